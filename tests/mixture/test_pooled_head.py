"""A mixture as one backbone under one head: the same distribution as its logits, for every kind of mixture."""

import pytest
import torch
from helpers import CLOSE, PAD, left_pad, tiny
from torch import nn

from mpo_hf import MixturePolicyModel


PROMPTS = [[1, 4, 5, 6, 7], [1, 9]]


def logps_by_head(model, inputs) -> torch.Tensor:
    head, hidden = model.get_output_embeddings(), model.base_model(**inputs).last_hidden_state
    assert hidden.shape[-1] == head.in_features and head.weight.shape == (model.config.vocab_size, head.in_features)
    return nn.functional.linear(hidden, head.weight, head.bias).log_softmax(-1)


@torch.no_grad()
def test_head_gives_the_distribution_of_the_logits(case):
    inputs = left_pad(PROMPTS)
    seen = inputs["attention_mask"].bool()
    expected = case.model(**inputs).logits.log_softmax(-1)
    torch.testing.assert_close(logps_by_head(case.model, inputs)[seen], expected[seen], **CLOSE)
    # weights that are set later count, also where they take a component out
    before, case.model.mixture_weights = case.model.mixture_weights, [0.0] * (len(case.weights) - 1) + [1.0]
    expected = case.model(**inputs).logits.log_softmax(-1)
    torch.testing.assert_close(logps_by_head(case.model, inputs)[seen], expected[seen], **CLOSE)
    case.model.mixture_weights = before


@torch.no_grad()
@pytest.mark.parametrize("share", [False, True], ids=["own heads", "one head"])
def test_biases_and_larger_vocabularies(share):
    policies = [tiny("llama", 1, vocab_size=34), tiny("gpt2", 2)]
    for seed, policy in enumerate(policies):
        torch.manual_seed(seed)
        policy.lm_head.bias = nn.Parameter(torch.randn(policy.config.vocab_size))
    policies = [policies[0]] * 2 if share else policies
    model = MixturePolicyModel.from_policies(policies, [0.3, 0.7], vocab_size=32)
    inputs = {"input_ids": torch.tensor([[1, 4, 5, 6]])}
    torch.testing.assert_close(logps_by_head(model, inputs), model(**inputs).logits.log_softmax(-1), **CLOSE)
    assert model.get_output_embeddings().in_features == (16 if share else 32)


def test_head_is_no_weight_of_the_mixture(case):
    names = [name for name, _ in case.model.named_parameters()]
    assert not any("pooled_head" in name for name in [*names, *case.model.state_dict()])


@torch.no_grad()
def test_padding_has_no_say():
    model = MixturePolicyModel.from_policies([tiny("llama", 1), tiny("gpt2", 2)])
    alone = logps_by_head(model, {"input_ids": torch.tensor([PROMPTS[1]])})[0]
    padded = logps_by_head(model, left_pad(PROMPTS, pad=PAD))[1]
    torch.testing.assert_close(padded[-2:], alone, **CLOSE)


def mask_with(value):
    def hook(model, args, output):
        output.logits[..., 30:] = value

    return hook


@pytest.mark.parametrize("value", [-torch.inf, torch.nan, 3.0])
def test_logits_that_are_masked_behind_the_head_are_refused(value):
    policies = [tiny("llama", 1), tiny("gpt2", 2)]
    policies[1].register_forward_hook(mask_with(value))
    model = MixturePolicyModel.from_policies(policies)
    with pytest.raises(ValueError, match="more than a linear layer"), torch.no_grad():
        model.base_model(torch.tensor([PROMPTS[0]]))
