r"""
Mixture weights from a table of completions: multiple importance sampling, the exact minimum on the table, and how far
from the true one it is.

Every objective of MPO comes down to one form. With rows j of a table, each a completion of a prompt x,

$$ \hat F(\lambda) = \frac1P \sum_x \log \sum_{j \in x} \exp\Big(b_j + \sum_k \lambda_k a_{jk}\Big) $$

where \\(a_{jk} = P(r_k)(x, y_j)/\beta\\) and \\(b_j\\) is the logarithm of a self-normalised importance weight
\\(\pi_{ref}(y_j)/q(y_j)\\), or, with implicit rewards, \\(a_{jk} = \log \pi_k(y_j)\\) and \\(b_j = -\log q(y_j) - \log m_x\\).
It is convex, so that its minimum over the simplex is found to any precision without another sample.
"""

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .welfare import MaxMin, Polyhedral, Welfare


if TYPE_CHECKING:
    from .primal import MixtureTable


# numbers of one batch of bootstrap replicates; what is held at a time is about this many float64
_CHUNK = 4_000_000


@dataclass
class DualTable:
    r"""
    The dual objective of a table of N completions of P prompts.

    Args:
        prompt (`torch.LongTensor` of shape `(N,)`): which prompt, 0 to P - 1, every row belongs to.
        offsets (`torch.Tensor` of shape `(N,)`): \\(b_j\\), float64.
        advantages (`torch.Tensor` of shape `(N, K)`): \\(a_{jk}\\), float64.
    """

    prompt: torch.Tensor
    offsets: torch.Tensor
    advantages: torch.Tensor

    def __post_init__(self):
        if len(self.prompt) == 0:
            raise ValueError("A table without completions says nothing about the weights.")
        for name in ("offsets", "advantages"):
            if torch.isnan(getattr(self, name)).any() or (getattr(self, name) == torch.inf).any():
                raise ValueError(
                    f"`{name}` must be numbers: look for log-probabilities or rewards that are not finite."
                )

    @property
    def num_prompts(self) -> int:
        return int(self.prompt.max()) + 1

    @property
    def num_objectives(self) -> int:
        return self.advantages.shape[-1]

    def by_prompt(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            weights (`torch.Tensor`): B vectors of mixture weights, shape `(B, K)`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the terms of F̂ of every prompt, shape `(P, B)`, and the shares that the
            completions have in them, shape `(N, B)`: they sum to 1 over each prompt.
        """
        exponents = self.offsets.unsqueeze(-1) + self.advantages @ weights.T
        values = segment_logsumexp(exponents, self.prompt, self.num_prompts)
        return values, (exponents - values[self.prompt]).exp_()

    def part(self, rows: torch.Tensor, prompt: torch.Tensor) -> "DualTable":
        """The table of some rows, all those of their prompts, which are numbered anew, from 0 on."""
        return DualTable(prompt, self.offsets[rows], self.advantages[rows])

    def effective_sample_sizes(self, weights: torch.Tensor) -> torch.Tensor:
        """Effective sample size of every prompt, as a fraction of its completions, shape `(P,)`."""
        _, shares = self.by_prompt(weights.unsqueeze(0))
        return effective_fractions(self.prompt, shares[:, 0])


def sums_by_prompt(prompt: torch.Tensor, values: torch.Tensor, num_prompts: int) -> torch.Tensor:
    """Sums of values of shape `(N, B)` over the rows of each prompt, shape `(num_prompts, B)`."""
    return values.new_zeros(num_prompts, values.shape[-1]).index_add_(0, prompt, values)


def effective_fractions(prompt: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """
    Effective sample size of every prompt, as a fraction of its completions, shape `(P,)`, where these have shares of shape
    `(N,)`, with sum 1 over each prompt.
    """
    counts = torch.bincount(prompt)
    return 1 / (sums_by_prompt(prompt, shares.unsqueeze(-1) ** 2, len(counts)).squeeze(-1) * counts)


def log_shares(prompt: torch.Tensor, log_ratios: torch.Tensor) -> torch.Tensor:
    """Log importance weights of shape `(N,)`, from those up to a constant by prompt, with sum 1 over each prompt."""
    sums = segment_logsumexp(log_ratios.unsqueeze(-1), prompt, int(prompt.max()) + 1)
    return log_ratios - sums.squeeze(-1)[prompt]


def segment_logsumexp(values: torch.Tensor, segment: torch.Tensor, num_segments: int) -> torch.Tensor:
    """
    Log-sum-exp over the rows of each segment.

    Args:
        values (`torch.Tensor`): shape `(N, B)`.
        segment (`torch.LongTensor`): the segment of every row, shape `(N,)`.
        num_segments (`int`): how many segments there are; each has at least one row.

    Returns:
        `torch.Tensor` of shape `(num_segments, B)`.
    """
    index = segment.unsqueeze(-1).expand_as(values)
    largest = values.new_full((num_segments, values.shape[-1]), -torch.inf).scatter_reduce(0, index, values, "amax")
    largest = largest.clamp(min=torch.finfo(values.dtype).min)
    return sums_by_prompt(segment, (values - largest[segment]).exp_(), num_segments).log() + largest


def balance_heuristic(prompt: torch.Tensor, proposal: torch.Tensor, proposal_logps: torch.Tensor) -> torch.Tensor:
    r"""
    The density that completions of several proposals were drawn from together, prompt by prompt:
    \\(q(y) = \sum_s \frac{m_{xs}}{m_x} q_s(y)\\), with \\(m_{xs}\\) of the \\(m_x\\) completions of prompt x drawn from
    \\(q_s\\) (the balance heuristic of multiple importance sampling; Veach and Guibas, 1995).

    Args:
        prompt (`torch.LongTensor` of shape `(N,)`): which prompt every row belongs to.
        proposal (`torch.LongTensor` of shape `(N,)`): which of S proposals drew every row.
        proposal_logps (`torch.Tensor` of shape `(N, S)`):
            \\(\log q_s(y_j)\\) under every proposal; those of proposals that drew nothing for that prompt are not used.

    Returns:
        `torch.Tensor`: \\(\log q(y_j)\\), shape `(N,)`.
    """
    counts = proposal_logps.new_zeros(int(prompt.max()) + 1, proposal_logps.shape[-1])
    counts.index_put_((prompt, proposal), proposal_logps.new_ones(()), accumulate=True)
    shares = (counts / counts.sum(-1, keepdim=True))[prompt]
    return torch.where(shares > 0, shares.log() + proposal_logps, -torch.inf).logsumexp(-1)


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
        prompt (`torch.LongTensor` of shape `(N,)`): which prompt every row belongs to.
        advantages (`torch.Tensor` of shape `(N, K)`): \\(r_k(x, y_j)/\beta\\).
        reference_logps (`torch.Tensor` of shape `(N,)`): \\(\log \pi_{ref}(y_j)\\).
        proposal_logps (`torch.Tensor` of shape `(N,)`): \\(\log q(y_j)\\); see [`balance_heuristic`].
        normalize (`bool`, *optional*, defaults to `True`):
            Whether to apply the paper's P: an advantage then counts relative to what a policy of its own could reach.
    """
    offsets = log_shares(prompt, reference_logps - proposal_logps)
    if normalize:
        num_prompts = int(prompt.max()) + 1
        advantages = advantages - segment_logsumexp(offsets.unsqueeze(-1) + advantages, prompt, num_prompts)[prompt]
    return DualTable(prompt, offsets, advantages)


def implicit_table(prompt: torch.Tensor, policy_logps: torch.Tensor, proposal_logps: torch.Tensor) -> DualTable:
    r"""
    The table of the dual objective with implicit rewards, \\(E_x \log E_{y \sim q} \prod_k \pi_k(y)^{\lambda_k}/q(y)\\).

    Args:
        prompt (`torch.LongTensor` of shape `(N,)`): which prompt every row belongs to.
        policy_logps (`torch.Tensor` of shape `(N, K)`): \\(\log \pi_k(y_j)\\).
        proposal_logps (`torch.Tensor` of shape `(N,)`): \\(\log q(y_j)\\); see [`balance_heuristic`].
    """
    counts = torch.bincount(prompt).to(proposal_logps)
    return DualTable(prompt, -proposal_logps - counts.log()[prompt], policy_logps)


def minimize_dual(
    table: DualTable,
    prompt_weights: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
    tolerance: float = 1e-9,
    max_iterations: int = 100,
    welfare: Welfare | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The exact minimum of \\(\hat F\\) over the simplex, or over the weights of another welfare function, by Newton's
    method: a quadratic model of F̂ is minimised there at each step. One pass over the table an iteration, whatever K.

    Args:
        table ([`DualTable`]): the table.
        prompt_weights (`torch.Tensor` of shape `(B, P)`, *optional*):
            Weights of the prompts, rows with sum 1, for B minima at a time. Defaults to equal weights, and B = 1.
        start (`torch.Tensor` of shape `(K,)`, *optional*):
            Where to start, among the weights of the welfare. Defaults to uniform weights.
        tolerance (`float`, *optional*, defaults to 1e-9):
            Iterations end when \\(\nabla \hat F \cdot \lambda - U(\nabla \hat F)\\), which bounds the distance of F̂ from
            its minimum, is below it.
        max_iterations (`int`, *optional*, defaults to 100): iterations at most.
        welfare ([`~mpo_hf.estimation.welfare.Welfare`], *optional*): the welfare function U. Defaults to the max-min.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: minimisers of shape `(B, K)` and minima of shape `(B,)`.

    Example:

    ```python
    >>> import torch
    >>> from mpo_hf.estimation import implicit_table, minimize_dual

    >>> logps = torch.tensor([[0.8, 0.2], [0.2, 0.8]], dtype=torch.float64).log()  # two policies, two completions
    >>> table = implicit_table(torch.tensor([0, 0]), logps, torch.full((2,), 0.5, dtype=torch.float64).log())
    >>> weights, minimum = minimize_dual(table)
    >>> weights
    tensor([[0.5000, 0.5000]], dtype=torch.float64)
    ```
    """
    if prompt_weights is None:
        prompt_weights = table.offsets.new_full((1, table.num_prompts), 1 / table.num_prompts)
    welfare = welfare if welfare is not None else MaxMin()
    if start is None:
        start = welfare.start(table.num_objectives)
    rows = max(1, _CHUNK // len(table.prompt))
    found = [
        _minimize(table, chunk, start, tolerance, max_iterations, welfare) for chunk in prompt_weights.split(rows)
    ]
    return torch.cat([weights for weights, _ in found]), torch.cat([minimum for _, minimum in found])


def _minimize(
    table: DualTable,
    prompt_weights: torch.Tensor,
    start: torch.Tensor,
    tolerance: float,
    max_iterations: int,
    welfare: Welfare,
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = start.to(prompt_weights).expand(len(prompt_weights), -1).clone()
    value, gradient, hessian = _derivatives(table, prompt_weights, weights)
    for _ in range(max_iterations):
        distance = (gradient * weights).sum(-1) - welfare.value(gradient)
        open_ = distance > tolerance
        if not open_.any():
            break
        direction = welfare.quadratic_minimum(weights, gradient, hessian) - weights
        slope = (gradient * direction).sum(-1)
        open_ = open_ & (slope < -1e-14 * (1 + value.abs()))  # what float64 can tell apart
        if not open_.any():
            break
        step = torch.ones_like(value)
        for _ in range(30):  # Armijo; a full step is taken near the minimum
            new = welfare.retract(weights + step.unsqueeze(-1) * direction)
            new_value = _value(table, prompt_weights, new)
            short = open_ & (new_value > value + 1e-4 * step * slope + 1e-15 * value.abs())
            if not short.any():
                break
            step = torch.where(short, step / 2, step)
        new = welfare.retract(weights + step.unsqueeze(-1) * direction)
        weights = torch.where(open_.unsqueeze(-1), new, weights)
        value, gradient, hessian = _derivatives(table, prompt_weights, weights)
    return weights, value


def _value(table: DualTable, prompt_weights: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    values, _ = table.by_prompt(weights)
    return (prompt_weights.T * values).sum(0)


def _derivatives(
    table: DualTable, prompt_weights: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """F̂ of B weightings of the prompts, its gradients `(B, K)` and Hessians `(B, K, K)`."""
    values, shares = table.by_prompt(weights)
    advantages, prompt = table.advantages, table.prompt
    num_weights, num_objectives = weights.shape
    weighted = shares * prompt_weights.T[prompt]
    gradient = weighted.T @ advantages
    second = torch.einsum("nb,nk,nl->bkl", weighted, advantages, advantages)
    for k in range(num_objectives):  # one objective at a time: (N, B, K) numbers would not fit
        mean_k = sums_by_prompt(prompt, shares * advantages[:, k : k + 1], len(values))
        second[:, k] -= (weighted * mean_k[prompt]).T @ advantages
    return (prompt_weights.T * values).sum(0), gradient, (second + second.transpose(1, 2)) / 2


@dataclass
class Certificate:
    r"""
    How good fitted weights are, from the completions that they were fitted on; see [`certify`].

    Args:
        weights (`torch.Tensor` of shape `(K,)`): the mixture weights λ.
        standard_errors (`torch.Tensor` of shape `(K,)`): standard errors of the weights that minimise F̂.
        dual_objective (`float`): F̂(λ).
        duality_gap (`float`): F̂(λ) less its minimum on the same completions; 0 for the minimiser itself.
        duality_gap_bound (`float`):
            Upper confidence bound of F(λ) - F(λ*), in nats. \\(E_x \mathrm{KL}(\pi^* \| \pi_\lambda)\\) is no larger.
        confidence (`float`): the level of the bound and of the intervals.
        rewards (`torch.Tensor` of shape `(K,)`, *optional*):
            Expected reward of every objective under the policy that F is about,
            \\(\pi_{ref} \exp(\sum_k \lambda_k r_k/\beta)\\), normalised.
        reward_errors (`torch.Tensor` of shape `(K,)`, *optional*): their standard errors.
        mixture_rewards (`torch.Tensor` of shape `(K,)`, *optional*):
            Expected reward of every objective under the sequence-level mixture of the policies at hand, on the prompts whose
            completions are scored under these. The same as `rewards` as far as every policy is optimal for its reward.
        mixture_reward_errors (`torch.Tensor` of shape `(K,)`, *optional*): their standard errors.
        shortfall (`float`, *optional*):
            How far the welfare of that mixture, its divergence from the reference paid, is below what any policy at all
            could have, in nats (β times it is in units of the rewards). By weak duality no policy reaches more than the
            minimum of F; 0 for policies that are optimal for their rewards, at the best weights. Of the same prompts.
        shortfall_error (`float`, *optional*): its standard error.
        of_mixture (`bool`, *optional*, defaults to `False`):
            Whether the duality gap is that shortfall, as for weights fitted to what the mixture reaches
            (`objective="achieved"`), rather than the distance of F.
        active (`torch.Tensor` of shape `(K,)`):
            The fraction of the replicates in which an objective has weight: near 1 for those that bind, near 0 for those
            that are better off than the worst.
        effective_sample_size (`float`): mean effective sample size, as a fraction of a prompt's completions.
    """

    weights: torch.Tensor
    standard_errors: torch.Tensor
    dual_objective: float
    duality_gap: float
    duality_gap_bound: float
    confidence: float
    active: torch.Tensor
    effective_sample_size: float
    rewards: torch.Tensor | None = None
    reward_errors: torch.Tensor | None = None
    mixture_rewards: torch.Tensor | None = None
    mixture_reward_errors: torch.Tensor | None = None
    shortfall: float | None = None
    shortfall_error: float | None = None
    of_mixture: bool = False


def certify(
    table: DualTable,
    weights: torch.Tensor | None = None,
    rewards: torch.Tensor | None = None,
    num_resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
    welfare: Welfare | None = None,
    mixture: "MixtureTable | None" = None,
    mixture_weights: torch.Tensor | None = None,
) -> Certificate:
    r"""
    A confidence bound of the duality gap F(λ) - F(λ*), and standard errors, by the bootstrap over prompts.

    In every replicate the prompts are drawn anew, with all their completions. How far F̂ at `weights` then lies above
    its new minimum is what the gap would look like if the prompts at hand were all that there are. As with any
    bootstrap the bound is too small for few prompts; it is widened by the ratio of Hotelling's distribution to its limit.
    It does not know the bias of a log of a mean, which falls with the completions a prompt: with an effective sample
    size of a few completions, do not believe it.

    Args:
        table ([`DualTable`]): the table.
        weights (`torch.Tensor` of shape `(K,)`, *optional*):
            The mixture weights λ in question. Defaults to the minimiser of F̂.
        rewards (`torch.Tensor` of shape `(N, K)`, *optional*): rewards of the completions, on their own scale.
        num_resamples (`int`, *optional*, defaults to 200): replicates.
        confidence (`float`, *optional*, defaults to 0.95): level of the bound.
        seed (`int`, *optional*, defaults to 0): seed of the replicates.
        welfare ([`~mpo_hf.estimation.welfare.Welfare`], *optional*): the welfare function. Defaults to the max-min.
        mixture ([`~mpo_hf.estimation.primal.MixtureTable`], *optional*):
            The same completions for mixtures of the policies at hand, from which `mixture_rewards` and `shortfall` follow; or
            those of some of the prompts, which are then compared with the minimum of F̂ on the same prompts.
        mixture_weights (`torch.Tensor` of shape `(M,)`, *optional*):
            Weights of its components. Defaults to `weights`.

    Returns:
        [`Certificate`]

    Raises:
        `ValueError`: for fewer than two prompts, which say nothing about others.
    """
    num_prompts = table.num_prompts
    if num_prompts < 2:
        raise ValueError("A certificate needs completions of at least 2 prompts, got 1.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, got {confidence}.")
    welfare = welfare if welfare is not None else MaxMin()
    found = _bootstrap(table, num_resamples, seed, welfare)
    weights = found.best if weights is None else weights.to(table.offsets)
    by_prompt, shares = table.by_prompt(weights.unsqueeze(0))
    gaps = found.counts @ by_prompt[:, 0] - found.minima
    active = (found.minimizers > 1e-6).double().mean(0)
    widened = _small_sample_factor(num_prompts, max(1, int(active.gt(0.5).sum()) - 1), confidence)
    gap_bound = gaps.quantile(confidence).clamp(min=0).item()
    value = by_prompt.mean().item()
    certificate = Certificate(
        weights=weights,
        standard_errors=found.minimizers.std(0),
        dual_objective=value,
        duality_gap=max(0.0, value - found.minimum.item()),
        duality_gap_bound=gap_bound * widened if math.isfinite(widened) else math.inf,
        confidence=confidence,
        active=active,
        effective_sample_size=effective_fractions(table.prompt, shares[:, 0]).mean().item(),
    )
    if rewards is not None:
        certificate.rewards, certificate.reward_errors = _mean_rewards(table.prompt, shares, rewards, found.counts)
    if mixture is not None:
        mixture_weights = weights if mixture_weights is None else mixture_weights
        if mixture.rows is not None:
            rewards = rewards[mixture.rows] if rewards is not None else None
            found = _bootstrap(table.part(mixture.rows, mixture.prompt), num_resamples, seed, welfare)
        _certify_mixture(certificate, mixture, mixture_weights, rewards, found, welfare)
    return certificate


def _certify_mixture(
    certificate: Certificate,
    mixture: "MixtureTable",
    weights: torch.Tensor,
    rewards: torch.Tensor | None,
    dual: "_Bootstrap",
    welfare: Welfare,
) -> None:
    """
    Fills in what the mixture itself reaches, and how far below the minimum of the dual objective that is; everything of the
    prompts of its table.
    """
    shares, divergence = mixture.shares(weights)
    shares = shares.unsqueeze(-1)
    if rewards is not None:
        found = _mean_rewards(mixture.prompt, shares, rewards, dual.counts)
        certificate.mixture_rewards, certificate.mixture_reward_errors = found
    num_prompts = len(divergence)
    gains = sums_by_prompt(mixture.prompt, shares * mixture.gains, num_prompts)
    draws = torch.cat([dual.counts.new_full((1, num_prompts), 1 / num_prompts), dual.counts])
    achieved = welfare.value(draws @ gains) - draws @ divergence
    shortfalls = torch.cat([dual.minimum.reshape(1), dual.minima]) - achieved
    certificate.shortfall, certificate.shortfall_error = shortfalls[0].item(), shortfalls[1:].std().item()


@dataclass
class _Bootstrap:
    """
    The minimum of a table and its minimiser, and those of B replicates, whose prompts have the weights `counts` of shape
    `(B, P)`.
    """

    best: torch.Tensor
    minimum: torch.Tensor
    counts: torch.Tensor
    minimizers: torch.Tensor
    minima: torch.Tensor


def _bootstrap(table: DualTable, num_resamples: int, seed: int, welfare: Welfare) -> _Bootstrap:
    counts = bootstrap_counts(table.num_prompts, num_resamples, seed)
    (best,), (minimum,) = minimize_dual(table, welfare=welfare)
    return _Bootstrap(best, minimum, counts, *_minima_of_replicates(table, counts, best, welfare))


def _minima_of_replicates(
    table: DualTable, counts: torch.Tensor, best: torch.Tensor, welfare: Welfare
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Minimisers and minima with the prompts weighted by each row of `counts`. On large tables those of the quadratic models at
    `best`, which hardly differ there, and take one pass over the table instead of several for each replicate.
    """
    if len(table.prompt) * len(counts) <= _CHUNK or not isinstance(welfare, Polyhedral):
        return minimize_dual(table, counts, start=best, tolerance=1e-7, welfare=welfare)
    advantages, prompt, num_prompts = table.advantages, table.prompt, table.num_prompts
    values, shares = table.by_prompt(best.unsqueeze(0))
    means = sums_by_prompt(prompt, shares * advantages, num_prompts)
    seconds = [
        sums_by_prompt(prompt, shares * advantages[:, k : k + 1] * advantages, num_prompts)
        for k in range(table.num_objectives)
    ]
    covariances = torch.stack(seconds, dim=1) - means.unsqueeze(-1) * means.unsqueeze(-2)
    gradient, hessian = counts @ means, torch.einsum("bp,pkl->bkl", counts, covariances)
    found = welfare.quadratic_minimum(best.expand(len(counts), -1), gradient, hessian)
    step = found - best
    change = (gradient * step).sum(-1) + torch.einsum("bk,bkl,bl->b", step, hessian, step) / 2
    return found, counts @ values[:, 0] + change


def bootstrap_counts(num_prompts: int, num_resamples: int, seed: int) -> torch.Tensor:
    """Weights of the prompts in every replicate of a bootstrap over them, shape `(num_resamples, num_prompts)`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num_prompts, (num_resamples, num_prompts), generator=generator)
    counts = torch.zeros(num_resamples, num_prompts, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts)).div_(num_prompts)


def _mean_rewards(
    prompt: torch.Tensor, shares: torch.Tensor, rewards: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean rewards of completions that have shares in their prompts, and standard errors by the bootstrap."""
    by_prompt = sums_by_prompt(prompt, shares * rewards, counts.shape[-1])
    return by_prompt.mean(0), (counts @ by_prompt).std(0)


@functools.cache
def _small_sample_factor(num_prompts: int, dimension: int, confidence: float, draws: int = 200_000) -> float:
    """The quantile of Hotelling's distribution for a mean of `num_prompts`, relative to that of its limit, by simulation."""
    if num_prompts <= dimension + 1:
        return float("inf")
    generator = torch.Generator().manual_seed(0)
    quantile = torch.randn(draws, dimension, generator=generator, dtype=torch.float64).square().sum(-1)
    degrees = num_prompts - dimension
    # chi-squared draws of any number of degrees, by Wilson and Hilferty's cube
    normal = torch.randn(draws, generator=generator, dtype=torch.float64)
    scale = (1 - 2 / (9 * degrees) + normal * (2 / (9 * degrees)) ** 0.5).clamp(min=1e-3) ** 3
    hotelling = quantile / scale * (num_prompts - 1) / degrees * num_prompts / (num_prompts - 1)
    return (hotelling.quantile(confidence) / quantile.quantile(confidence)).item()
