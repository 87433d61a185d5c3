"""Full models of one architecture in one forward pass: the results of each alone, over the weights that they keep."""

import contextlib
import copy
import logging

import pytest
import torch
from helpers import BOS, CLOSE, PAD, RoutedLayer, left_pad, save_lora, tiny
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache

from mpo_hf import MixturePolicyModel
from mpo_hf.mixture.stacked_models import StackedLinear, StackedNorm, stack_models
from mpo_hf.mixture.stacked_rows import MAX_STACKED_TOKENS, StackedModules


INPUTS = left_pad([[BOS, 7, 11, 3, 22, 8, 14], [BOS, 30], [BOS, 6, 6, 19, 27]])
IDS = torch.tensor([[BOS, 7, 11, 3, 22, 8, 14], [BOS, 30, 5, 6, 9, 2, 4]])
WEIGHTS = [0.2, 0.5, 0.3]
SETTINGS = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD, "eos_token_id": 10_000}


def three(architecture="llama", **changes):
    return [tiny(architecture, seed, **changes) for seed in range(3)]


def side_by_side(models, weights=WEIGHTS):
    """A mixture that runs models side by side, and one of copies of them that does not."""
    apart = MixturePolicyModel.from_policies([copy.deepcopy(model) for model in models], weights)
    mixture = MixturePolicyModel.from_policies(models, weights)
    mixture.stack_models = True
    return mixture, apart


@contextlib.contextmanager
def calls(model):
    """How many rows every pass over a model itself has."""
    rows = []
    hook = model.register_forward_hook(
        lambda _, args, kwargs, __: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        yield rows
    finally:
        hook.remove()


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
        ("gpt2", {}),
        ("qwen2", {}),
        ("mistral", {}),
        ("gemma3", {}),
    ],
    ids=str,
)
def test_results_are_those_of_one_after_another(architecture, changes):
    mixture, apart = side_by_side(three(architecture, **changes))
    assert mixture.stacked_components == [[0, 1, 2]]
    with calls(mixture.backbones[1]) as rows:
        for inputs in (INPUTS, {"input_ids": IDS}, {"input_ids": IDS[:1]}):
            torch.testing.assert_close(mixture(**inputs).logits, apart(**inputs).logits, **CLOSE)
        for way in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
            assert mixture.generate(**INPUTS, **SETTINGS, **way).equal(apart.generate(**INPUTS, **SETTINGS, **way))
    assert rows == []


@torch.no_grad()
def test_layers_are_batched_products():
    stack = stack_models(three())
    layers = [layer for layer in stack.modules() if isinstance(layer, nn.Linear | StackedLinear)]
    assert layers and all(isinstance(layer, StackedLinear) for layer in layers)
    assert any(isinstance(layer, StackedNorm) for layer in stack.modules())
    # layer norms take one vector of parameters: each its own
    assert any(isinstance(layer, StackedModules) for layer in stack_models(three("gpt2")).modules())


@torch.no_grad()
@pytest.mark.parametrize("first", [True, False], ids=["from side by side", "to side by side"])
def test_either_way_goes_on_from_the_cache_of_the_other(first):
    mixture, apart = side_by_side(three())
    cache = DynamicCache(config=mixture.config)
    expected = apart(IDS).logits
    for start, end in ((0, 3), (3, 4), (4, 5), (5, 7)):
        mixture.stack_models = first = not first
        logits = mixture(IDS[:, start:end], cache=cache).logits
        torch.testing.assert_close(logits, expected[:, start:end], **CLOSE)


def test_a_compiled_step_is_one_graph_of_batched_products():
    mixture, apart = side_by_side(three(num_hidden_layers=1))
    products = []

    def backend(module, _):
        products.append(sum(node.target is torch.bmm for node in module.graph.nodes))
        return module.forward

    torch._dynamo.reset()
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True  # Transformers compiles on accelerators only, unless told so
    written = mixture.generate(**INPUTS, **SETTINGS, cache_implementation="static", compile_config=config)
    assert written.equal(apart.generate(**INPUTS, **SETTINGS))
    assert products == [8]  # seven linear layers and the head


# ---- what the models keep ----


@torch.no_grad()
def test_weights_are_held_once_and_stay_the_models_own(tmp_path):
    models = three(tie_word_embeddings=True)
    before = [copy.deepcopy(model.state_dict()) for model in models]
    mixture, _ = side_by_side(models)
    assert mixture.stacked_components
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}
    assert sum(held.values()) == sum(p.nbytes for model in models for p in model.parameters())
    for k, model in enumerate(models):
        model.save_pretrained(tmp_path / str(k))
        with safe_open(tmp_path / str(k) / "model.safetensors", "pt") as file:
            saved = {name: file.get_tensor(name) for name in file.keys()}
        assert saved and all(tensor.equal(before[k][name]) for name, tensor in saved.items())
        assert model.lm_head.weight is model.model.embed_tokens.weight


@torch.no_grad()
def test_a_mixture_is_saved_whole(tmp_path):
    mixture, apart = side_by_side(three())
    assert mixture.stacked_components
    mixture.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(opened(IDS).logits, apart(IDS).logits, **CLOSE)


def grow(model):
    model.model.layers[0].mlp.down_proj.weight.mul_(3)


def replace_parameter(model):
    layer = model.model.layers[0].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight * 3)


def replace_layer(model):
    layer = model.model.layers[1].mlp
    layer.up_proj = nn.Linear(layer.up_proj.in_features, layer.up_proj.out_features, bias=False)


@torch.no_grad()
@pytest.mark.parametrize("change", [grow, replace_parameter, replace_layer])
def test_changes_are_seen(change):
    mixture, apart = side_by_side(three())
    before = mixture(IDS).logits
    for model in (mixture.backbones[1], apart.backbones[1]):
        torch.manual_seed(0)
        change(model)
    after = mixture(IDS).logits
    assert (after - before).abs().max() > 1e-3
    with calls(mixture.backbones[1]) as rows:
        assert mixture(IDS).logits.equal(after)
    assert rows == []
    torch.testing.assert_close(after, apart(IDS).logits, **CLOSE)


@torch.no_grad()
def test_copies_and_other_dtypes():
    mixture, apart = side_by_side(three())
    expected = mixture(IDS).logits
    twin = copy.deepcopy(mixture)
    mixture.to(torch.float64)
    assert mixture.stacked_components
    torch.testing.assert_close(mixture(IDS).logits, apart.double()(IDS).logits, **CLOSE)
    grow(mixture.backbones[0])
    torch.testing.assert_close(twin(IDS).logits, expected, **CLOSE)


def test_weights_that_moved_in_inference_mode_can_still_be_trained():
    models = three()
    mixture, _ = side_by_side(models)
    with torch.inference_mode():
        mixture(IDS)
    models[0](IDS, labels=IDS).loss.backward()
    torch.optim.SGD(models[0].parameters(), lr=0.1).step()
    assert models[0].lm_head.weight.grad.abs().sum() > 0


# ---- where each runs alone ----


def test_not_unless_asked():
    mixture = MixturePolicyModel.from_policies(three())
    pointers = [p.data_ptr() for p in mixture.parameters()]
    with calls(mixture.backbones[1]) as rows, torch.no_grad():
        mixture(IDS)
    assert rows == [2]
    assert mixture.stacked_components == []
    assert [p.data_ptr() for p in mixture.parameters()] == pointers


@torch.no_grad()
def test_models_with_weight_only():
    mixture, apart = side_by_side(three())
    for weights in ([0.5, 0, 0.5], [0, 1, 0]):
        logits = mixture(IDS, mixture_weights=weights).logits
        torch.testing.assert_close(logits, apart(IDS, mixture_weights=weights).logits, **CLOSE)


def test_gradients_are_those_of_one_after_another():
    mixture, apart = side_by_side(three())
    for model in (mixture, apart):
        model(IDS, labels=IDS).loss.backward()
    for name, parameter in mixture.named_parameters():
        torch.testing.assert_close(parameter.grad, apart.get_parameter(name).grad, **CLOSE)


@torch.no_grad()
def test_long_prompts_run_one_after_another_and_steps_side_by_side():
    mixture, apart = side_by_side(three(max_position_embeddings=512))
    assert mixture.stacked_components
    ids = torch.randint(3, 30, (1, MAX_STACKED_TOKENS // 3 + 1))
    with calls(mixture.backbones[1]) as rows:
        written = mixture.generate(ids, **SETTINGS)
    assert rows == [1]
    assert written.equal(apart.generate(ids, **SETTINGS))


def share_a_weight():
    models = three()
    models[2].lm_head.weight = models[0].lm_head.weight
    return models


def other_positions():
    models = three()
    models[1].model.rotary_emb.inv_freq = models[1].model.rotary_emb.inv_freq / 2
    return models


def routed():
    models = three()
    for model in models:
        model.model.layers[0].mlp = RoutedLayer(model.config)
    return models


class LessMean(nn.Module):
    """A layer that looks at the whole batch."""

    def forward(self, hidden_states):
        return hidden_states - hidden_states.mean(0)


def between_rows():
    models = three()
    for model in models:
        model.model.norm = nn.Sequential(model.model.norm, LessMean())
    return models


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (share_a_weight, "they share the weight lm_head.weight"),
        (other_positions, "different buffers model.rotary_emb.inv_freq"),
        (routed, "because of an error: RuntimeError"),
        (between_rows, "apart"),
    ],
)
def test_reasons_are_logged(make, reason, caplog):
    with caplog.at_level(logging.INFO, logger="mpo_hf.mixture.stacked_models"):
        mixture, apart = side_by_side(make())
        assert mixture.stacked_components == []
    assert reason in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(mixture(IDS).logits, apart(IDS).logits, **CLOSE)


@torch.no_grad()
def test_only_models_that_compute_alike_run_together(tmp_path):
    one, two, three_ = three()
    larger = tiny("llama", 3, num_hidden_layers=3)
    adapted = AutoModelForCausalLM.from_pretrained(save_lora(tmp_path / "lora", save(one, tmp_path / "base"), 4))
    scaled = tiny("llama", 5, rms_norm_eps=0.1)
    policies = [one, larger, two, adapted, scaled, three_]
    mixture, apart = side_by_side(policies, [1 / 6] * 6)
    assert mixture.stacked_components == [[0, 2, 5]]
    torch.testing.assert_close(mixture(IDS).logits, apart(IDS).logits, **CLOSE)


def save(model, folder):
    model.save_pretrained(folder)
    return str(folder)
