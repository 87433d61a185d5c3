r"""
The bias of the estimated dual objective, from the completions themselves, and weights that are fitted with less of it.

The logarithm of a mean over m completions is too small on average, by half the squared coefficient of variation over m
and further terms. This does not fall with the number of prompts, and as it depends on the weights, it moves the
minimizer of F̂. Where the rewards are relative to a baseline that was estimated from the same completions, as with the
paper's P, the baseline has a bias of its own, which is often the larger one.

The delete-one jackknife removes the term of order 1/m. What remains, with heavy tails, is extrapolated: halves and
quarters of the completions tell by which ratio the bias falls when the number of completions doubles.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .dual import minimize_dual
from .tables import DualTable, MixtureTable, segment_logsumexp, sums_by_prompt
from .welfare import MaxMin, Polyhedral, Welfare


# The extrapolated bias is at most this multiple of the difference between all completions and their halves: lognormal
# terms with 4 to 64 completions have 1.3 to 2.4.
MAX_TAIL = 2.0
# ... and at least this multiple: the limit for many completions is 1, and bounded rewards have 0.8 to 1 before.
MIN_TAIL = 0.5
# With a larger ratio of two successive differences the bias hardly falls yet, and nothing can be extrapolated: rewards
# that one completion in twenty earns have 1.2 to 1.6 with four completions.
MAX_RATIO = 1.1
# Fewer completions of a prompt have no quarters.
MIN_COMPLETIONS = 4
# Mean effective number of completions below which the extrapolation fell short of the bias in simulations.
MIN_EFFECTIVE_COMPLETIONS = 3.0
# Shares closer to 1 leave only rounding errors to estimate from when their completion is deleted.
MAX_SHARE = 1 - 1e-12
# Fewer prompts do not show how much prompts vary.
MIN_PROMPTS = 8
# Instead of a division by zero, where nothing varies.
TINY = 1e-300
# So many times its own variance is subtracted from the square of an estimated bias before it decides how much of it is
# corrected: a bias within about two standard errors of 0 is left alone.
CAUTION = 4.0


@dataclass
class BiasEstimate:
    r"""
    What has to be added to F̂ and its gradient at some weights; see [`estimate_bias`].

    Args:
        value (`torch.Tensor` of shape `(P,)`): for the terms of F̂, with the extrapolated rest.
        jackknife (`torch.Tensor` of shape `(P, K)`): for their gradients, by the jackknife.
        extrapolated (`torch.Tensor` of shape `(P, K)`): the same, with the extrapolated rest.
        ratio (`float`):
            By which the bias falls when the number of completions doubles: 1/2 where they are many. NaN if unknown.
        effective_completions (`float`): effective number of completions, the mean over the prompts.
        is_reliable (`bool`): whether the completions suffice for this estimate.
        has_baselines (`bool`, *optional*, defaults to `False`):
            Whether rewards are relative to optima that were estimated from the completions.
    """

    value: torch.Tensor
    jackknife: torch.Tensor
    extrapolated: torch.Tensor
    ratio: float
    effective_completions: float
    is_reliable: bool
    has_baselines: bool = False


def estimate_bias(table: DualTable, weights: torch.Tensor) -> BiasEstimate:
    r"""
    Estimates the bias of F̂ and of its gradient at some weights.

    Baselines that were estimated from the completions of the table are recognized by what they set to zero: the paper's
    P the logarithm of the mean of exp(a), the scale "regret" the mean of a under the objective's own policy, the scale
    "reference" its mean under the reference.

    Args:
        table ([`DualTable`]): the table.
        weights (`torch.Tensor` of shape `(K,)`): the weights λ.

    Returns:
        [`BiasEstimate`]
    """
    weights = weights.to(table.offsets)
    samples = Samples(table.prompt)
    shares, term = samples.log_mean(table, weights)
    factor, ratio = _extrapolation([term])
    gradient = samples.bias_of_means(shares, table.advantages)
    baselines, terms = _bias_of_baselines(table, samples)
    factors = torch.ones_like(weights)
    if terms:
        # One factor for all objectives together: errors that they share cancel, and that of each alone is noisy. What
        # exceeds the jackknife grows faster than it. In simulations of objectives with unequal variances, an excess in
        # proportion was too little for the larger one, and one in proportion to the square too much.
        common, other_ratio = _extrapolation(list(terms.values()))
        ratio = math.nan if math.isnan(ratio + other_ratio) else max(ratio, other_ratio)
        sizes = torch.stack([term.jackknife.mean() for term in terms.values()]).clamp(min=TINY)
        factors[list(terms)] = 1 + (common - 1) * sizes.sqrt() * sizes.sum() / (sizes * sizes.sqrt()).sum()
    jackknife, extrapolated = gradient - baselines, factor * gradient - factors * baselines
    value = factor * term.jackknife - (factors * baselines) @ weights
    effective = (1 / sums_by_prompt(table.prompt, shares.unsqueeze(-1) ** 2, table.num_prompts)).mean().item()
    is_finite = all(bool(torch.isfinite(found).all()) for found in (value, jackknife, extrapolated))
    return BiasEstimate(
        value,
        jackknife,
        extrapolated,
        ratio,
        effective,
        is_reliable=is_finite
        and ratio <= MAX_RATIO
        and effective >= MIN_EFFECTIVE_COMPLETIONS
        and int(samples.sizes.min()) >= MIN_COMPLETIONS,
        has_baselines=bool(terms),
    )


def bias_of_mixture(mixture: MixtureTable, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What has to be added to the expected gains of a mixture by prompt, `(P, K)`, and to its divergence from the
    reference, `(P,)`, of [`MixtureTable.measure`]: by the jackknife.
    """
    samples = Samples(mixture.prompt)
    shares, _ = mixture.shares(weights)
    log_ratios = (mixture.policy_log_ratios @ weights - mixture.reference_log_ratios).unsqueeze(-1)
    divergence = samples.bias_of_means(shares, log_ratios).squeeze(-1) - samples.bias_of_log(shares)
    return samples.bias_of_means(shares, mixture.gains), divergence


def minimize_debiased(table: DualTable, welfare: Welfare | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The minimum of F̂ with a part of its bias removed. The jackknife removes bias and adds variance; the part that it
    corrects is the one with the least estimated error of the gradient, between nothing and all; nothing with fewer than
    8 prompts.

    Args:
        table ([`DualTable`]): the table.
        welfare ([`~mpo_hf.estimation.welfare.Welfare`], *optional*): the welfare function U. Defaults to the max-min.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the minimizer, shape `(1, K)`, and the minimum, shape `(1,)`, as from
            [`minimize_dual`].
    """
    welfare = welfare if welfare is not None else MaxMin()
    plain = minimize_dual(table, welfare=welfare)
    if table.num_prompts < MIN_PROMPTS or int(torch.bincount(table.prompt).min()) < 2:
        return plain
    (weights,) = plain[0]
    bias = estimate_bias(table, weights).jackknife
    _, gradients, hessians = moments_by_prompt(table, weights)
    part = _part_to_correct(gradients, bias, metric(gradients.mean(0), hessians.mean(0), welfare))
    if not 0 < part <= 1:  # NaN included
        return plain
    shifted = table.advantages + (part * bias)[table.prompt]
    return minimize_dual(DualTable(table.prompt, table.offsets, shifted), start=weights, welfare=welfare)


def moments_by_prompt(table: DualTable, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The terms of F̂ by prompt, `(P,)`, their gradients, `(P, K)`, and their Hessians, `(P, K, K)`."""
    values, shares = table.by_prompt(weights.unsqueeze(0))
    advantages, prompt = torch.where(shares > 0, table.advantages, 0), table.prompt
    means = sums_by_prompt(prompt, shares * advantages, len(values))
    seconds = [
        sums_by_prompt(prompt, shares * advantages[:, k : k + 1] * advantages, len(values))
        for k in range(table.num_objectives)
    ]
    return values[:, 0], means, torch.stack(seconds, dim=1) - means.unsqueeze(-1) * means.unsqueeze(-2)


def metric(gradient: torch.Tensor, hessian: torch.Tensor, welfare: Welfare) -> torch.Tensor:
    r"""
    The matrix M, shape `(K, K)`, for which half of \\(e^T M e\\) is the duality gap that an error e of the gradient
    leads to, as far as the weights can follow it: along a sum of weights that is fixed, or along the boundary of Λ.
    """
    num_objectives = len(gradient)
    normal = gradient
    if isinstance(welfare, Polyhedral):
        normal = welfare.limits(num_objectives)[1].to(gradient)
    along = torch.eye(num_objectives).to(gradient)
    if normal.norm() > 0:
        along = along - torch.outer(normal, normal) / normal.square().sum()
    return torch.linalg.pinv(along @ hessian @ along, hermitian=True)


def _part_to_correct(gradients: torch.Tensor, bias: torch.Tensor, metric: torch.Tensor) -> float:
    """The part c of the bias for which the mean of `gradients + c * bias` has the least estimated error."""

    def covariance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        first, second = first - first.mean(0), second - second.mean(0)
        return torch.einsum("pk,kl,pl->", first, metric, second) / (len(first) * (len(first) - 1))

    mean, noise = bias.mean(0), covariance(bias, bias)
    squared = (mean @ metric @ mean - CAUTION * noise).clamp(min=0)
    return ((squared - covariance(gradients, bias)) / (squared + noise)).clamp(0, 1).item()


# ---- logarithms of means, and their baselines ----


@dataclass
class _Term:
    """
    A logarithm of a mean by prompt, what it lacks by the jackknife, `(P,)` each, and by how much those of halves are
    below it, and those of quarters below these.
    """

    values: torch.Tensor
    jackknife: torch.Tensor
    above_halves: float
    halves_above_quarters: float


class Samples:
    """The completions of a table, by prompt and in order."""

    def __init__(self, prompt: torch.Tensor):
        self.prompt, self.sizes = prompt, torch.bincount(prompt)
        order = prompt.argsort(stable=True)
        starts = self.sizes.cumsum(0) - self.sizes
        self.rank = torch.empty_like(order)
        self.rank[order] = torch.arange(len(order)) - starts[prompt[order]]

    def log_mean(self, table: DualTable, weights: torch.Tensor) -> tuple[torch.Tensor, _Term]:
        """The shares of the completions at some weights, shape `(N,)`, and the term of F̂ there."""
        prompt, num_prompts = self.prompt, len(self.sizes)
        used = weights != 0  # 0 times the logarithm of an impossible completion is 0
        exponents = (table.offsets + table.advantages[:, used] @ weights[used]).unsqueeze(-1)
        levels = [segment_logsumexp(exponents, prompt, num_prompts).squeeze(-1)]
        shares = (exponents.squeeze(-1) - levels[0][prompt]).exp_()
        for parts in (2, 4):
            # every second or fourth one, so that each part has its share of every proposal
            part = prompt * parts + self.rank % parts
            of_parts = segment_logsumexp(exponents, part, num_prompts * parts).view(num_prompts, parts)
            counts = torch.bincount(part, minlength=num_prompts * parts).view(num_prompts, parts)
            levels.append((of_parts - (counts / self.sizes.unsqueeze(-1)).log()).mean(-1))
        whole, halves, quarters = (level.mean().item() for level in levels)
        return shares, _Term(levels[0], self.bias_of_log(shares), whole - halves, halves - quarters)

    def bias_of_log(self, shares: torch.Tensor) -> torch.Tensor:
        """What the logarithm of a mean lacks, by the jackknife, given the shares of the completions in it: `(P,)`."""
        sizes = self.sizes.to(shares)
        logs = torch.log1p(-shares.clamp(max=MAX_SHARE)).unsqueeze(-1)
        sums = sums_by_prompt(self.prompt, logs, len(sizes)).squeeze(-1)
        return (sizes - 1) * (-sums / sizes + torch.log1p(-1 / sizes))

    def means(self, shares: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Means of values of shape `(N, K)` with the given shares, `(P, K)`."""
        weighted = torch.where(shares.unsqueeze(-1) > 0, shares.unsqueeze(-1) * values, 0)
        return sums_by_prompt(self.prompt, weighted, len(self.sizes))

    def bias_of_means(self, shares: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """What means of values of shape `(N, K)` with the given shares lack, by the jackknife: `(P, K)`."""
        sizes, prompt = self.sizes.to(shares).unsqueeze(-1), self.prompt
        shares = shares.unsqueeze(-1)
        values = torch.where(shares > 0, values, 0)  # an impossible completion may have the value -inf
        means = sums_by_prompt(prompt, shares * values, len(sizes))
        moves = shares / (1 - shares.clamp(max=MAX_SHARE)) * (values - means[prompt])
        return (sizes - 1) / sizes * sums_by_prompt(prompt, moves, len(sizes))


def _bias_of_baselines(table: DualTable, samples: Samples) -> tuple[torch.Tensor, dict[int, _Term]]:
    """
    What the baselines of the objectives lack, by the jackknife, shape `(P, K)`, 0 where there is none; and for those
    whose bias falls like that of a logarithm of a mean, that logarithm.
    """
    found = table.offsets.new_zeros(len(samples.sizes), table.num_objectives)
    terms = {}
    of_reference, _ = samples.log_mean(table, found.new_zeros(table.num_objectives))
    for k, vertex in enumerate(torch.eye(table.num_objectives).to(found)):
        column = table.advantages[:, k : k + 1]
        scale = column[torch.isfinite(column)].abs().amax().clamp(min=1) if torch.isfinite(column).any() else 1.0
        limit = torch.finfo(found.dtype).eps ** 0.5 * scale
        shares, term = samples.log_mean(table, vertex)
        if (term.values.abs() <= limit).all():  # the paper's P
            found[:, k], terms[k] = term.jackknife - samples.bias_of_log(of_reference), term
        elif (samples.means(shares, column).abs() <= limit).all():  # "regret"
            found[:, k], terms[k] = samples.bias_of_means(shares, column).squeeze(-1), term
        elif (samples.means(of_reference, column).abs() <= limit).all():  # "reference"
            found[:, k] = samples.bias_of_means(of_reference, column).squeeze(-1)
    return found, terms


def _extrapolation(terms: Sequence[_Term]) -> tuple[float, float]:
    """
    By which factor the jackknife's estimate of a bias has to be multiplied, and the ratio by which the bias falls.

    Differences that fall by a ratio ρ from one doubling to the next sum up to ρ/(1 - ρ) times the last one (Aitken).
    """
    jackknife = sum(term.jackknife.mean().item() for term in terms)
    last = sum(term.above_halves for term in terms)
    before = sum(term.halves_above_quarters for term in terms)
    if not (jackknife > 0 and last > 0 and before > 0):  # no variation at all, or NaN
        return 1.0, math.nan
    ratio = last / before
    tail = max(MIN_TAIL, ratio / (1 - ratio)) if ratio < 1 else MAX_TAIL
    return min(tail, MAX_TAIL) * last / jackknife, ratio
