"""The bias of the dual objective, against deletions in loops and the enumeration of all samples of a small world."""

import itertools
import math

import pytest
import torch

from mpo_hf.estimation import (
    AlphaFair,
    Constrained,
    CVaR,
    DualTable,
    MaxMin,
    RewardScale,
    certify,
    implicit_table,
    minimize_debiased,
    minimize_dual,
    reward_table,
)
from mpo_hf.estimation.bias import MAX_RATIO, estimate_bias, metric, moments_by_prompt
from mpo_hf.estimation.gap_bound import _gaps_of_models, _studentized_errors, gap_bound


THIRDS = [1 / 3] * 3
WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)


def draw(seed: int, sizes: list[int], spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompts of rows in mixed order, rewards of three objectives, and log-ratios of reference and proposal."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.repeat_interleave(torch.tensor(sizes))
    prompt = prompt[torch.randperm(len(prompt), generator=generator)]
    rows = torch.randn(len(prompt), 4, generator=generator, dtype=torch.float64)
    return prompt, spread * rows[:, :3], 0.5 * rows[:, 3]


def make_table(kind: str, prompt: torch.Tensor, rewards: torch.Tensor, log_ratios: torch.Tensor) -> DualTable:
    if kind == "implicit":
        return implicit_table(prompt, rewards, -log_ratios)
    gains = RewardScale(kind, 1.0)(rewards, prompt, log_ratios)
    return reward_table(prompt, gains, log_ratios, torch.zeros_like(log_ratios), normalize=False)


def at(table: DualTable, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The terms of F̂ and their gradients, the latter by differentiation."""
    weights = weights.clone().requires_grad_()
    values = table.by_prompt(weights.unsqueeze(0))[0][:, 0]
    gradients = [torch.autograd.grad(value, weights, retain_graph=True)[0] for value in values]
    return values.detach(), torch.stack(gradients)


@pytest.mark.parametrize("kind", ["optimal", "regret", "reference", "none", "implicit"])
def test_jackknife_is_that_of_tables_made_again_without_each_completion(kind):
    """Baselines and self-normalized importance weights are then those of the other completions."""
    sizes = [5, 7, 4]
    prompt, rewards, log_ratios = draw(0, sizes)
    _, whole = at(make_table(kind, prompt, rewards, log_ratios), WEIGHTS)
    expected = torch.zeros_like(whole)
    for x, size in enumerate(sizes):
        rows = (prompt == x).nonzero().squeeze(-1)
        for left_out in range(size):
            others = torch.cat([rows[:left_out], rows[left_out + 1 :]])
            alone = make_table(kind, torch.zeros(size - 1).long(), rewards[others], log_ratios[others])
            expected[x] += (size - 1) / size * (whole[x] - at(alone, WEIGHTS)[1][0])
    found = estimate_bias(make_table(kind, prompt, rewards, log_ratios), WEIGHTS)
    torch.testing.assert_close(found.jackknife, expected, atol=1e-10, rtol=1e-8)


def every_sample(outcomes: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All samples of a prompt with equally likely completions, one prompt each: the mean over them is the expectation."""
    samples = list(itertools.product(range(len(outcomes)), repeat=size))
    prompt = torch.arange(len(samples)).repeat_interleave(size)
    return prompt, outcomes[torch.tensor(samples).flatten()]


@pytest.mark.parametrize("kind", ["optimal", "none"])
def test_estimated_bias_is_that_of_all_samples_of_a_small_world(kind):
    generator = torch.Generator().manual_seed(1)
    outcomes = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    exact = make_table(kind, torch.zeros(4).long(), outcomes, torch.zeros(4).double())
    true_value, true_gradient = at(exact, WEIGHTS)
    prompt, rewards = every_sample(outcomes, 5)
    table = make_table(kind, prompt, rewards, torch.zeros(len(prompt)).double())
    values, gradients, _ = moments_by_prompt(table, WEIGHTS)
    found = estimate_bias(table, WEIGHTS)
    along = metric(gradients.mean(0), moments_by_prompt(exact, WEIGHTS)[2].mean(0), MaxMin())
    bias = true_gradient[0] - gradients.mean(0)
    size = bias @ along @ bias

    def left(estimate: torch.Tensor) -> float:
        rest = bias - estimate.mean(0)
        return (rest @ along @ rest / size).item()

    lacks = (true_value[0] - values.mean()).item()
    assert abs(lacks) > 0.005 and abs(lacks - found.value.mean().item()) < 0.25 * abs(lacks)
    assert left(found.jackknife) < 0.2 and left(found.extrapolated) < 0.2
    assert found.ratio == pytest.approx(0.5, abs=0.15)


def sample(seed: int, num_prompts: int, size: int, shape: str, scale: float) -> DualTable:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(num_prompts * size, 3, generator=generator, dtype=torch.float64)
    rewards = (drawn > 0.95).double() if shape == "rare" else torch.special.ndtri(drawn)
    prompt = torch.arange(num_prompts).repeat_interleave(size)
    rewards = rewards * scale * torch.tensor([1.0, 0.9, 0.8], dtype=torch.float64)
    return make_table("optimal", prompt, rewards, torch.zeros(len(prompt)).double())


@pytest.mark.parametrize(
    "num_prompts, size, shape, scale, bounds",
    [
        (60, 32, "normal", 1.0, True),
        (60, 32, "normal", 25.0, False),  # hardly more than one completion counts
        (7, 32, "normal", 1.0, False),  # too few prompts
        (60, 3, "normal", 1.0, False),  # too few completions
        (200, 4, "rare", 4.0, False),  # most prompts have no completion with a reward
    ],
)
def test_bound_is_infinite_where_it_could_not_hold(num_prompts, size, shape, scale, bounds):
    certificate = certify(sample(0, num_prompts, size, shape, scale))
    assert math.isfinite(certificate.duality_gap_bound) == bounds
    assert certificate.num_prompts == num_prompts
    assert certificate.effective_completions == pytest.approx(size * certificate.effective_sample_fraction)


def test_bias_of_rare_rewards_does_not_fall_with_few_completions():
    rare, common = (estimate_bias(sample(0, 300, 4, shape, 4.0), torch.tensor(THIRDS)) for shape in ("rare", "normal"))
    assert rare.ratio > MAX_RATIO > common.ratio


def test_debiased_weights_are_closer_where_bias_dominates_and_the_same_where_it_is_not_seen():
    """All samples of five of a prompt's completions, one prompt each: nothing but bias is left."""
    outcomes = torch.tensor([[3.0, 0.0, 0.5], [0.0, 1.0, 0.0], [0.0, 0.3, 1.0], [0.5, 0.0, 0.0]]).double()
    exact = make_table("none", torch.zeros(4).long(), outcomes, torch.zeros(4).double())
    _, (minimum,) = minimize_dual(exact)
    prompt, rewards = every_sample(outcomes, 5)
    table = make_table("none", prompt, rewards, torch.zeros(len(prompt)).double())
    plain, debiased = minimize_dual(table)[0], minimize_debiased(table)[0]
    gaps = [exact.by_prompt(weights)[0].item() - minimum.item() for weights in (plain, debiased)]
    assert gaps[0] > 1e-4 and gaps[1] < 0.2 * gaps[0]
    for few in (sample(0, 12, 64, "normal", 0.3), sample(0, 7, 8, "normal", 2.0)):
        assert torch.equal(minimize_debiased(few)[0], minimize_dual(few)[0])


def test_objective_without_variation_leaves_the_bias_of_baselines_unknown():
    prompt, rewards, log_ratios = draw(2, [8] * 20)
    assert estimate_bias(make_table("optimal", prompt, rewards, log_ratios), WEIGHTS).is_reliable
    estimate = estimate_bias(make_table("optimal", prompt, 0 * rewards, 0 * log_ratios), WEIGHTS)
    assert math.isnan(estimate.ratio) and not estimate.is_reliable


@pytest.mark.parametrize(
    "welfare",
    [MaxMin(), CVaR(0.6, THIRDS), Constrained(MaxMin(), [1], 3.0), AlphaFair(1.0, THIRDS), AlphaFair(2.0, THIRDS)],
    ids=["max-min", "cvar", "constrained", "nash", "alpha"],
)
def test_gaps_of_quadratic_models_are_those_of_a_search(welfare):
    generator = torch.Generator().manual_seed(0)
    center = welfare.retract(welfare.start(3).unsqueeze(0))[0]
    gradients = 0.5 + torch.rand(4, 3, generator=generator, dtype=torch.float64)
    roots = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    hessians = roots @ roots.mT
    found = _gaps_of_models(center, center, gradients, hessians, welfare)
    if isinstance(welfare, AlphaFair):  # the boundary of Λ, by two of the weights
        grid = torch.exp(torch.linspace(-3, 3, 2001, dtype=torch.float64))
        points = torch.cartesian_prod(grid[::8], grid[::8], torch.ones(1, dtype=torch.float64))
        points = welfare.retract(points)
    else:
        steps = torch.linspace(0, 1, 61, dtype=torch.float64)
        points = torch.cartesian_prod(steps, 3 * steps, steps)
        points = welfare.project(points).unique(dim=0)
    step = points - center
    values = gradients @ step.T + torch.einsum("nk,bkl,nl->bn", step, hessians, step) / 2
    best = -values.min(-1).values
    assert (found >= best - 1e-9).all()
    torch.testing.assert_close(found, best, atol=2e-3, rtol=2e-2)
    assert found.max() > 0.01


def test_models_that_are_not_numbers_or_fall_without_end_have_infinite_gaps():
    center = torch.ones(3, dtype=torch.float64)
    gradients = torch.tensor([[1.0, 1.0, 1.0], [1.0, torch.nan, 1.0], [1.0, -1.0, 1.0]], dtype=torch.float64)
    hessians = torch.zeros(3, 3, 3, dtype=torch.float64)
    hessians[:2] = torch.eye(3)
    gaps = _gaps_of_models(center / 3, center / 3, gradients, hessians, AlphaFair(1.0, THIRDS))
    assert gaps[0] < 1 and gaps[1:].isinf().all()


def test_errors_of_replicates_are_in_units_of_their_own_deviation():
    gradients = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 0.5], [2.0, 2.0]], dtype=torch.float64)
    counts = torch.tensor([[2, 1, 0, 1], [0, 4, 0, 0]], dtype=torch.float64) / 4
    found = _studentized_errors(gradients, counts, torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64)))
    drawn = gradients[[0, 0, 1, 3]]

    def variance(rows: torch.Tensor) -> torch.Tensor:
        return ((rows - rows.mean(0)) ** 2).mean(0) @ torch.tensor([1.0, 2.0], dtype=torch.float64)

    scale = (variance(gradients) / variance(drawn)).sqrt()
    torch.testing.assert_close(found[0], scale * (drawn.mean(0) - gradients.mean(0)))
    assert not torch.isfinite(found[1]).any()


def test_noise_of_baselines_counts_less_than_that_of_other_biases():
    """The same moments and biases: only whether they are those of baselines differs."""
    prompt, rewards, log_ratios = draw(3, [8] * 30)
    table = make_table("optimal", prompt, rewards, log_ratios)
    (weights,), _ = minimize_dual(table)
    bias = estimate_bias(table, weights)
    assert (
        bias.has_baselines
        and not estimate_bias(make_table("none", prompt, rewards, log_ratios), weights).has_baselines
    )
    counts = torch.rand(200, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts /= counts.sum(-1, keepdim=True)
    narrow = gap_bound(table, weights, weights, bias, counts, 0.95, MaxMin())
    bias.has_baselines = False
    assert 0 < narrow < gap_bound(table, weights, weights, bias, counts, 0.95, MaxMin()) < math.inf


def test_one_number_that_is_none_makes_the_bound_infinite():
    table = sample(0, 40, 16, "normal", 1.0)
    (weights,), _ = minimize_dual(table)
    bias = estimate_bias(table, weights)
    counts = torch.full((20, 40), 1 / 40, dtype=torch.float64)
    counts[:, :20] *= torch.linspace(0.5, 1.5, 20).double().unsqueeze(-1)
    counts /= counts.sum(-1, keepdim=True)
    assert math.isfinite(gap_bound(table, weights, weights, bias, counts, 0.95, MaxMin()))
    bias.extrapolated[3, 1] = torch.nan
    assert gap_bound(table, weights, weights, bias, counts, 0.95, MaxMin()) == math.inf


def test_impossible_completions_have_no_part_in_a_bias():
    """A policy that rules a completion out: the bias is that of a table with a very small probability instead."""
    prompt, logps, log_ratios = draw(1, [8] * 12)
    logps[::5, 1] = -torch.inf
    finite = logps.clamp(min=-300)
    found, expected = (
        estimate_bias(make_table("implicit", prompt, rows, log_ratios), WEIGHTS) for rows in (logps, finite)
    )
    torch.testing.assert_close(found.jackknife, expected.jackknife)
    torch.testing.assert_close(found.extrapolated, expected.extrapolated)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, num_prompts, size, scale, times",
    [
        ("normal", 100, 16, 1.2, 7),
        ("normal", 300, 16, 1.2, 6),
        ("normal", 30, 64, 1.2, 6),
        ("rare", 100, 16, 4.0, 10),
    ],
)
def test_bound_covers_and_is_not_much_larger_than_the_gaps(shape, num_prompts, size, scale, times):
    """
    Prompts alike, whose exact F is that of one prompt with a million completions. Of 200 fits at a level of 95%, at
    least 93% must be covered. The median bound is at most so many times the mean gap, of which the smallest number
    that 95% of the gaps are below is about the threefold.
    """
    everything = sample(10_000, 1, 1_000_000, shape, scale)
    _, (minimum,) = minimize_dual(everything)
    gaps, bounds = [], []
    for fit in range(200):
        table = sample(fit, num_prompts, size, shape, scale)
        weights, _ = minimize_debiased(table)
        gaps.append(everything.by_prompt(weights)[0].item() - minimum.item())
        bounds.append(certify(table, weights[0], seed=fit).duality_gap_bound)
    covered = sum(gap <= bound for gap, bound in zip(gaps, bounds)) / len(gaps)
    median = sorted(bounds)[len(bounds) // 2]
    assert covered >= 0.93
    assert median <= times * sum(gaps) / len(gaps)
