"""Adapters over one base in one forward pass: PEFT's own results, whatever the adapters, the call and the cache."""

import contextlib
import copy
import logging
import re

import peft
import pytest
import torch
from accelerate import cpu_offload
from helpers import (
    BOS,
    CLOSE,
    PAD,
    PROMPTS,
    SIZES,
    VOCAB,
    RoutedLayer,
    left_pad,
    load_lora,
    save_lora,
    save_tiny,
    tiny,
)
from packaging import version
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, JambaConfig, JambaForCausalLM, StaticCache

from mpo_hf import MixturePolicyModel
from mpo_hf.mixture.stacked_lora import KEPT_STACKS, AdapterStacks, StackedLoraLinear, stack_adapters
from mpo_hf.mixture.stacked_rows import MAX_STACKED_TOKENS


INPUTS = left_pad(PROMPTS)
IDS = torch.tensor([[BOS, 7, 11, 3, 22, 8, 14], [BOS, 30, 5, 6, 9, 2, 4]])

# One adapter with these settings runs beside another of other rank and targets, and beside the base itself.
SUPPORTED = {
    "one layer": ("llama", {"r": 3, "target_modules": ["down_proj"]}),
    "rslora": ("llama", {"r": 2, "lora_alpha": 64, "use_rslora": True}),
    "patterns": ("llama", {"rank_pattern": {"layers.1.*q_proj": 5}, "alpha_pattern": {"down_proj": 40}}),
    "some layers": ("llama", {"layers_to_transform": [1], "target_modules": ["o_proj", "up_proj"]}),
    "all-linear": ("llama", {"target_modules": "all-linear", "r": 1}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "bias of the adapter": ("llama", {"target_modules": ["q_proj"], "lora_bias": True}),
    "dropout": ("llama", {"lora_dropout": 0.5}),
    "sliding window": ("mistral", {}),
    "head of another kind": ("gemma3", {"target_modules": ["k_proj", "gate_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "scaled embeddings": ("gemma3", {"target_modules": ["embed_tokens", "q_proj"]}),
    "saved head": ("llama", {"modules_to_save": ["lm_head"]}),
    "saved norms and embeddings": ("llama", {"modules_to_save": ["norm", "embed_tokens"]}),
}
REFUSED = {
    "dora": ({"use_dora": True}, "DoraLinearVariant"),
}


# as of the versions of Transformers and PEFT that the test environments have
needs_peft_21 = pytest.mark.skipif(
    version.parse(peft.__version__) < version.parse("0.21"), reason="PEFT itself fails here before 0.21"
)


def simple(architecture):
    """Settings of a plain adapter over a model of this architecture."""
    return {"target_modules": ["c_attn"], "fan_in_fan_out": True} if architecture == "gpt2" else {}


def build(folder, architecture="llama", first=None, second=None, **changes):
    """Folders of a base and two adapters over it."""
    base = save_tiny(folder / "base", architecture, 20, **changes)
    settings = [{"r": 2, **simple(architecture), **(first or {})}, {"r": 4, **simple(architecture), **(second or {})}]
    return base, *(save_lora(folder / f"adapter_{i}", base, 30 + i, **own) for i, own in enumerate(settings))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A mixture of a base and two adapters over it, and their folders."""
    paths = build(tmp_path_factory.mktemp("three"))
    return MixturePolicyModel.from_policies(list(paths), [0.2, 0.45, 0.35]), paths


def alone(base, *adapters):
    """Base and adapters as PEFT runs them, each over a base of its own."""
    return [AutoModelForCausalLM.from_pretrained(base).eval(), *(load_lora(adapter, base) for adapter in adapters)]


@contextlib.contextmanager
def one_after_another(mixture):
    """The general path: adapters are activated in turn."""
    mixture.stack_adapters = False
    try:
        yield mixture
    finally:
        mixture.stack_adapters = True


@contextlib.contextmanager
def passes(mixture):
    """Rows of every pass over the first model of a mixture, in a list."""
    backbone = mixture.backbones[0]
    base = backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone
    norm = next(module for name, module in base.named_modules() if name in ("model.norm", "transformer.ln_f"))
    rows = []
    hook = norm.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    try:
        yield rows
    finally:
        hook.remove()


@torch.no_grad()
def assert_same_either_way(mixture, **kwargs):
    side_by_side = mixture(**kwargs)
    with one_after_another(mixture):
        expected = mixture(**kwargs)
    torch.testing.assert_close(side_by_side.logits, expected.logits, **CLOSE)
    return side_by_side, expected


# ---- the layers ----


@torch.no_grad()
@pytest.mark.parametrize(("architecture", "settings"), SUPPORTED.values(), ids=SUPPORTED.keys())
def test_rows_of_every_adapter_equal_what_peft_computes(architecture, settings, tmp_path):
    base, *adapters = build(tmp_path, architecture, first=settings)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters[0], "first")
    model.load_adapter(adapters[1], "second")
    model.eval()
    unchanged = copy.deepcopy(model)
    stack = AdapterStacks(model).get([None, "second", "first", "second"])
    blocks = stack(**{name: value.repeat(4, 1) for name, value in INPUTS.items()}).logits.chunk(4)
    models = alone(base, *adapters)
    real = INPUTS["attention_mask"].bool()
    for block, k in zip(blocks, [0, 2, 1, 2], strict=True):
        torch.testing.assert_close(block[real], models[k](**INPUTS).logits[real], **CLOSE)
    # and PEFT's own model is none the wiser
    torch.testing.assert_close(model(**INPUTS).logits, unchanged(**INPUTS).logits, rtol=0, atol=0)


@torch.no_grad()
def test_adapters_in_higher_precision_than_their_base(tmp_path):
    base, *adapters = build(tmp_path)
    mixture = MixturePolicyModel.from_policies(adapters, dtype=torch.bfloat16)
    stack = mixture.backbones[0]
    factors = {p.dtype for name, p in stack.named_parameters() if "lora_" in name}
    assert factors == {torch.float32} and stack.dtype == torch.bfloat16  # as PEFT loads them
    assert mixture.stacked_components == [[0, 1]]
    side_by_side = mixture(IDS).logits
    with one_after_another(mixture):
        torch.testing.assert_close(side_by_side, mixture(IDS).logits, atol=0.1, rtol=0.02)


def test_a_stack_shares_the_weights_of_the_base(three):
    mixture, _ = three
    (model,) = mixture.backbones
    assert mixture.stacked_components == [[0, 1, 2]]
    stack = mixture._stacks[0].get([None, "component_0", "component_1"])
    own = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in own for p in stack.parameters())
    layers = [layer for layer in stack.modules() if isinstance(layer, StackedLoraLinear)]
    assert len(layers) == 6 and all(layer.factors_a.shape[::2] == (3, 4) for layer in layers)
    assert "factors" not in "".join(mixture.state_dict())


# ---- what does not fit ----


@pytest.mark.parametrize(("settings", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_adapters_of_other_kinds_run_after_the_others(settings, reason, tmp_path, caplog):
    base, *adapters = build(tmp_path, first=settings)
    mixture = MixturePolicyModel.from_policies([*adapters, base], [0.3, 0.3, 0.4])
    with caplog.at_level(logging.INFO, logger="mpo_hf.mixture.stacked_lora"):
        assert mixture.stacked_components == [[1, 2]]
    assert re.search(f"component_0 does not run in one pass with others, because .*{reason}", caplog.text)
    with passes(mixture) as rows:
        assert_same_either_way(mixture, **INPUTS)
    assert rows[:2] == [3, 6]
    models = alone(base, *adapters)
    for k, model in enumerate([*models[1:], models[0]]):
        one = mixture(IDS, mixture_weights=torch.eye(3)[k]).logits
        torch.testing.assert_close(one, model(IDS).logits.log_softmax(-1), **CLOSE)


def test_adapter_of_single_tokens_runs_after_the_base(tmp_path, caplog):
    base, adapter, _ = build(tmp_path, first={"trainable_token_indices": [3, 5]})
    mixture = MixturePolicyModel.from_policies([base, adapter])
    with caplog.at_level(logging.INFO, logger="mpo_hf.mixture.stacked_lora"):
        assert mixture.stacked_components == []
    assert "because it has `trainable_token_indices`" in caplog.text
    expected = sum(model(IDS).logits.log_softmax(-1) / 2 for model in alone(base, adapter))
    torch.testing.assert_close(mixture(IDS).logits, expected, **CLOSE)


@needs_peft_21
def test_saved_modules_whose_rows_cannot_be_told_apart_run_one_after_another(tmp_path):
    """Attention takes more than hidden states."""
    first = {"target_modules": ["o_proj", "up_proj"], "modules_to_save": ["self_attn"]}
    base, *adapters = build(tmp_path, first=first, second={"target_modules": ["down_proj"]})
    mixture = MixturePolicyModel.from_policies(adapters)
    assert mixture.stacked_components == []
    expected = sum(model(IDS).logits.log_softmax(-1) / 2 for model in alone(base, *adapters)[1:])
    torch.testing.assert_close(mixture(IDS).logits, expected, **CLOSE)


@pytest.mark.parametrize("saved", ["mlp", "self_attn"])
def test_an_adapter_inside_of_a_module_that_another_one_saves_is_refused(saved, tmp_path):
    """PEFT puts the layers of the second adapter into the first one's copy of that module, where nothing fills them."""
    _, *adapters = build(tmp_path, first={"target_modules": ["o_proj", "up_proj"], "modules_to_save": [saved]})
    with pytest.raises(ValueError, match=rf"adapter_1.* does not fit .*{saved}.modules_to_save.component_0"):
        MixturePolicyModel.from_policies(adapters)
    with pytest.raises(ValueError, match=rf"adapter_0.* does not fit the base.*{saved}"):
        MixturePolicyModel.from_policies(adapters[::-1])


@torch.no_grad()
def test_changes_of_saved_modules_are_seen_at_once(tmp_path):
    _, *adapters = build(tmp_path, first={"modules_to_save": ["norm"]})
    mixture = MixturePolicyModel.from_policies(adapters)
    assert mixture.stacked_components == [[0, 1]]
    before = mixture(IDS).logits
    next(p for name, p in mixture.named_parameters() if "modules_to_save" in name).mul_(2)
    side_by_side, _ = assert_same_either_way(mixture, input_ids=IDS)
    assert (side_by_side.logits - before).abs().max() > 0.1


def test_adapters_other_than_lora_run_one_after_another(tmp_path):
    base = save_tiny(tmp_path / "base", "llama", 20)
    config = IA3Config(
        task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[], init_ia3_weights=False
    )
    adapters = [save_lora(tmp_path / f"ia3_{i}", base, 30 + i, config) for i in range(2)]
    mixture = MixturePolicyModel.from_policies(adapters)
    assert mixture.stacked_components == []
    expected = sum(model(IDS).logits.log_softmax(-1) / 2 for model in alone(base, *adapters)[1:])
    torch.testing.assert_close(mixture(IDS).logits, expected, **CLOSE)


def test_adapters_on_routed_experts_run_one_after_another(caplog):
    base = tiny("llama", 20)
    for layer in base.model.layers:
        layer.mlp = RoutedLayer(base.config)
    config = LoraConfig(target_modules=["experts.0", "experts.1"], init_lora_weights=False)
    model = get_peft_model(base, config, "first")
    model.add_adapter("second", config)
    model.eval()
    with caplog.at_level(logging.INFO, logger="mpo_hf.mixture.stacked_lora"):
        assert stack_adapters(model, ["first", "second"]) is None
    assert "a layer of theirs saw" in caplog.text


@needs_peft_21
def test_whatever_a_stack_raises_adapters_run_one_after_another(tmp_path, caplog):
    """The Mamba layers of Jamba read weights of layers that LoRA wraps, by names that a stack has not."""
    sizes = {**SIZES, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
    config = JambaConfig(**sizes, mamba_d_state=4, mamba_dt_rank=2, use_mamba_kernels=False)
    base = str(tmp_path / "base")
    JambaForCausalLM(config).save_pretrained(base)
    adapters = [save_lora(tmp_path / f"lora_{i}", base, 30 + i, r=2, target_modules="all-linear") for i in range(2)]
    mixture = MixturePolicyModel.from_policies(adapters)
    with caplog.at_level(logging.INFO, logger="mpo_hf.mixture.stacked_lora"):
        assert mixture.stacked_components == []
    assert "run one after another, because of an error: AttributeError" in caplog.text
    expected = sum(model(IDS, use_cache=False).logits.log_softmax(-1) / 2 for model in alone(base, *adapters)[1:])
    torch.testing.assert_close(mixture(IDS, use_cache=False).logits, expected, **CLOSE)


def test_models_that_are_offloaded_run_one_after_another(tmp_path, caplog):
    _, *adapters = build(tmp_path)
    mixture = MixturePolicyModel.from_policies(adapters)
    assert mixture.stacked_components == [[0, 1]]
    cpu_offload(mixture.backbones[0].get_base_model(), execution_device=torch.device("cpu"))
    with caplog.at_level(logging.INFO, logger="mpo_hf.mixture.stacked_lora"):
        assert mixture.stacked_components == []
    assert "is replaced" in caplog.text


def test_merged_adapters_are_not_stacked(tmp_path):
    base, *adapters = build(tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters[0], "first")
    model.load_adapter(adapters[1], "second")
    stacks = AdapterStacks(model.eval())
    assert stacks.get(["first", "second"]) is not None
    model.merge_adapter(["first"])
    assert stacks.get(["first", "second"]) is None
    model.unmerge_adapter()
    assert stacks.get(["first", "second"]) is not None


# ---- when adapters run side by side ----


def test_one_pass_of_the_rows_of_those_that_have_weight(three):
    mixture, _ = three
    by_row = [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]
    for _ in range(2):  # a new stack is tried once
        with torch.no_grad(), passes(mixture) as rows:
            for weights in (None, [0.5, 0.0, 0.5], [0.0, 1.0, 0.0], by_row):
                mixture(IDS, mixture_weights=weights)
            mixture.policy(1)(IDS)
    assert rows == [6, 4, 2, 6, 2]


def test_results_are_the_same_for_any_subset_and_in_any_order(three):
    mixture, _ = three
    subsets = [[0.2, 0.3, 0.5], [0.5, 0.0, 0.5], [0.0, 0.4, 0.6], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]]
    by_row = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.1, 0.2, 0.7]])
    for weights in (*subsets, by_row, *reversed(subsets)):
        assert_same_either_way(mixture, mixture_weights=weights, **INPUTS)
    assert len(mixture._stacks[0]._stacks) <= KEPT_STACKS


def test_every_base_has_a_stack_of_its_own(tmp_path):
    base, *adapters = build(tmp_path)
    other, *others = build(tmp_path / "other", "gpt2")
    policies = [adapters[0], others[0], tiny("qwen2", 5), adapters[1], others[1], other]
    mixture = MixturePolicyModel.from_policies(policies)
    assert mixture.stacked_components == [[0, 3], [1, 4, 5]]
    assert_same_either_way(mixture, **INPUTS)
    models = [*alone(base, *adapters)[1:], *alone(other, *others), tiny("qwen2", 5)]
    expected = sum(model(IDS).logits.log_softmax(-1) / 6 for model in models)
    torch.testing.assert_close(mixture(IDS).logits, expected, **CLOSE)


def test_policies_and_reference_do_not_disturb_a_stack(three):
    mixture, (base, *adapters) = three
    models = alone(base, *adapters)
    for k in (2, 0, 1):
        expected = mixture(IDS).logits
        view = mixture.policy(k)
        torch.testing.assert_close(view(IDS).logits, models[k](IDS).logits.log_softmax(-1), **CLOSE)
        torch.testing.assert_close(mixture(IDS).logits, expected, rtol=0, atol=0)


def test_long_inputs_run_one_after_another(three):
    mixture, _ = three
    rows = MAX_STACKED_TOKENS // 3 // 16 + 1
    ids = torch.randint(VOCAB, (rows, 16))
    with torch.no_grad(), passes(mixture) as seen:
        mixture(ids[:-1])
        mixture(ids)
    assert seen == [3 * (rows - 1), rows, rows, rows]


def test_hidden_states_and_attentions_come_component_by_component(three):
    mixture, _ = three
    asked = {"output_hidden_states": True, "output_attentions": True}
    mixture.set_attn_implementation("eager")
    before = mixture(IDS).logits
    output, expected = assert_same_either_way(mixture, input_ids=IDS, **asked)
    torch.testing.assert_close(before, output.logits, **CLOSE)
    mixture.set_attn_implementation("sdpa")
    for name, count in (("hidden_states", 9), ("attentions", 6)):
        assert len(output[name]) == count
        torch.testing.assert_close(output[name], expected[name], rtol=0, atol=0)


def test_masks_by_position_are_repeated_for_every_block(three):
    mixture, _ = three
    keep = torch.ones(7, 7, dtype=torch.bool).tril()
    for mask in (keep.expand(2, 1, 7, 7).clone(), keep.expand(1, 1, 7, 7)):
        mask[0, 0, 4:, 1] = False
        assert_same_either_way(mixture, input_ids=IDS, attention_mask=mask, position_ids=torch.arange(7)[None])


def test_trained_adapters_get_their_gradients(tmp_path):
    base, *adapters = build(tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters[0], "a", is_trainable=True)
    first = MixturePolicyModel.from_policies([model, base])
    mixture = MixturePolicyModel.from_policies([first.policy(0), {"name_or_path": base, "adapter": adapters[1]}])
    mixture(IDS, labels=IDS).loss.backward()
    trained = [p for name, p in model.named_parameters() if ".a." in name]
    assert trained and all(p.grad is not None for p in trained)


def test_autocast_falls_back(three):
    mixture, _ = three
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), passes(mixture) as rows:
        mixture(IDS)
    assert rows == [2, 2, 2]


# ---- adapters that change ----


def changes(base, adapter):
    """Ways to change the second of two adapters in place."""

    def in_place(model):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "component_1" in name:
                    parameter.mul_(1.5)

    def data(model):
        for name, parameter in model.named_parameters():
            if "component_1" in name:
                parameter.data = parameter.data * 1.5

    def scale(model):
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("component_1", 3.0)

    def reload(model):
        model.delete_adapter("component_1")
        model.load_adapter(adapter, "component_1")
        model.eval()

    def embeddings(model):
        model.get_base_model().set_input_embeddings(nn.Embedding(VOCAB, 16))

    return {f.__name__: f for f in (in_place, data, scale, reload, embeddings)}


@pytest.mark.parametrize("way", changes(None, None))
def test_a_stack_follows_its_adapters(way, tmp_path):
    base, *adapters = build(tmp_path)
    other = save_lora(tmp_path / "other", base, 77, r=3, target_modules=["k_proj"])
    mixture = MixturePolicyModel.from_policies(adapters)
    before = mixture(IDS).logits
    stack = mixture._stacks[0].get(["component_0", "component_1"])
    mixture(IDS)
    assert mixture._stacks[0].get(["component_0", "component_1"]) is stack
    changes(base, other)[way](mixture.backbones[0])
    after, _ = assert_same_either_way(mixture, input_ids=IDS)
    assert (after.logits - before).abs().max() > 1e-3


def test_a_stack_follows_its_model_to_another_dtype_and_into_a_copy(tmp_path):
    _, *adapters = build(tmp_path)
    mixture = MixturePolicyModel.from_policies(adapters)
    mixture(IDS)
    twin = copy.deepcopy(mixture)
    mixture.to(torch.float64)
    assert_same_either_way(mixture, input_ids=IDS)
    torch.testing.assert_close(twin(IDS).logits, mixture(IDS).logits.float(), **CLOSE)
    assert twin._stacks[0].model is twin.backbones[0]


# ---- caches ----


def caches(mixture):
    return {
        "dynamic": DynamicCache(config=mixture.config),
        "growing": DynamicCache(),
        "static": StaticCache(config=mixture.config, max_cache_len=20),
    }


@pytest.fixture(scope="module", params=["llama", "mistral", "gpt2"])
def pair(request, tmp_path_factory):
    """A mixture of two adapters over a base of one architecture after another."""
    _, *adapters = build(tmp_path_factory.mktemp("pair"), request.param)
    mixture = MixturePolicyModel.from_policies(adapters, [0.3, 0.7])
    assert mixture.stacked_components == [[0, 1]]
    return mixture


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "growing", "static"])
@pytest.mark.parametrize("lengths", [[3, 1, 1, 2], [1, 5, 1], [6, 1]], ids=str)
def test_either_path_goes_on_from_the_cache_of_the_other(pair, kind, lengths):
    expected = pair(IDS).logits
    for path in range(2 ** len(lengths)):
        cache, start = caches(pair)[kind], 0
        for i, length in enumerate(lengths):
            pair.stack_adapters = bool(path >> i & 1)
            ids = IDS[:, start : start + length]
            logits = pair(ids, cache=cache).logits
            torch.testing.assert_close(logits, expected[:, start : start + length], **CLOSE)
            start += length
    pair.stack_adapters = True


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "growing", "static"])
def test_a_cache_may_be_changed_between_two_steps(pair, kind):
    """As beam search, assisted decoding, prompt caching and several sequences for one prompt do."""
    for change in ("reorder", "repeat", "select", "crop", "copy", "reset"):
        cache, ids = caches(pair)[kind], IDS[:, :3]
        if kind == "static" and change in ("repeat", "select", "crop"):
            continue
        pair(ids, cache=cache)
        if change == "reorder":
            cache.reorder_cache(torch.tensor([1, 0]))
            ids = ids.flip(0)
        elif change == "repeat":
            cache.batch_repeat_interleave(2)
            ids = ids.repeat_interleave(2, 0)
        elif change == "select":
            cache.batch_select_indices(torch.tensor([1]))
            ids = ids[1:]
        elif change == "crop":
            cache.crop(-1)
            ids = ids[:, :2]
        elif change == "copy":
            original, cache = cache, copy.deepcopy(cache)
            pair(torch.tensor([[9], [9]]), cache=original)
        else:
            cache.reset()
            ids = ids[:, :0]
        for new in (torch.tensor([[4, 12]]), torch.tensor([[21]])):
            new = new.expand(len(ids), -1)
            ids = torch.cat([ids, new], 1)
            step = pair(new, cache=cache).logits[:, -1]
            torch.testing.assert_close(step, pair(ids).logits[:, -1], **CLOSE)


@torch.no_grad()
def test_a_cache_grows_beyond_its_room(three):
    mixture, _ = three
    ids = torch.randint(VOCAB, (2, 160), generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=mixture.config)
    mixture(ids[:, :3], cache=cache)
    for i in range(3, 160):
        logits = mixture(ids[:, i : i + 1], cache=cache).logits
    torch.testing.assert_close(logits[:, -1], mixture(ids).logits[:, -1], **CLOSE)
    assert cache.layers[0].keys.untyped_storage().nbytes() < 2 * 3 * cache.layers[0].keys.nbytes


def test_beams_are_gathered_without_room_that_the_next_reordering_leaves_behind(three):
    mixture, _ = three

    def search():
        cache, held = DynamicCache(config=mixture.config), []
        mixture(IDS[:, :3], cache=cache)
        for i in range(3, 6):
            cache.reorder_cache(torch.tensor([1, 0]))
            logits = mixture(IDS[:, i : i + 1], cache=cache).logits
            held.append(cache.layers[0].keys.untyped_storage().nbytes() / cache.layers[0].keys.nbytes)
        return logits, held

    logits, held = search()
    assert held == [3, 3, 3]  # keys of the three components, no more
    with one_after_another(mixture):
        torch.testing.assert_close(logits, search()[0], **CLOSE)


def test_a_cache_made_in_inference_mode_is_used_outside_of_it(three):
    mixture, _ = three
    cache = DynamicCache(config=mixture.config)
    with torch.inference_mode():
        mixture(IDS[:, :4], cache=cache)
    with torch.no_grad():
        logits = mixture(IDS[:, 4:], cache=cache).logits
        torch.testing.assert_close(logits, mixture(IDS).logits[:, 4:], **CLOSE)


@torch.no_grad()
def test_steps_of_decoding_copy_nothing_twice(three):
    mixture, _ = three
    for cache in (DynamicCache(config=mixture.config), StaticCache(config=mixture.config, max_cache_len=20)):
        for ids in (IDS, IDS[:, :1], IDS[:, :1]):
            mixture(ids, cache=cache)
            for i in range(2):
                blocks = [cache.layers[i + start].keys for start in (0, 2, 4)]
                step = blocks[0].untyped_storage().nbytes() // 3
                assert [b.data_ptr() - blocks[0].data_ptr() for b in blocks] == [0, step, 2 * step]


GENERATION = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 3},
    "sampling": {"do_sample": True, "top_k": 0},
    "several sequences": {"do_sample": True, "top_k": 0, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams over a static cache": {"num_beams": 3, "cache_implementation": "static"},
    "sampled beams": {"num_beams": 2, "do_sample": True, "top_k": 0},
    "weights by row": {"mixture_weights": torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.1, 0.9]])},
    "guidance": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize("settings", GENERATION.values(), ids=GENERATION.keys())
def test_every_mode_of_generate_writes_the_same(pair, settings):
    def write(mixture):
        torch.manual_seed(3)
        return mixture.generate(**INPUTS, **{"max_new_tokens": 8, "pad_token_id": PAD, "do_sample": False, **settings})

    with passes(pair) as rows:
        output = write(pair).tolist()
    count = len(rows)
    with one_after_another(pair), passes(pair) as rows:
        assert output == write(pair).tolist()
    assert len(rows) == 2 * count


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "top_k": 1}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_assisted_decoding_writes_the_same(pair, settings):
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": [], "pad_token_id": PAD, **settings}
    ids = torch.tensor([[BOS, 7, 11, 7, 11, 7]])
    expected = pair.generate(ids, **{**settings, "prompt_lookup_num_tokens": None})
    if "prompt_lookup_num_tokens" not in settings:
        settings["assistant_model"] = pair.policy(0)
    assert pair.generate(ids, **settings).tolist() == expected.tolist()


@torch.no_grad()
def test_what_is_compiled_before_anything_ran_goes_the_general_way(tmp_path):
    _, *adapters = build(tmp_path, num_hidden_layers=1)
    mixture = MixturePolicyModel.from_policies(adapters)
    torch._dynamo.reset()
    logits = torch.compile(mixture, fullgraph=True, backend="eager")(IDS, use_cache=False).logits
    assert not mixture._stacks
    torch.testing.assert_close(logits, mixture(IDS).logits, **CLOSE)


class Reading(nn.Module):
    """Two layers that read the same tensor, which may be changed in between."""

    device = torch.device("cpu")

    def __init__(self, changes):
        super().__init__()
        self.first, self.second, self.changes = nn.Linear(6, 4), nn.Linear(6, 4), changes

    def forward(self, input_ids, **kwargs):
        hidden = input_ids[..., None] + torch.linspace(0, 1, 6)
        output = self.first(hidden)
        if self.changes:
            hidden.mul_(3)
        return output + self.second(hidden)


@torch.no_grad()
@pytest.mark.parametrize("changes", [False, True])
def test_layers_that_read_one_input_share_a_product_unless_it_changes(changes):
    torch.manual_seed(0)
    model = get_peft_model(Reading(changes), LoraConfig(target_modules=["first", "second"], init_lora_weights=False))
    model.add_adapter("b", LoraConfig(r=3, target_modules=["first", "second"], init_lora_weights=False))
    stack = stack_adapters(model.eval(), ["default", "b"])
    shared = stack.first.shared_input
    assert (shared is None) == changes and stack.second.shared_input is shared
    ids = torch.randint(9, (2, 5))
    expected = []
    for adapter in ("default", "b"):
        model.set_adapter(adapter)
        expected.append(model(input_ids=ids))
    found = stack(input_ids=ids.repeat(2, 1))
    torch.testing.assert_close(found, torch.cat(expected), **CLOSE)
    if shared is not None:  # nothing is kept beyond the last layer that reads it
        assert shared._last == (None, ())
        # what another input left behind is not taken for that of this one
        stack.first(ids[..., None].repeat(2, 1, 6).float())
        torch.testing.assert_close(stack(input_ids=ids.repeat(2, 1)), torch.cat(expected), **CLOSE)
