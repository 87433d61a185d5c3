"""Reward scales, against loops over completions."""

import math

import pytest
import torch

from mpo_hf.estimation.reward_scales import SCALES, RewardScale, distinguishes, win_rates
from mpo_hf.rewards import normalize_rewards


PROMPT = torch.tensor([0, 2, 1, 0, 2, 1, 0, 2, 2, 1])
BETA = 0.4


def draw(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 4, (10, 2), generator=generator).double() / 2  # with ties
    return rewards, torch.randn(10, generator=generator, dtype=torch.float64)


def by_loop(scale: str, rewards: list, shares: list, k: int, j: int) -> float:
    """The gain of completion j on objective k, from sums over the completions of its prompt."""
    rows = [i for i in range(10) if PROMPT[i] == PROMPT[j]]
    r = [row[k] for row in rewards]
    if scale == "optimal":
        return r[j] - BETA * math.log(sum(shares[i] * math.exp(r[i] / BETA) for i in rows))
    if scale == "regret":
        own = [shares[i] * math.exp(r[i] / BETA) for i in rows]
        return r[j] - sum(w * r[i] for w, i in zip(own, rows)) / sum(own)
    if scale == "reference":
        return r[j] - sum(shares[i] * r[i] for i in rows)
    if scale == "z_score":
        mean = sum(shares[i] * r[i] for i in range(10)) / 3
        return (r[j] - mean) / math.sqrt(sum(shares[i] * (r[i] - mean) ** 2 for i in range(10)) / 3)
    if scale == "win_rate":
        return sum(shares[i] * (r[i] < r[j]) + 0.5 * shares[i] * (r[i] == r[j]) for i in rows)
    return r[j]


def shares_of(log_ratios: torch.Tensor) -> list[float]:
    sums = [sum(math.exp(log_ratios[i]) for i in range(10) if PROMPT[i] == p) for p in range(3)]
    return [math.exp(log_ratios[j]) / sums[PROMPT[j]] for j in range(10)]


# "gain" takes the expected rewards of the reference and of each policy, which it is given
MEANS = {"reference_means": torch.tensor([0.1, -0.3]).double(), "policy_means": torch.tensor([0.6, 1.1]).double()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [scale for scale in SCALES if scale != "gain"])
def test_gains_are_those_of_a_loop(scale, seed):
    rewards, log_ratios = draw(seed)
    gains = RewardScale(scale, BETA)(rewards, PROMPT, log_ratios + 5.0 * PROMPT)  # constants of prompts drop out
    shares = shares_of(log_ratios)
    expected = [[by_loop(scale, rewards.tolist(), shares, k, j) for k in range(2)] for j in range(10)]
    torch.testing.assert_close(gains, torch.tensor(expected, dtype=torch.float64))


def test_gains_are_in_units_of_what_each_own_policy_gains():
    rewards, log_ratios = draw()
    gains = RewardScale("gain", BETA, **MEANS)(rewards, PROMPT, log_ratios)
    for k in range(2):
        reference, policy = (MEANS[name][k] for name in ("reference_means", "policy_means"))
        torch.testing.assert_close(gains[:, k], (rewards[:, k] - reference) / (policy - reference))
    with pytest.raises(ValueError, match='"gain" needs the expected rewards'):
        RewardScale("gain", BETA)(rewards, PROMPT, log_ratios)


def test_known_rewards_of_the_reference_take_the_place_of_estimates_by_prompt():
    rewards, log_ratios = draw()
    known = {"reference_means": MEANS["reference_means"]}
    gains = RewardScale("reference", BETA, **known)(rewards, PROMPT, log_ratios)
    torch.testing.assert_close(gains, rewards - MEANS["reference_means"])


@pytest.mark.parametrize("scale", ["none", "reference", "z_score", "win_rate"])
def test_gains_from_the_reference_and_from_thresholds(scale):
    rewards, log_ratios = draw()
    before = rewards.clone()
    gains = RewardScale(scale, BETA, {1: 0.25}, from_reference=True)(rewards, PROMPT, log_ratios)
    shares = torch.tensor(shares_of(log_ratios), dtype=torch.float64)
    for p in range(3):
        of_reference = (shares * gains[:, 0])[PROMPT == p].sum()
        assert of_reference.item() == pytest.approx(0, abs=1e-12)
    in_unit = RewardScale("none" if scale == "reference" else scale, BETA)(rewards, PROMPT, log_ratios)
    torch.testing.assert_close(gains[:, 1], in_unit[:, 1] - 0.25)
    torch.testing.assert_close(rewards, before)


def test_optimal_is_the_normalization_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(4, 5, 3, generator=generator, dtype=torch.float64)
    log_ratios = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    prompt = torch.arange(4).repeat_interleave(5)
    gains = RewardScale("optimal", BETA)(rewards.reshape(-1, 3), prompt, log_ratios.flatten())
    torch.testing.assert_close(gains.view(4, 5, 3), normalize_rewards(rewards, BETA, log_ratios))


def test_win_rates_do_not_depend_on_the_scale():
    rewards, log_ratios = draw()
    shares = torch.tensor(shares_of(log_ratios), dtype=torch.float64)
    torch.testing.assert_close(win_rates(rewards, PROMPT, shares), win_rates(rewards.exp() * 9 - 4, PROMPT, shares))
    of_reference = torch.zeros(3, 2, dtype=torch.float64)
    of_reference.index_add_(0, PROMPT, shares.unsqueeze(-1) * win_rates(rewards, PROMPT, shares))
    torch.testing.assert_close(of_reference, torch.full_like(of_reference, 0.5))


@pytest.mark.parametrize("noise", [0.0, 1.4e-17, 1e-8])
@pytest.mark.parametrize("names, told", [(None, "objective 1"), (["kind", "safe"], "'safe'")])
def test_rewards_that_are_all_equal_have_no_z_score(noise, names, told):
    """Also those that differ by rounding errors of float64 or float32, or where the reference never is."""
    rewards, log_ratios = draw()
    rewards[:, 1] = 0.1
    rewards[3, 1] += noise
    scale = RewardScale("z_score", BETA, objective_names=names)
    with pytest.raises(ValueError, match=f"rewards of {told} are all 0.1, .* Use another `normalize_rewards`"):
        scale(rewards, PROMPT, log_ratios)
    rewards[7, 1], log_ratios[7] = 5.0, -math.inf
    with pytest.raises(ValueError, match=f"rewards of {told} are all 0.1"):
        scale(rewards, PROMPT, log_ratios)


@pytest.mark.parametrize("size", [1e-17, 1.0, 1e150])
def test_z_scores_do_not_depend_on_the_unit(size):
    rewards, log_ratios = draw()
    expected = RewardScale("z_score", BETA)(rewards, PROMPT, log_ratios)
    torch.testing.assert_close(RewardScale("z_score", BETA)(rewards * size, PROMPT, log_ratios), expected)


@pytest.mark.parametrize("noise", [0.0, 1.4e-17, 1e-9])
@pytest.mark.parametrize("scale", SCALES)
def test_rewards_that_are_equal_up_to_rounding_errors_are_equal(scale, noise):
    """Of one objective in all prompts, of the other in one prompt; what the reference excludes does not matter."""
    rewards, log_ratios = draw()
    rewards[:, 1] = 0.1 + PROMPT.double()
    rewards[PROMPT == 2, 0] = 0.1
    exact = rewards.clone()
    log_ratios[7] = -math.inf
    rewards[7, 1] = exact[7, 1] = 9.0
    rewards[[4, 8], 0] += noise
    rewards[[0, 5, 4], 1] += noise
    assert distinguishes(rewards, PROMPT, log_ratios).tolist() == [True, False]
    means = MEANS if scale == "gain" else {}
    gains = RewardScale(scale, BETA, **means)(rewards, PROMPT, log_ratios)
    kept = log_ratios > -math.inf
    torch.testing.assert_close(
        gains[kept], RewardScale(scale, BETA, **means)(exact, PROMPT, log_ratios)[kept], atol=1e-8, rtol=0
    )
    if scale in ("optimal", "regret", "reference"):
        assert (gains[kept, 1] == 0).all() and (gains[PROMPT == 2, 0] == 0).all()
    if scale == "win_rate":
        torch.testing.assert_close(gains[kept, 1], torch.full((9,), 0.5, dtype=torch.float64))


def test_rewards_that_differ_a_little_are_not_equal():
    rewards, log_ratios = torch.tensor([[1e6, 1e-20], [1e6 + 1, 0.0]], dtype=torch.float64), torch.zeros(2).double()
    assert distinguishes(rewards, torch.tensor([0, 0]), log_ratios).tolist() == [True, True]
    assert distinguishes(rewards, torch.tensor([0, 1]), log_ratios).tolist() == [False, False]  # one completion each
