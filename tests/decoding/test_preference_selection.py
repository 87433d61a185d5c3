"""Robust Preference Selection, against a loop over what it drew, and policies that show the weights they were drawn at."""

import math

import pytest
import torch
from toy import PROMPTS, VOCAB_SIZE, TabularPolicy, toy_tokenizer

from mpo_hf import MixturePolicyModel, select_completions
from mpo_hf.decoding.preference_selection import neighboring_weights


def angles_to(target, weights):
    target = torch.tensor(target, dtype=torch.float64)
    cosines = weights @ target / (weights.norm(dim=-1) * target.norm())
    return torch.rad2deg(cosines.clamp(max=1).acos())


@pytest.mark.parametrize(
    "target", [[0.5, 0.5], [0.9, 0.1], [0.2, 0.3, 0.5], [0.0, 1.0, 0.0], [0.1, 0.2, 0.3, 0.2, 0.2]]
)
@pytest.mark.parametrize("max_angle", [10, 30, 90])
def test_neighbors_are_on_the_simplex_and_within_the_angle(target, max_angle):
    torch.manual_seed(0)
    weights = neighboring_weights(target, 2000, max_angle)
    assert weights.shape == (2000, len(target))
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2000, dtype=torch.float64))
    angles = angles_to(target, weights)
    assert angles.max() <= max_angle + 1e-6
    # the neighborhood is used up to its edge, or to the corner of the simplex that is farthest away
    farthest = max(angles_to(target, torch.eye(len(target), dtype=torch.float64)).tolist())
    assert angles.max() > 0.8 * min(max_angle, farthest)


@pytest.mark.parametrize("dimension", [2, 3, 5])
def test_neighbors_are_uniform_over_the_sphere(dimension):
    """Against directions drawn from all of the sphere, of which those within the angle are kept."""
    torch.manual_seed(0)
    n, target = 8000, torch.arange(1, dimension + 1).double()
    target = (target / target.sum()).tolist()
    drawn = neighboring_weights(target, n, 40)
    sphere = torch.randn(100 * n, dimension, dtype=torch.float64)
    sphere = sphere[(sphere >= 0).all(-1)]
    sphere = sphere[angles_to(target, sphere) <= 40]
    expected = sphere / sphere.sum(-1, keepdim=True)
    assert len(expected) > n
    statistics = [(lambda w: angles_to(target, w)), *((lambda w, k=k: w[:, k]) for k in range(dimension))]
    for statistic in statistics:
        # Kolmogorov and Smirnov's distance, and its 0.999 quantile
        grid = torch.cat([statistic(drawn), statistic(expected)])
        below = [torch.searchsorted(statistic(w).sort().values, grid, right=True) / len(w) for w in (drawn, expected)]
        assert (below[0] - below[1]).abs().max() < 1.95 * math.sqrt(1 / n + 1 / len(expected))


def decided_policy(token):
    """Says one token again and again, so firmly that a mixture follows whichever policy has more weight."""
    table = torch.full((len(PROMPTS), *[VOCAB_SIZE] * 3), -3000.0, dtype=torch.float64)
    table[:, token, token, token] = 0
    return TabularPolicy(table.flatten(1).log_softmax(-1))


@pytest.fixture(scope="module")
def mixture():
    return MixturePolicyModel.from_policies([decided_policy(1), decided_policy(2)], [0.6, 0.4])


@pytest.fixture(scope="module")
def varied():
    """Policies whose completions vary, also at one and the same weights."""
    generator = torch.Generator().manual_seed(0)
    tables = 2 * torch.randn(2, len(PROMPTS), VOCAB_SIZE**3, generator=generator)
    return MixturePolicyModel.from_policies([TabularPolicy(table.log_softmax(-1)) for table in tables])


def rewards_of(texts):
    """Two rewards that pull apart: how early in the alphabet, and how many different letters."""
    return [[-float(sum(map(ord, text))) for text in texts], [20.0 * len(set(text.split())) for text in texts]]


def early(completions, **kwargs):
    return rewards_of(completions)[0]


def various(completions, **kwargs):
    return rewards_of(completions)[1]


def select(model, prompts=PROMPTS, reward_funcs=(early, various), **kwargs):
    return select_completions(
        model, prompts, toy_tokenizer(), list(reward_funcs), **{"max_completion_length": 3, **kwargs}
    )


def test_candidates_are_drawn_at_their_own_weights(mixture):
    torch.manual_seed(0)
    result = select(mixture, num_neighbors=40)
    assert result.candidate_weights.shape == (4, 40, 2)
    assert angles_to([0.6, 0.4], result.candidate_weights).max() <= 30
    letters = {"b b b": 0, "c c c": 1}
    firm = (result.candidate_weights[..., 0] - 0.5).abs() > 0.01
    said = torch.tensor([[letters.get(text, -1) for text in texts] for texts in result.candidates])
    assert torch.equal(said[firm], result.candidate_weights.argmax(-1)[firm])
    assert len(said[firm].unique()) == 2


@pytest.mark.parametrize("target", [None, [0.5, 0.5], [0.95, 0.05], [0.0, 1.0]])
def test_the_best_along_the_target_is_chosen(varied, target):
    torch.manual_seed(0)
    result = select(varied, target_weights=target, num_neighbors=8)
    target = target or [0.5, 0.5]
    assert angles_to(target, result.candidate_weights).max() <= 30
    for row, texts in enumerate(result.candidates):
        assert len(set(texts)) > 1
        scores = [sum(w * r for w, r in zip(target, rewards)) for rewards in zip(*rewards_of(texts))]
        assert scores[result.chosen[row]] == max(scores)
        assert result.completions[row] == texts[result.chosen[row]]
        assert result.rewards[row].T.tolist() == rewards_of(texts)


def test_columns_and_conversations_reach_the_rewards(mixture):
    seen = {}

    def reward(prompts, completions, answer, completion_ids, **kwargs):
        seen.update(prompts=prompts, completions=completions, answer=answer, ids=completion_ids)
        return [0.0] * len(prompts)

    tokenizer = toy_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:2]]
    result = select_completions(
        mixture, prompts, tokenizer, [reward, reward], num_neighbors=3, max_completion_length=2, answer=["x", "y"]
    )
    assert seen["prompts"] == [prompt for prompt in prompts for _ in range(3)]
    assert seen["answer"] == ["x"] * 3 + ["y"] * 3
    assert [c[0]["role"] for c in seen["completions"]] == ["assistant"] * 6
    assert [len(ids) for ids in seen["ids"]] == [2] * 6
    assert result.completions[0] in result.candidates[0]


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"reward_funcs": [early]}, "1 reward functions for 2 policies"),
        ({"target_weights": [0.5, 0.6]}, "0.6"),
        ({"target_weights": [[0.5, 0.5]] * 4}, "`target_weights`"),
        ({"max_angle": 0}, "`max_angle`.* got 0"),
        ({"max_angle": 120}, "`max_angle`.* got 120"),
        ({"num_neighbors": 0}, "`num_neighbors`.* got 0"),
    ],
)
def test_bad_arguments_are_named(mixture, kwargs, message):
    with pytest.raises(ValueError, match=message):
        select(mixture, **kwargs)
