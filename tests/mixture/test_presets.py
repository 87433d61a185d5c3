"""Each preset against the formula of its paper, written out."""

import copy
import pickle

import pytest
import torch
from helpers import CLOSE
from peft import LoraConfig, get_peft_model
from toy import toy_policy

from mpo_hf import MixtureLogitsProcessor, MixturePolicyConfig, MixturePolicyModel
from mpo_hf.mixture.pooling import log_normalizer


@pytest.fixture(scope="module")
def policies():
    return [toy_policy(seed, 0.5) for seed in (1, 2, 3)]


@pytest.fixture
def ids():
    return torch.tensor([[1, 2, 3], [5, 0, 4]])


@torch.no_grad()
def probabilities(model, ids):
    return model(ids).logits.softmax(-1)


def test_realignment_interpolates_and_extrapolates(policies, ids):
    reference, aligned, _ = policies
    p, q = probabilities(reference, ids), probabilities(aligned, ids)
    for strength in (0.0, 0.4, 1.0, 2.5):
        expected = p ** (1 - strength) * q**strength
        model = MixturePolicyModel.from_realignment(reference, aligned, strength)
        torch.testing.assert_close(probabilities(model, ids), expected / expected.sum(-1, keepdim=True), **CLOSE)
    assert model.reference_policy is not None


def test_proxy_tuning_adds_the_difference_of_small_models(policies, ids):
    base, expert, anti = (probabilities(policy, ids) for policy in policies)
    expected = base * (expert / anti) ** 0.7
    model = MixturePolicyModel.from_proxy_tuning(*policies, strength=0.7)
    torch.testing.assert_close(probabilities(model, ids), expected / expected.sum(-1, keepdim=True), **CLOSE)


def test_contrast_keeps_to_what_the_expert_finds_plausible(policies, ids):
    expert, amateur = (probabilities(policy, ids) for policy in policies[:2])
    plausible = expert >= 0.3 * expert.max(-1, keepdim=True).values
    assert 0 < plausible.sum() < plausible.numel()
    expected = torch.where(plausible, expert**1.5 * amateur**-0.5, torch.zeros(()))
    model = MixturePolicyModel.from_contrast(*policies[:2], penalty=0.5, plausibility=0.3)
    torch.testing.assert_close(probabilities(model, ids), expected / expected.sum(-1, keepdim=True), **CLOSE)
    cached = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False))


def test_plausible_tokens_keep_the_sum_of_log_probabilities(policies, ids):
    expert, amateur = (probabilities(policy, ids) for policy in policies[:2])
    plausible = expert >= 0.3 * expert.max(-1, keepdim=True).values
    expected = (1.5 * expert.log() - 0.5 * amateur.log()).masked_fill(~plausible, -torch.inf)
    model = MixturePolicyModel.from_contrast(*policies[:2], penalty=0.5, plausibility=0.3)
    with torch.no_grad():
        logits = model(ids).logits
    torch.testing.assert_close(logits, expected, **CLOSE)
    torch.testing.assert_close(log_normalizer(logits), expected.exp().sum(-1).log(), **CLOSE)


@pytest.mark.parametrize("saved", [False, True])
def test_a_contrast_within_a_mixture_still_rules_tokens_out(policies, ids, saved, tmp_path):
    contrast = MixturePolicyModel.from_contrast(*policies[:2], penalty=0.5, plausibility=0.3)
    own, other = probabilities(contrast, ids), probabilities(policies[2], ids)
    assert (own == 0).any()
    expected = own**0.6 * other**0.4
    if saved:
        contrast.save_pretrained(tmp_path)
    options = {"weights": [0.6, 0.4], "allow_off_simplex": True}
    model = MixturePolicyModel.from_policies([tmp_path if saved else contrast, policies[2]], **options)
    torch.testing.assert_close(probabilities(model, ids), expected / expected.sum(-1, keepdim=True), **CLOSE)

    processor = MixtureLogitsProcessor([contrast, policies[2]], weights=[0.0, 0.6, 0.4], allow_off_simplex=True)
    with torch.no_grad():
        scores = processor(ids, policies[0](ids).logits[:, -1])
    expected = expected[:, -1] / expected[:, -1].sum(-1, keepdim=True)
    torch.testing.assert_close(scores.exp(), expected, **CLOSE)


def test_a_plausibility_that_would_be_lost_or_misjudged_is_refused(policies):
    contrast = MixturePolicyModel.from_contrast(*policies[:2], plausibility=0.3)
    pair = MixturePolicyModel.from_policies(policies[1:])
    for build in (
        lambda: MixturePolicyModel.from_policies([policies[2], contrast], allow_off_simplex=True),
        lambda: MixturePolicyModel.from_contrast(policies[2], contrast),
        lambda: MixtureLogitsProcessor([policies[2], contrast]),
    ):
        with pytest.raises(ValueError, match="The policy 1 is a mixture with `plausibility=0.3`"):
            build()
    for expert in (pair, contrast):
        with pytest.raises(ValueError, match="judged by one policy"):
            MixturePolicyModel.from_contrast(expert, policies[0], plausibility=0.1)
    assert MixturePolicyModel.from_contrast(pair, policies[0], plausibility=0).config.plausibility == 0


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "nested", "saved and nested"])
def test_copies_keep_what_a_mixture_has(policies, ids, way, tmp_path):
    model = MixturePolicyModel.from_policies(
        policies[:2],
        [1.5, -0.5],
        reference=policies[2],
        labels=["a", "b"],
        vocab_size=5,
        allow_off_simplex=True,
        plausibility=0.3,
    )
    model.generation_config.top_k, model.generation_config.do_sample = 3, True
    ids = ids % 5
    expected = probabilities(model, ids)
    if way == "deepcopy":
        copied = copy.deepcopy(model)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        if way == "saved and nested":
            model.save_pretrained(tmp_path)
        given = tmp_path if way == "saved and nested" else model
        copied = MixturePolicyModel.from_policies([given], allow_off_simplex=True)
    assert copied.config.plausibility == 0.3 and copied.config.vocab_size == 5
    assert copied.config.labels == ["a", "b"] and copied.generation_config.top_k == 3
    torch.testing.assert_close(probabilities(copied, ids), expected, **CLOSE)
    if way != "saved and nested":  # a reference in memory is not saved
        reference = probabilities(policies[2], ids)[..., :5]
        torch.testing.assert_close(
            probabilities(copied.reference_policy, ids), reference / reference.sum(-1, keepdim=True), **CLOSE
        )


def test_a_claimed_vocabulary_and_an_adapter_over_a_mixture_are_not_forgotten(policies):
    claimed = MixturePolicyModel.from_policies(policies[:2], vocab_size=4)
    assert MixturePolicyModel.from_policies([claimed, claimed]).config.vocab_size == 4
    with pytest.raises(ValueError, match="4 token ids where the others have 6"):
        MixturePolicyModel.from_policies([policies[2], claimed])
    with pytest.raises(ValueError, match="`vocab_size=5`"):
        MixturePolicyModel.from_policies([policies[2], claimed], vocab_size=5)
    adapted = get_peft_model(
        MixturePolicyModel.from_policies([toy_policy(4, 0.5)]), LoraConfig(target_modules=["q_proj"])
    )
    with pytest.raises(ValueError, match="as a whole"):
        MixturePolicyModel.from_policies([adapted, policies[2]])


def test_weights_in_a_generation_config_are_for_their_mixture(policies, ids):
    model = MixturePolicyModel.from_policies(policies)
    model.generation_config.mixture_weights = [0.2, 0.3, 0.5]
    settings = {"max_new_tokens": 4, "do_sample": False}
    expected = policies[1].generate(ids, **settings)
    assert torch.equal(model.policy(1).generate(ids, **settings), expected)
    nested = MixturePolicyModel.from_policies([model, policies[0]], [0.0, 1.0])
    assert torch.equal(nested.generate(ids, **settings), policies[0].generate(ids, **settings))


def test_a_preset_survives_saving(policies, ids, tmp_path):
    model = MixturePolicyModel.from_contrast(*policies[:2], penalty=0.5, plausibility=0.3)
    model.save_pretrained(tmp_path)
    opened = MixturePolicyModel.from_pretrained(tmp_path)
    assert opened.config.plausibility == 0.3 and opened.config.mixture_weights == [1.5, -0.5]
    torch.testing.assert_close(probabilities(opened, ids), probabilities(model, ids), **CLOSE)


def test_plausibility_needs_the_component_that_judges(policies, ids):
    model = MixturePolicyModel.from_contrast(*policies[:2], penalty=0.5, plausibility=0.3)
    with pytest.raises(ValueError, match="judged by the first component"):
        model(ids, mixture_weights=[0.0, 1.0])
    model.mixture_weights = [0.0, 1.0]
    with pytest.raises(ValueError, match="judged by the first component"):
        model(ids)


@pytest.mark.parametrize("plausibility", [-0.1, 1.0, "much", float("nan")])
def test_a_plausibility_that_makes_no_sense_is_refused(plausibility):
    with pytest.raises(ValueError, match="plausibility"):
        MixturePolicyConfig(plausibility=plausibility)
