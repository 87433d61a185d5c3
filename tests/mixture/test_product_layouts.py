"""The forms that products take on the CPU: chosen by time, equal up to rounding, pinned where someone asks for it."""

import copy
import gc
import json
import logging
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from helpers import BOS, CLOSE, PAD, left_pad, load_lora, save_lora, save_tiny, tiny
from torch import nn
from torch.nn.utils import prune

from mpo_hf import MixturePolicyModel, get_product_layouts, set_product_layouts
from mpo_hf.mixture import product_layouts, tuned_attention, tuned_modules, tuned_products
from mpo_hf.mixture.product_layouts import FORMS, PLAIN, choose_layout
from mpo_hf.mixture.tuned_modules import TunedLinear, TunedModels, Tuner
from mpo_hf.mixture.tuned_products import _PRODUCTS, LinearProducts


INPUTS = left_pad([[BOS, 7, 11, 3, 22, 8, 14], [BOS, 30], [BOS, 6, 6, 19, 27]])
SETTINGS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, "eos_token_id": 10_000}
LINEAR = [form for form in FORMS if form in _PRODUCTS]


@pytest.fixture(autouse=True)
def measured():
    """Every test begins with nothing chosen."""
    set_product_layouts("measured")
    yield
    set_product_layouts("measured")


@pytest.fixture
def all_sizes(monkeypatch):
    """Tiny weights are tuned as well."""
    monkeypatch.setattr(tuned_products, "MIN_NUMEL", 0)
    monkeypatch.setattr(tuned_modules, "MIN_NUMEL", 0)
    monkeypatch.setattr(tuned_attention, "MIN_NUMEL", 0)


@pytest.fixture
def always(monkeypatch):
    """Makes every product take one form where it can, without a measurement."""
    asked = []

    def set_form(wanted):
        def choose(name, terms, forms):
            asked.append(name)
            return wanted if wanted in forms else PLAIN

        for module in (tuned_products, tuned_attention):
            monkeypatch.setattr(module, "choose_layout", choose)
        return asked

    return set_form


def forms(**seconds):
    """Functions that compute the same in a time that each is given, and count their calls."""
    calls = dict.fromkeys(seconds, 0)

    def make(form):
        def run():
            calls[form] += 1
            time.sleep(seconds[form])
            return torch.ones(3)

        return run

    return {form: make(form) for form in seconds}, calls


# ---- choosing ----


def test_the_fastest_form_is_chosen_once():
    own, calls = forms(plain=0.01, turned=0.001, onednn=0.005)
    assert choose_layout("a", 1, own) == "turned"
    assert get_product_layouts() == {"a": "turned"}
    before = dict(calls)
    assert choose_layout("a", 1, own) == "turned" and calls == before


def test_large_products_are_timed_once(monkeypatch):
    monkeypatch.setattr(product_layouts, "_MAX_SECONDS", 0)
    own, calls = forms(plain=0.01, turned=0)
    assert choose_layout("a", 1, own) == "turned" and max(calls.values()) <= 3


def test_threads_that_ask_at_once_get_one_answer():
    own, calls = forms(plain=0.004, turned=0.001)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: choose_layout("a", 1, own), range(4))) == {"turned"}
    assert calls["turned"] == 1 + product_layouts._ROUNDS


def test_noise_does_not_take_the_plain_form_away():
    own, _ = forms(plain=0.01, turned=0.0097)
    assert choose_layout("a", 1, own) == PLAIN


def test_a_form_that_computes_something_else_or_does_not_exist_is_not_chosen():
    own, _ = forms(plain=0.002)
    wrong = {"turned": lambda: torch.ones(3) + 1e-3, "onednn": lambda: torch.ops.mkldnn._no_such_operator()}
    nan, shorter = {"padded to 4": lambda: torch.full((3,), torch.nan)}, {"padded to 8": lambda: torch.ones(2)}
    assert choose_layout("a", 1, own | wrong | nan | shorter) == PLAIN


def test_a_product_of_nan_is_plain_without_a_word(caplog):
    nan = {form: lambda: torch.full((3,), torch.nan) for form in (PLAIN, "turned")}
    with caplog.at_level(logging.WARNING, logger="mpo_hf"):
        logging.getLogger("mpo_hf").propagate = True
        assert choose_layout("a", 1, nan) == PLAIN
    assert not caplog.records


def test_choices_are_pinned_and_all_else_is_plain():
    set_product_layouts({"a": "turned"})
    own, calls = forms(plain=0.001, turned=0.002)
    assert choose_layout("a", 1, own) == "turned"
    assert choose_layout("b", 1, own) == PLAIN
    assert calls == {"plain": 2, "turned": 1}  # whether it works here, for the one that is pinned
    assert get_product_layouts() == {"a": "turned"}


def test_a_pinned_form_that_does_not_work_here_is_plain_with_a_warning(caplog):
    set_product_layouts({"a": "onednn", "b": "padded to 4"})
    own, _ = forms(plain=0)
    with caplog.at_level(logging.WARNING, logger="mpo_hf"):
        logging.getLogger("mpo_hf").propagate = True
        assert choose_layout("a", 1, own | {"onednn": lambda: torch.ops.mkldnn._no_such_operator()}) == PLAIN
        assert choose_layout("b", 1, own) == PLAIN  # as for other numbers of rows


def test_plain_measures_nothing():
    set_product_layouts("plain")
    own, calls = forms(plain=0.001, turned=0)
    assert choose_layout("a", 1, own) == PLAIN and calls == {"plain": 0, "turned": 0}


def test_choices_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    path = tmp_path / "layouts.json"
    path.write_text(json.dumps({"a": "turned"}))
    set_product_layouts(path)
    assert get_product_layouts() == {"a": "turned"}
    for value, expected in ((str(path), {"a": "turned"}), ("plain", {}), ("measured", {})):
        monkeypatch.setenv("MPO_HF_PRODUCT_LAYOUTS", value)
        monkeypatch.setattr(product_layouts, "_LAYOUTS", None)
        assert get_product_layouts() == expected
        assert product_layouts.are_plain() == (value == "plain")


@pytest.mark.parametrize("wrong", [{"a": "upside down"}, {"a": 3}, {"a": ["plain"]}], ids=str)
def test_what_is_no_choice_is_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match="Product layouts must be 'measured', 'plain'"):
        set_product_layouts(wrong)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON file of product layouts"):
        set_product_layouts(tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="Product layouts must be"):
        set_product_layouts(tmp_path / "list.json")
    with pytest.raises(OSError, match="fastest"):
        set_product_layouts("fastest")


# ---- products ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", LINEAR)
def test_every_form_is_the_product(form, dtype):
    product, least, most = _PRODUCTS[form]
    torch.manual_seed(0)
    weight, bias = torch.randn(40, 24).to(dtype), torch.randn(40).to(dtype)
    for count in range(least, min(most, 9) + 1):
        rows = torch.randn(count, 24).to(dtype)
        for own in (None, bias):
            exact = rows.double() @ weight.double().T + (0 if own is None else own.double())
            found = product(rows, weight, own)
            assert found.dtype == dtype and found.is_contiguous()
            torch.testing.assert_close(
                found.double(), exact, atol=20 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps
            )


@torch.no_grad()
def test_a_measurement_leaves_the_generator_of_the_user_alone():
    layer = Tuner().layer(nn.Linear(512, 256))
    before = torch.get_rng_state()
    layer(torch.ones(3, 512))
    assert torch.equal(before, torch.get_rng_state())
    assert list(get_product_layouts()) == [f"float32, 3 x 512 x 256, {torch.get_num_threads()} threads"]


def test_small_weights_other_layers_and_numbers_of_threads():
    class Scaled(nn.Linear):
        pass

    for module in (nn.Linear(16, 16), Scaled(512, 256), nn.Embedding(512, 256)):
        assert Tuner().layer(module) is module
    products = LinearProducts()
    products.layers.append({"weight": torch.randn(256, 512)})
    products.form(3), products.form(300), products.form(4000)
    assert len(get_product_layouts()) == 2  # all numbers of rows beyond the largest share a choice
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        products.form(3)
    finally:
        torch.set_num_threads(threads)
    assert len(get_product_layouts()) == 3


@pytest.mark.usefixtures("all_sizes")
def test_gradients_and_empty_inputs_go_the_plain_way(always):
    asked, layer = always("onednn"), nn.Linear(6, 4)
    twin = Tuner().layer(layer)
    assert isinstance(twin, TunedLinear) and isinstance(twin, nn.Linear)
    twin(torch.ones(2, 6)).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        assert twin(torch.ones(0, 6)).shape == (0, 4)
        assert not asked
        twin(torch.ones(2, 6))
    assert len(asked) == 1


# ---- models ----


def by_hand(models, weights):
    """Pooled log-probabilities of all positions, one unpadded row after another."""
    rows = []
    for ids, mask in zip(INPUTS["input_ids"], INPUTS["attention_mask"]):
        text = ids[mask.bool()][None]
        rows.append(sum(w * model(text).logits[0].float().log_softmax(-1) for w, model in zip(weights, models)))
    return rows


def compare(mixture, expected, tolerance=None):
    found = mixture(**INPUTS).logits
    for row, mask, own in zip(found, INPUTS["attention_mask"], expected):
        torch.testing.assert_close(row[mask.bool()], own, **(tolerance or CLOSE))


@torch.no_grad()
@pytest.mark.usefixtures("all_sizes")
@pytest.mark.parametrize("form", LINEAR)
def test_models_and_adapters_are_the_same_in_every_form(form, always, tmp_path):
    asked = always(form)
    base = save_tiny(tmp_path / "base", "llama", 20)
    adapters = [save_lora(tmp_path / f"adapter_{k}", base, 30 + k, r=2 + k) for k in range(2)]
    alone = [load_lora(adapter, base) for adapter in adapters]
    mixture = MixturePolicyModel.from_policies(adapters, [0.3, 0.7], reference=base)
    compare(mixture, by_hand(alone, [0.3, 0.7]))
    compare(mixture.policy(1), by_hand(alone[1:], [1.0]))
    compare(mixture.reference_policy, by_hand([tiny("llama", 20)], [1.0]))
    models = [tiny("llama", seed) for seed in range(3)]
    expected = by_hand([copy.deepcopy(model) for model in models], [0.2, 0.5, 0.3])
    for side_by_side in (False, True):
        full = MixturePolicyModel.from_policies(models, [0.2, 0.5, 0.3])
        full.stack_models = side_by_side
        compare(full, expected)
        steps = full.generate(**INPUTS, **SETTINGS)
        set_product_layouts("plain")
        assert torch.equal(full.generate(**INPUTS, **SETTINGS), steps)
        set_product_layouts("measured")
    assert asked


@torch.no_grad()
@pytest.mark.usefixtures("all_sizes")
def test_pinned_choices_give_the_same_bits_and_samples(tmp_path):
    base = save_tiny(tmp_path / "base", "llama", 20)
    mixture = MixturePolicyModel.from_policies([base, save_lora(tmp_path / "adapter", base, 30)], [0.4, 0.6])
    settings = {**SETTINGS, "do_sample": True}
    torch.manual_seed(0)
    sampled, logits = mixture.generate(**INPUTS, **settings), mixture(**INPUTS).logits
    choices = json.loads(json.dumps(get_product_layouts()))
    assert choices
    set_product_layouts(choices)
    torch.manual_seed(0)
    assert torch.equal(mixture.generate(**INPUTS, **settings), sampled)
    assert torch.equal(mixture(**INPUTS).logits, logits)
    assert get_product_layouts() == choices


@torch.no_grad()
@pytest.mark.usefixtures("all_sizes")
def test_changes_of_a_model_in_memory_are_seen():
    model = tiny("llama", 1)
    mixture = MixturePolicyModel.from_policies([model])
    layer = model.model.layers[1].mlp.up_proj

    def changed(change, undo=lambda: None):
        before = mixture(**INPUTS).logits
        change()
        after = mixture(**INPUTS).logits
        assert not torch.allclose(after[:, -1], before[:, -1], atol=1e-3)
        compare(mixture, by_hand([model], [1.0]))
        undo()

    changed(lambda: layer.weight.data.mul_(3))
    changed(lambda: setattr(layer, "weight", nn.Parameter(-layer.weight)))
    handles = []
    changed(
        lambda: handles.append(layer.register_forward_hook(lambda *args: 2 * args[-1])), lambda: handles[0].remove()
    )
    changed(lambda: setattr(layer, "forward", lambda x: -F.linear(x, layer.weight)))
    changed(lambda: delattr(layer, "forward"))
    changed(lambda: prune.l1_unstructured(layer, "weight", amount=0.8))
    changed(lambda: setattr(model.model.layers[0].self_attn, "scaling", 0.01))
    changed(lambda: setattr(model.model.layers[0], "mlp", copy.deepcopy(model.model.layers[1].mlp)))


@torch.no_grad()
@pytest.mark.usefixtures("all_sizes")
def test_copies_follow_to_another_dtype_and_end_with_their_model():
    model = tiny("llama", 1)
    mixture = MixturePolicyModel.from_policies([model])
    mixture(**INPUTS)
    mixture.to(torch.float64)
    mixture(**INPUTS)
    assert any(name.startswith("float64") for name in get_product_layouts())
    assert torch.equal(copy.deepcopy(mixture)(**INPUTS).logits, mixture(**INPUTS).logits)
    weights = weakref.ref(model.lm_head.weight)
    mixture.backbone_0 = tiny("llama", 2)
    del model
    gc.collect()
    assert weights() is None


def test_training_and_hidden_states_run_the_model_itself(monkeypatch):
    model = tiny("llama", 1)
    mixture = MixturePolicyModel.from_policies([model])
    monkeypatch.setattr(TunedModels, "get", lambda *args, **kwargs: pytest.fail("made a copy"))
    mixture(**INPUTS, use_cache=False).logits.sum().backward()
    assert model.lm_head.weight.grad is not None
    with torch.no_grad():
        mixture(**INPUTS, use_cache=False, output_hidden_states=True)
        set_product_layouts("plain")
        mixture(**INPUTS)


# ---- attention ----


@torch.no_grad()
@pytest.mark.usefixtures("all_sizes")
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_attention_in_float32_is_nearer_to_the_exact_one(architecture, always):
    model = tiny(architecture, 1).to(torch.bfloat16)
    expected = by_hand([copy.deepcopy(model).float()], [1.0])
    errors = {}
    for form in (PLAIN, "float32"):
        asked = always(form)
        mixture = MixturePolicyModel.from_policies([model])
        found = mixture(**INPUTS).logits
        assert any("attention with a mask" in name for name in asked)
        rows = [row[mask.bool()] for row, mask in zip(found, INPUTS["attention_mask"])]
        errors[form] = max((row - own).abs().max() for row, own in zip(rows, expected))
        # steps with a cache, which the next position of a full pass is the same as
        text = mixture.generate(**INPUTS, **SETTINGS)
        logits = mixture(text, attention_mask=F.pad(INPUTS["attention_mask"], (0, 6), value=1)).logits
        best = logits.log_softmax(-1)[:, -7:-1]
        taken = best.gather(-1, text[:, -6:, None])[..., 0]
        assert (best.amax(-1) - taken).max() < 0.2
    assert errors["float32"] <= 1.5 * errors[PLAIN]


@torch.no_grad()
@pytest.mark.usefixtures("all_sizes")
def test_another_attention_of_the_model_is_used_from_then_on(always):
    asked = always("float32")
    mixture = MixturePolicyModel.from_policies([tiny("llama", 1).to(torch.bfloat16)])
    mixture(**INPUTS)
    before = len([name for name in asked if "attention" in name])
    mixture.set_attn_implementation("eager")
    mixture(**INPUTS)
    assert before and len([name for name in asked if "attention" in name]) == before
    assert mixture.backbones[0].config._attn_implementation == "eager"


def test_layers_that_know_the_name_of_the_attention_keep_it():
    from transformers.models.falcon.modeling_falcon import FalconAttention
    from transformers.models.llama.modeling_llama import LlamaAttention

    assert tuned_attention._asks_for_attention(LlamaAttention)
    assert not tuned_attention._asks_for_attention(FalconAttention)  # compares it with "sdpa"
    assert not tuned_attention._asks_for_attention(nn.Linear)


def test_the_last_positions_of_several_texts_are_copied_rather_than_the_weight(all_sizes, monkeypatch):
    """PyTorch multiplies rows that are no block of memory by a copy of the weight for each text."""
    linear, seen = nn.Linear(8, 16, bias=False), []
    monkeypatch.setattr(
        tuned_modules.F, "linear", lambda rows, *args: seen.append(rows) or torch.mm(rows[:, 0], args[0].t())
    )
    set_product_layouts("plain")
    with torch.no_grad():
        Tuner().layer(linear)(torch.randn(3, 5, 8)[:, -1:])
    assert seen and all(rows.is_contiguous() for rows in seen)
