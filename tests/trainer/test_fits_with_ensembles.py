"""Reward ensembles in use: as rewards of a fit, and to select completions by."""

import statistics

import pytest
import torch
from fits import count_b, count_c, make_args, make_trainer
from toy import LENGTH, toy_tokenizer

from mpo_hf import MixturePolicyModel, MPOTrainer, RewardEnsemble, select_completions


def count_c_and_d(completions, **kwargs):
    return [float(c.split().count("c") + c.split().count("d")) for c in completions]


def worst_by_hand(completions, **kwargs):
    return [min(pair) for pair in zip(count_c(completions), count_c_and_d(completions))]


@pytest.mark.parametrize("estimator", ["bsmd", "mis"])
def test_a_fit_takes_one_as_a_reward_and_logs_its_members(mixture, tmp_path, estimator):
    kwargs = {"estimator": estimator, "max_steps": 3}
    ensemble = RewardEnsemble([count_c, count_c_and_d, worst_by_hand], "worst_case")
    trainer = make_trainer(mixture, tmp_path / "ensemble", rewards=[ensemble, count_b], **kwargs)
    trainer.train()
    fitted = mixture.mixture_weights.clone()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    mixture.mixture_weights = [0.5, 0.5]
    by_hand = make_trainer(mixture, tmp_path / "by_hand", rewards=[worst_by_hand, count_b], **kwargs)
    by_hand.train()
    assert torch.equal(mixture.mixture_weights, fitted) and fitted.tolist() != [0.5, 0.5]
    for entry in steps:
        assert entry["rewards/a"] == entry["ensembles/a/worst_by_hand"] <= entry["ensembles/a/count_c"]
        assert entry["ensembles/a/count_c"] <= entry["ensembles/a/count_c_and_d"]
        assert entry["ensembles/a/disagreement"] >= 0
    assert max(entry["ensembles/a/disagreement"] for entry in steps) > 0
    assert not [name for name in steps[0] if name.startswith("ensembles/b")]


def test_completions_are_selected_by_one(mixture):
    ensemble = RewardEnsemble([count_c, count_c_and_d], "uncertainty", 0.5)
    torch.manual_seed(0)
    result = select_completions(
        mixture, ["a b", "c d"], toy_tokenizer(), [ensemble, count_b], num_neighbors=3, max_completion_length=LENGTH
    )
    texts = [text for candidates in result.candidates for text in candidates]
    pairs = zip(count_c(texts), count_c_and_d(texts))
    expected = [statistics.fmean(pair) - 0.5 * statistics.pvariance(pair) for pair in pairs]
    assert result.rewards[..., 0].flatten().tolist() == pytest.approx(expected)


def test_another_aggregation_takes_no_generation(mixture, tmp_path, monkeypatch):
    """A fit to the completions of another one, with the rewards of now and not with those that came with them."""
    members = [count_c, count_c_and_d]
    kwargs = {"estimator": "mis", "max_steps": 4}
    rewards = [RewardEnsemble(members, "mean"), count_b]
    make_trainer(mixture, tmp_path / "run", rewards=rewards, **kwargs).train()
    by_mean = mixture.mixture_weights.clone()
    monkeypatch.setattr(MixturePolicyModel, "generate", None)

    def refit(name, reward):
        mixture.mixture_weights = [0.5, 0.5]
        trainer = MPOTrainer(
            model=mixture,
            reward_funcs=[reward, count_b],
            args=make_args(tmp_path / name, **kwargs),
            processing_class=toy_tokenizer(),
            rollouts=tmp_path / "run" / "_rollouts",
        )
        trainer.train()
        return mixture.mixture_weights.clone()

    worst = refit("worst", RewardEnsemble(members, "worst_case"))
    torch.testing.assert_close(refit("mean", RewardEnsemble(members, "mean")), by_mean)
    torch.testing.assert_close(refit("by_hand", count_c), worst)  # there are never fewer of two letters than of one
    assert (worst - by_mean).abs().max() > 1e-3
