"""Each preset against the formula of its paper, written out."""

import pytest
import torch
from helpers import CLOSE
from toy import toy_policy

from mpo_hf import MixturePolicyConfig, MixturePolicyModel


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
