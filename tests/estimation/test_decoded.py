"""Mixtures as they are decoded, token by token: estimates from completions against sums over all of them."""

import math

import pytest
import torch
from decoded_worlds import DecodedWorld
from scipy.optimize import minimize

from mpo_hf.estimation import (
    AlphaFair,
    Constrained,
    CVaR,
    DecodedTable,
    InfeasibleError,
    LogNormalizer,
    MaxMin,
    WeightedSum,
    primal_objective,
)
from mpo_hf.estimation.comparison import compare
from mpo_hf.estimation.decoded import num_terms
from mpo_hf.estimation.decoded_weights import WeightSpace, maximize_decoded, starting_points


UNIFORM = torch.full((3,), 1 / 3, dtype=torch.float64)
BETA = 0.2


@pytest.fixture(scope="module")
def world():
    return DecodedWorld(seed=0, beta=BETA, kind="undertrained")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_normalizers_are_exact_at_their_anchor_and_of_third_order_away_from_it(world, temperature):
    table = world.table(UNIFORM, 20, seed=0, temperature=temperature)
    assert_close(table.logps(UNIFORM), world.logps(UNIFORM, temperature)[world.drawn])
    errors = []
    for step in (0.3, 0.15):
        weights = UNIFORM + step * torch.tensor([1.0, -0.5, -0.5])
        errors.append((table.logps(weights) - world.logps(weights, temperature)[world.drawn]).abs().max().item())
    assert 0 < errors[0] < 0.05
    assert errors[1] < errors[0] / 6  # 8 for a cubic error


def test_derivatives_are_those_of_sums_over_the_vocabulary(world):
    """The packed gradient and Hessian against differences of the exact normalizer."""
    table = world.table(UNIFORM, 5, seed=1)
    step = 1e-3
    for k in range(3):
        ahead, behind = (UNIFORM + sign * step * torch.eye(3, dtype=torch.float64)[k] for sign in (1, -1))
        slope = (world.normalizer(ahead) - world.normalizer(behind))[world.drawn] / (2 * step)
        torch.testing.assert_close(table.normalizer.mean[:, k], slope, atol=1e-4, rtol=0)
    packed = table.normalizer.pack()
    assert packed.shape[-1] == num_terms(3) == 13
    assert torch.equal(LogNormalizer.unpack(packed, 3).covariance, table.normalizer.covariance)
    with pytest.raises(ValueError, match="have 8 numbers a completion, got 13"):
        LogNormalizer.unpack(packed, 2)


def test_all_weight_on_one_policy_is_exact(world):
    table = world.table(UNIFORM, 20, seed=2)
    for k, corner in enumerate(torch.eye(3, dtype=torch.float64)):
        assert torch.equal(table.logps(corner), table.policy_logps[:, k])


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [1.0, 0.0, 0.0]])
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_estimates_are_unbiased(world, weights, temperature):
    """200 tables of two proposals: the mean estimate is within four standard errors of the sum over all completions."""
    weights = torch.tensor(weights, dtype=torch.float64)
    exact = torch.cat([v.reshape(-1) for v in world.reached(weights, temperature)])
    found = []
    for seed in range(200):
        table = world.table([UNIFORM, torch.tensor([0.6, 0.2, 0.2]).double()], 4, seed, temperature)
        gains, divergence = table.measure(weights)
        found.append(torch.cat([gains.mean(0), divergence.mean().reshape(1)]))
    found = torch.stack(found)
    error = found.std(0) / len(found) ** 0.5
    # the expansion is off by less than a hundredth of a nat, and the normalization by the mean weight by O(1/N)
    assert ((found.mean(0) - exact).abs() < 4 * error + 0.02).all(), (found.mean(0) - exact, error)


def test_standard_errors_are_those_of_repetitions(world):
    """Over tables with new prompts and completions; a standard error from 36 prompts is itself off by an eighth."""
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    estimates, errors = [], []
    for seed in range(200):
        table = world.table(UNIFORM, 4, seed, prompts="drawn")
        gains, _ = table.measure(weights)
        estimates.append(gains.mean(0))
        errors.append(gains.std(0) / len(gains) ** 0.5)
    ratio = torch.stack(errors).mean(0) / torch.stack(estimates).std(0)
    assert ((ratio > 0.85) & (ratio < 1.2)).all(), ratio


def test_effective_sample_sizes(world):
    table = world.table(UNIFORM, 8, seed=3)
    assert table.effective_sample_fraction(UNIFORM).item() == pytest.approx(1)
    ratios = table.log_ratios(torch.tensor([0.8, 0.1, 0.1]).double())
    assert table.effective_sample_size(ratios) == pytest.approx(
        (ratios.exp().sum() ** 2 / (2 * ratios).exp().sum()).item()
    )
    assert table.efficiency(UNIFORM, UNIFORM).item() == pytest.approx(1)
    assert table.efficiency(torch.tensor([0.8, 0.1, 0.1]).double(), UNIFORM).item() == pytest.approx(
        table.effective_sample_size(ratios) / len(ratios)
    )


WELFARES = {
    "max_min": MaxMin(),
    "weighted_sum": WeightedSum([0.2, 0.3, 0.5]),
    "cvar": CVaR(0.5, [1 / 3] * 3),
    "nash": AlphaFair(1.0, [1 / 3] * 3),
    "alpha_fair": AlphaFair(3.0, [0.5, 0.25, 0.25]),
    "constrained": Constrained(MaxMin(), [1], 10.0),
}


@pytest.mark.parametrize("name", WELFARES)
def test_maximum_is_that_of_a_fine_grid(world, name):
    table, welfare = world.table(UNIFORM, 40, seed=4), WELFARES[name]
    if name in ("nash", "alpha_fair"):  # gains over the reference
        table.gains = table.gains - table.contributions(table.reference_log_ratios(), table.gains).mean(0)
    space = WeightSpace(3)
    weights, value = maximize_decoded(table, welfare, space, starting_points(space))
    grid = [torch.tensor([i, j, 40 - i - j]).double() / 40 for i in range(41) for j in range(41 - i)]
    best = max(primal_objective(table, point, welfare).item() for point in grid)
    assert value.item() >= best - 1e-7
    assert primal_objective(table, weights, welfare).item() == pytest.approx(value.item())
    assert weights.sum().item() == pytest.approx(1) and (weights >= 0).all()


def test_free_sum_is_no_worse_and_agrees_with_another_solver(world):
    table = world.table(UNIFORM, 40, seed=5, with_reference=True)
    space = WeightSpace(4, free_sum=True)
    weights, value = maximize_decoded(table, MaxMin(), space, starting_points(space))
    fixed = WeightSpace(3)
    _, on_simplex = maximize_decoded(world.table(UNIFORM, 40, seed=5), MaxMin(), fixed, starting_points(fixed))
    assert value > on_simplex + 0.01  # the policies are undertrained
    assert weights[:3].sum() > 1.1 and weights.sum().item() == pytest.approx(1)
    result = minimize(
        lambda w: -primal_objective(table, space.components(torch.tensor(w)), MaxMin()).item(),
        weights[:3].numpy() * 0.97,
        method="Nelder-Mead",
        options={"xatol": 1e-7, "fatol": 1e-10, "maxiter": 2000},
    )
    assert value.item() == pytest.approx(-result.fun, abs=1e-4)


def test_weights_stay_within_reach(world):
    table = world.table(UNIFORM, 40, seed=6)
    space = WeightSpace(3, proposal=UNIFORM, min_efficiency=0.97)
    weights, value = maximize_decoded(table, WeightedSum([1.0, 0.0, 0.0]), space, starting_points(space))
    assert table.efficiency(weights, UNIFORM).item() >= 0.97 - 1e-6
    _, free = maximize_decoded(table, WeightedSum([1.0, 0.0, 0.0]), WeightSpace(3), starting_points(WeightSpace(3)))
    assert value <= free


def test_welfare_without_feasible_weights_is_an_error_with_the_largest_gains(world):
    table = world.table(UNIFORM, 10, seed=7)
    table.gains = table.gains - 100.0
    space = WeightSpace(3)
    with pytest.raises(
        InfeasibleError, match="positive gains for all objectives.*at best they are a -.*Leave a and b and c"
    ):
        maximize_decoded(table, WELFARES["nash"], space, starting_points(space), objectives=["a", "b", "c"])


def test_a_policy_that_rules_tokens_out_gives_finite_estimates(world):
    table = world.table(UNIFORM, 40, seed=8)
    ruled_out = torch.zeros(len(table.prompt), dtype=torch.bool)
    ruled_out[::5] = True
    table.policy_logps[ruled_out, 2] = -math.inf
    weights = torch.tensor([0.4, 0.3, 0.3], dtype=torch.float64, requires_grad=True)
    gains, divergence = table.measure(weights)
    (gains.sum() + divergence.sum()).backward()
    assert gains.isfinite().all() and divergence.isfinite().all() and weights.grad.isfinite().all()
    assert (table.log_ratios(weights.detach())[ruled_out] == -math.inf).all()
    # without weight the policy does not count
    assert table.log_ratios(torch.tensor([0.6, 0.4, 0.0]).double()).isfinite().all()


def test_rows_without_normalizers_say_nothing_of_mixtures(world):
    table = world.table(UNIFORM, 10, seed=9)
    packed = table.normalizer.pack()
    extra = {name: torch.cat([getattr(table, name), getattr(table, name)[:7]]) for name in (
        "prompt", "gains", "policy_logps", "reference_logps", "proposal_logps"
    )}  # fmt: skip
    extra["policy_logps"][-7:], extra["gains"][-7:] = math.nan, 1e6
    unknown = torch.full((7, packed.shape[-1]), math.nan, dtype=torch.float64)
    proposal = torch.cat([table.proposal, torch.ones(7, dtype=torch.long)])
    longer = DecodedTable(proposal=proposal, normalizer=LogNormalizer.unpack(torch.cat([packed, unknown]), 3), **extra)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    ratios = longer.log_ratios(weights)
    assert (ratios[-7:] == -math.inf).all() and torch.equal(ratios[:-7], table.log_ratios(weights))
    assert longer.effective_sample_size(ratios) == pytest.approx(table.effective_sample_size(ratios[:-7]))


def test_comparison_reports_what_each_policy_reaches(world):
    table = world.table(UNIFORM, 400, seed=10)
    rewards = world.rewards.flatten(0, 1)[world.drawn_rows]
    targets = {"uniform": UNIFORM, "policy 0": torch.tensor([1.0, 0.0, 0.0]).double(), "reference": None}
    found, of_first = compare(table, targets, MaxMin(), rewards, BETA), math.nan
    for name, weights in targets.items():
        logps = world.logps(weights) if weights is not None else world.reference
        exact = torch.einsum("py,pyk->k", logps.exp(), world.rewards) / len(logps)
        comparison = found[name]
        assert ((comparison.rewards - exact).abs() < 4 * world.sampling_error(rewards)).all()
        gains, divergence = world.reached_by(logps)
        welfare = BETA * (gains.min() - divergence).item()
        of_first = welfare if name == "uniform" else of_first
        # 36 prompts of which each has its share of completions: the error is that of the completions alone
        assert comparison.welfare == pytest.approx(welfare, abs=0.01)
        assert comparison.less_than_first == pytest.approx(of_first - welfare, abs=0.01)
    assert found["reference"].divergence == found["uniform"].less_than_first == 0


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_densities_of_a_prompt_are_those_of_all_proposals_or_each_its_own(world):
    """Completions of the reference that no policy has scored have no density under the mixture that drew the others."""
    table = world.table([UNIFORM, torch.tensor([0.6, 0.2, 0.2]).double()], 4, seed=11)
    proposals = [tuple(UNIFORM.tolist()), (0.6, 0.2, 0.2), ()]
    together = table.log_densities(proposals)
    exact = [world.logps(weights)[world.drawn] for weights in proposals[:2]]
    torch.testing.assert_close(together, (torch.stack(exact).exp().mean(0)).log(), atol=0.02, rtol=0)
    of_first = (table.prompt == 0).nonzero().squeeze(-1)
    table.proposal[of_first[:2]] = 2
    table.policy_logps[of_first[:2]] = math.nan
    table = DecodedTable(
        **{n: getattr(table, n) for n in ("prompt", "proposal", "gains", "policy_logps", "reference_logps")},
        proposal_logps=table.proposal_logps,
        normalizer=table.normalizer,
    )
    mixed = table.log_densities(proposals)
    assert torch.equal(mixed[of_first], table.proposal_logps[of_first])
    others = table.prompt != 0
    torch.testing.assert_close(mixed[others], together[others])
