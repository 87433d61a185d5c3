r"""
Certificates of fitted weights: the duality gap with its confidence bound, rewards, and standard errors.
"""

import math
from dataclasses import dataclass

import torch

from .bias import MIN_PROMPTS, bias_of_mixture, estimate_bias, moments_by_prompt
from .dual import CHUNK_NUMEL, minimize_dual
from .gap_bound import gap_bound
from .primal import SMOOTHING, maximize_primal, primal_objective
from .tables import DualTable, MixtureTable, effective_sample_fractions, sums_by_prompt
from .welfare import MaxMin, Polyhedral, Welfare


# Precision of the minima of the replicates, in nats: far below the gaps of interest (0.01 ends a fit by default), and
# reached in fewer iterations than the default of `minimize_dual`.
REPLICATE_TOLERANCE = 1e-7
# Numbers (rows times replicates) up to which every replicate is minimized exactly.
EXACT_NUMEL = CHUNK_NUMEL // 10
# A weight above this counts as an objective that binds. Newton's method sets the others to exactly 0; L-BFGS, whose
# weights are a softmax, does not.
ACTIVE_WEIGHT = 1e-6
ACTIVE_WEIGHT_PRIMAL = 1e-3
# Replicates for the standard errors of the maximizer of the primal objective, each of which takes a run of L-BFGS.
NUM_PRIMAL_REPLICATES = 20


@dataclass
class Certificate:
    r"""
    How good fitted weights are, from the completions that they were fitted on; see [`certify`].

    Args:
        weights (`torch.Tensor` of shape `(K,)`): the mixture weights λ.
        standard_errors (`torch.Tensor` of shape `(K,)`): standard errors of the minimizer of F̂.
        dual_objective (`float`): F̂(λ).
        duality_gap (`float`): F̂(λ) less its minimum on the same completions; 0 for the minimizer itself.
        duality_gap_bound (`float`):
            Upper confidence bound of F(λ) - F(λ*), in nats. \\(E_x \mathrm{KL}(\pi^* \| \pi_\lambda)\\) is no larger.
            Infinite if there are too few prompts, or too few completions that count, for any bound.
        confidence (`float`): confidence level of the bound.
        active (`torch.Tensor` of shape `(K,)`):
            The fraction of the replicates in which an objective has weight: near 1 for objectives that bind, near 0
            for those that are better off than the worst.
        effective_sample_fraction (`float`): mean effective sample size, as a fraction of a prompt's completions.
        effective_completions (`float`, *optional*): mean effective sample size of a prompt, in completions.
        num_prompts (`int`, *optional*): number of prompts.
        rewards (`torch.Tensor` of shape `(K,)`, *optional*):
            Expected reward of every objective under the optimal policy for these weights,
            \\(\pi_{ref} \exp(\sum_k \lambda_k r_k/\beta)\\), normalized.
        reward_errors (`torch.Tensor` of shape `(K,)`, *optional*): their standard errors.
        mixture_rewards (`torch.Tensor` of shape `(K,)`, *optional*):
            Expected reward of every objective under the sequence-level mixture of the given policies, on the prompts
            whose completions are scored under these. Equal to `rewards` if every policy is optimal for its reward.
        mixture_reward_errors (`torch.Tensor` of shape `(K,)`, *optional*): their standard errors.
        mixture_duality_gap (`float`, *optional*):
            The duality gap of that mixture, min F̂ - Ĝ, in nats, on the same prompts: how far its welfare, less its
            divergence from the reference, is below an upper bound for every policy (weak duality). Times β it is in
            units of the rewards. 0 for policies that are optimal for their rewards, at the optimal weights.
        mixture_duality_gap_error (`float`, *optional*): its standard error.
        of_mixture (`bool`, *optional*, defaults to `False`):
            Whether `duality_gap` and its bound are those of the mixture, min F̂ - Ĝ, as for weights that maximize the
            primal objective (`objective="achieved"`), rather than F̂(λ) - min F̂.
        optimality_gap_bound (`float`, *optional*):
            Of weights that were fitted to what is decoded: upper confidence bound of how much more welfare, in nats, the
            best weights within reach of the completions have.
        divergence (`float`, *optional*): the divergence of the mixture from the reference, in nats a completion.
        divergence_error (`float`, *optional*): its standard error.
    """

    weights: torch.Tensor
    standard_errors: torch.Tensor
    dual_objective: float
    duality_gap: float
    duality_gap_bound: float
    confidence: float
    active: torch.Tensor
    effective_sample_fraction: float
    effective_completions: float = math.nan
    num_prompts: int = 0
    rewards: torch.Tensor | None = None
    reward_errors: torch.Tensor | None = None
    mixture_rewards: torch.Tensor | None = None
    mixture_reward_errors: torch.Tensor | None = None
    mixture_duality_gap: float | None = None
    mixture_duality_gap_error: float | None = None
    of_mixture: bool = False
    optimality_gap_bound: float | None = None
    divergence: float | None = None
    divergence_error: float | None = None


def certify(
    table: DualTable,
    weights: torch.Tensor | None = None,
    rewards: torch.Tensor | None = None,
    num_resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
    welfare: Welfare | None = None,
    mixture: MixtureTable | None = None,
    mixture_weights: torch.Tensor | None = None,
) -> Certificate:
    r"""
    A confidence bound of the duality gap F(λ) - F(λ*), and standard errors, by the bootstrap over prompts.

    Every replicate draws the prompts anew, with all their completions. The bound counts in the bias of F̂, which falls
    with the number of completions per prompt, not with that of prompts ([`~mpo_hf.estimation.bias`] estimates it), and
    the errors of few prompts ([`~mpo_hf.estimation.gap_bound`]). In simulations with effective fractions of 20% to
    70% and at least 16 completions, bounds with 95% confidence held in 93% to 100% of 200 fits, see the page of
    benchmarks. It is infinite for fewer than 8 prompts, fewer than 4 completions of a prompt, fewer than 3 effective
    completions on average, and where the bias does not fall yet with the number of completions, as when rewards are so
    rare that most prompts have none.

    Args:
        table ([`DualTable`]): the table.
        weights (`torch.Tensor` of shape `(K,)`, *optional*): the mixture weights λ. Defaults to the minimizer of F̂.
        rewards (`torch.Tensor` of shape `(N, K)`, *optional*): rewards of the completions, on their own scale.
        num_resamples (`int`, *optional*, defaults to 200): number of replicates.
        confidence (`float`, *optional*, defaults to 0.95): confidence level of the bound.
        seed (`int`, *optional*, defaults to 0): seed of the replicates.
        welfare ([`~mpo_hf.estimation.welfare.Welfare`], *optional*): the welfare function. Defaults to the max-min.
        mixture ([`MixtureTable`], *optional*):
            The same completions for mixtures of the given policies, which give `mixture_rewards` and
            `mixture_duality_gap`; or those of some of the prompts, which are then compared with the minimum of F̂ on
            the same prompts.
        mixture_weights (`torch.Tensor` of shape `(M,)`, *optional*):
            Weights of its components. Defaults to `weights`.

    Returns:
        [`Certificate`]

    Raises:
        `ValueError`: the table has fewer than two prompts, which gives no information on the variation between
            prompts, or `confidence` is not between 0 and 1.
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
    bias = estimate_bias(table, found.best)
    value = by_prompt.mean().item()
    fractions = effective_sample_fractions(table.prompt, shares[:, 0])
    certificate = Certificate(
        weights=weights,
        standard_errors=found.minimizers.std(0),
        dual_objective=value,
        duality_gap=max(0.0, value - found.minimum.item()),
        duality_gap_bound=gap_bound(table, weights, found.best, bias, found.counts, confidence, welfare, seed),
        confidence=confidence,
        active=(found.minimizers > ACTIVE_WEIGHT).double().mean(0),
        effective_sample_fraction=fractions.mean().item(),
        effective_completions=(fractions * torch.bincount(table.prompt)).mean().item(),
        num_prompts=num_prompts,
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


def certify_primal(
    table: DualTable,
    mixture: MixtureTable,
    weights: torch.Tensor,
    welfare: Polyhedral,
    rewards: torch.Tensor | None = None,
    num_resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> Certificate:
    r"""
    A certificate of weights that were fitted by [`maximize_primal`]: its duality gap is min F̂ - Ĝ, an upper bound of
    what any policy could gain over this mixture.

    Args:
        table ([`DualTable`]): the completions, for F.
        mixture ([`MixtureTable`]): the same completions, for G.
        weights (`torch.Tensor` of shape `(M,)`): the mixture weights.
        welfare ([`~mpo_hf.estimation.welfare.Welfare`]): the welfare function.
        rewards (`torch.Tensor` of shape `(N, K)`, *optional*): rewards of the completions, on their own scale.
        num_resamples (`int`, *optional*, defaults to 200):
            Number of bootstrap replicates. The standard errors of the weights are from the first 20 of them.
        confidence (`float`, *optional*, defaults to 0.95): confidence level of the bound.
        seed (`int`, *optional*, defaults to 0): seed of the replicates.

    Returns:
        [`Certificate`]
    """
    certificate = certify(
        table,
        rewards=rewards,
        num_resamples=num_resamples,
        confidence=confidence,
        seed=seed,
        welfare=welfare,
        mixture=mixture,
        mixture_weights=weights,
    )
    best, gap = certificate.weights, certificate.mixture_duality_gap  # the minimizer of F̂, as no weights are given
    assert gap is not None  # as `mixture` is given
    counts = bootstrap_counts(table.num_prompts, num_resamples, seed)
    replicates = torch.stack(
        [
            maximize_primal(mixture, welfare, [weights], draws, SMOOTHING[-1:])[0]
            for draws in counts[:NUM_PRIMAL_REPLICATES]
        ]
    )
    certificate.of_mixture = True
    certificate.weights, certificate.standard_errors = weights, replicates.std(0)
    certificate.active = (replicates > ACTIVE_WEIGHT_PRIMAL).double().mean(0)
    fractions = effective_sample_fractions(mixture.prompt, mixture.shares(weights)[0])
    certificate.effective_sample_fraction = fractions.mean().item()
    certificate.effective_completions = (fractions * torch.bincount(mixture.prompt)).mean().item()
    certificate.duality_gap = max(0.0, gap)
    certificate.duality_gap_bound = _primal_gap_bound(
        table, best, mixture, weights, replicates, counts, confidence, welfare
    )
    return certificate


def _primal_gap_bound(
    table: DualTable,
    best: torch.Tensor,
    mixture: MixtureTable,
    weights: torch.Tensor,
    replicates: torch.Tensor,
    counts: torch.Tensor,
    confidence: float,
    welfare: Welfare,
) -> float:
    r"""
    Upper confidence bound of min F - G(λ), from \(\hat F\) and \(\hat G\) with their estimated biases, and without
    what fitting to the same completions gains. `replicates` are maximizers of \(\hat G\) for the first rows of
    `counts`.
    """
    (gains, divergence), lacks = mixture.measure(weights), bias_of_mixture(mixture, weights)
    fitted = [
        primal_objective(mixture, found, welfare, draws) - primal_objective(mixture, weights, welfare, draws)
        for found, draws in zip(replicates, counts.unsqueeze(1))
    ]
    optimism = torch.stack(fitted).mean()
    return bound_over_policies(
        table, best, gains + lacks[0], divergence + lacks[1], optimism, counts, confidence, welfare
    )


def bound_over_policies(
    table: DualTable,
    best: torch.Tensor,
    gains: torch.Tensor,
    divergence: torch.Tensor,
    optimism: torch.Tensor,
    counts: torch.Tensor,
    confidence: float,
    welfare: Welfare,
) -> float:
    r"""
    Upper confidence bound of how much more welfare any policy could have than a mixture, min F - G (weak duality).

    Args:
        table ([`DualTable`]): the completions, for F; its bias is estimated and counted in.
        best (`torch.Tensor` of shape `(K,)`): the minimizer of F̂.
        gains (`torch.Tensor` of shape `(P, K)`): contributions of the prompts to the gains of the mixture.
        divergence (`torch.Tensor` of shape `(P,)`): the same for its divergence from the reference.
        optimism (`torch.Tensor`): how much better than the mixture the best weights of a replicate are on it, the mean.
        counts (`torch.Tensor` of shape `(B, P)`): weights of the prompts in every replicate, rows with sum 1.
        confidence (`float`): confidence level.
        welfare ([`~mpo_hf.estimation.welfare.Welfare`]): the welfare function.

    Returns:
        `float`: the bound, in nats; infinite if prompts or completions are too few for any.
    """
    bias = estimate_bias(table, best)
    num_prompts = table.num_prompts
    if num_prompts < MIN_PROMPTS or not bias.is_reliable:
        return math.inf
    values = table.by_prompt(best.unsqueeze(0))[0][:, 0] + bias.value

    def gap(draws: torch.Tensor) -> torch.Tensor:
        return draws @ (values + divergence) - welfare.value(draws @ gains)

    equal = counts.new_full((1, num_prompts), 1 / num_prompts)
    # the sampled maximum is above the maximum of G by as much as G(λ) is below it
    found = gap(equal)[0] + 2 * optimism.clamp(min=0)
    found = found + _student_quantile(confidence, num_prompts - 1) * gap(counts).std()
    return max(0.0, found.item()) if torch.isfinite(found) else math.inf


def _student_quantile(confidence: float, degrees: int) -> float:
    from scipy import stats  # here, as the import takes up to a second

    return float(stats.t.ppf(confidence, degrees))


def _certify_mixture(
    certificate: Certificate,
    mixture: MixtureTable,
    weights: torch.Tensor,
    rewards: torch.Tensor | None,
    dual: "_Bootstrap",
    welfare: Welfare,
) -> None:
    """Fills in the mixture's rewards and its duality gap, both from the prompts of its table."""
    shares, divergence = mixture.shares(weights)
    shares = shares.unsqueeze(-1)
    if rewards is not None:
        found = _mean_rewards(mixture.prompt, shares, rewards, dual.counts)
        certificate.mixture_rewards, certificate.mixture_reward_errors = found
    num_prompts = len(divergence)
    certificate.divergence = divergence.mean().item()
    certificate.divergence_error = (dual.counts @ divergence).std().item()
    gains = sums_by_prompt(mixture.prompt, shares * mixture.gains, num_prompts)
    draws = torch.cat([dual.counts.new_full((1, num_prompts), 1 / num_prompts), dual.counts])
    primal = welfare.value(draws @ gains) - draws @ divergence
    gaps = torch.cat([dual.minimum.reshape(1), dual.minima]) - primal
    # a replicate may have no positive gains, and then no welfare that is a function of these
    error = gaps[1:].std().item() if gaps[1:].isfinite().all() else math.inf
    certificate.mixture_duality_gap, certificate.mixture_duality_gap_error = gaps[0].item(), error


def _mean_rewards(
    prompt: torch.Tensor, shares: torch.Tensor, rewards: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean rewards of completions with the given shares, and standard errors by the bootstrap, `(K,)` each."""
    by_prompt = sums_by_prompt(prompt, shares * rewards, counts.shape[-1])
    return by_prompt.mean(0), (counts @ by_prompt).std(0)


# ---- the bootstrap ----


@dataclass
class _Bootstrap:
    """
    The minimum of F̂ and its minimizer, shape `(K,)`, and those of B replicates, `(B,)` and `(B, K)`, which weight the
    prompts by `counts` of shape `(B, P)`.
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
    Minimizers and minima with the prompts weighted by each row of `counts`. On large tables these are those of the
    quadratic models at `best`, which hardly differ, and take one pass over the table instead of several for each
    replicate.
    """
    if len(table.prompt) * len(counts) <= EXACT_NUMEL or not isinstance(welfare, Polyhedral):
        return minimize_dual(table, counts, start=best, tolerance=REPLICATE_TOLERANCE, welfare=welfare)
    values, gradients, hessians = moments_by_prompt(table, best)
    gradient, hessian = counts @ gradients, torch.einsum("bp,pkl->bkl", counts, hessians)
    found = welfare.quadratic_minimum(best.expand(len(counts), -1), gradient, hessian)
    step = found - best
    change = (gradient * step).sum(-1) + torch.einsum("bk,bkl,bl->b", step, hessian, step) / 2
    return found, counts @ values + change


def bootstrap_counts(num_prompts: int, num_resamples: int, seed: int) -> torch.Tensor:
    """Weights of the prompts in every replicate of a bootstrap over them, shape `(num_resamples, num_prompts)`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num_prompts, (num_resamples, num_prompts), generator=generator)
    counts = torch.zeros(num_resamples, num_prompts, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts)).div_(num_prompts)
