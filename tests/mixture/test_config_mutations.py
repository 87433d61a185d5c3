"""
Configs that are not what this package wrote: field by field, with values of every kind. Each opens right, or is refused
with a ValueError or OSError that names the field.
"""

import copy
import dataclasses
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLOSE, save_tiny, tiny
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.utils import logging

from mpo_hf import MixtureComponent, MixturePolicyConfig, MixturePolicyModel
from mpo_hf.mixture import configuration_mixture
from mpo_hf.mixture.config_schema import MAX_LAYERS


DEEP: Any = {}
for _ in range(60):
    DEEP = {"a": [DEEP]}
VALUES = {
    "null": None,
    "true": True,
    "zero": 0,
    "negative": -3,
    "fraction": 1.5,
    "nan": math.nan,
    "infinity": math.inf,
    "huge": 10**12,
    "beyond floats": 10**400,
    "text": "rubbish",
    "empty text": "",
    "long text": "x" * 100_000,
    "no character": "a\0b",
    "half a character": "\ud800",
    "empty list": [],
    "nested list": [[1]],
    "long list": [0.5] * 2000,
    "empty mapping": {},
    "mapping": {"rubbish": 1},
    "deep": DEEP,
}
TEXTS = {name for name, value in VALUES.items() if isinstance(value, str)}
NUMBERS = {"zero", "negative", "fraction", "nan", "infinity", "huge", "beyond floats"}
MAPPINGS = {"empty mapping", "mapping", "deep"}
# the values which each field of a mixture may have; all others are refused
FINE = {
    "components": {"null"},
    "mixture_weights": {"null"},
    "reference": {"null"},
    "component_configs": {"null", "empty list"},
    "vocab_size": {"null"},
    "allow_off_simplex": {"true"},
    "plausibility": {"zero"},
    "mixture_format": set(),
    "transformers_version": TEXTS,
    "architectures": {"empty list"},
    "custom_pipelines": MAPPINGS,
    "quantization_config": MAPPINGS,
    "dtype": set(),
    "torch_dtype": set(),
    "tokenizer_class": TEXTS,
    "bos_token_id": {"zero", "huge", "beyond floats"},
    "pad_token_id": {"zero", "huge", "beyond floats"},
    "eos_token_id": {"zero", "huge", "beyond floats"},
    "use_cache": {"true"},
    "tie_word_embeddings": {"true"},
    "return_dict": {"true"},
    "output_attentions": {"true"},
    "output_hidden_states": {"true"},
    "output_router_logits": {"true"},
    "router_aux_loss_coef": NUMBERS,
    "is_causal": {"true"},
    "is_encoder_decoder": set(),
    "chunk_size_feed_forward": {"zero", "huge", "beyond floats"},
    "num_labels": {"zero"},
    "id2label": {"empty mapping"},
    "label2id": {"empty mapping", "mapping"},
    "problem_type": set(),
}
OWN = ("components", "mixture_weights", "reference", "component_configs", "vocab_size", "allow_off_simplex")
OWN = (*OWN, "plausibility", "mixture_format")
# accepted and not kept: Transformers reads these from a generation config only
ELSEWHERE = set(GenerationConfig().to_dict()) - set(FINE)


@pytest.fixture(autouse=True, scope="module")
def quiet():
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # Transformers warns of token ids, thousands of times
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("parts")
    return [save_tiny(root / str(seed), "llama", seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def intact(parts) -> dict[str, Any]:
    """The config of a mixture of two models in folders, as it is saved."""
    config = MixturePolicyConfig(
        components=[{"name_or_path": parts[0]}, {"name_or_path": parts[1], "label": "kind"}],
        component_configs=[tiny("llama", seed).config for seed in (0, 1)],
    )
    return json.loads(config.to_json_string())


def outcome(folder: Path, fields: dict[str, Any], open_it: Callable, **kwargs) -> Any:
    """What opens, or the error; anything but a ValueError or OSError fails the test."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    try:
        return open_it(str(folder), **kwargs)
    except (ValueError, OSError) as err:
        assert len(str(err)) < 5000, f"{fields.keys()}: a message of {len(str(err))} characters"
        return err


def faults(cases: Iterator, folder: Path, open_it: Callable) -> list[str]:
    """The cases that opened though they must not, or were refused without their name, or though they are fine."""
    found = []
    for name, field, fields, fine in cases:
        result = outcome(folder, fields, open_it)
        if isinstance(result, Exception) == fine or (isinstance(result, Exception) and field not in str(result)):
            found.append(f"{name}: {str(result)[:200] if isinstance(result, Exception) else 'opened'}")
    return [fault.encode("ascii", "replace").decode() for fault in found]


def chosen(cases: Iterator[tuple], count: int) -> list[tuple]:
    """Some of the cases, always the same."""
    return random.Random(0).sample(list(cases), count)


def of_the_mixture(intact: dict) -> Iterator[tuple]:
    for field, fine in FINE.items():
        for name, value in VALUES.items():
            may_be_null = name == "null" and field not in OWN
            yield f"{field}={name}", field, {**intact, field: value}, name in fine or may_be_null


def of_a_component(intact: dict) -> Iterator[tuple]:
    for field in [field.name for field in dataclasses.fields(MixtureComponent)]:
        for name, value in VALUES.items():
            fields = copy.deepcopy(intact)
            fields["components"][1] = {"name_or_path": "org/a", "adapter": "org/lora", field: value}
            fine = name == "null" or (name in ("text", "long text") and field != "dtype")
            yield f"components[1].{field}={name}", field, fields, fine
        yield f"reference.{field}", field, {**intact, "reference": {"name_or_path": "org/a", field: 7}}, False


def of_a_part(intact: dict) -> Iterator[tuple]:
    """Configs of components. What Transformers builds is fine, as long as it is a language model of a size that exists."""
    for field in intact["component_configs"][1]:
        for name, value in VALUES.items():
            entry = {**intact["component_configs"][1], field: value}
            fields = {**intact, "component_configs": [intact["component_configs"][0], entry], "vocab_size": None}
            yield f"component_configs[1].{field}={name}", field, fields, describes_a_model(entry)


def describes_a_model(entry: dict) -> bool:
    layers = entry["num_hidden_layers"]
    if isinstance(layers, int | float) and layers > MAX_LAYERS:
        return False
    try:
        config = AutoConfig.for_model(**copy.deepcopy(entry))
    except Exception:
        return False
    return all(type(n) is int and n > 0 for n in (config.vocab_size, config.num_hidden_layers))


def test_fields_of_a_mixture_have_one_type(intact, tmp_path):
    cases = list(of_the_mixture(intact))
    assert len(cases) > 600
    assert not faults(cases, tmp_path, AutoConfig.from_pretrained)
    # AutoConfig looks into it for the name of a class before it knows whose config it is
    code = [
        ("auto_map", "auto_map", {**intact, "auto_map": value}, name in MAPPINGS) for name, value in VALUES.items()
    ]
    assert not faults(code[1:], tmp_path, MixturePolicyConfig.from_pretrained)


def test_fields_of_a_component_are_text(intact, tmp_path):
    assert not faults(chosen(of_a_component(intact), 100), tmp_path, AutoConfig.from_pretrained)


def test_configs_of_components_are_what_transformers_builds(intact, tmp_path):
    assert not faults(chosen(of_a_part(intact), 50), tmp_path, AutoConfig.from_pretrained)


@pytest.mark.slow
@pytest.mark.parametrize("cases", [of_a_component, of_a_part])
def test_every_field_of_every_component(intact, tmp_path, cases):
    cases = list(cases(intact))
    assert len(cases) > 200
    assert not faults(cases, tmp_path, AutoConfig.from_pretrained)


# ---- keys that are no fields ----


def attributes() -> list[str]:
    """Every name that a config of mixtures has, and is not a field: methods, properties, storage."""
    config = MixturePolicyConfig(component_configs=[tiny("llama", 0).config])
    read_elsewhere = {"model_type", "name_or_path", "_name_or_path"}
    return sorted({*dir(config), *vars(config), "component_0", "_heterogeneity_spec"} - set(FINE) - read_elsewhere)


def test_no_key_reaches_an_attribute(intact, tmp_path):
    names = attributes()
    assert {"_mixture_weights", "__class__", "to_dict", "_attn_implementation", "sub_configs"} < set(names)
    kept = AutoConfig.for_model(**copy.deepcopy(intact)).to_dict()
    for name in names:
        for value in (1, [9, 9]):
            result = outcome(tmp_path, {**intact, name: value}, AutoConfig.from_pretrained)
            assert (isinstance(result, ValueError) and name in str(result)) or result.to_dict() == kept, name


def test_no_override_reaches_an_attribute(intact, tmp_path):
    for name in set(attributes()) - {"max_position_embeddings", "_commit_hash"}:
        result = outcome(tmp_path, intact, AutoConfig.from_pretrained, **{name: [9, 9]})
        assert isinstance(result, ValueError) and name in str(result), name


def test_overrides_are_checked_like_the_fields_that_they_override(intact, tmp_path):
    for field, fine in FINE.items():
        for name in ("negative", "mapping", "empty text"):
            result = outcome(tmp_path, intact, AutoConfig.from_pretrained, **{field: VALUES[name]})
            if field not in ("dtype", "torch_dtype"):  # of the weights to load, not of the config
                assert isinstance(result, ValueError) != (name in fine), (field, name)


def test_assignments_are_checked_like_the_file(intact):
    config = MixturePolicyConfig.from_dict(intact)
    before = config.to_dict()
    for field in set(OWN) - {"mixture_format"}:
        for name in ("negative", "mapping", "text"):
            for assign in (lambda f, v: setattr(config, f, v), lambda f, v: config.update({f: v})):
                with pytest.raises(ValueError, match=field):
                    assign(field, VALUES[name])
    assert config.to_dict() == before


def test_keys_of_a_component_config_are_no_parts_of_its_class(intact, tmp_path):
    theirs = {name for name in dir(PreTrainedConfig) if callable(getattr(PreTrainedConfig, name))}
    storage = {name for name in vars(PreTrainedConfig()) if name.startswith("_")} - {"_name_or_path"}
    for name in (*theirs, *storage, "attribute_map", "sub_configs", "_attn_implementation", "_heterogeneity_spec"):
        fields = copy.deepcopy(intact)
        fields["component_configs"][1][name] = {}
        result = outcome(tmp_path, fields, AutoConfig.from_pretrained)
        assert isinstance(result, ValueError) and name in str(result) and "component_configs[1]" in str(result), name


def test_what_others_write_into_configs_is_kept_or_left_to_the_generation_config(intact, tmp_path):
    others = {
        "transformers_version": "5.19.0",
        "architectures": ["MixturePolicyModel"],
        "dtype": "bfloat16",
        "id2label": {"0": "a", "1": "b"},
        "label2id": {"a": 0, "b": 1},
        "custom_pipelines": {"mine": {"impl": "mine.Mine"}},
        "output_router_logits": False,
    }
    opened = outcome(tmp_path, {**intact, **others, **dict.fromkeys(ELSEWHERE, 7)}, AutoConfig.from_pretrained)
    assert opened.dtype == torch.bfloat16 and opened.id2label == {0: "a", 1: "b"}
    assert opened.custom_pipelines == others["custom_pipelines"] and opened.output_router_logits is False
    assert not [name for name in ELSEWHERE if getattr(opened, name, None) == 7]
    opened.save_pretrained(tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").to_dict() == {
        **opened.to_dict(),
        "_name_or_path": str(tmp_path / "again"),
    }


def test_what_is_set_by_others_is_not_saved_and_named(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    logging.set_verbosity_warning()
    config = MixturePolicyConfig(components=[{"name_or_path": "org/a"}])
    config.remark = "mine"
    config.save_pretrained(tmp_path)
    logging.set_verbosity(logging.CRITICAL)
    assert "remark" in caplog.text
    assert not hasattr(AutoConfig.from_pretrained(tmp_path), "remark")


# ---- formats ----


def test_format_is_saved_and_that_of_a_later_version_is_refused_first(intact, tmp_path):
    assert intact["mixture_format"] == 1
    result = outcome(tmp_path, {**intact, "mixture_format": 2, "later": 1}, AutoConfig.from_pretrained)
    assert isinstance(result, ValueError) and "`mixture_format` 2" in str(result) and "--upgrade mpo_hf" in str(result)


def test_configs_without_a_format_open(intact, tmp_path):
    old = {name: value for name, value in intact.items() if name != "mixture_format"}
    assert outcome(tmp_path, old, AutoConfig.from_pretrained).to_dict() == {
        **MixturePolicyConfig.from_dict(intact).to_dict(),
        "_name_or_path": str(tmp_path),
    }


def test_unknown_field_is_refused_with_the_one_that_may_be_meant(intact, tmp_path):
    result = outcome(tmp_path, {**intact, "mixture_wieghts": [0, 1]}, AutoConfig.from_pretrained)
    assert isinstance(result, ValueError) and "'mixture_wieghts'. Did you mean 'mixture_weights'?" in str(result)


def test_last_of_two_fields_of_one_name_is_checked(intact, tmp_path):
    text = json.dumps(intact)
    for weights, error in ((".25, .75", None), ("9, 9", "mixture_weights")):
        (tmp_path / "config.json").write_text(f'{text[:-1]}, "mixture_weights": [{weights.replace(".", "0.")}]}}')
        if error is None:
            assert AutoConfig.from_pretrained(tmp_path).mixture_weights == [0.25, 0.75]
        else:
            with pytest.raises(ValueError, match=error):
                AutoConfig.from_pretrained(tmp_path)


# ---- sizes ----


@pytest.mark.parametrize("field", ["num_hidden_layers", "num_labels"])
@pytest.mark.parametrize("nested", [False, True])
def test_numbers_that_become_lists_are_bounded_before_anything_is_built(intact, tmp_path, monkeypatch, field, nested):
    built = []
    monkeypatch.setattr(AutoConfig, "for_model", lambda *args, **kwargs: built.append(kwargs))
    entry = {"model_type": "gemma3_text", field: 10**9}
    entry = {"model_type": "gemma3", "text_config": entry} if nested else entry
    result = outcome(tmp_path, {**intact, "component_configs": [entry, entry]}, AutoConfig.from_pretrained)
    assert isinstance(result, ValueError) and field in str(result) and "component_configs[0]" in str(result)
    assert not built


def test_number_of_components_is_bounded(tmp_path):
    fields = {"model_type": "mpo_mixture", "components": [{"name_or_path": "org/a"}] * 2000}
    result = outcome(tmp_path, fields, AutoConfig.from_pretrained)
    assert isinstance(result, ValueError) and "`components` lists 2000" in str(result)
    fields["components"] = fields["components"][:200]
    assert outcome(tmp_path, fields, AutoConfig.from_pretrained).mixture_weights == pytest.approx([1 / 200] * 200)


def test_mixtures_inside_of_mixtures_are_refused_at_the_outermost(intact, tmp_path):
    fields = intact
    for _ in range(50):
        fields = {**intact, "component_configs": [fields, intact["component_configs"][0]]}
    result = outcome(tmp_path, fields, AutoConfig.from_pretrained)
    assert isinstance(result, ValueError) and "component_configs[0]" in str(result) and "mpo_mixture" in str(result)


def test_layers_are_counted_when_they_are_asked_for(monkeypatch):
    # Transformers' own check of each config goes through its layers; the mixture's goes through none
    parts = [tiny("llama", 0).config, tiny("gemma3", 0).config]
    asked = []
    monkeypatch.setattr(
        configuration_mixture, "layer_types_of", lambda config: asked.append(config) or ["full_attention"]
    )
    config = MixturePolicyConfig(component_configs=parts)
    assert not asked
    assert config.layer_types == ["full_attention"] * 2 and len(asked) == 2


# ---- models ----


@pytest.fixture
def layers_built(monkeypatch) -> list:
    built = []
    monkeypatch.setattr(LlamaDecoderLayer, "__init__", lambda self, *args: built.append(self))
    return built


def test_models_of_refused_configs_are_not_built(intact, tmp_path, layers_built):
    cases = [case for case in of_the_mixture(intact) if not case[-1]]
    assert not faults(random.Random(1).sample(cases, 60), tmp_path, AutoModelForCausalLM.from_pretrained)
    assert not layers_built


def test_component_with_too_many_layers_is_refused_before_it_is_built(intact, parts, tmp_path, layers_built):
    shutil.copytree(parts[1], tmp_path / "deep")
    path = tmp_path / "deep/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 100_000}))
    fields = {**intact, "components": [intact["components"][0], {"name_or_path": "./deep", "label": "kind"}]}
    result = outcome(tmp_path, fields, AutoModelForCausalLM.from_pretrained)
    assert isinstance(result, ValueError) and "(kind)" in str(result) and "num_hidden_layers" in str(result)
    assert not layers_built


def test_models_of_configs_that_are_fine_are_those_of_the_intact_one(intact, tmp_path):
    ids = torch.tensor([[1, 5, 9]])
    expected = outcome(tmp_path, intact, AutoModelForCausalLM.from_pretrained)(ids).logits
    leave_out = {"components", "dtype", "torch_dtype", "quantization_config", "return_dict"}
    cases = [case for case in of_the_mixture(intact) if case[-1] and case[1] not in leave_out]
    for name, _, fields, _ in random.Random(2).sample(cases, 6):
        torch.testing.assert_close(
            outcome(tmp_path, fields, AutoModelForCausalLM.from_pretrained)(ids).logits, expected, msg=name
        )


@pytest.mark.slow
def test_whole_mixture_is_what_its_parts_are_or_refused(tmp_path):
    """Against Transformers' own models of the same configs and weights, pooled by hand."""
    MixturePolicyModel.from_policies([tiny("llama", 0), tiny("llama", 1)]).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    weights = load_file(tmp_path / "model.safetensors")
    second_weights = {key[11:]: weight for key, weight in weights.items() if key.startswith("backbone_1.")}
    ids = torch.tensor([[1, 5, 9]])
    first = tiny("llama", 0)(ids).logits.log_softmax(-1)
    for name, _, fields, fine in of_a_part(saved):
        result = outcome(tmp_path, fields, AutoModelForCausalLM.from_pretrained)
        if not fine:  # among them numbers of layers that nobody could build
            assert isinstance(result, Exception), name
            continue
        try:
            config = AutoConfig.for_model(**fields["component_configs"][1])
            part = type(tiny("llama", 0)).from_pretrained(None, config=config, state_dict=second_weights)
        except Exception:
            assert isinstance(result, Exception), name
            continue
        if not isinstance(result, Exception):
            second = part.eval()(ids).logits.log_softmax(-1)
            torch.testing.assert_close(result(ids).logits, (first + second) / 2, msg=name, equal_nan=True, **CLOSE)
