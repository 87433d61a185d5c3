"""How often the bound of decoded mixtures holds, in simulated fits whose best weights are known."""

import pytest
import torch
from decoded_worlds import DecodedWorld

from mpo_hf.estimation import (
    DualTable,
    MaxMin,
    WeightSpace,
    certify_decoded,
    maximize_decoded,
)
from mpo_hf.estimation.decoded_weights import starting_points


UNIFORM = torch.full((3,), 1 / 3, dtype=torch.float64)
BETA = 0.2


def dual_table(table) -> DualTable:
    """Any table of the same prompts: what is measured here does not depend on it."""
    return DualTable(table.prompt, torch.zeros_like(table.proposal_logps), table.gains)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["optimal", "undertrained", "other_beta"])
@pytest.mark.parametrize("count", [4, 16])
def test_bound_covers(kind, count):
    """
    100 fits to 36 prompts drawn anew, with `count` completions each. 95% are nominal, and 90 of 100 are required (2.3 standard
    errors below); the median bound is no more than six times the mean gap.
    """
    world = DecodedWorld(seed=0, beta=BETA, kind=kind)
    best = world.best_on_grid(40)
    gaps, bounds = [], []
    for seed in range(1000, 1100):
        table = world.table(UNIFORM, count, seed, prompts="drawn")
        space = WeightSpace(3, proposal=UNIFORM)
        weights, _ = maximize_decoded(table, MaxMin(), space, starting_points(space))
        certificate = certify_decoded(dual_table(table), table, weights, MaxMin(), space, table.gains)
        gaps.append(max(0.0, best - world.welfare(weights)) / BETA)
        bounds.append(certificate.optimality_gap_bound)
    gaps, bounds = torch.tensor(gaps), torch.tensor(bounds)
    print(f"{kind} {count}: {(gaps <= bounds).double().mean():.2f} covered, {gaps.mean():.4f}, {bounds.median():.4f}")
    assert (gaps <= bounds).sum() >= 90
    assert bounds.median() <= 6 * gaps.mean()


def test_too_few_prompts_have_no_bound():
    world = DecodedWorld(seed=0, beta=BETA, kind="optimal")
    table = world.table(UNIFORM, 8, seed=0)
    few = table.prompt < 9
    names = ("prompt", "proposal", "gains", "policy_logps", "reference_logps", "proposal_logps")
    table = type(table)(**{n: getattr(table, n)[few] for n in names}, normalizer=table.normalizer.part(few))
    space = WeightSpace(3)
    weights, _ = maximize_decoded(table, MaxMin(), space, starting_points(space))
    found = certify_decoded(dual_table(table), table, weights, MaxMin(), space, table.gains)
    assert found.optimality_gap_bound == float("inf")
