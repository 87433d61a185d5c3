"""
Estimates from hostile numbers: infinite log-probabilities, rewards that nothing improves, rewards that are no numbers.

Each ends in weights whose optimality a loop over completions confirms, or in an error that names the objective.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from fits import make_args

from mpo_hf.estimation import certify
from mpo_hf.trainer.fit_problem import FitProblem


pytestmark = pytest.mark.integration
NAMES = ["kind", "safe", "short"]
NUM_PROMPTS, NUM_COMPLETIONS, BETA = 5, 6, 0.5
WEIGHTS = [0.5, 0.3, 0.2]
INF = math.inf


@dataclass
class World:
    """All completions of all prompts: log-probabilities under the policies and the reference, and rewards."""

    policies: torch.Tensor
    reference: torch.Tensor
    rewards: torch.Tensor

    def rows(self, proposal: str) -> dict[str, torch.Tensor]:
        """Every completion that a proposal draws, once, with a uniform density."""
        drawn = torch.ones_like(self.reference, dtype=torch.bool)
        if proposal == "reference" and (self.reference > -INF).any(-1).all():
            drawn = self.reference > -INF
        counts = drawn.sum(-1, keepdim=True).double().expand_as(drawn)
        return {
            "prompt": torch.arange(NUM_PROMPTS).unsqueeze(-1).expand_as(drawn)[drawn],
            "proposal_logps": -counts.log()[drawn],
            "policy_logps": self.policies[drawn],
            "reference_logps": self.reference[drawn],
            "rewards": self.rewards[drawn],
        }


def make_world(seed: int = 0) -> World:
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_PROMPTS, NUM_COMPLETIONS)
    reference = torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(-1)
    rewards = torch.rand(*shape, 3, generator=generator, dtype=torch.float64)
    noise = 0.3 * torch.randn(*shape, 3, generator=generator, dtype=torch.float64)
    policies = (reference.unsqueeze(-1) + rewards / BETA + noise).log_softmax(1)
    return World(policies, reference, rewards)


# ---- hostile inputs: each changes a world ----


def policy_excludes(world: World) -> None:
    world.policies[:, :2, 1] = -INF
    world.policies = world.policies.log_softmax(1)


def policies_exclude_differently(world: World) -> None:
    world.policies[:, 0, 0], world.policies[:, 5, 2] = -INF, -INF
    world.policies = world.policies.log_softmax(1)


def policy_is_another_within_its_support(world: World) -> None:
    world.policies[..., 1] = world.policies[..., 0]
    policy_excludes(world)


def policies_have_nothing_in_common(world: World) -> None:
    world.policies[2, :3, 0], world.policies[2, 3:, 2] = -INF, -INF
    world.policies = world.policies.log_softmax(1)


def reference_excludes(world: World) -> None:
    world.reference[:, 0] = -INF
    world.reference = world.reference.log_softmax(1)


def reference_excludes_a_prompt(world: World) -> None:
    world.reference[1] = -INF


def constant(world: World) -> None:
    world.rewards[..., 1] = 0.3


def nearly_constant(world: World) -> None:
    world.rewards[..., 1] = 0.1 + 1.4e-17 * world.rewards[..., 1].round()
    assert len(world.rewards[..., 1].unique()) == 2


def of_the_prompt_alone(world: World) -> None:
    world.rewards[..., 1] = torch.arange(NUM_PROMPTS, dtype=torch.float64).unsqueeze(-1)


def differs_where_the_reference_never_is(world: World) -> None:
    reference_excludes(world)
    world.rewards[:, 1:, 1] = 0.3


def opposed(world: World) -> None:
    world.rewards[..., 2] = 1 - world.rewards[..., 0]


def large(world: World) -> None:
    world.rewards *= 1e3


def small(world: World) -> None:
    world.rewards *= 1e-9


def set_reward(value: float) -> Callable[[World], None]:
    def change(world: World) -> None:
        world.rewards[3, 2, 1] = value

    return change


EXCLUDING = [policy_excludes, policies_exclude_differently, policy_is_another_within_its_support]
FLAT = [constant, nearly_constant, of_the_prompt_alone, differs_where_the_reference_never_is]
OF_THE_REFERENCE = [reference_excludes, differs_where_the_reference_never_is]
HARMLESS = [lambda world: None, *EXCLUDING, reference_excludes, opposed, large, small, *FLAT]

WELFARES = {
    "max_min": {},
    "weighted_sum": {"welfare_weights": WEIGHTS},
    "cvar": {"cvar_level": 0.5, "welfare_weights": WEIGHTS},
    "nash": {"welfare_weights": WEIGHTS},
    "alpha_fair": {"fairness_alpha": 3.0, "welfare_weights": WEIGHTS},
    "constraint": {"welfare": "max_min", "constraints": {"safe": 0.5}},
}


def make_problem(tmp_path, objective: str, welfare: str, **options) -> FitProblem:
    options = {"welfare": welfare, "beta": BETA, **WELFARES[welfare], **options}
    if objective == "achieved":
        options.setdefault("mixing", "sequence")
    return FitProblem(make_args(tmp_path, estimator="mis", objective=objective, **options), NAMES)


# ---- loops that know nothing of tables ----


def welfare_of(problem: FitProblem, gains: list[float]) -> float:
    args = problem.args
    if args.constraints:
        return min(gains[0], gains[2]) + args.constraint_price * min(gains[1], 0)
    if args.welfare == "max_min":
        return min(gains)
    if args.welfare == "weighted_sum":
        return sum(w * g for w, g in zip(WEIGHTS, gains))
    if args.welfare == "cvar":
        total, left = 0.0, args.cvar_level
        for gain, weight in sorted(zip(gains, WEIGHTS)):
            total, left = total + min(weight, left) * gain, left - min(weight, left)
        return total / args.cvar_level
    if min(gains) <= 0:
        return -INF
    if args.welfare == "nash":
        return math.prod(g**w for w, g in zip(WEIGHTS, gains))
    power = 1 - args.fairness_alpha
    return sum(w * g**power for w, g in zip(WEIGHTS, gains)) ** (1 / power)


def product(numbers, weights) -> float:
    """The logarithm of a product of powers; to the power of 0, everything is 1."""
    return sum(w * x for w, x in zip(weights, numbers) if w != 0)


def log_sum(values: list[float]) -> float:
    largest = max(values)
    return -INF if largest == -INF else largest + math.log(sum(math.exp(v - largest) for v in values))


def dual_and_primal(problem: FitProblem, prompt, base, gains, weights) -> tuple[float, float]:
    r"""
    F(λ), and the welfare of the policy \(\propto \exp(b + \lambda \cdot a)\) less its divergence from exp(b), by sums over
    completions. They are equal at the optimum only.
    """
    dual, divergence, expected = 0.0, 0.0, [0.0] * 3
    for x in range(NUM_PROMPTS):
        rows = [j for j in range(len(prompt)) if prompt[j] == x]
        terms = [base[j] + product(gains[j], weights) for j in rows]
        total = log_sum(terms)
        dual += total / NUM_PROMPTS
        for j, term in zip(rows, terms):
            if (share := math.exp(term - total) / NUM_PROMPTS) > 0:
                divergence += share * (term - total - base[j])
                expected = [e + share * g for e, g in zip(expected, gains[j])]
    return dual, welfare_of(problem, expected) - divergence


def check_optimum(problem: FitProblem, estimator, tolerance: float = 1e-6) -> torch.Tensor:
    """The fitted weights, once a loop has found no duality gap and the certificate none either."""
    table = estimator.table
    weights = estimator.best(problem.welfare.start(3))
    numbers = table.prompt.tolist(), table.offsets.tolist(), table.advantages.tolist()
    dual, primal = dual_and_primal(problem, *numbers, weights.tolist())
    assert weights.isfinite().all() and weights.min() >= 0
    assert weights.sum().item() == pytest.approx(1) or not problem.welfare.on_simplex
    assert abs(dual - primal) <= tolerance * (1 + abs(dual))
    found = estimator.certify(weights, problem.mixture_weights(weights), None, num_resamples=20)
    assert abs(found.duality_gap) <= tolerance * (1 + abs(dual))
    return weights


# ---- the dual objective ----


@pytest.mark.parametrize(
    "change, proposal",
    [*itertools.product(HARMLESS, ["mixture"]), *itertools.product(OF_THE_REFERENCE, ["reference"])],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
@pytest.mark.parametrize("welfare", WELFARES)
@pytest.mark.parametrize("scale", ["optimal", "reference", "z_score", "win_rate"])
def test_weights_from_rewards_are_optimal_or_an_error_names_the_objective(tmp_path, scale, welfare, change, proposal):
    positive_gains = welfare in ("nash", "alpha_fair")
    if positive_gains and scale == "optimal":
        scale = "none"
    world, problem = make_world(), make_problem(tmp_path, "reward", welfare, normalize_rewards=scale)
    change(world)
    rows, error = world.rows(proposal), None
    no_z_score = scale == "z_score" and change in (constant, nearly_constant, differs_where_the_reference_never_is)
    if no_z_score:
        error = "rewards of 'safe' are all 0.[13], .* Use another `normalize_rewards`"
    elif positive_gains and change in FLAT:
        error = "No policy .* has 'safe' with a positive gain, .* Leave it out"
    elif positive_gains and change is opposed:
        error = "positive gains for 'kind' and 'short' at once"
    if error is None:
        check_optimum(problem, problem.make_estimator(**rows))
    else:
        with pytest.raises(ValueError, match=error):
            problem.make_estimator(**rows).best(problem.welfare.start(3))


@pytest.mark.parametrize("change", [lambda world: None, *EXCLUDING, reference_excludes], ids=lambda c: c.__name__)
@pytest.mark.parametrize("welfare", ["max_min", "weighted_sum", "cvar"])
@pytest.mark.parametrize("seed", range(3))
def test_weights_from_policies_are_optimal(tmp_path, seed, welfare, change):
    world, problem = make_world(seed), make_problem(tmp_path, "implicit", welfare)
    change(world)
    rows = world.rows("mixture")
    weights = check_optimum(problem, problem.make_estimator(**rows), tolerance=1e-5)
    # and below those of a grid, with all faces of the simplex, for which completions of other policies are not excluded
    if welfare == "max_min":
        numbers = (
            rows["prompt"].tolist(),
            (-rows["proposal_logps"] - math.log(6)).tolist(),
            rows["policy_logps"].tolist(),
        )
        least = min(dual_and_primal(problem, *numbers, point)[0] for point in grid(12))
        assert dual_and_primal(problem, *numbers, weights.tolist())[0] <= least + 1e-5


def test_a_policy_without_weight_excludes_nothing(tmp_path):
    """With a weight of 0 throughout, also completions that only it excludes count."""
    world = make_world()
    policies_have_nothing_in_common(world)
    problem = make_problem(tmp_path, "implicit", "weighted_sum", welfare_weights=[0.4, 0.6, 0.0])
    estimator = problem.make_estimator(**world.rows("mixture"))
    assert estimator.best(problem.welfare.start(3)).tolist() == pytest.approx([0.4, 0.6, 0.0])
    expected = torch.logsumexp(world.policies[..., :2] @ torch.tensor([0.4, 0.6]).double(), dim=-1).mean()
    loss = estimator.loss(torch.tensor([0.4, 0.6, 0.0], dtype=torch.float64))
    assert loss.item() == pytest.approx(expected.item())


def test_policies_without_a_common_completion_have_no_mixture(tmp_path):
    world, problem = make_world(), make_problem(tmp_path, "implicit", "max_min")
    policies_have_nothing_in_common(world)
    with pytest.raises(ValueError, match="prompt 2 .* policy of 'kind' or 'short', .* Draw more completions"):
        problem.make_estimator(**world.rows("mixture"))
    # rewards give weights all the same, and say that what this mixture reaches is not known
    problem = make_problem(tmp_path, "reward", "max_min")
    estimator = problem.make_estimator(**world.rows("mixture"))
    weights = torch.tensor([0.4, 0.3, 0.3], dtype=torch.float64)
    found = estimator.certify(weights, weights, None, num_resamples=10)
    assert not found.mixture_duality_gap < INF


def test_a_reference_that_excludes_a_prompt_is_an_error(tmp_path):
    world, problem = make_world(), make_problem(tmp_path, "reward", "max_min")
    reference_excludes_a_prompt(world)
    with pytest.raises(ValueError, match="completions of prompt 1 have no importance weights: .*reference"):
        problem.make_estimator(**world.rows("mixture"))


@pytest.mark.parametrize("value", [math.nan, INF, -INF, 1e308])
@pytest.mark.parametrize("scale", ["optimal", "reference", "z_score", "win_rate", "none"])
@pytest.mark.parametrize("objective", ["reward", "achieved"])
def test_rewards_that_are_no_numbers_are_refused_by_name(tmp_path, objective, scale, value):
    world, problem = make_world(), make_problem(tmp_path, objective, "max_min", normalize_rewards=scale)
    set_reward(value)(world)
    with pytest.raises(ValueError, match="reward .* of 'safe' is .* in row 20"):
        problem.make_estimator(**world.rows("reference"))


@pytest.mark.parametrize(
    "objective, column",
    [
        *itertools.product(["reward", "achieved"], ["policy_logps", "reference_logps", "proposal_logps"]),
        *itertools.product(["implicit"], ["policy_logps", "proposal_logps"]),
    ],
)
@pytest.mark.parametrize("value", [math.nan, INF])
def test_log_probabilities_that_are_no_numbers_are_refused(tmp_path, objective, column, value):
    problem = make_problem(tmp_path, objective, "max_min")
    rows = make_world().rows("mixture")
    rows[column][20, ...] = value
    if (objective, column) == ("reward", "policy_logps") and math.isnan(value):  # unknown: only others are looked at
        assert 3 not in problem.make_estimator(**rows).table.prompt[problem.make_estimator(**rows).mixture.rows]
        return
    named = "'kind'.* in row 20" if (objective, column) == ("implicit", "policy_logps") else "prompt 3|row 20|1 of 30"
    with pytest.raises(ValueError, match=named):
        problem.make_estimator(**rows)


# ---- the primal objective ----


def grid(count: int) -> list[tuple[float, ...]]:
    """Points of the simplex, with its faces and corners."""
    steps = itertools.product(range(count + 1), repeat=2)
    return [(a / count, b / count, 1 - (a + b) / count) for a, b in steps if a + b <= count]


def reached(problem: FitProblem, rows: dict, gains, weights) -> float:
    """Welfare of a mixture of the given policies, less its divergence, by sums over completions."""
    divergence, expected = 0.0, [0.0] * 3
    for x in range(NUM_PROMPTS):
        members = [j for j in range(len(gains)) if rows["prompt"][j] == x]
        terms = [product(rows["policy_logps"][j].tolist(), weights) for j in members]
        total = log_sum(terms)
        if total == -INF:
            return -INF
        for j, term in zip(members, terms):
            if (share := math.exp(term - total) / NUM_PROMPTS) > 0:
                divergence += share * (term - total - rows["reference_logps"][j].item())
                expected = [e + share * g for e, g in zip(expected, gains[j])]
    return welfare_of(problem, expected) - divergence


@pytest.mark.parametrize(
    "change",
    [lambda world: None, *EXCLUDING, policies_have_nothing_in_common, opposed, *FLAT],
    ids=lambda c: c.__name__,
)
@pytest.mark.parametrize("welfare", ["max_min", "cvar", "constraint"])
def test_what_mixtures_reach_is_the_best_of_all_sets_of_policies(tmp_path, welfare, change):
    world, problem = make_world(), make_problem(tmp_path, "achieved", welfare, normalize_rewards="reference")
    change(world)
    rows = world.rows("reference")
    estimator = problem.make_estimator(**rows)
    weights = estimator.best(torch.full((3,), 1 / 3, dtype=torch.float64))
    gains = estimator.table.advantages.tolist()
    value = reached(problem, rows, gains, weights.tolist())
    assert weights.min() >= 0 and weights.sum().item() == pytest.approx(1)
    assert value == pytest.approx(-estimator.loss(weights).item(), abs=1e-9)
    assert value >= max(reached(problem, rows, gains, point) for point in grid(12)) - 2e-4
    found = estimator.certify(weights, weights, None, num_resamples=10)
    assert found.duality_gap >= 0 and not found.duality_gap_bound < found.duality_gap


def test_a_mixture_that_leaves_the_reference_has_no_primal_objective(tmp_path):
    world, problem = make_world(), make_problem(tmp_path, "achieved", "max_min")
    reference_excludes(world)
    estimator = problem.make_estimator(**world.rows("mixture"))
    with pytest.raises(
        ValueError, match="reference gives 5 of the completions the probability 0, .* row 0.* `objective"
    ):
        estimator.best(torch.full((3,), 1 / 3, dtype=torch.float64))


# ---- no false certainty ----


@pytest.mark.parametrize("change", HARMLESS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("objective", ["reward", "implicit"])
def test_other_weights_are_never_certified_as_good(tmp_path, objective, change):
    world = make_world()
    change(world)
    problem = make_problem(tmp_path, objective, "max_min", normalize_rewards="reference")
    table = problem.make_estimator(**world.rows("mixture")).table
    least = certify(table, num_resamples=10).dual_objective
    numbers = table.prompt.tolist(), table.offsets.tolist(), table.advantages.tolist()
    for point in grid(2):
        gap = dual_and_primal(problem, *numbers, point)[0] - least
        found = certify(table, torch.tensor(point, dtype=torch.float64), num_resamples=100)
        assert found.duality_gap == pytest.approx(gap, abs=1e-6 * (1 + abs(least)))
        assert not found.duality_gap_bound < 0.5 * gap


@pytest.mark.parametrize("welfare", ["nash", "alpha_fair"])
def test_an_objective_that_one_prompt_improves_is_fitted_and_not_certain(tmp_path, welfare):
    """The resamples without this prompt have no policy that improves the objective: the bound must not be small."""
    world, problem = make_world(), make_problem(tmp_path, "reward", welfare)
    world.rewards[1:, :, 1] = 0.3
    estimator = problem.make_estimator(**world.rows("reference"))
    weights = check_optimum(problem, estimator)
    found = estimator.certify(weights, problem.mixture_weights(weights), None, num_resamples=100)
    assert not found.duality_gap_bound < 0.1


@pytest.mark.parametrize("seed", range(4))
def test_where_newtons_method_ends_early_the_certificate_says_how_far_from_the_minimum(tmp_path, seed):
    """Rewards of a million β make the objective piecewise linear up to rounding."""
    world, problem = make_world(seed), make_problem(tmp_path, "reward", "max_min", normalize_rewards="none")
    world.rewards *= 1e6
    estimator = problem.make_estimator(**world.rows("reference"))
    weights = estimator.best(problem.welfare.start(3))
    table = estimator.table
    numbers = table.prompt.tolist(), table.offsets.tolist(), table.advantages.tolist()
    least = min(dual_and_primal(problem, *numbers, point)[0] for point in grid(60))
    found = estimator.certify(weights, weights, None, num_resamples=10)
    assert found.duality_gap >= found.dual_objective - least - 1e-6 * abs(least)


def test_objectives_that_nothing_improves_are_warned_about_by_name(tmp_path, caplog):
    for change in [lambda world: None, *FLAT]:
        caplog.clear()
        world, problem = make_world(), make_problem(tmp_path, "reward", "max_min", normalize_rewards="reference")
        change(world)
        weights = problem.make_estimator(**world.rows("reference")).best(problem.welfare.start(3))
        problem.warn_of_flat_objectives()
        problem.warn_of_flat_objectives()
        told = [record.message for record in caplog.records]
        assert len(told) == (change in FLAT)
        if told:
            assert "rewards of 'safe' are the same" in told[0] and "Leave this objective out" in told[0]
            assert np.argmax(weights.tolist()) == 1  # which takes the weight, as it is the worst off


@pytest.mark.parametrize("threshold, told", [(0.5, False), (2.0, True)])
def test_a_constraint_out_of_reach_is_warned_about_by_name(tmp_path, caplog, threshold, told):
    problem = make_problem(tmp_path, "reward", "constraint", constraints={"safe": threshold})
    weights = problem.make_estimator(**make_world().rows("reference")).best(problem.welfare.start(3))
    problem.warn_of_weights(weights)
    assert any("constraint of 'safe'" in record.message for record in caplog.records) == told


def test_a_weight_that_is_a_large_power_is_warned_about_by_name(tmp_path, caplog):
    for scale, told in ((1.0, False), (1e-6, True)):
        world, problem = make_world(), make_problem(tmp_path, "reward", "nash")
        world.rewards[..., 1] *= scale
        weights = check_optimum(problem, problem.make_estimator(**world.rows("reference")))
        problem.warn_of_weights(weights)
        assert any("weight of 'safe'" in record.message for record in caplog.records) == told
