"""Toy policies whose decoded mixtures are known exactly: optimal for their rewards, undertrained, or trained to other β."""

from collections.abc import Sequence

import torch
from optima import ALL_PROMPTS, population
from toy import LENGTH, VOCAB_SIZE, TabularPolicy

from mpo_hf.estimation import DecodedTable, LogNormalizer


# How far each policy is on the way from the reference to the optimum of its reward, in log-probabilities.
KINDS = {"optimal": (1.0, 1.0, 1.0), "undertrained": (0.3, 0.6, 0.45), "other_beta": (2.5, 1.0, 0.5)}


class DecodedWorld:
    """
    Three policies over all 36 prompts of two tokens, with completions of three tokens, and everything about their mixtures by
    sums over all completions.
    """

    def __init__(self, seed: int, beta: float, kind: str):
        enumeration, self.rewards = population(seed, beta)
        self.beta, self.reference, self.completions = beta, enumeration.reference, enumeration.completions
        ratios = enumeration.policies - self.reference.unsqueeze(-1)
        scaled = self.reference.unsqueeze(-1) + torch.tensor(KINDS[kind]) * ratios
        self.policies = scaled.log_softmax(1)
        self.models = [TabularPolicy(logps, ALL_PROMPTS) for logps in self.policies.unbind(-1)]
        self.reference_model = TabularPolicy(self.reference, ALL_PROMPTS)
        # the paper's normalization
        optimum = torch.logsumexp(self.reference.unsqueeze(-1) + self.rewards / beta, dim=1, keepdim=True)
        self.gains = self.rewards / beta - optimum

    def _pooled(self, weights: torch.Tensor, temperature: float) -> list[torch.Tensor]:
        """Pooled log-probabilities of every next token, one tensor a position."""
        models = [*self.models, self.reference_model][: len(weights)]
        by_position = zip(*([table.log_softmax(-1) for table in model.tables] for model in models))
        return [sum(w / temperature * t for w, t in zip(weights, tables)) for tables in by_position]

    def logps(self, weights: Sequence[float] | torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """Log-probabilities of all completions of the decoded mixture, shape `(P, Y)`."""
        total: torch.Tensor | float = 0.0
        for pooled in self._pooled(torch.as_tensor(weights, dtype=torch.float64), temperature)[:LENGTH]:
            total = (total if isinstance(total, float) else total.unsqueeze(-1)) + pooled.log_softmax(-1)
        return total.reshape(len(self.reference), -1)

    def normalizer(self, weights: torch.Tensor) -> torch.Tensor:
        """The sum of log Z over the tokens of all completions, shape `(P, Y)`."""
        return self.policies @ weights - self.logps(weights)

    def reached_by(self, logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Expected gains, in nats, and the divergence of any policy."""
        gains = torch.einsum("py,pyk->k", logps.exp(), self.gains) / len(logps)
        return gains, (logps.exp() * (logps - self.reference)).sum(-1).mean()

    def reached(self, weights, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of a decoded mixture."""
        return self.reached_by(self.logps(weights, temperature))

    def welfare(self, weights, temperature: float = 1.0) -> float:
        """The smallest gain less the divergence, times β."""
        gains, divergence = self.reached(weights, temperature)
        return self.beta * (gains.min() - divergence).item()

    def best_on_grid(self, steps: int) -> float:
        """The largest welfare on a grid of the simplex."""
        grid = [(i / steps, j / steps, 1 - (i + j) / steps) for i in range(steps + 1) for j in range(steps + 1 - i)]
        return max(self.welfare(point) for point in grid)

    def table(
        self,
        proposals,
        count: int,
        seed: int,
        temperature: float = 1.0,
        prompts: str = "all",
        with_reference: bool = False,
    ) -> DecodedTable:
        """
        A table of `count` completions of every prompt from each proposal, with normalizers by sums over the vocabulary.
        `drawn` is the index of its rows in tensors of shape (P, Y), and `drawn_rows` in their first dimensions flattened.
        """
        proposals = [proposals] if isinstance(proposals, torch.Tensor) else proposals
        generator = torch.Generator().manual_seed(seed)
        size = len(self.reference)
        chosen = torch.arange(size) if prompts == "all" else torch.randint(size, (size,), generator=generator)
        rows, place, own, packed, index = [], [], [], [], []
        for s, weights in enumerate(proposals):
            weights = torch.cat([weights, weights.new_zeros(1)]) if with_reference else weights
            logps = self.logps(weights, temperature)
            drawn = torch.multinomial(logps[chosen].exp(), count, replacement=True, generator=generator)
            of_prompt = chosen.repeat_interleave(count)
            rows.append((of_prompt, drawn.flatten()))
            place.append(torch.arange(size).repeat_interleave(count))
            own.append(logps[rows[-1]])
            packed.append(self._packed(weights, temperature)[rows[-1]])
            index.append(torch.full((len(of_prompt),), s))
        self.drawn = tuple(map(torch.cat, zip(*rows)))
        self.drawn_rows = self.drawn[0] * self.reference.shape[1] + self.drawn[1]
        policies = self.policies[self.drawn]
        if with_reference:
            policies = torch.cat([policies, self.reference[self.drawn].unsqueeze(-1)], dim=-1)
        return DecodedTable(
            prompt=torch.cat(place),
            proposal=torch.cat(index),
            gains=self.gains[self.drawn],
            policy_logps=policies.clone(),
            reference_logps=self.reference[self.drawn],
            proposal_logps=torch.cat(own),
            normalizer=LogNormalizer.unpack(torch.cat(packed), policies.shape[-1]),
            temperature=temperature,
        )

    def _packed(self, weights: torch.Tensor, temperature: float) -> torch.Tensor:
        """Normalizers of all completions, shape (P, Y, E), by sums over the vocabulary."""
        models = [*self.models, self.reference_model][: len(weights)]
        upper = torch.triu_indices(len(weights), len(weights))
        total: torch.Tensor | float = 0.0
        for t, pooled in enumerate(self._pooled(weights, temperature)[:LENGTH]):
            logps = torch.stack([model.tables[t].log_softmax(-1) for model in models], dim=-1)
            probabilities = pooled.softmax(-1).unsqueeze(-1)
            mean = (probabilities * logps).sum(-2)
            centered = logps - mean.unsqueeze(-2)
            covariance = torch.einsum("...v,...vk,...vl->...kl", probabilities.squeeze(-1), centered, centered)
            terms = torch.cat([pooled.logsumexp(-1, keepdim=True), mean, covariance[..., upper[0], upper[1]]], dim=-1)
            repeated = terms.unsqueeze(-2).expand(*terms.shape[:-1], VOCAB_SIZE, terms.shape[-1])
            total = (total if isinstance(total, float) else total.unsqueeze(-2)) + repeated
        values = total.reshape(*self.reference.shape, -1)
        anchor = (weights / temperature).expand(*self.reference.shape, -1)
        return torch.cat([anchor, values], dim=-1)

    def sampling_error(self, rewards: torch.Tensor) -> torch.Tensor:
        """The standard error of mean rewards of as many completions, were all of these drawn from one policy."""
        return rewards.std(0) / len(rewards) ** 0.5 * 2
