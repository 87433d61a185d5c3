r"""
Tables of completions, from which the objectives of MPO are estimated by multiple importance sampling.

A row j of a table is one completion of a prompt x. Every form of the dual objective is

$$ \hat F(\lambda) = \frac1P \sum_x \log \sum_{j \in x} \exp\Big(b_j + \sum_k \lambda_k a_{jk}\Big) $$

where \\(a_{jk} = P(r_k)(x, y_j)/\beta\\) and \\(b_j\\) is the logarithm of a self-normalized importance weight
\\(\pi_{ref}(y_j)/q(y_j)\\), or, with implicit rewards, \\(a_{jk} = \log \pi_k(y_j)\\) and
\\(b_j = -\log q(y_j) - \log m_x\\). [`DualTable`] holds these numbers. [`MixtureTable`] holds those that the expected
rewards of mixtures of the given policies depend on.
"""

from dataclasses import dataclass

import torch


@dataclass
class DualTable:
    r"""
    The dual objective of a table of N completions of P prompts.

    Args:
        prompt (`torch.LongTensor` of shape `(N,)`): index of the prompt of every row, 0 to P - 1.
        offsets (`torch.Tensor` of shape `(N,)`): \\(b_j\\), float64.
        advantages (`torch.Tensor` of shape `(N, K)`): \\(a_{jk}\\), float64.

    Raises:
        `ValueError`: the table is empty, or has a NaN or a positive infinity.
    """

    prompt: torch.Tensor
    offsets: torch.Tensor
    advantages: torch.Tensor

    def __post_init__(self):
        if len(self.prompt) == 0:
            raise ValueError("A table needs at least one completion, got none.")
        for name in ("offsets", "advantages"):
            if torch.isnan(getattr(self, name)).any() or (getattr(self, name) == torch.inf).any():
                raise ValueError(
                    f"`{name}` contains NaN or infinity. Check the log-probabilities and rewards for values that "
                    "are not finite."
                )

    @property
    def num_prompts(self) -> int:
        return int(self.prompt.max()) + 1

    @property
    def num_objectives(self) -> int:
        return self.advantages.shape[-1]

    def by_prompt(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The terms of F̂ of every prompt, and the shares of the completions in them.

        Args:
            weights (`torch.Tensor` of shape `(B, K)`): B vectors of mixture weights.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the terms, shape `(P, B)`, and the shares, shape `(N, B)`, which sum
                to 1 over each prompt.
        """
        exponents = self.offsets.unsqueeze(-1) + self.advantages @ weights.T
        values = segment_logsumexp(exponents, self.prompt, self.num_prompts)
        return values, (exponents - values[self.prompt]).exp_()

    def part(self, rows: torch.Tensor, prompt: torch.Tensor) -> "DualTable":
        """
        A table of some of the prompts.

        Args:
            rows (`torch.LongTensor` of shape `(n,)`): all rows of these prompts.
            prompt (`torch.LongTensor` of shape `(n,)`): the new index of the prompt of each of these rows, from 0 on.
        """
        return DualTable(prompt, self.offsets[rows], self.advantages[rows])

    def effective_sample_fractions(self, weights: torch.Tensor) -> torch.Tensor:
        """Effective sample size of every prompt, as a fraction of its completions, shape `(P,)`."""
        _, shares = self.by_prompt(weights.unsqueeze(0))
        return effective_sample_fractions(self.prompt, shares[:, 0])


@dataclass
class MixtureTable:
    r"""
    N completions of P prompts, with the numbers that their importance weights under any mixture depend on.

    Args:
        prompt (`torch.LongTensor` of shape `(N,)`): index of the prompt of every row, 0 to P - 1.
        gains (`torch.Tensor` of shape `(N, K)`): \\((r_k(x, y_j) - d_k)/\beta\\).
        policy_log_ratios (`torch.Tensor` of shape `(N, M)`): \\(\log \pi_i(y_j) - \log q(y_j)\\) for every component.
        reference_log_ratios (`torch.Tensor` of shape `(N,)`): \\(\log \pi_{ref}(y_j) - \log q(y_j)\\).
        rows (`torch.LongTensor` of shape `(N,)`, *optional*):
            Indices of these rows in the table of the dual objective, where that table has further prompts whose
            completions are not scored under the policies. Defaults to all of its rows.
    """

    prompt: torch.Tensor
    gains: torch.Tensor
    policy_log_ratios: torch.Tensor
    reference_log_ratios: torch.Tensor
    rows: torch.Tensor | None = None

    def shares(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        The normalized importance weights of the completions under a mixture, and its divergence from the reference.

        Args:
            weights (`torch.Tensor` of shape `(M,)`): mixture weights of the components.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the shares of the completions, shape `(N,)`, which sum to 1 over each
                prompt, and \\(\mathrm{KL}(\pi_\lambda \| \pi_{ref})\\) by prompt, shape `(P,)`.
        """
        counts = torch.bincount(self.prompt)
        ratios = (self.policy_log_ratios @ weights).unsqueeze(-1)
        log_sums = segment_logsumexp(ratios, self.prompt, len(counts))
        shares = (ratios - log_sums[self.prompt]).exp()
        divergence = sums_by_prompt(
            self.prompt, shares * (ratios - self.reference_log_ratios.unsqueeze(-1)), len(counts)
        )
        log_normalizers = log_sums - counts.to(ratios).log().unsqueeze(-1)
        return shares.squeeze(-1), (divergence - log_normalizers).squeeze(-1)

    def measure(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Expected gains of a mixture by prompt, shape `(P, K)`, and its divergence from the reference, `(P,)`."""
        shares, divergence = self.shares(weights)
        return sums_by_prompt(self.prompt, shares.unsqueeze(-1) * self.gains, len(divergence)), divergence

    def effective_sample_fraction(self, weights: torch.Tensor) -> torch.Tensor:
        """Effective sample size for a mixture as a fraction of a prompt's completions, the mean over the prompts."""
        shares, _ = self.shares(weights)
        return effective_sample_fractions(self.prompt, shares).mean()


# ---- making tables ----


def reward_table(
    prompt: torch.Tensor,
    advantages: torch.Tensor,
    reference_logps: torch.Tensor,
    proposal_logps: torch.Tensor,
    normalize: bool = True,
) -> DualTable:
    r"""
    The table of the dual objective with rewards, \\(E_x \log E_{y \sim \pi_{ref}} \exp(\sum_k \lambda_k a_k)\\).

    Args:
        prompt (`torch.LongTensor` of shape `(N,)`): index of the prompt of every row.
        advantages (`torch.Tensor` of shape `(N, K)`): \\(r_k(x, y_j)/\beta\\).
        reference_logps (`torch.Tensor` of shape `(N,)`): \\(\log \pi_{ref}(y_j)\\).
        proposal_logps (`torch.Tensor` of shape `(N,)`): \\(\log q(y_j)\\); see [`balance_heuristic`].
        normalize (`bool`, *optional*, defaults to `True`):
            Whether to apply the paper's P: an advantage is then relative to what the optimal policy of its objective
            attains.
    """
    offsets = log_shares(prompt, reference_logps - proposal_logps)
    if normalize:
        advantages = normalize_by_prompt(advantages, offsets, prompt, int(prompt.max()) + 1)
    return DualTable(prompt, offsets, advantages)


def implicit_table(prompt: torch.Tensor, policy_logps: torch.Tensor, proposal_logps: torch.Tensor) -> DualTable:
    r"""
    The table of the dual objective with implicit rewards,
    \\(E_x \log E_{y \sim q} \prod_k \pi_k(y)^{\lambda_k}/q(y)\\).

    Args:
        prompt (`torch.LongTensor` of shape `(N,)`): index of the prompt of every row.
        policy_logps (`torch.Tensor` of shape `(N, K)`): \\(\log \pi_k(y_j)\\).
        proposal_logps (`torch.Tensor` of shape `(N,)`): \\(\log q(y_j)\\); see [`balance_heuristic`].
    """
    counts = torch.bincount(prompt).to(proposal_logps)
    return DualTable(prompt, -proposal_logps - counts.log()[prompt], policy_logps)


def balance_heuristic(prompt: torch.Tensor, proposal: torch.Tensor, proposal_logps: torch.Tensor) -> torch.Tensor:
    r"""
    The density of the mixture of proposals that the completions of each prompt were drawn from,
    \\(q(y) = \sum_s \frac{m_{xs}}{m_x} q_s(y)\\), with \\(m_{xs}\\) of the \\(m_x\\) completions of prompt x drawn
    from \\(q_s\\) (the balance heuristic of multiple importance sampling; Veach and Guibas, 1995).

    Args:
        prompt (`torch.LongTensor` of shape `(N,)`): index of the prompt of every row.
        proposal (`torch.LongTensor` of shape `(N,)`): index of the proposal, of S, that drew every row.
        proposal_logps (`torch.Tensor` of shape `(N, S)`):
            \\(\log q_s(y_j)\\) under every proposal; not used for proposals that drew nothing for the prompt.

    Returns:
        `torch.Tensor`: \\(\log q(y_j)\\), shape `(N,)`.
    """
    counts = proposal_logps.new_zeros(int(prompt.max()) + 1, proposal_logps.shape[-1])
    counts.index_put_((prompt, proposal), proposal_logps.new_ones(()), accumulate=True)
    shares = (counts / counts.sum(-1, keepdim=True))[prompt]
    return torch.where(shares > 0, shares.log() + proposal_logps, -torch.inf).logsumexp(-1)


def normalize_by_prompt(
    rewards: torch.Tensor, log_weights: torch.Tensor, prompt: torch.Tensor, num_prompts: int, beta: float = 1.0
) -> torch.Tensor:
    r"""
    The normalization P of [Mixing Preference Optimization](https://huggingface.co/papers/2502.18699), by prompt:

    $$ P(r)_{jk} = r_{jk} - \beta \log \sum_{i \in x} \rho_i \exp(r_{ik} / \beta) $$

    Args:
        rewards (`torch.Tensor` of shape `(N, K)`): \\(r_{jk}\\).
        log_weights (`torch.Tensor` of shape `(N,)`): \\(\log \rho_j\\), importance weights of the reference with sum 1
            over each prompt; see [`log_shares`].
        prompt (`torch.LongTensor` of shape `(N,)`): index of the prompt of every row.
        num_prompts (`int`): number of prompts; each has at least one row.
        beta (`float`, *optional*, defaults to 1.0): KL coefficient β; 1 for rewards that are divided by it already.

    Returns:
        `torch.Tensor` of shape `(N, K)`.
    """
    values = segment_logsumexp(log_weights.unsqueeze(-1) + rewards / beta, prompt, num_prompts)
    return rewards - beta * values[prompt]


# ---- sums by prompt ----


def sums_by_prompt(prompt: torch.Tensor, values: torch.Tensor, num_prompts: int) -> torch.Tensor:
    """Sums of values of shape `(N, B)` over the rows of each prompt, shape `(num_prompts, B)`."""
    return values.new_zeros(num_prompts, values.shape[-1]).index_add_(0, prompt, values)


def log_shares(prompt: torch.Tensor, log_ratios: torch.Tensor) -> torch.Tensor:
    """
    Log importance weights of shape `(N,)` with sum 1 over each prompt, from log-ratios that are known up to a constant
    of each prompt.
    """
    sums = segment_logsumexp(log_ratios.unsqueeze(-1), prompt, int(prompt.max()) + 1)
    return log_ratios - sums.squeeze(-1)[prompt]


def effective_sample_fractions(prompt: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """
    Effective sample size of every prompt, as a fraction of its completions, shape `(P,)`.

    Args:
        prompt (`torch.LongTensor` of shape `(N,)`): index of the prompt of every row.
        shares (`torch.Tensor` of shape `(N,)`): importance weights with sum 1 over each prompt.
    """
    counts = torch.bincount(prompt)
    return 1 / (sums_by_prompt(prompt, shares.unsqueeze(-1) ** 2, len(counts)).squeeze(-1) * counts)


def segment_logsumexp(values: torch.Tensor, segment: torch.Tensor, num_segments: int) -> torch.Tensor:
    """
    Log-sum-exp over the rows of each segment.

    Args:
        values (`torch.Tensor` of shape `(N, B)`): the exponents.
        segment (`torch.LongTensor` of shape `(N,)`): index of the segment of every row.
        num_segments (`int`): number of segments; each has at least one row.

    Returns:
        `torch.Tensor` of shape `(num_segments, B)`.
    """
    index = segment.unsqueeze(-1).expand_as(values)
    largest = values.new_full((num_segments, values.shape[-1]), -torch.inf).scatter_reduce(0, index, values, "amax")
    largest = largest.clamp(min=torch.finfo(values.dtype).min)  # -inf less -inf would be NaN
    return sums_by_prompt(segment, (values - largest[segment]).exp_(), num_segments).log() + largest
