"""Completions that some policy or the reference gives the probability 0, and tables that are none, against loops."""

import itertools
import math

import pytest
import torch

from mpo_hf.estimation import (
    AlphaFair,
    Constrained,
    CVaR,
    DualTable,
    InfeasibleError,
    MaxMin,
    MixtureTable,
    WeightedSum,
    certify,
    implicit_table,
    minimize_dual,
    primal_objective,
    reward_table,
)
from mpo_hf.estimation.objectives import implicit_dual_objective, on_policy_objective
from mpo_hf.estimation.tables import log_product, log_shares


INF = math.inf
THIRD = [1 / 3] * 3


def draw_logps(seed: int, zeros: int, num_prompts: int = 4, count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of rows, and log-probabilities with `zeros` zeros under each of three policies, in random places."""
    generator = torch.Generator().manual_seed(seed)
    logps = torch.randn(num_prompts, count, 3, generator=generator, dtype=torch.float64)
    for x, k in itertools.product(range(num_prompts), range(3)):
        logps[x, torch.randperm(count - 1, generator=generator)[:zeros], k] = -INF  # the last one is nobody's zero
    return torch.arange(num_prompts).repeat_interleave(count), logps.log_softmax(1).flatten(0, 1)


def power_product(logps: list[float], weights: list[float]) -> float:
    """A product of powers of probabilities; the power of 0 is 1, also of 0."""
    return math.prod(math.exp(x) ** w for x, w in zip(logps, weights) if w != 0)


@pytest.mark.parametrize("zeros", [0, 1, 3])
@pytest.mark.parametrize("weights", [[0.2, 0.5, 0.3], [0.0, 0.4, 0.6], [0.0, 0.0, 1.0], [1.3, 0.2, 0.0]])
def test_products_and_their_gradients_are_those_of_a_loop(weights, zeros):
    _, logps = draw_logps(0, zeros)
    excluded = logps == -INF
    for rows, point in ((logps, weights), (logps.view(4, 6, 3), weights)):
        point = torch.tensor(point, dtype=torch.float64, requires_grad=True)
        found = log_product(rows, point, (rows == -INF) if zeros else None)
        expected = [power_product(row, weights) for row in logps.tolist()]
        torch.testing.assert_close(found.exp().flatten(), torch.tensor(expected, dtype=torch.float64))
        found.flatten().logsumexp(0).backward()
        used = torch.tensor([w != 0 for w in weights])
        shares = torch.tensor(expected, dtype=torch.float64) / sum(expected)
        mean = (shares.unsqueeze(-1) * logps.masked_fill(excluded, 0)).sum(0)  # of what has shares
        torch.testing.assert_close(point.grad[used], mean[used])


@pytest.mark.parametrize(
    "welfare", [MaxMin(), CVaR(0.5, THIRD), WeightedSum([0.5, 0.5, 0.0])], ids=lambda w: type(w).__name__
)
@pytest.mark.parametrize("zeros", [0, 1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_minimum_is_below_all_points_and_attained_up_to_little(welfare, zeros, seed):
    """Of the weights' set with its faces; replicates are minimized in the same way, and certified."""
    prompt, logps = draw_logps(seed, zeros)
    table = implicit_table(prompt, logps, torch.full((24,), -math.log(6), dtype=torch.float64))
    (weights,), (minimum,) = minimize_dual(table, welfare=welfare)
    points = welfare.project(torch.distributions.Dirichlet(torch.ones(3).double()).sample((300,)))
    faces = welfare.project(
        torch.tensor([*torch.eye(3).tolist(), [0.5, 0.5, 0], [0, 0.5, 0.5], [0.5, 0, 0.5]]).double()
    )
    values = table.by_prompt(torch.cat([points, faces]))[0].mean(0)
    by_prompt = [sum(power_product(row, weights.tolist()) for row in logps[prompt == x].tolist()) for x in range(4)]
    assert sum(map(math.log, by_prompt)) / 4 == pytest.approx(minimum.item(), abs=2e-5)
    assert minimum.item() <= values.min().item() + 1e-9
    found = certify(table, weights, num_resamples=20, welfare=welfare)
    assert 0 <= found.duality_gap <= 2e-5
    assert found.standard_errors.isfinite().all() and found.effective_sample_fraction > 0
    worse = certify(table, points[0], num_resamples=20, welfare=welfare)
    assert worse.duality_gap == pytest.approx((values[0] - minimum).item(), abs=1e-9)


def test_a_minimum_at_the_end_of_an_excluding_policy_keeps_a_weight_for_it():
    """The second policy is the first one, within its support: the best mixture excludes what it excludes."""
    logps = torch.tensor([[0.5, 0.3, 0.2], [0.0, 0.6, 0.4]], dtype=torch.float64).log().T
    table = implicit_table(torch.zeros(3).long(), logps, torch.full((3,), -math.log(3), dtype=torch.float64))
    (weights,), (minimum,) = minimize_dual(table)
    assert minimum.item() == pytest.approx(math.log(0.5), abs=1e-9)
    assert 0 < weights[1] < 1e-5 and weights.sum().item() == pytest.approx(1)
    value = table.by_prompt(torch.stack([weights, torch.tensor([1.0, 0.0]).double()]))[0][0]
    assert value[0].item() == pytest.approx(minimum.item(), abs=1e-5) and value[1].item() == pytest.approx(0)


def test_prompts_without_a_shared_completion_are_an_error_with_names():
    logps = torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64).log()
    prompt, density = torch.tensor([0, 0, 1, 1]), torch.full((4,), -math.log(2), dtype=torch.float64)
    for names, told in ((None, "objective 0 or objective 1"), (["kind", "safe"], "'kind' or 'safe'")):
        table = implicit_table(prompt, logps, density, names)
        with pytest.raises(ValueError, match=f"prompt 1 .* policy of {told}, .*`proposal"):
            minimize_dual(table)
        assert minimize_dual(table, welfare=WeightedSum([1.0, 0.0]))[0].tolist() == [[1.0, 0.0]]
        with pytest.raises(ValueError, match=f"policy of {told}"):
            half = torch.tensor([0.5, 0.5], dtype=torch.float64)
            implicit_dual_objective(half, logps.view(2, 2, 2), density.view(2, 2), names)


@pytest.mark.parametrize("weights", [[0.5, 0.5, 0.0], [0.0, 0.3, 0.7]])
def test_mirror_descents_objective_has_the_gradient_of_what_is_not_excluded(weights):
    _, logps = draw_logps(1, 2)
    density = torch.full((4, 6), -math.log(6), dtype=torch.float64)
    point = torch.tensor(weights, dtype=torch.float64, requires_grad=True)
    value, _ = implicit_dual_objective(point, logps.view(4, 6, 3), density)
    value.backward()
    step = 1e-6
    for k in [k for k in range(3) if weights[k]]:
        up, down = ([w + sign * step * (i == k) for i, w in enumerate(weights)] for sign in (1, -1))
        values = [
            sum(math.log(sum(power_product(row, w) for row in prompt)) for prompt in logps.view(4, 6, 3).tolist()) / 4
            for w in (up, down)
        ]
        assert point.grad[k].item() == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-6)


def test_on_policy_objective_counts_nothing_of_completions_without_a_share():
    ones = torch.zeros(1, 3, dtype=torch.float64)
    pooled, reference = torch.tensor([[-INF, -1.0, -2.0]]).double(), torch.tensor([[-INF, -1.5, -1.0]]).double()
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64, requires_grad=True)
    advantages = torch.rand(1, 3, 2, dtype=torch.float64)
    value, _ = on_policy_objective(weights, advantages, pooled, ones, reference)
    without, _ = on_policy_objective(weights, advantages[:, 1:], pooled[:, 1:], ones[:, 1:], reference[:, 1:])
    # the mean over three completions instead of two, in the normalizer
    assert value.item() == pytest.approx(without.item() + math.log(2 / 3))
    assert value.isfinite()


# ---- mixtures of the given policies ----


def small_mixture(policies: list[list[float]], reference: list[float]) -> MixtureTable:
    """One prompt, with completions of a uniform proposal."""
    count = len(reference)
    return MixtureTable(
        torch.zeros(count).long(),
        torch.arange(count, dtype=torch.float64).unsqueeze(-1),
        (torch.tensor(policies, dtype=torch.float64) * count).log().T,
        (torch.tensor(reference, dtype=torch.float64) * count).log(),
    )


@pytest.mark.parametrize(
    "weights, policy",
    [
        ([1.0, 0.0, 0.0], [0.5, 0.25, 0.25]),
        ([0.0, 1.0, 0.0], [0.0, 0.5, 0.5]),
        ([0.5, 0.5, 0.0], [0.0, 0.5, 0.5]),
        ([0.0, 1.5, -0.5], [0.0, 0.5, 0.5]),  # a negative power of 0 beside a positive one
    ],
)
def test_a_mixture_is_measured_without_what_it_excludes(weights, policy):
    table = small_mixture([[0.5, 0.25, 0.25], [0.0, 0.5, 0.5], [0.0, 0.5, 0.5]], [0.2, 0.4, 0.4])
    shares, (divergence,) = table.shares(torch.tensor(weights, dtype=torch.float64))
    assert shares.tolist() == pytest.approx(policy)
    expected = sum(p * math.log(p / q) for p, q in zip(policy, [0.2, 0.4, 0.4]) if p)
    assert divergence.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "policies, reference, weights",
    [
        ([[0.5, 0.5], [0.5, 0.5]], [0.0, 1.0], [0.5, 0.5]),  # the reference excludes what the mixture has
        ([[1.0, 0.0], [0.0, 1.0]], [0.5, 0.5], [0.5, 0.5]),  # nothing is left
        ([[0.5, 0.5], [0.0, 1.0]], [0.5, 0.5], [1.5, -0.5]),  # a negative power of 0
    ],
)
def test_a_mixture_with_an_infinite_divergence_has_no_welfare(policies, reference, weights):
    table, weights = small_mixture(policies, reference), torch.tensor(weights, dtype=torch.float64)
    assert table.shares(weights)[1].item() == INF
    assert primal_objective(table, weights, MaxMin()).item() == -INF
    assert primal_objective(table, weights, MaxMin(), torch.ones(3, 1).double()).tolist() == [-INF] * 3


# ---- gains that no policy has ----


def gains_table(*columns: list[float], names=None) -> DualTable:
    """Two prompts with three completions each, equally likely under the reference."""
    advantages = torch.tensor(columns, dtype=torch.float64).T
    return DualTable(torch.tensor([0, 0, 0, 1, 1, 1]), torch.full((6,), -math.log(3)).double(), advantages, names)


UP, DOWN, FLAT = [1.0, 0.0, -1.0, 2.0, -1.0, -1.0], [-1.0, 0.0, 1.0, -2.0, 1.0, 1.0], [0.0] * 6
OTHER = [0.0, 1.0, -1.0, 0.0, 1.0, -1.0]


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(
    "columns, objectives",
    [
        ([UP, OTHER, FLAT], [2]),
        ([UP, [1e-17] * 3 + [-1e-17] * 3, OTHER], [1]),  # rounding errors
        ([UP, OTHER, [-0.3] * 6], [2]),  # below the baseline throughout
        ([UP, DOWN, OTHER], [0, 1]),
        ([UP, OTHER, [-u - 2 * o for u, o in zip(UP, OTHER)]], [0, 1, 2]),
        ([[g - 3 for g in UP], OTHER, UP], [0]),
    ],
)
def test_welfare_of_gains_that_no_policy_has_is_an_error_with_their_names(alpha, columns, objectives):
    table, welfare = gains_table(*columns, names=["kind", "safe", "short"]), AlphaFair(alpha, THIRD)
    with pytest.raises(
        InfeasibleError, match=" and ".join(f"'{['kind', 'safe', 'short'][k]}'" for k in objectives)
    ) as error:
        minimize_dual(table, welfare=welfare)
    assert error.value.objectives == objectives
    with pytest.raises(InfeasibleError):
        certify(table, welfare=welfare)
    # minima of replicates are limits, or lower bounds of them
    _, minima = minimize_dual(table, torch.tensor([[0.5, 0.5], [1.0, 0.0]]).double(), welfare=welfare)
    assert not minima.isnan().any()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("gain", [1e-8, 1e-3, 1.0])
def test_small_gains_of_some_policy_are_enough(alpha, gain):
    """Opposed objectives, but for a completion that is good for both."""
    better = [gain if j == 1 else g for j, g in enumerate(DOWN)]
    table = gains_table(UP, better)
    table.advantages[1] = gain
    (weights,), (minimum,) = minimize_dual(table, welfare=AlphaFair(alpha, [0.5, 0.5]))
    assert weights.isfinite().all() and minimum.isfinite()


def test_welfare_over_a_bounded_set_needs_no_gains():
    table = gains_table(UP, DOWN, FLAT)
    for welfare in (MaxMin(), CVaR(0.5, THIRD), WeightedSum(THIRD), Constrained(MaxMin(), [2], 5.0)):
        (weights,), (minimum,) = minimize_dual(table, welfare=welfare)
        assert weights.isfinite().all() and minimum.isfinite()


# ---- tables that are none ----


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt": torch.tensor([0, 0, 2, 2])}, "prompt 1 has no completion"),
        ({"offsets": torch.tensor([0.0, 0.0, -INF, -INF])}, "prompt 1 has no completion"),
        ({"offsets": torch.tensor([0.0, math.nan, 0.0, 0.0])}, "nan in row 1, of prompt 0"),
        ({"advantages": torch.tensor([[0.0, math.nan]] * 4)}, "`advantages` of 'safe' contains nan in row 0"),
        ({"advantages": torch.tensor([[0.0, 1.0]] * 3 + [[INF, 1.0]])}, "'kind' contains inf in row 3"),
        (
            {"advantages": torch.tensor([[0.0, -1e200]] * 4, dtype=torch.float64)},
            "'safe' contains -1e.200 .*raise `beta`",
        ),
    ],
)
def test_numbers_that_make_no_table_are_refused_with_their_place(change, message):
    good = {"prompt": torch.tensor([0, 0, 1, 1]), "offsets": torch.zeros(4), "advantages": torch.zeros(4, 2)}
    with pytest.raises(ValueError, match=message):
        DualTable(**{**good, **change}, objective_names=["kind", "safe"])


@pytest.mark.parametrize("ratios", [[0.0, -INF, -INF], [0.0, INF, 0.0], [0.0, math.nan, 0.0]])
def test_prompts_without_importance_weights_are_refused(ratios):
    ratios = torch.tensor(ratios, dtype=torch.float64)
    with pytest.raises(ValueError, match="completions of prompt 1 have no importance weights"):
        log_shares(torch.tensor([0, 1, 1]), ratios)
    with pytest.raises(ValueError, match="completions of prompt 1 have no importance weights"):
        reward_table(torch.tensor([0, 1, 1]), torch.zeros(3, 2).double(), ratios, torch.zeros(3).double())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gains": torch.tensor([[0.0], [-INF]])}, "`gains` contains -inf in row 1"),
        ({"policy_log_ratios": torch.tensor([[0.0], [math.nan]])}, "`policy_log_ratios` contains nan in row 1"),
        ({"reference_log_ratios": torch.tensor([INF, 0.0])}, "`reference_log_ratios` contains inf in row 0"),
    ],
)
def test_numbers_that_make_no_mixture_are_refused_with_their_place(change, message):
    good = {"prompt": torch.tensor([0, 1]), "gains": torch.zeros(2, 1)}
    good |= {"policy_log_ratios": torch.zeros(2, 1), "reference_log_ratios": torch.zeros(2)}
    with pytest.raises(ValueError, match=message):
        MixtureTable(**{**good, **change})
