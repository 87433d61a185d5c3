"""Reward scales, against loops over completions."""

import math

import pytest
import torch

from mpo_hf.estimation.reward_scales import SCALES, RewardScale, win_rates
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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", SCALES)
def test_gains_are_those_of_a_loop(scale, seed):
    rewards, log_ratios = draw(seed)
    gains = RewardScale(scale, BETA)(rewards, PROMPT, log_ratios + 5.0 * PROMPT)  # constants of prompts drop out
    shares = shares_of(log_ratios)
    expected = [[by_loop(scale, rewards.tolist(), shares, k, j) for k in range(2)] for j in range(10)]
    torch.testing.assert_close(gains, torch.tensor(expected, dtype=torch.float64))


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


def test_rewards_that_are_all_equal_have_no_z_score():
    rewards, log_ratios = draw()
    rewards[:, 1] = 0.5
    with pytest.raises(ValueError, match="objective 1 are all 0.5"):
        RewardScale("z_score", BETA)(rewards, PROMPT, log_ratios)
