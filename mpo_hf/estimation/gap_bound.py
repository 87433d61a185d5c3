r"""
An upper confidence bound of the duality gap F(λ) - F(λ*), by a studentized bootstrap over prompts.

The gap of weights follows from the error of the gradient of F̂: sampling of prompts and completions, which a bootstrap
over prompts imitates, and the bias, which is estimated ([`estimate_bias`]) and counted in. A part of the noise of that
estimate is in the bootstrap, too. How large a part, and how much of the extrapolated bias counts, was chosen by
simulations: as little as covers in them.
"""

import math

import torch

from .bias import MIN_PROMPTS, BiasEstimate, metric, moments_by_prompt
from .tables import DualTable
from .welfare import Polyhedral, WeightedSum, Welfare


# Least and largest multiple of the extrapolated rest of the bias that counts, with equal probability between them. In
# simulations all of it was about right for normal rewards, and too much for rare ones.
REST_RANGE = (0.5, 1.0)
# Estimated baselines have biases that mostly cancel between objectives; what is left is largely noise. It widens the bound
# twice: by the estimate itself, which is rarely 0, and by the errors of the replicates. These have this share of the noise
# of the rest, ...
REST_NOISE = 0.4
# ... and half of that, and of the noise of the jackknife, with this number of prompts. With few, which show little of the
# bias, once is enough. With many, bias exceeds the error of sampling, and nothing makes up for too small an estimate.
PROMPTS_OF_HALF_NOISE = 20
# Share of the error probability that the bootstrap may use. The rest is for what it does not know: the extrapolation may
# fall short, and the tails of prompts may be heavier than those drawn. Without it, simulated "95%" were 90 to 97%.
BOOTSTRAP_SHARE = 0.5
# Newton steps to the minimum of a quadratic model over weights with a curved boundary.
NUM_STEPS = 20


def gap_bound(
    table: DualTable,
    weights: torch.Tensor,
    center: torch.Tensor,
    bias: BiasEstimate,
    counts: torch.Tensor,
    confidence: float,
    welfare: Welfare,
    seed: int = 0,
) -> float:
    r"""
    Upper confidence bound of F(λ) - F(λ*), in nats.

    Every replicate is a quadratic model of F around `center`, with a gradient that is the corrected one plus an error.
    The errors are those of a bootstrap over prompts in units of their own standard deviation (studentized), which
    widens the bound where few prompts, or rare ones, determine the gradient. The noise of the estimated bias is part of
    them: all of it, or with estimated baselines a share that grows with the number of prompts.

    Args:
        table ([`DualTable`]): the table.
        weights (`torch.Tensor` of shape `(K,)`): the mixture weights λ.
        center (`torch.Tensor` of shape `(K,)`): the minimizer of F̂.
        bias ([`BiasEstimate`]): the bias at the center.
        counts (`torch.Tensor` of shape `(B, P)`): weights of the prompts in every replicate, rows with sum 1.
        confidence (`float`): confidence level.
        welfare ([`~mpo_hf.estimation.welfare.Welfare`]): the welfare function.
        seed (`int`, *optional*, defaults to 0): seed of the draws of the uncertain part of the bias.

    Returns:
        `float`: the bound; infinite if prompts or completions are too few for any, or a replicate has no finite gap
            where the bound would lie.
    """
    if table.num_objectives == 1 or isinstance(welfare, WeightedSum):
        return 0.0  # there is only one λ
    if table.num_prompts < MIN_PROMPTS or not bias.is_reliable:
        return math.inf
    _, gradients, hessians = moments_by_prompt(table, center)
    if not (torch.isfinite(gradients + bias.extrapolated).all() and torch.isfinite(hessians).all()):
        return math.inf
    along = metric((gradients + bias.extrapolated).mean(0), hessians.mean(0), welfare)
    rest = bias.extrapolated - bias.jackknife
    noise = bias.extrapolated
    if bias.has_baselines:
        share = table.num_prompts / (table.num_prompts + PROMPTS_OF_HALF_NOISE)
        noise = share * (bias.jackknife + REST_NOISE * rest)
    errors = _studentized_errors(gradients + noise, counts, along)
    draws = torch.rand(len(counts), 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    least, largest = REST_RANGE
    multiples = least + (largest - least) * draws.to(errors)
    replicates = (gradients + bias.jackknife).mean(0) + multiples * rest.mean(0) + errors
    gaps = _gaps_of_models(weights, center, replicates, torch.einsum("bp,pkl->bkl", counts, hessians), welfare)
    level = 1 - BOOTSTRAP_SHARE * (1 - confidence)
    return gaps.sort().values[math.ceil(level * len(gaps)) - 1].item()


def _studentized_errors(gradients: torch.Tensor, counts: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """
    Errors of the mean of `gradients`, shape `(B, K)`: those of the replicates, times the standard deviation of the
    prompts over that of the replicate's prompts. Infinite where the prompts of a replicate do not vary.
    """
    gradients = gradients - gradients.mean(0)
    errors = counts @ gradients
    squared = ((gradients @ metric) * gradients).sum(-1)
    variances = counts @ squared - ((errors @ metric) * errors).sum(-1)
    scale = torch.where(
        variances > torch.finfo(variances.dtype).eps * squared.mean(), squared.mean() / variances, torch.inf
    )
    return errors * scale.sqrt().unsqueeze(-1)


def _gaps_of_models(
    weights: torch.Tensor, center: torch.Tensor, gradients: torch.Tensor, hessians: torch.Tensor, welfare: Welfare
) -> torch.Tensor:
    """
    The gap of weights in quadratic models around `center` with B gradients and Hessians: `(B,)`, infinite where a
    model has no finite minimum.
    """
    gaps = torch.full_like(gradients[:, 0], torch.inf)
    finite = torch.isfinite(gradients).all(-1)
    gradients, hessians = gradients[finite], hessians[finite]

    def gradient_at(points: torch.Tensor) -> torch.Tensor:
        return gradients + torch.einsum("bkl,bl->bk", hessians, points - center)

    def value_at(points: torch.Tensor) -> torch.Tensor:
        return ((gradients + gradient_at(points)) * (points - center)).sum(-1) / 2

    points = center.expand_as(gradients)
    for _ in range(1 if isinstance(welfare, Polyhedral) else NUM_STEPS):
        points = welfare.retract(welfare.quadratic_minimum(points, gradient_at(points), hessians))
    gradient = gradient_at(points)
    # how far the points may still be from the minimum; infinite where the model falls without end
    rest = ((gradient * points).sum(-1) - welfare.value(gradient)).clamp(min=0)
    found = value_at(weights.expand_as(gradients)) - value_at(points) + rest
    gaps[finite] = torch.where(torch.isnan(found), torch.inf, found.clamp(min=0))
    return gaps
