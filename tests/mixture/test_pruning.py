"""Components without weight cost nothing, and small weights can be pruned at a bounded loss."""

import pytest
import torch
from helpers import BOS, CLOSE, greedy, save_lora, save_tiny, tiny
from torch import nn
from transformers import GenerationConfig

from mpo_hf import MixturePolicyModel
from mpo_hf.mixture.configuration_mixture import prune_mixture_weights


IDS = torch.tensor([[BOS, 7, 11, 3, 22, 8, 14], [BOS, 30, 5, 6, 9, 2, 4]])
SETTINGS = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}


@pytest.fixture
def stacked(tmp_path):
    """A mixture of three adapters over one base."""
    base = save_tiny(tmp_path / "base", "llama", 20)
    adapters = [save_lora(tmp_path / f"adapter_{i}", base, 30 + i) for i in range(3)]
    model = MixturePolicyModel.from_policies(adapters, [0.7, 0.29, 0.01])
    assert model.stacked_components == [[0, 1, 2]]
    return model


@pytest.fixture
def rows_computed(monkeypatch):
    """How many rows the adapted layers see: of a stack in one batch, of adapters in turn one after another."""
    seen: list[int] = []

    def record(call):
        def counted(layer, hidden_states):
            if hidden_states.shape[-1] == 24:  # down_proj, which there is one of in every layer
                seen.append(len(hidden_states))
            return call(layer, hidden_states)

        return counted

    monkeypatch.setattr(nn.Linear, "forward", record(nn.Linear.forward))
    return seen


@torch.no_grad()
def logits_of(model, weights):
    return model(IDS, use_cache=False, mixture_weights=weights).logits


@torch.no_grad()
def test_adapters_without_weight_have_no_rows_in_the_common_pass(stacked, rows_computed):
    counts = {}
    for weights in ([0.5, 0.3, 0.2], [0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]):
        logits_of(stacked, weights)  # makes the stack
        rows_computed.clear()
        logits_of(stacked, weights)
        counts[str(weights)] = max(rows_computed)
    assert list(counts.values()) == [6, 4, 2, 4]


@torch.no_grad()
def test_adapters_are_taken_up_again_when_they_get_weight(stacked):
    policies = [stacked.policy(k) for k in range(3)]
    for weights in ([0.5, 0.0, 0.5], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0], [0.2, 0.3, 0.5]):
        stacked.mixture_weights = weights
        expected = sum(w * policy(IDS).logits for w, policy in zip(weights, policies))
        torch.testing.assert_close(stacked(IDS).logits, expected, **CLOSE)


@pytest.mark.parametrize(
    ("weights", "below", "expected"),
    [
        ([0.6, 0.39, 0.01], 0.02, [0.6 / 0.99, 0.39 / 0.99, 0]),
        ([0.6, 0.39, 0.01], 0.01, [0.6, 0.39, 0.01]),
        ([0.6, 0.39, 0.01], 0.0, [0.6, 0.39, 0.01]),
        ([[0.9, 0.1], [0.4, 0.6]], 0.5, [[1, 0], [0, 1]]),
        ([1 / 3] * 3, 1 / 3, [1 / 3] * 3),
    ],
    ids=str,
)
def test_pruned_weights(weights, below, expected):
    torch.testing.assert_close(prune_mixture_weights(weights, below), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("weights", "below", "message"),
    [
        ([0.5, 0.5], 0.6, "`prune_below` must be from 0 to 1/2 for 2 components, got 0.6"),
        ([0.5, 0.5], -0.1, "got -0.1"),
        ([0.5, 0.5], "0.1", "got '0.1'"),
        ([1.5, -0.5], 0.1, "on the simplex"),
        ([0.5, 0.1], 0.1, "on the simplex"),
    ],
    ids=str,
)
def test_pruning_that_makes_no_sense_is_refused(weights, below, message):
    with pytest.raises(ValueError, match=message):
        prune_mixture_weights(weights, below)


@pytest.mark.parametrize("way", ["argument", "config"])
def test_generation_with_pruning_is_that_with_pruned_weights(way):
    names = ["llama", "gpt2", "qwen2"]
    policies, components = ([tiny(name, 10 + i) for i, name in enumerate(names)] for _ in range(2))
    model = MixturePolicyModel.from_policies(policies, [0.45, 0.2, 0.35])
    runs = []
    model.backbones[1].register_forward_hook(lambda *_: runs.append(1))
    prompts = IDS.tolist()
    if way == "argument":
        output = model.generate(IDS, **SETTINGS, prune_below=0.25)
    else:
        output = model.generate(IDS, generation_config=GenerationConfig(**SETTINGS, prune_below=0.25))
    pruned = [0.45 / 0.8, 0.0, 0.35 / 0.8]
    assert output[:, 7:].tolist() == greedy(components, pruned, prompts, 4, ends=()) and not runs
    # the weights of the call are pruned, row by row, in place of the model's own
    weights = [[0.9, 0.1, 0.0], [0.1, 0.9, 0.0]]
    output = model.generate(IDS, **SETTINGS, mixture_weights=weights, prune_below=0.25)
    assert output[:, 7:].tolist() == greedy(components, [[1.0, 0, 0], [0, 1.0, 0]], prompts, 4, ends=())
    # and nothing lasts
    assert model.generate(IDS, **SETTINGS)[:, 7:].tolist() == greedy(
        components, [0.45, 0.2, 0.35], prompts, 4, ends=()
    )


@torch.no_grad()
def test_loss_by_pruning_is_within_its_bound(stacked):
    """KL(pruned || full) <= sum of λ_k KL(pruned || π_k) over the pruned, at every token."""
    for weights, below in (([0.7, 0.29, 0.01], 0.02), ([0.5, 0.3, 0.2], 0.25), ([0.8, 0.12, 0.08], 0.2)):
        pruned = prune_mixture_weights(weights, below)
        small = logits_of(stacked, pruned).double().log_softmax(-1)
        full = logits_of(stacked, weights).double().log_softmax(-1)
        loss = (small.exp() * (small - full)).sum(-1)
        bound = 0
        for k in (pruned == 0).nonzero().flatten().tolist():
            policy = stacked.policy(k)(IDS).logits.double().log_softmax(-1)
            bound = bound + weights[k] * (small.exp() * (small - policy)).sum(-1)
        assert (loss > 0).all() and (loss <= bound + 1e-6).all()
