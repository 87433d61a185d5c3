"""Certificates of weights that were fitted to what is decoded."""

import math

import torch

from .certificate import ACTIVE_WEIGHT_PRIMAL, Certificate, bootstrap_counts, bound_over_policies
from .comparison import compare
from .decoded import DecodedTable
from .decoded_weights import WeightSpace
from .dual import minimize_dual
from .gap_bound import BOOTSTRAP_SHARE
from .tables import DualTable
from .welfare import InfeasibleError, Welfare


# Half the distance, in weights, of the points from which the contributions of the prompts are interpolated.
STEP = 0.02
# The best weights of a replicate are looked for among so many random points at each of these distances.
NUM_POINTS = 400
DISTANCES = (0.003, 0.01, 0.03, 0.1, 0.3)
# Fewer prompts say too little of how prompts vary: the quantile of a bootstrap over them is too small.
MIN_PROMPTS_OF_BOUND = 10
# The part of the error probability that is kept for what the bootstrap does not know (BOOTSTRAP_SHARE) is not enough: with few effective completions the
# fitted weights are further from the best ones than those of the replicates are from them. In simulations of 36 prompts the
# 95% quantile of the replicates covered 70 to 92%; see tests/estimation/test_decoded_bound.py.
SMALL_SAMPLE = 100.0


def certify_decoded(
    table: DualTable,
    completions: DecodedTable,
    weights: torch.Tensor,
    welfare: Welfare,
    space: WeightSpace,
    rewards: torch.Tensor,
    num_resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> Certificate:
    r"""
    A certificate of weights that were fitted by [`maximize_decoded`]: an upper confidence bound of how much better the best
    weights within reach of the completions are, and of how much better any policy could be (weak duality).

    Args:
        table ([`DualTable`]): the completions, for F.
        completions ([`DecodedTable`]): the same completions, for G.
        weights (`torch.Tensor` of shape `(M,)`): the mixture weights.
        welfare ([`~mpo_hf.estimation.welfare.Welfare`]): the welfare function.
        space ([`WeightSpace`]): the weights that they were chosen from.
        rewards (`torch.Tensor` of shape `(N, K)`): rewards of the completions, on their own scale.
        num_resamples (`int`, *optional*, defaults to 200): number of bootstrap replicates.
        confidence (`float`, *optional*, defaults to 0.95): confidence level of the bounds.
        seed (`int`, *optional*, defaults to 0): seed of the replicates.

    Returns:
        [`Certificate`]
    """
    if completions.num_prompts < 2:
        raise ValueError("A certificate needs completions of at least 2 prompts, got 1.")
    counts = bootstrap_counts(completions.num_prompts, num_resamples, seed)
    gaps, found = _gaps(completions, weights, welfare, space, counts, seed)
    effective = completions.effective_sample_size(completions.log_ratios(weights))
    reached = compare(completions, {"": weights}, welfare, rewards)[""]
    certificate = Certificate(
        weights=space.chosen(weights),
        standard_errors=found.std(0),
        dual_objective=math.inf,
        duality_gap=math.inf,
        duality_gap_bound=math.inf,
        confidence=confidence,
        active=(found > ACTIVE_WEIGHT_PRIMAL).double().mean(0),
        effective_sample_fraction=completions.effective_sample_fraction(weights).item(),
        effective_completions=effective / completions.num_prompts,
        num_prompts=completions.num_prompts,
        mixture_rewards=reached.rewards,
        mixture_reward_errors=reached.reward_errors,
        of_mixture=True,
        optimality_gap_bound=math.inf,
        divergence=reached.divergence,
        divergence_error=reached.divergence_error,
    )
    if completions.num_prompts >= MIN_PROMPTS_OF_BOUND and gaps.isfinite().all():
        level = 1 - BOOTSTRAP_SHARE * (1 - confidence)
        certificate.optimality_gap_bound = (1 + SMALL_SAMPLE / effective) * gaps.quantile(level).item()
    _compare_with_any_policy(certificate, table, completions, weights, welfare, counts, gaps.mean())
    return certificate


def _compare_with_any_policy(
    certificate: Certificate,
    table: DualTable,
    completions: DecodedTable,
    weights: torch.Tensor,
    welfare: Welfare,
    counts: torch.Tensor,
    optimism: torch.Tensor,
) -> None:
    """Fills in how much more welfare any policy could have, by weak duality."""
    try:
        (best,), _ = minimize_dual(table, welfare=welfare)
    except InfeasibleError:  # of any policy over these completions, by estimates that are not those of G
        return
    gains, divergence = completions.measure(weights)
    certificate.dual_objective = table.by_prompt(best.unsqueeze(0))[0].mean().item()
    gap = certificate.dual_objective - (welfare.value(gains.mean(0)) - divergence.mean()).item()
    certificate.mixture_duality_gap, certificate.duality_gap = gap, max(0.0, gap)
    certificate.duality_gap_bound = bound_over_policies(
        table, best, gains, divergence, optimism, counts, certificate.confidence, welfare
    )


def _gaps(
    completions: DecodedTable,
    weights: torch.Tensor,
    welfare: Welfare,
    space: WeightSpace,
    counts: torch.Tensor,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    How much better the best weights of every replicate are on it, shape `(B,)`, and these weights, `(B, size)`. They are the
    best of random points around the fitted ones, where the contributions of the prompts are quadratic functions.
    """
    model = _QuadraticModel(completions, space.chosen(weights), space)
    steps = _random_steps(model.directions, space.chosen(weights), seed)
    values = counts @ model.coefficients.flatten(1)  # of the replicates, (B, Q * (K + 1))
    values = values.unflatten(1, model.coefficients.shape[1:])
    columns = torch.einsum("cq,bqk->bck", model.terms(steps), values)
    objective = welfare.value(columns[..., :-1]) - columns[..., -1]
    best = objective.argmax(1)
    gaps = objective.gather(1, best.unsqueeze(1)).squeeze(1) - objective[:, 0]
    return gaps, space.chosen(weights) + (steps @ model.directions)[best]


def _random_steps(directions: torch.Tensor, chosen: torch.Tensor, seed: int) -> torch.Tensor:
    """No step, and random ones at several distances that leave all weights at 0 or above, shape `(C, D)`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(DISTANCES), NUM_POINTS, len(directions))
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    drawn = drawn / drawn.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    lengths = torch.tensor(DISTANCES, dtype=torch.float64)[:, None, None]
    steps = (lengths * torch.rand(shape[:-1], generator=generator, dtype=torch.float64).unsqueeze(-1) * drawn).flatten(
        0, 1
    )
    moves = steps @ directions
    # a weight that would become negative stops at 0: the step is shortened to that
    room = torch.where(moves < 0, chosen / -moves.clamp(max=-1e-300), torch.inf).amin(-1, keepdim=True)
    return torch.cat([torch.zeros(1, len(directions), dtype=torch.float64), steps * room.clamp(max=1)])


class _QuadraticModel:
    """
    The contributions of the prompts to the gains and the divergence as quadratic functions of a step from given weights.

    Attributes:
        directions (`torch.Tensor` of shape `(D, size)`): a basis of the steps.
        coefficients (`torch.Tensor` of shape `(P, Q, K + 1)`): by prompt, of the terms of a step.
    """

    def __init__(self, completions: DecodedTable, chosen: torch.Tensor, space: WeightSpace):
        self.directions = _basis(space)
        self._pairs = torch.triu_indices(len(self.directions), len(self.directions))
        # inside of the simplex by enough for steps in all directions; the functions are smooth there
        inner = (chosen + 2 * STEP).clamp(min=2 * STEP)
        inner = inner if space.free_sum else inner / inner.sum() * chosen.sum()
        count = len(self.directions)
        axes = torch.eye(count, dtype=torch.float64)
        steps = [torch.zeros(count, dtype=torch.float64), *(STEP * axes), *(-STEP * axes)]
        steps += [STEP * (axes[i] + axes[j]) for i in range(count) for j in range(i + 1, count)]
        points = torch.stack(steps)
        measured = [completions.measure(space.components(point)) for point in inner + points @ self.directions]
        values = [torch.cat([gains, divergence.unsqueeze(-1)], dim=-1) for gains, divergence in measured]
        # steps are counted from the chosen weights, and the functions are interpolated around the inner ones
        self._offset = torch.zeros(count, dtype=torch.float64)
        self.coefficients = torch.linalg.solve(
            self.terms(points), torch.stack(values, dim=1)
        )  # as many points as terms
        self._offset = torch.linalg.lstsq(self.directions.T, (chosen - inner).unsqueeze(-1)).solution.squeeze(-1)

    def terms(self, steps: torch.Tensor) -> torch.Tensor:
        """1, the steps and the products of their entries: shape `(C, Q)`."""
        steps = steps + self._offset
        products = steps[:, self._pairs[0]] * steps[:, self._pairs[1]]
        return torch.cat([torch.ones(len(steps), 1, dtype=torch.float64), steps, products], dim=-1)


def _basis(space: WeightSpace) -> torch.Tensor:
    """A basis of the changes of the chosen weights: all of them, or those that leave the sum."""
    eye = torch.eye(space.size, dtype=torch.float64)
    return eye if space.free_sum else torch.linalg.svd(eye - 1 / space.size)[2][:-1]
