r"""
Mixtures as they are decoded, token by token, estimated from completions of other mixtures.

At temperature T and with weights λ, decoding draws a completion with the log-probability

$$ \log \pi_\lambda(y) = \sum_k \mu_k \log \pi_k(y) - A(\mu), \qquad
   A(\mu) = \sum_t \log \sum_v \prod_k \pi_k(v | y_{<t})^{\mu_k}, \qquad \mu = \lambda / T $$

A is convex in μ. At the weights that a completion was decoded with, its gradient and its Hessian are sums over the tokens
of the mean and the covariance of the components' log-probabilities of the next token, which decoding computes on the way.
[`LogNormalizer`] holds them, so that the log-probability of a completion is known to second order around these weights
without another pass of the policies; [`DecodedTable`] estimates from it what other weights would reach.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .tables import known_densities, sums_by_prompt


# Control variates need no exact weights, and a weight beyond this would leave nothing of the other completions.
MAX_LOG_RATIO = 20.0
# Weights of the rows of a prompt that sum to less than this part of it are none.
SMALLEST = 1e-9


def num_terms(num_components: int) -> int:
    """Numbers of a packed [`LogNormalizer`] a completion: anchor, value, mean and the upper triangle of the covariance."""
    return 1 + 2 * num_components + num_components * (num_components + 1) // 2


@dataclass
class LogNormalizer:
    r"""
    \\(A(\mu)\\) of N completions, to second order around the weights of each.

    Args:
        anchor (`torch.Tensor` of shape `(N, M)`): weights divided by the temperature, around which A is expanded.
        value (`torch.Tensor` of shape `(N,)`): A there.
        mean (`torch.Tensor` of shape `(N, M)`): its gradient.
        covariance (`torch.Tensor` of shape `(N, M * (M + 1) / 2)`): the upper triangle of its Hessian.
    """

    anchor: torch.Tensor
    value: torch.Tensor
    mean: torch.Tensor
    covariance: torch.Tensor

    @classmethod
    def unpack(cls, packed: torch.Tensor, num_components: int) -> "LogNormalizer":
        """From rows of `num_terms(num_components)` numbers, as [`~LogNormalizer.pack`] returns."""
        if packed.shape[-1] != num_terms(num_components):
            raise ValueError(
                f"Normalizers of {num_components} components have {num_terms(num_components)} numbers a completion, got "
                f"{packed.shape[-1]}."
            )
        sizes = [num_components, 1, num_components, packed.shape[-1] - 2 * num_components - 1]
        anchor, value, mean, covariance = packed.split(sizes, dim=-1)
        return cls(anchor, value.squeeze(-1), mean, covariance)

    def pack(self) -> torch.Tensor:
        """All numbers as rows of one tensor."""
        return torch.cat([self.anchor, self.value.unsqueeze(-1), self.mean, self.covariance], dim=-1)

    def __call__(self, point: torch.Tensor) -> torch.Tensor:
        """A at a point μ of shape `(M,)`, shape `(N,)`."""
        step = point - self.anchor
        upper = torch.triu_indices(len(point), len(point))
        twice = torch.where(upper[0] == upper[1], 1.0, 2.0).to(point)
        curvature = (self.covariance * (twice * step[:, upper[0]] * step[:, upper[1]])).sum(-1)
        return self.value + (self.mean * step).sum(-1) + curvature / 2

    def part(self, rows: torch.Tensor) -> "LogNormalizer":
        """That of some completions."""
        return LogNormalizer(self.anchor[rows], self.value[rows], self.mean[rows], self.covariance[rows])


@dataclass
class DecodedTable:
    r"""
    N completions of P prompts, with the numbers that the law of any mixture, decoded token by token, depends on.

    Completions of one proposal \\(q_s\\) estimate expectations under a mixture by importance weights
    \\(w_j = \pi_\lambda(y_j)/q_s(y_j)\\). Both densities are normalized, so that the weights have mean 1 and need not be
    normalized by prompt, which would be biased by 1/m. Expectations are means over the prompts of

    $$ b_x + \hat w_j (r_j - b_{xj}) $$

    with \\(\hat w\\) divided by its mean over the completions of the proposal. \\(b_x\\) estimates the expectation under one
    mixture, the `base`, from all completions of the prompt, and \\(b_{xj}\\) from all but the j-th: a control variate that
    takes out what differs between prompts, also for proposals that were used on a few of them. The estimates of several
    proposals are combined in proportion to their effective sample sizes.

    Args:
        prompt (`torch.LongTensor` of shape `(N,)`): index of the prompt of every row, 0 to P - 1.
        proposal (`torch.LongTensor` of shape `(N,)`): index of the proposal that drew every row, of S.
        gains (`torch.Tensor` of shape `(N, K)`): \\((r_k(x, y_j) - d_k)/\beta\\), float64.
        policy_logps (`torch.Tensor` of shape `(N, M)`): \\(\log \pi_k(y_j)\\) of every component.
        reference_logps (`torch.Tensor` of shape `(N,)`): \\(\log \pi_{ref}(y_j)\\).
        proposal_logps (`torch.Tensor` of shape `(N,)`): \\(\log q(y_j)\\) under the proposal that drew it.
        normalizer ([`LogNormalizer`]): A of every row; NaN in rows that say nothing of mixtures.
        temperature (`float`, *optional*, defaults to 1.0): the temperature that mixtures are decoded at.
        from_reference (`torch.BoolTensor` of shape `(N,)`, *optional*):
            Which rows the reference drew, at this temperature. Defaults to none.
        base (`torch.Tensor` of shape `(M,)`, *optional*):
            Weights of the mixture that the control variates speak of. Defaults to whatever drew the completions.
    """

    prompt: torch.Tensor
    proposal: torch.Tensor
    gains: torch.Tensor
    policy_logps: torch.Tensor
    reference_logps: torch.Tensor
    proposal_logps: torch.Tensor
    normalizer: LogNormalizer
    temperature: float = 1.0
    from_reference: torch.Tensor | None = None
    base: torch.Tensor | None = None
    num_prompts: int = field(init=False)
    _is_known: torch.Tensor = field(init=False, repr=False)
    _shares: torch.Tensor = field(init=False, repr=False)
    _of_base: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self):
        packed = self.normalizer.pack()
        self._is_known = ~(packed.isnan().any(-1) | self.policy_logps.isnan().any(-1))
        self.normalizer = LogNormalizer.unpack(packed.nan_to_num(), self.policy_logps.shape[-1])
        self.num_prompts = int(self.prompt.max()) + 1
        # every prompt that a proposal has visited counts the same for it, however many completions it drew there
        cells, cell = (self.prompt * (int(self.proposal.max()) + 1) + self.proposal).unique(return_inverse=True)
        visited = torch.bincount(cells % (int(self.proposal.max()) + 1)).clamp(min=1)
        self._shares = 1 / (torch.bincount(cell)[cell] * visited[self.proposal]).to(self.gains)
        self._of_base = torch.ones_like(self.proposal_logps)
        if self.base is not None:
            self._of_base = self.log_ratios(self.base).clamp(max=MAX_LOG_RATIO).exp()

    # ---- densities ----

    def logps(self, weights: torch.Tensor) -> torch.Tensor:
        r"""\\(\log \pi_\lambda(y_j)\\) of the mixture with weights of shape `(M,)`, to second order, shape `(N,)`."""
        single = _single_component(weights)
        if single is not None and self.temperature == 1:
            return self.policy_logps[:, single].nan_to_num(-torch.inf)
        point = weights / self.temperature
        finite = self.policy_logps.isfinite() | ~self._is_known.unsqueeze(-1)
        pooled = (torch.where(finite, self.policy_logps.nan_to_num(), 0) * point).sum(-1)
        # a component without weight does not count, also where it rules a completion out
        ruled_out = (~finite & (point != 0)).any(-1) | ~self._is_known
        return torch.where(ruled_out, -torch.inf, pooled - self.normalizer(point))

    def log_ratios(self, weights: torch.Tensor) -> torch.Tensor:
        r"""\\(\log \pi_\lambda(y_j)/q(y_j)\\), shape `(N,)`."""
        return self.logps(weights) - self.proposal_logps

    def log_densities(self, proposals: Sequence[tuple[float, ...] | None]) -> torch.Tensor:
        r"""
        The log-density of every row under all proposals of its prompt together, as far as these are known; see
        [`~mpo_hf.estimation.tables.known_densities`].

        Args:
            proposals (`Sequence[tuple[float, ...]]`):
                The mixture weights of each of the S proposals that `proposal` refers to; `()` for the reference, and `None`
                where that is not known.
        """
        count = self.policy_logps.shape[-1]
        unknown = torch.full_like(self.proposal_logps, torch.nan)
        by_proposal = []
        for s, weights in enumerate(proposals):
            logps = unknown
            if weights is not None and len(weights) == count:
                found = self.logps(torch.tensor(weights, dtype=torch.float64))
                logps = torch.where(self._is_known | (found > -torch.inf), found, torch.nan)
            elif weights == () and self.temperature == 1:
                logps = self.reference_logps
            by_proposal.append(torch.where(self.proposal == s, self.proposal_logps, logps))
        return known_densities(self.prompt, self.proposal, torch.stack(by_proposal, dim=-1), self.proposal_logps)

    def reference_log_ratios(self) -> torch.Tensor:
        r"""
        \\(\log \pi_{ref}(y_j)/q(y_j)\\) for the reference as it is decoded, shape `(N,)`: known of all rows at temperature 1,
        and of the reference's own completions at others.
        """
        own = self.from_reference if self.from_reference is not None else torch.zeros_like(self._is_known)
        elsewhere = self.reference_logps - self.proposal_logps if self.temperature == 1 else -torch.inf
        return torch.where(own, 0, torch.as_tensor(elsewhere).to(self.proposal_logps))

    # ---- expectations ----

    def measure(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Expected gains of a decoded mixture and its divergence from the reference, in nats a completion.

        Args:
            weights (`torch.Tensor` of shape `(M,)`): mixture weights of the components.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: contributions of the prompts, of shape `(P, K)` and `(P,)`, whose means
                are the estimates. Differentiable in the weights.
        """
        log_ratios = self.log_ratios(weights)
        divergence = log_ratios + self.proposal_logps - self.reference_logps
        values = self.contributions(log_ratios, torch.cat([self.gains, divergence.unsqueeze(-1)], dim=-1))
        return values[:, :-1], values[:, -1]

    def contributions(self, log_ratios: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        r"""
        The influence of every prompt on the expectations of some columns.

        Args:
            log_ratios (`torch.Tensor` of shape `(N,)`): \\(\log w_j\\) of the target.
            columns (`torch.Tensor` of shape `(N, C)`): what to take the expectation of.

        Returns:
            `torch.Tensor` of shape `(P, C)`: the means over the prompts are the estimates, and the standard deviations
                over the prompts, divided by the root of their number, are their standard errors.
        """
        possible = log_ratios > -torch.inf
        columns = torch.where(possible.unsqueeze(-1), columns, 0)
        baseline, of_others = self._baselines(columns, possible)
        weights, sizes = self._weights(log_ratios)
        trust, shares = (sizes / sizes.sum()).unsqueeze(-1), self._shares.unsqueeze(-1)
        corrections = weights.unsqueeze(-1) * (columns - of_others)
        means = sums_by_prompt(self.proposal, shares * corrections, len(sizes))
        estimate = baseline.mean(0) + (trust * means).sum(0)
        # the mean weight is estimated, too, which gives each row the influence of its weight on the mean correction
        influence = corrections - weights.unsqueeze(-1) * means[self.proposal]
        deviations = sums_by_prompt(self.prompt, trust[self.proposal] * shares * influence, self.num_prompts)
        return estimate + (baseline - baseline.mean(0)) + self.num_prompts * deviations

    def _baselines(self, columns: torch.Tensor, possible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Means of the columns of every prompt under the base, shape `(P, C)`, and of the other rows of each row's prompt,
        `(N, C)`. Where there are no such rows, they are the means of all prompts.
        """
        of_base = torch.where(possible, self._of_base, 0).unsqueeze(-1)
        sums = sums_by_prompt(self.prompt, of_base * columns, self.num_prompts)
        totals = sums_by_prompt(self.prompt, of_base, self.num_prompts)
        overall = sums.sum(0) / totals.sum().clamp(min=SMALLEST)
        by_prompt = torch.where(totals > SMALLEST, sums / totals.clamp(min=SMALLEST), overall)
        rest = totals[self.prompt] - of_base
        others = (sums[self.prompt] - of_base * columns) / rest.clamp(min=SMALLEST)
        return by_prompt, torch.where(rest > SMALLEST * totals[self.prompt].clamp(min=1), others, overall)

    def _weights(self, log_ratios: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Importance weights with mean 1 over each proposal, and the effective sample size of each: `(N,)`, `(S,)`."""
        count = int(self.proposal.max()) + 1
        largest = log_ratios.detach().new_full((count,), -torch.inf)
        largest = largest.scatter_reduce(0, self.proposal, log_ratios.detach(), "amax")
        largest = largest.clamp(min=torch.finfo(log_ratios.dtype).min)  # -inf less -inf would be NaN
        raw = (log_ratios - largest[self.proposal]).exp()
        sums = sums_by_prompt(
            self.proposal, torch.stack([self._shares * raw, (self._shares * raw) ** 2], dim=-1), count
        )
        first, second = sums.unbind(-1)
        tiny = torch.finfo(log_ratios.dtype).tiny
        return raw / first.clamp(min=tiny)[self.proposal], first**2 / second.clamp(min=tiny)

    # ---- how much the completions say ----

    def effective_sample_size(self, log_ratios: torch.Tensor) -> float:
        """Effective sample size over all completions, with log-ratios of shape `(N,)` of a target."""
        return self._weights(log_ratios)[1].sum().item()

    def effective_sample_fraction(self, weights: torch.Tensor) -> torch.Tensor:
        """Effective sample size at some weights as a fraction of the completions that say something of mixtures."""
        return self._weights(self.log_ratios(weights))[1].sum() / self._is_known.sum()

    def efficiency(self, weights: torch.Tensor, proposal: torch.Tensor) -> torch.Tensor:
        r"""
        The effective sample size, as a fraction, that completions of one mixture have for another one,
        \\(1/E_{\pi_\lambda}[\pi_\lambda/\pi_{\lambda'}]\\).

        Args:
            weights (`torch.Tensor` of shape `(M,)`): λ.
            proposal (`torch.Tensor` of shape `(M,)`): λ', the weights that the completions are drawn with.

        Returns:
            `torch.Tensor`: a scalar between 0 and 1, differentiable in `weights`.
        """
        target, drawn = self.log_ratios(weights), self.log_ratios(proposal)
        importance, sizes = self._weights(drawn)
        share = self._shares * importance * (sizes / sizes.sum())[self.proposal]
        known = drawn > -torch.inf
        ratio = torch.where(known, target - torch.where(known, drawn, 0), -torch.inf)
        ratio = (ratio - ratio.detach().max()).exp()
        return (share * ratio).sum() ** 2 / (share * ratio**2).sum()


def _single_component(weights: torch.Tensor) -> int | None:
    """The component that has all the weight, if there is one."""
    largest = int(weights.argmax())
    alone = weights[largest] == 1 and bool((weights != 0).sum() == 1)
    return largest if alone and not weights.requires_grad else None
