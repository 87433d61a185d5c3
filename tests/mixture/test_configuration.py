"""`MixturePolicyConfig`: what it holds, what it refuses, and that saving it loses nothing."""

import json
import pathlib

import pytest
import torch
from helpers import SIZES, VOCAB, tiny
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from mpo_hf import MixtureComponent, MixturePolicyConfig, MixturePolicyModel
from mpo_hf.mixture.mixture_weights import check_mixture_weights


TWO = [{"name_or_path": "org/a"}, {"name_or_path": "org/b"}]
EVERY_FIELD = {
    "name_or_path": "org/base",
    "revision": "v1",
    "subfolder": "inner",
    "variant": "fp16",
    "dtype": "bfloat16",
    "gguf_file": "model.gguf",
    "adapter": "org/lora",
    "adapter_revision": "v2",
    "adapter_subfolder": "deep/er",
    "label": "helpful",
}
LLAMA = {"model_type": "llama", **SIZES}


def two_configs():
    return [tiny("llama", 0).config, tiny("mistral", 0).config]


def write_config(folder: pathlib.Path, **fields) -> str:
    folder.mkdir(exist_ok=True)
    text = json.dumps({"model_type": "mpo_mixture", "components": TWO, **fields})
    (folder / "config.json").write_text(text)
    return str(folder)


# ---- what it holds ----


def test_auto_classes_know_the_mixture():
    config = AutoConfig.for_model("mpo_mixture", components=TWO)
    assert type(config) is MixturePolicyConfig
    model = AutoModelForCausalLM.from_config(MixturePolicyConfig(component_configs=two_configs()))
    assert type(model) is MixturePolicyModel


def test_components_keep_their_order_and_every_field():
    config = MixturePolicyConfig(components=[EVERY_FIELD, *TWO])
    assert [component.to_dict() for component in config.components] == [EVERY_FIELD, *TWO]
    assert config.components[0] == MixtureComponent(**EVERY_FIELD)


def test_weights_are_uniform_unless_given():
    assert MixturePolicyConfig(components=TWO).mixture_weights == [0.5, 0.5]
    assert MixturePolicyConfig(components=TWO, mixture_weights=[0.25, 0.75]).mixture_weights == [0.25, 0.75]


def test_labels_are_made_unique_and_default_to_numbers():
    components = [{"label": "kind"}, {}, {"label": "kind"}]
    assert MixturePolicyConfig(components=components).labels == ["kind", "policy_1", "kind_2"]


def test_paths_and_dtypes_may_be_objects():
    component = MixtureComponent(pathlib.Path("some/folder"), adapter=pathlib.Path("other"), dtype=torch.float16)
    assert component.to_dict() == {"name_or_path": "some/folder", "adapter": "other", "dtype": "float16"}


def test_config_does_not_alias_the_component_it_was_given():
    component = MixtureComponent("org/a")
    config = MixturePolicyConfig(components=[component])
    config.components[0].label = "changed"
    assert component.label is None


def test_decoder_fields_are_those_of_all_components_one_after_another():
    llama, gemma = tiny("llama", 0).config, tiny("gemma3", 0).config
    config = MixturePolicyConfig(component_configs=[llama, gemma])
    assert config.num_hidden_layers == 5
    assert config.layer_types == ["full_attention"] * 2 + gemma.layer_types
    assert len(config.per_layer_config) == 5
    assert config.max_position_embeddings == 64
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (VOCAB, 1, 2, 0)
    sliding = [False, False, True, False, True]
    assert DynamicCache(config=config).is_sliding == sliding
    assert StaticCache(config=config, max_cache_len=16).is_sliding == sliding


def test_vocab_size_defaults_to_the_smallest_component():
    configs = [tiny("llama", 0, vocab_size=40).config, tiny("llama", 0).config]
    assert MixturePolicyConfig(component_configs=configs).vocab_size == VOCAB
    assert MixturePolicyConfig(component_configs=configs, vocab_size=20).vocab_size == 20


def test_shortest_context_limits_the_mixture():
    configs = [tiny("llama", 0).config, tiny("gpt2", 0, max_position_embeddings=48).config]
    assert MixturePolicyConfig(component_configs=configs).max_position_embeddings == 48


# ---- saving ----


@pytest.mark.parametrize("open_config", [MixturePolicyConfig.from_pretrained, AutoConfig.from_pretrained])
def test_saved_config_comes_back_unchanged(tmp_path, open_config):
    config = MixturePolicyConfig(
        components=[EVERY_FIELD, {"name_or_path": "org/b", "label": "harmless"}],
        mixture_weights=[0.1, 0.9],
        reference={"name_or_path": "org/base", "revision": "v0"},
        component_configs=two_configs(),
        vocab_size=30,
    )
    config.save_pretrained(tmp_path / "once")
    opened = open_config(tmp_path / "once")
    for name in ("components", "mixture_weights", "reference", "vocab_size", "labels", "allow_off_simplex"):
        assert getattr(opened, name) == getattr(config, name)
    for before, after in zip(config.component_configs, opened.component_configs, strict=True):
        assert type(after) is type(before) and after.to_dict() == before.to_dict()
    opened.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice/config.json").read_text() == (tmp_path / "once/config.json").read_text()


def test_weights_survive_saving_to_the_last_bit(tmp_path):
    weights = [1 / 3, 2 / 3]
    config = MixturePolicyConfig(components=TWO, mixture_weights=weights)
    config.save_pretrained(tmp_path)
    assert MixturePolicyConfig.from_pretrained(tmp_path).mixture_weights == config.mixture_weights
    assert config.mixture_weights == pytest.approx(weights, abs=1e-15)


def test_off_simplex_weights_survive_saving(tmp_path):
    MixturePolicyConfig(components=TWO, mixture_weights=[2, -1], allow_off_simplex=True).save_pretrained(tmp_path)
    assert MixturePolicyConfig.from_pretrained(tmp_path).mixture_weights == [2, -1]


@pytest.mark.parametrize("open_config", [MixturePolicyConfig.from_pretrained, AutoConfig.from_pretrained])
def test_weights_can_be_overridden_while_opening(tmp_path, open_config):
    folder = write_config(tmp_path)
    assert open_config(folder, mixture_weights=[0.2, 0.8]).mixture_weights == [0.2, 0.8]
    assert open_config(folder, mixture_weights=[2, -1], allow_off_simplex=True).mixture_weights == [2, -1]
    assert open_config(folder, mixture_weights=None).mixture_weights == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"\[2.0, -1.0\]"):
        open_config(folder, mixture_weights=[2, -1])


# ---- what it refuses ----

BAD_WEIGHTS = {
    "too few": ([1.0], r"Expected 2 .*\[1.0\]"),
    "too many": ([0.2, 0.3, 0.5], r"Expected 2 .*\[0.2, 0.3, 0.5\]"),
    "no list": (1.0, "Expected 2 .* 1.0"),
    "nested": ([[0.5, 0.5]], r"\[\[0.5, 0.5\]\]"),
    "ragged": ([[0.5], [0.5, 0.5]], "must be numbers"),
    "strings": (["0.5", "0.5"], r"must be numbers.*'0.5'"),
    "a string": ("0.5", "must be numbers.*'0.5'"),
    "none inside": ([None, 1.0], "must be numbers.*None"),
    "a dictionary": ({"a": 0.5, "b": 0.5}, "must be numbers.*'a'"),
    "not a number": ([float("nan"), 1.0], r"finite.*\[nan, 1.0\]"),
    "infinite": ([float("inf"), 0.0], r"finite.*\[inf, 0.0\]"),
    "beyond floats": ([10**400, 0], "must be numbers"),
    "negative": ([-0.1, 1.1], r">= 0.*\[-0.1, 1.1\]"),
    "sum too large": ([0.5, 0.5002], r"sum to 1.*\[0.5, 0.5002\]"),
    "sum too small": ([0.5, 0.4998], r"sum to 1.*\[0.5, 0.4998\]"),
    "all zero": ([0.0, 0.0], r"\[0.0, 0.0\]"),
}


@pytest.mark.parametrize("weights, message", BAD_WEIGHTS.values(), ids=BAD_WEIGHTS.keys())
def test_bad_weights_are_refused_wherever_they_enter(tmp_path, weights, message):
    with pytest.raises(ValueError, match=message):
        MixturePolicyConfig(components=TWO, mixture_weights=weights)
    config = MixturePolicyConfig(components=TWO)
    with pytest.raises(ValueError, match=message):
        config.mixture_weights = weights
    assert config.mixture_weights == [0.5, 0.5]
    with pytest.raises(ValueError, match=message):
        MixturePolicyConfig.from_pretrained(write_config(tmp_path, mixture_weights=weights))


def test_rounding_in_the_sum_of_weights_is_normalized_away():
    weights = check_mixture_weights([0.33333, 0.33333, 0.33333], 3)
    assert weights.dtype == torch.float64
    torch.testing.assert_close(weights, torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=1e-15)
    by_row = check_mixture_weights(torch.tensor([[0.3, 0.7], [1.00005, 0.0]]), 2)
    torch.testing.assert_close(by_row.sum(-1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-15)


def test_off_simplex_weights_are_accepted_by_name_only():
    weights = check_mixture_weights([1.5, -0.75], 2, allow_off_simplex=True)
    assert weights.tolist() == [1.5, -0.75]  # as they are: dividing by the sum would double them
    with pytest.raises(ValueError, match="allow_off_simplex=True"):
        check_mixture_weights([1.5, -0.75], 2)
    for weights, message in [([0.0, 0.0], "all be zero"), ([float("nan"), 1.0], "finite"), ([1.0], "Expected 2")]:
        with pytest.raises(ValueError, match=message):
            check_mixture_weights(weights, 2, allow_off_simplex=True)


BAD_FIELDS = {
    "components no list": ({"components": "org/a"}, "`components` must be a list.*'org/a'"),
    "component no dictionary": ({"components": ["org/a"]}, "'org/a'"),
    "component with unknown key": ({"components": [{"name_or_path": "a", "wieght": 1}]}, r"unknown keys \['wieght'\]"),
    "component with empty name": ({"components": [{"name_or_path": ""}]}, "`name_or_path`.*''"),
    "component with numeric name": ({"components": [{"name_or_path": 3}]}, "`name_or_path`.*3"),
    "component of no dtype": ({"components": [{"name_or_path": "a", "dtype": "float33"}]}, "float33"),
    "component with module as dtype": ({"components": [{"name_or_path": "a", "dtype": "nn"}]}, "'nn'"),
    "adapter revision alone": ({"components": [{"name_or_path": "a", "adapter_revision": "b"}]}, "need an `adapter`"),
    "reference as string": ({"reference": "org/a"}, "'org/a'"),
    "reference without name": ({"reference": {}}, r"`name_or_path`.*\{\}"),
    "reference with unknown key": ({"reference": {"path": "org/a"}}, r"unknown keys \['path'\]"),
    "negative vocabulary": ({"vocab_size": -4}, "`vocab_size`.*-4"),
    "empty vocabulary": ({"vocab_size": 0}, "`vocab_size`.*0"),
    "vocabulary as string": ({"vocab_size": "32"}, "`vocab_size`.*'32'"),
    "vocabulary as truth": ({"vocab_size": True}, "`vocab_size`.*True"),
    "vocabulary beyond components": ({"vocab_size": 33, "component_configs": [LLAMA, LLAMA]}, "33.*more than.*32"),
    "simplex flag as string": ({"allow_off_simplex": "no"}, "`allow_off_simplex`.*'no'"),
    "configs no list": ({"component_configs": LLAMA}, "`component_configs` must be a list"),
    "too few configs": ({"component_configs": [LLAMA]}, "1 `component_configs` for 2"),
    "config without type": ({"component_configs": [{}, LLAMA]}, r"`model_type`, got \{\}"),
    "config no dictionary": ({"component_configs": [7, LLAMA]}, "`model_type`, got 7"),
    "config of unknown type": ({"component_configs": [{"model_type": "lama"}, LLAMA]}, "lama"),
    "config of wrong field": ({"component_configs": [{**LLAMA, "hidden_size": "x"}, LLAMA]}, "hidden_size.*'x'"),
    "config of no layers": ({"component_configs": [{**LLAMA, "num_hidden_layers": -1}, LLAMA]}, "`num_hidden_layers`"),
    "config of no language": ({"component_configs": [{"model_type": "vit"}, LLAMA]}, "vit.*not describe a language"),
    "config of a mixture": (
        {"component_configs": [{"model_type": "mpo_mixture"}, LLAMA]},
        "mpo_mixture.*not describe",
    ),
    "computed field": ({"num_hidden_layers": 7}, r"\['num_hidden_layers'\].*cannot be set"),
    "layers of its own": ({"per_layer_config": {"0": {}}}, r"\['per_layer_config'\].*cannot be set"),
}


@pytest.mark.parametrize("fields, message", BAD_FIELDS.values(), ids=BAD_FIELDS.keys())
def test_hand_edited_nonsense_is_refused_by_name(tmp_path, fields, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        MixturePolicyConfig(**{"components": TWO, **fields})
    with pytest.raises(ValueError, match=f"(?s){message}"):
        AutoConfig.from_pretrained(write_config(tmp_path, **fields))


def test_intact_config_passes_the_same_checks(tmp_path):
    # the cases above differ from this one in one field each
    config = AutoConfig.from_pretrained(write_config(tmp_path, component_configs=[LLAMA, LLAMA], vocab_size=32))
    assert config.vocab_size == 32 and config.num_hidden_layers == 4


def test_weights_by_row_do_not_belong_into_a_config():
    config = MixturePolicyConfig(components=TWO)
    with pytest.raises(ValueError, match="one weight a component"):
        config.mixture_weights = [[0.5, 0.5], [0.1, 0.9]]


def test_layers_of_a_mixture_cannot_be_replaced():
    config = MixturePolicyConfig(component_configs=two_configs())
    with pytest.raises(ValueError, match="change the components"):
        config.per_layer_config = {0: {}}
