"""Welfare functions: the dual that a fit minimizes against the primal problem, solved policy by policy by another solver."""

import functools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from mpo_hf.estimation import DualTable, minimize_dual
from mpo_hf.estimation.welfare import AlphaFair, Constrained, CVaR, MaxMin, WeightedSum, project_to_simplex


BETA, PROMPTS, COMPLETIONS = 0.3, 2, 6
WEIGHTS = [0.5, 0.3, 0.2]


class World:
    """Two prompts with six possible completions each, a reference policy and three rewards."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(PROMPTS, COMPLETIONS, generator=generator, dtype=torch.float64)
        self.reference = logits.softmax(-1)
        self.rewards = torch.rand(PROMPTS, COMPLETIONS, 3, generator=generator, dtype=torch.float64)
        self.of_reference = torch.einsum("py,pyk->k", self.reference, self.rewards) / PROMPTS

    def table(self, shift: torch.Tensor) -> DualTable:
        """All completions, with their probability under the reference."""
        prompt = torch.arange(PROMPTS).repeat_interleave(COMPLETIONS)
        advantages = (self.rewards - shift).reshape(-1, 3) / BETA
        return DualTable(prompt, self.reference.log().flatten(), advantages)

    def policy(self, weights: torch.Tensor) -> torch.Tensor:
        return (self.reference.log() + self.rewards @ weights / BETA).softmax(-1)

    def gains(self, policy, shift: torch.Tensor) -> np.ndarray:
        policy = np.asarray(policy).reshape(PROMPTS, COMPLETIONS)
        return np.einsum("py,pyk->k", policy, self.rewards.numpy()) / PROMPTS - shift.numpy()

    def divergence(self, policy) -> float:
        policy = np.asarray(policy).reshape(PROMPTS, COMPLETIONS)
        return (policy * (np.log(policy.clip(1e-300)) - self.reference.log().numpy())).sum() / PROMPTS

    def primal(self, shift: torch.Tensor, goal, slacks=0, constraints=()) -> tuple[np.ndarray, float]:
        """
        The best policy and what it reaches: `goal(gains, slack variables)` less the divergence, under constraints (the
        same arguments, at least 0), with the probabilities of all completions as variables.
        """
        size = PROMPTS * COMPLETIONS
        split = lambda v: (self.gains(v[:size], shift), v[size:])  # noqa: E731
        each = [
            {"type": "eq", "fun": lambda v, p=p: v[p * COMPLETIONS : (p + 1) * COMPLETIONS].sum() - 1}
            for p in range(PROMPTS)
        ]
        result = minimize(
            lambda v: BETA * self.divergence(v[:size]) - goal(*split(v)),
            np.concatenate([self.policy(torch.full((3,), 0.4, dtype=torch.float64)).flatten(), np.zeros(slacks)]),
            bounds=[(1e-9, 1)] * size + [(None, None)] * slacks,
            constraints=each + [{"type": "ineq", "fun": lambda v, c=c: c(*split(v))} for c in constraints],
            method="SLSQP",
            options={"ftol": 1e-13, "maxiter": 1000},
        )
        return result.x[:size].reshape(PROMPTS, COMPLETIONS), -result.fun


def power_mean(gains: np.ndarray, power: float) -> float:
    gains = gains.clip(1e-9)  # the solver tries others
    if power == 0:
        return math.exp(np.dot(WEIGHTS, np.log(gains)))
    return np.dot(WEIGHTS, gains**power) ** (1 / power)


def check(world: World, welfare, shift: torch.Tensor, policy: np.ndarray, value: float) -> torch.Tensor:
    (weights,), (minimum,) = minimize_dual(world.table(shift), welfare=welfare)
    assert BETA * minimum.item() == pytest.approx(value, abs=2e-6)  # no gap between the dual and the primal problem
    np.testing.assert_allclose(world.policy(weights), policy, atol=2e-3)
    return weights


@pytest.mark.parametrize("seed", range(3))
def test_max_min(seed):
    world = World(seed)
    shift = world.of_reference
    worst = [lambda gains, t, k=k: gains[k] - t[0] for k in range(3)]
    policy, value = world.primal(shift, lambda gains, t: t[0], 1, worst)
    weights = check(world, MaxMin(), shift, policy, value)
    assert weights.sum().item() == pytest.approx(1)


def test_weighted_sum():
    world = World(0)
    policy, value = world.primal(world.of_reference, lambda gains, _: np.dot(WEIGHTS, gains))
    weights = check(world, WeightedSum(WEIGHTS), world.of_reference, policy, value)
    assert weights.tolist() == pytest.approx(WEIGHTS)


@pytest.mark.parametrize("level", [0.25, 0.6, 1.0])
def test_mean_of_the_worst_objectives(level):
    """Against Rockafellar and Uryasev's form, with a threshold and what each objective falls short of it."""
    world = World(1)

    def goal(gains, slack):
        return slack[0] - np.dot(WEIGHTS, slack[1:]) / level

    falls_short = [lambda gains, s, k=k: s[1 + k] - (s[0] - gains[k]) for k in range(3)]
    falls_short += [lambda gains, s, k=k: s[1 + k] for k in range(3)]
    policy, value = world.primal(world.of_reference, goal, 4, falls_short)
    weights = check(world, CVaR(level, WEIGHTS), world.of_reference, policy, value)
    assert (weights <= torch.tensor(WEIGHTS, dtype=torch.float64) / level + 1e-9).all()


@pytest.mark.parametrize("alpha", [0.4, 1, 2, 5])
@pytest.mark.parametrize("seed", range(2))
def test_alpha_fairness(alpha, seed):
    world = World(seed)
    above_zero = [lambda gains, _, k=k: gains[k] - 1e-6 for k in range(3)]
    policy, value = world.primal(world.of_reference, lambda gains, _: power_mean(gains, 1 - alpha), 0, above_zero)
    weights = check(world, AlphaFair(alpha, WEIGHTS), world.of_reference, policy, value)
    gains = torch.tensor(world.gains(policy, world.of_reference))
    # the weights are how much the welfare grows with each gain
    slope = [
        (power_mean((gains + step).numpy(), 1 - alpha) - power_mean((gains - step).numpy(), 1 - alpha)) / 2e-5
        for step in 1e-5 * torch.eye(3, dtype=torch.float64)
    ]
    assert weights.tolist() == pytest.approx(slope, rel=0.02)


@pytest.mark.parametrize("free", ["max_min", "weighted_sum"])
def test_constraints(free):
    world = World(2)
    reachable = np.asarray(
        world.gains(world.policy(torch.tensor([0.0, 0.0, 1.5], dtype=torch.float64)), torch.zeros(3))
    )[2]
    threshold = 0.5 * (world.of_reference[2].item() + reachable)
    shift = torch.cat([world.of_reference[:2], torch.tensor([threshold], dtype=torch.float64)])
    holds = [lambda gains, _: gains[2]]
    if free == "max_min":
        holds += [lambda gains, t, k=k: gains[k] - t[0] for k in range(2)]
        policy, value = world.primal(shift, lambda gains, t: t[0], 1, holds)
        welfare = Constrained(MaxMin(), [2], price=50)
    else:
        policy, value = world.primal(shift, lambda gains, _: gains[:2].mean(), 0, holds)
        welfare = Constrained(WeightedSum([0.5, 0.5]), [2], price=50)
    weights = check(world, welfare, shift, policy, value)
    assert 0 < weights[2] < 50 and weights[:2].sum().item() == pytest.approx(1)
    assert world.gains(world.policy(weights), shift)[2] == pytest.approx(0, abs=1e-4)


def test_a_constraint_that_holds_by_itself_has_no_weight_and_one_out_of_reach_the_price():
    world = World(2)
    for threshold, expected in ((-1.0, 0.0), (2.0, 5.0)):
        shift = torch.tensor([0.0, 0.0, threshold], dtype=torch.float64)
        (weights,), _ = minimize_dual(world.table(shift), welfare=Constrained(MaxMin(), [2], price=5))
        assert weights[2].item() == pytest.approx(expected, abs=1e-9)


def test_families_meet_at_their_ends():
    world = World(0)
    table = world.table(world.of_reference)
    (worst,), _ = minimize_dual(table)
    (narrow,), _ = minimize_dual(table, welfare=CVaR(1e-3, WEIGHTS))
    (averse,), _ = minimize_dual(table, welfare=AlphaFair(400, WEIGHTS))
    (whole,), _ = minimize_dual(table, welfare=CVaR(1, WEIGHTS))
    # counted from further down, where no gain is near 0
    (indifferent,), _ = minimize_dual(world.table(world.of_reference - 0.3), welfare=AlphaFair(0.002, WEIGHTS))
    torch.testing.assert_close(narrow, worst, atol=1e-4, rtol=0)
    torch.testing.assert_close(averse, worst, atol=0.02, rtol=0)
    assert whole.tolist() == pytest.approx(WEIGHTS)
    assert indifferent.tolist() == pytest.approx(WEIGHTS, abs=0.01)


WELFARES = [
    MaxMin(),
    WeightedSum(WEIGHTS),
    CVaR(0.4, WEIGHTS),
    AlphaFair(0.5, WEIGHTS),
    AlphaFair(1, WEIGHTS),
    AlphaFair(3, WEIGHTS),
    Constrained(MaxMin(), [1], 2.0),
]


@pytest.mark.parametrize("welfare", WELFARES, ids=lambda w: type(w).__name__)
def test_value_is_the_smallest_weighted_sum_over_the_set_of_weights(welfare):
    """No point of Λ gives less than U, and some point gives U; many functions at once are minimized as one at a time."""
    generator = torch.Generator().manual_seed(0)
    gains = torch.rand(20, 3, generator=generator, dtype=torch.float64) + 0.05
    points = torch.rand(4000, 3, generator=generator, dtype=torch.float64) * 4
    if isinstance(welfare, AlphaFair):
        inside = welfare.retract(points)
    else:
        inside = welfare.project(points)
    sums = gains @ inside.T
    value = welfare.value(gains)
    assert (sums.min(-1).values >= value - 1e-9).all()
    assert (sums.min(-1).values <= value + 0.05).all()


@pytest.mark.parametrize("welfare", WELFARES, ids=lambda w: type(w).__name__)
def test_several_minima_at_a_time_are_those_of_one_at_a_time(welfare):
    world = World(0)
    table = world.table(world.of_reference)
    prompts = torch.tensor([[0.5, 0.5], [0.3, 0.7], [0.6, 0.4]], dtype=torch.float64)
    together, minima = minimize_dual(table, prompts, welfare=welfare)
    for row in range(3):
        (alone,), (minimum,) = minimize_dual(table, prompts[row : row + 1], welfare=welfare)
        torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=0)
        assert minima[row].item() == pytest.approx(minimum.item(), abs=1e-7)


def distance(to: torch.Tensor, point: np.ndarray) -> float:
    return ((point - to.numpy()) ** 2).sum()


def test_projection_below_caps_is_the_nearest_point():
    generator = torch.Generator().manual_seed(0)
    caps = torch.tensor([0.2, 0.5, 0.4, 0.6], dtype=torch.float64)
    points = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    for point, projected in zip(points, project_to_simplex(points, caps)):
        nearest = minimize(
            functools.partial(distance, point),
            caps.numpy() / caps.sum().item(),
            bounds=[(0, cap) for cap in caps.tolist()],
            constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
            method="SLSQP",
            options={"ftol": 1e-14},
        ).x
        np.testing.assert_allclose(projected, nearest, atol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: WeightedSum([0.5, 0.6]), "sum 1"),
        (lambda: CVaR(0, WEIGHTS), r"in \(0, 1\]"),
        (lambda: AlphaFair(0, WEIGHTS), "above 0"),
        (lambda: AlphaFair(1, [1.0, 0.0]), "above 0"),
        (lambda: Constrained(AlphaFair(1, WEIGHTS), [0], 1.0), "not with AlphaFair"),
        (lambda: Constrained(MaxMin(), [0], math.inf), "price"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
