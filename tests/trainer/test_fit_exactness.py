"""
The fitted weights against the exact optimum: six tokens, completions of three, everything enumerated.

Policies are the exact optima of bounded rewards, π_k ∝ π_ref exp(r_k/β), so that all four estimators have one and the
same optimum λ*, which SLSQP finds on the full enumeration. "Far apart" is β = 1/20 with rewards between 0 and 1.
"""

import pytest
from fits import FAR, NEAR, fit


pytestmark = pytest.mark.integration


@pytest.mark.parametrize("objective, factor", [("reward", 1 / 4), ("implicit", 1 / 20)])
def test_mirror_descent_closes_most_of_the_gap_by_default_settings(tmp_path, objective, factor):
    gap, uniform_gap, trainer = fit(tmp_path, objective, None, FAR)
    assert trainer.args.proposal == {"reward": "reference", "implicit": "mixture"}[objective]
    assert uniform_gap > 0.05
    assert 0 <= gap <= factor * uniform_gap


@pytest.mark.parametrize("objective", ["reward", "implicit"])
def test_mixture_as_proposal_finds_the_optimum_of_policies_far_apart(tmp_path, objective):
    gap, uniform_gap, trainer = fit(tmp_path, objective, "mixture", FAR)
    assert uniform_gap > 0.05
    assert 0 <= gap <= 1e-3
    assert min(e["effective_sample_size"] for e in trainer.state.log_history if "loss" in e) > 0.5


@pytest.mark.slow
def test_reference_as_proposal_finds_the_optimum_of_rewards_far_apart(tmp_path):
    # rewards that span ten nats; the bias falls as 1/m only, so it takes more completions than the mixture does
    gap, uniform_gap, _ = fit(tmp_path, "reward", "reference", 1 / 10, num_generations=512)
    assert uniform_gap > 0.01
    assert 0 <= gap <= 1e-3


def test_implicit_objective_with_reference_as_proposal_works_for_policies_close_together(tmp_path):
    gap, _, _ = fit(tmp_path, "implicit", "reference", NEAR)
    assert 0 <= gap <= 1e-3


def test_the_papers_own_estimator_collapses_far_apart_and_says_so(tmp_path, caplog):
    gap, uniform_gap, trainer = fit(tmp_path, "implicit", "reference", FAR, seed=1)
    assert gap > uniform_gap  # worse than not fitting at all
    (warning,) = [r.getMessage() for r in caplog.records if "effective sample size has collapsed" in r.getMessage()]
    assert 'proposal="mixture"' in warning


@pytest.mark.slow
def test_temperature_of_the_samples_is_corrected_for(tmp_path):
    gap, uniform_gap, _ = fit(tmp_path, "reward", "reference", NEAR * 0.5, num_generations=256, temperature=1.3)
    assert 0 <= gap <= 1e-3
    gap, _, _ = fit(tmp_path, "implicit", "mixture", NEAR * 0.5, temperature=1.3)
    assert 0 <= gap <= 1e-3
