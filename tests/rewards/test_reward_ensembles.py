"""Reward ensembles, against a loop over the members and the formulas as the paper has them."""

import math
import pickle
import statistics

import pytest
import torch
from helpers import close
from reward_cases import (
    ANSWERS,
    CHATS,
    COMPLETIONS,
    PROMPTS,
    Constant,
    async_length,
    length,
    make_model,
    make_tokenizer,
)

from mpo_hf import RewardEnsemble, RewardModelSpec
from mpo_hf.rewards import ModelReward, RewardError, make_reward_functions
from mpo_hf.rewards.ensembles import aggregate_rewards


# what the paper writes down for one completion, of the list of its members' rewards
FORMULAS = {
    "mean": lambda rewards, c: sum(rewards) / len(rewards),
    "worst_case": lambda rewards, c: min(rewards),
    "uncertainty": lambda rewards, c: statistics.fmean(rewards) - c * statistics.pvariance(rewards),
}
CASES = [("mean", None), ("worst_case", None), ("uncertainty", 0.5), ("uncertainty", 0.1), ("uncertainty", 0)]


def classifier(seed: int, **kwargs):
    """A classifier with weights of its own."""
    model = make_model(**kwargs)
    torch.manual_seed(seed)
    model.score.weight.data.normal_()
    return model


@pytest.fixture
def members(tmp_path) -> list:
    """Members of every kind: a repo, a model, one output of another model that is turned round, and a function."""
    classifier(1).save_pretrained(tmp_path / "rm")
    make_tokenizer().save_pretrained(tmp_path / "rm")
    spec = RewardModelSpec(
        classifier(3, num_labels=2), processing_class=make_tokenizer(), logit=1, sign=-1, label="spec"
    )
    return [str(tmp_path / "rm"), classifier(2), spec, length]


TOKENIZERS = [None, make_tokenizer(), None, None]


def rewards_by_hand(members, prompts, completions) -> list[list[float]]:
    """A list of the members' rewards for every completion, from each member alone."""
    specs = [members[0], RewardModelSpec(members[1], processing_class=make_tokenizer()), members[2]]
    alone = [ModelReward(spec) for spec in specs]
    columns = [reward(prompts, completions).tolist() for reward in alone] + [length(completions)]
    return [list(row) for row in zip(*columns)]


class TestFormulas:
    @pytest.mark.parametrize("aggregation, coefficient", CASES)
    @pytest.mark.parametrize("shape", [(5, 2), (1, 7), (3, 4, 3)])
    def test_equal_a_loop(self, aggregation, coefficient, shape):
        rewards = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
        found = aggregate_rewards(rewards, aggregation, coefficient)
        expected = [FORMULAS[aggregation](row, coefficient) for row in rewards.flatten(0, -2).tolist()]
        assert found.shape == shape[:-1]
        assert found.flatten().tolist() == pytest.approx(expected)

    @pytest.mark.parametrize("aggregation, coefficient", CASES)
    def test_order_of_members_and_constants(self, aggregation, coefficient):
        rewards = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found = aggregate_rewards(rewards, aggregation, coefficient)
        torch.testing.assert_close(aggregate_rewards(rewards[:, [2, 0, 3, 1]], aggregation, coefficient), found)
        torch.testing.assert_close(aggregate_rewards(rewards + 7, aggregation, coefficient), found + 7)
        # on another scale, the coefficient is on the inverse of that scale
        scaled = aggregate_rewards(rewards * 4, aggregation, coefficient and coefficient / 4)
        torch.testing.assert_close(scaled, found * 4)
        assert (found <= rewards.mean(-1) + 1e-12).all()


class TestMembers:
    @pytest.mark.parametrize("aggregation, coefficient", CASES[:3])
    @pytest.mark.parametrize("prompts, completions", [(PROMPTS, COMPLETIONS), (CHATS, ANSWERS)])
    def test_equal_every_member_alone(self, members, aggregation, coefficient, prompts, completions):
        ensemble = RewardEnsemble(members, aggregation, coefficient, processing_classes=TOKENIZERS)
        rewards = ensemble(prompts, completions)
        table = rewards_by_hand(members, prompts, completions)
        assert rewards.dtype == torch.float64 and rewards.shape == (5,)
        assert rewards.tolist() == close([FORMULAS[aggregation](row, coefficient) for row in table])
        columns = [
            ensemble.metrics[name].tolist() for name in ("rm", "LlamaForSequenceClassification", "spec", "length")
        ]
        assert [list(row) for row in zip(*columns)] == [close(row) for row in table]
        disagreement = [statistics.pstdev(row) for row in table]
        assert ensemble.metrics["disagreement"].tolist() == close(disagreement)
        assert min(disagreement) > 0.1

    def test_columns_reach_every_member(self):
        def answer(completions, answer, **kwargs):
            return answer

        ensemble = RewardEnsemble([answer, async_length])
        assert ensemble(["a", "b"], ["xx", "yyyy"], answer=[4.0, 8.0]).tolist() == [3.0, 6.0]

    def test_errors_name_the_member(self):
        def broken(completions, **kwargs):
            return {}["missing"]

        with pytest.raises(RewardError, match="'broken' raised KeyError"):
            RewardEnsemble([length, broken], label="helpful")(["a"], ["b"])
        with pytest.raises(ValueError, match="'Constant' returned nan for completion 0"):
            RewardEnsemble([length, Constant(math.nan)], "worst_case")(["a"], ["b"])
        with pytest.raises(ValueError, match="'large' returned inf for completion 0"):  # members that are finite
            RewardEnsemble([Constant(1.5e308), Constant(1.6e308)], label="large")(["a"], ["b"])
        short = RewardModelSpec(make_model(), processing_class=make_tokenizer(), label="small", max_length=1)
        with pytest.raises(ValueError, match="'small' takes 1 to 1 tokens"):
            RewardEnsemble([short, length])(PROMPTS, COMPLETIONS)

    def test_members_of_one_name_are_told_apart(self):
        ensemble = RewardEnsemble([Constant(1.0), Constant(3.0)])
        assert ensemble(["a"], ["b"]).tolist() == [2.0]
        assert {name: values.tolist() for name, values in ensemble.metrics.items()} == {
            "Constant": [1.0],
            "Constant_2": [3.0],
            "disagreement": [1.0],
        }

    def test_an_ensemble_may_be_a_member(self):
        inner = RewardEnsemble([Constant(1.0), Constant(3.0)], label="inner")
        assert RewardEnsemble([inner, Constant(0.0)], "worst_case")(["a"], ["b"]).tolist() == [0.0]

    def test_models_are_moved(self, members):
        ensemble = make_reward_functions(RewardEnsemble(members, processing_classes=TOKENIZERS), device="meta")[0]
        models = [member.model for member in ensemble.members if member.model is not None]
        assert len(models) == 3
        assert {parameter.device.type for model in models for parameter in model.parameters()} == {"meta"}

    def test_pickles(self, members):
        ensemble = RewardEnsemble(members, "uncertainty", 0.5, label="helpful", processing_classes=TOKENIZERS)
        again = pickle.loads(pickle.dumps(ensemble))
        assert again.name == "helpful"
        assert torch.equal(again(PROMPTS, COMPLETIONS), ensemble(PROMPTS, COMPLETIONS))


def test_names():
    pair = [length, Constant(1.0)]
    functions = make_reward_functions([RewardEnsemble(pair), RewardEnsemble(pair, label="kind"), RewardEnsemble(pair)])
    assert [function.name for function in functions] == ["ensemble", "kind", "ensemble_2"]
    assert make_reward_functions([functions[1]], names=["other"])[0].name == "other"


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        (([],), {}, "two or more reward functions, got 0"),
        (([length],), {}, "two or more reward functions, got 1"),
        (("org/rm",), {}, "list of two or more .*, got 1"),
        (([length, 3],), {}, "3 is not a reward function"),
        (([length, length], "min"), {}, r"one of \['mean', 'worst_case', 'uncertainty'\], got 'min'"),
        (([length, length], "uncertainty"), {}, "needs a `coefficient`"),
        (([length, length],), {"coefficient": 0.5}, "0.5 would have no effect with 'mean'"),
        (([length, length], "uncertainty", -0.1), {}, "0 or more, got -0.1"),
        (([length, length], "uncertainty", math.nan), {}, "0 or more, got nan"),
        (([length, length], "uncertainty", "0.5"), {}, "0 or more, got '0.5'"),
        (([length, length],), {"processing_classes": [None] * 3}, "`processing_classes` has 3 entries for 2"),
    ],
)
def test_what_makes_no_sense_is_refused(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        RewardEnsemble(*args, **kwargs)
