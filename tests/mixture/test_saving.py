"""Saving a mixture: a config that says where its components live, or the whole of it; and opening it again."""

import dataclasses
import json
import os
import pathlib
import shutil

import pytest
import torch
from helpers import BOS, CLOSE, PROGRAMS, SIZES, fake_hub, load_lora, tiny
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    pipeline,
)

from mpo_hf import MixturePolicyConfig, MixturePolicyModel, MPOConfig
from mpo_hf.cli.push import PushArguments
from mpo_hf.mixture.hub import PUSH_ARGUMENTS


IDS = torch.tensor([[BOS, 7, 11, 3, 22, 8, 14], [BOS, 30, 5, 6, 9, 2, 4]])


@torch.no_grad()
def assert_same(mixture, other):
    torch.testing.assert_close(mixture(IDS).logits, other(IDS).logits, **CLOSE)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert mixture.generate(IDS, **settings).tolist() == other.generate(IDS, **settings).tolist()
    torch.manual_seed(0)
    sampled = mixture.generate(IDS, max_new_tokens=6, do_sample=True)
    torch.manual_seed(0)
    assert sampled.tolist() == other.generate(IDS, max_new_tokens=6, do_sample=True).tolist()


@pytest.fixture
def mixture(folders):
    policies = [folders.base, {"name_or_path": folders.base, "adapter": folders.kind}, folders.gpt2]
    mixture = MixturePolicyModel.from_policies(
        policies, [0.2, 0.5, 0.3], reference=folders.base, labels=["plain", "kind", "other"]
    )
    mixture.generation_config = GenerationConfig(max_new_tokens=5, temperature=0.5, do_sample=True)
    return mixture


def edit_config(folder, **fields) -> str:
    """Changes fields of a saved config by hand."""
    path = pathlib.Path(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return str(folder)


# ---- by reference ----


def test_saving_writes_configs_and_no_weights(mixture, tmp_path):
    mixture.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "generation_config.json"]
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["MixturePolicyModel"]


@pytest.mark.parametrize("open_model", [AutoModelForCausalLM.from_pretrained, MixturePolicyModel.from_pretrained])
def test_saved_mixture_opens_and_writes_the_same(mixture, tmp_path, open_model):
    mixture.save_pretrained(tmp_path)
    opened = open_model(tmp_path)
    assert type(opened) is MixturePolicyModel and not opened.training
    assert_same(opened, mixture)
    assert opened.config.labels == ["plain", "kind", "other"]
    assert opened.config.mixture_weights == mixture.config.mixture_weights
    assert len(opened.backbones) == 2
    assert (opened.generation_config.max_new_tokens, opened.generation_config.temperature) == (5, 0.5)
    reference = opened.reference_policy
    assert reference.backbones[0] is opened.backbones[0]
    torch.testing.assert_close(reference(IDS).logits, mixture.reference_policy(IDS).logits, **CLOSE)


def test_saving_again_changes_nothing(mixture, tmp_path):
    mixture.save_pretrained(tmp_path / "once")
    MixturePolicyModel.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "once" / name).read_text() == (tmp_path / "twice" / name).read_text()


def test_weights_changed_after_loading_are_saved(mixture, tmp_path):
    mixture.mixture_weights = [0.0, 0.9, 0.1]
    mixture.save_pretrained(tmp_path)
    assert MixturePolicyModel.from_pretrained(tmp_path).config.mixture_weights == [0.0, 0.9, 0.1]


def test_saved_mixture_runs_in_a_pipeline(mixture, tmp_path, tokenizer):
    mixture.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), tokenizer=AutoTokenizer.from_pretrained(tmp_path))
    text = generator("t4 t7 t9 ", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    ids = mixture.generate(torch.tensor([[4, 7, 9]]), max_new_tokens=3, do_sample=False)
    assert text.split()[-3:] == tokenizer.decode(ids[0, 3:]).split()


def test_arguments_of_opening_reach_the_components(mixture, tmp_path):
    mixture.save_pretrained(tmp_path)
    for open_model in (AutoModelForCausalLM.from_pretrained, MixturePolicyModel.from_pretrained):
        opened = open_model(tmp_path, dtype=torch.bfloat16, device_map="cpu", attn_implementation="eager")
        assert {backbone.dtype for backbone in opened.backbones} == {torch.bfloat16}
        assert len(opened(IDS, output_attentions=True).attentions) == 6
        assert opened.config.dtype == torch.bfloat16
        other = open_model(tmp_path, mixture_weights=[2, 0, -1], allow_off_simplex=True)
        assert other.mixture_weights.tolist() == [2, 0, -1]
        assert open_model(tmp_path, mixture_weights=None).config.mixture_weights == mixture.config.mixture_weights
        given = GenerationConfig(max_new_tokens=2)
        assert open_model(tmp_path, generation_config=given).generation_config.max_new_tokens == 2
        opened, info = open_model(tmp_path, output_loading_info=True)
        assert not any(info.values())


def test_precision_of_a_component_is_saved(folders, tmp_path):
    policies = [{"name_or_path": folders.base, "dtype": "bfloat16"}, folders.gpt2]
    mixture = MixturePolicyModel.from_policies(policies)
    mixture.save_pretrained(tmp_path)
    opened = MixturePolicyModel.from_pretrained(tmp_path)
    assert [backbone.dtype for backbone in opened.backbones] == [torch.bfloat16, torch.float32]
    assert_same(opened, mixture)


def test_mixture_without_generation_config_generates_as_its_first_component(mixture, folders, tmp_path):
    mixture.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    opened = MixturePolicyModel.from_pretrained(tmp_path)
    first = AutoModelForCausalLM.from_pretrained(folders.base).generation_config
    assert opened.generation_config.eos_token_id == first.eos_token_id == SIZES["eos_token_id"]


# ---- paths ----


@pytest.fixture
def movable(folders, tmp_path):
    """A folder with a mixture whose components lie in and beside it, moved after it was made."""
    home = tmp_path / "before"
    for name in ("base", "kind", "gpt2"):
        inside = home / ("mixture/policies" if name != "gpt2" else "beside") / name
        shutil.copytree(folders.root / name, inside)
    components = [
        {"name_or_path": "policies/base", "adapter": "./policies/kind"},
        {"name_or_path": "../beside/gpt2"},
        {"name_or_path": "./policies", "subfolder": "base"},
    ]
    reference = {"name_or_path": "./policies/base"}
    config = MixturePolicyConfig(components=components, mixture_weights=[0.5, 0.2, 0.3], reference=reference)
    config.save_pretrained(home / "mixture")
    return home.rename(tmp_path / "after") / "mixture"


def test_relative_paths_are_resolved_from_the_folder_of_the_config(movable, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mixture = MixturePolicyModel.from_policies([folders.kind, folders.gpt2, folders.base], [0.5, 0.2, 0.3])
    opened = [
        MixturePolicyModel.from_pretrained(path) for path in (movable, "after/mixture", "./after/../after/mixture")
    ]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for model in [*opened, AutoModelForCausalLM.from_pretrained("../after/mixture")]:
        assert_same(model, mixture)
        assert os.path.isabs(model.config.components[0].adapter)
        base = AutoModelForCausalLM.from_pretrained(folders.base)
        expected = base(IDS).logits.log_softmax(-1)
        torch.testing.assert_close(model.reference_policy(IDS).logits, expected, **CLOSE)


def test_subfolder_of_a_mixture_is_where_its_paths_begin(movable, folders):
    opened = MixturePolicyModel.from_pretrained(movable.parent, subfolder="mixture")
    assert opened.config.components[1].name_or_path == str(movable.parent / "beside/gpt2")


def test_relative_path_to_nowhere_is_named(movable):
    for component in ({"name_or_path": "./gone"}, {"name_or_path": "../beside/gpt2", "adapter": "../gone"}):
        with pytest.raises(OSError, match="gone.*does not exist"):
            MixturePolicyModel.from_pretrained(edit_config(movable, components=[component], mixture_weights=[1]))
    with pytest.raises(OSError, match="gone"):
        MixturePolicyModel.from_pretrained(edit_config(movable, components=[{"name_or_path": "gone"}]))


@pytest.mark.parametrize("subfolder", ["", "deep/mixture"])
def test_relative_paths_of_a_repository_stay_inside_it(folders, tmp_path, subfolder):
    repo, inner = tmp_path / "repo", tmp_path / "repo" / subfolder
    shutil.copytree(folders.base, inner / "policies/base")
    shutil.copytree(folders.kind, inner / "policies/kind")
    components = [{"name_or_path": "./policies/base", "adapter": "./policies/kind"}]
    MixturePolicyConfig(components=components).save_pretrained(inner)
    fake_hub(tmp_path / "cache", "org/mixture", repo, "v1")
    location = {"revision": "v1", "cache_dir": tmp_path / "cache", **({"subfolder": subfolder} if subfolder else {})}
    mixture = MixturePolicyModel.from_policies([folders.kind])
    assert_same(MixturePolicyModel.from_pretrained("org/mixture", **location), mixture)
    policy = {"name_or_path": "org/mixture", "revision": "v1", **({"subfolder": subfolder} if subfolder else {})}
    assert_same(MixturePolicyModel.from_policies([policy], cache_dir=tmp_path / "cache"), mixture)
    MixturePolicyConfig(components=[{"name_or_path": "./../../../outside"}]).save_pretrained(inner)
    fake_hub(tmp_path / "cache", "org/escaping", repo, "v1")
    with pytest.raises(OSError, match="outside its repository"):
        MixturePolicyModel.from_pretrained("org/escaping", **location)


# ---- whole ----


@pytest.mark.parametrize("tied", [False, True])
def test_mixture_of_models_in_memory_is_saved_whole(tmp_path, tied):
    policies = [tiny("llama", 1, tie_word_embeddings=tied), tiny("gpt2", 2), tiny("gemma3", 3)]
    mixture = MixturePolicyModel.from_policies(policies, [0.2, 0.3, 0.5], labels=["a", "b", "c"])
    mixture.save_pretrained(tmp_path)
    assert "model.safetensors" in os.listdir(tmp_path)
    for open_model in (AutoModelForCausalLM.from_pretrained, MixturePolicyModel.from_pretrained):
        opened, info = open_model(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert_same(opened, mixture)
        assert opened.config.labels == ["a", "b", "c"] and opened.config.mixture_weights == [0.2, 0.3, 0.5]
        llama, gpt2 = opened.backbones[0], opened.backbones[1]
        shared = llama.lm_head.weight.data_ptr() == llama.model.embed_tokens.weight.data_ptr()
        assert shared is tied and gpt2.lm_head.weight is gpt2.transformer.wte.weight
        opened.save_pretrained(tmp_path / "again")
        assert_same(MixturePolicyModel.from_pretrained(tmp_path / "again"), mixture)


def test_reference_in_memory_is_left_out_of_a_mixture_saved_whole(tmp_path):
    mixture = MixturePolicyModel.from_policies([tiny("llama", 1), tiny("gpt2", 2)], reference=tiny("qwen2", 3))
    assert mixture.reference_policy is not None
    mixture.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"backbone_0", "backbone_1"}
    opened = MixturePolicyModel.from_pretrained(tmp_path)
    assert_same(opened, mixture)
    assert opened.reference_policy is None


def test_reference_on_file_goes_with_a_mixture_saved_whole(folders, tmp_path):
    mixture = MixturePolicyModel.from_policies([tiny("llama", 1), tiny("gpt2", 2)], reference=folders.base)
    expected = mixture.reference_policy(IDS).logits
    mixture.save_pretrained(tmp_path)
    opened = MixturePolicyModel.from_pretrained(tmp_path)
    assert_same(opened, mixture)
    torch.testing.assert_close(opened.reference_policy(IDS).logits, expected, **CLOSE)


def test_models_of_different_precision_are_not_written_into_one_checkpoint(tmp_path):
    mixture = MixturePolicyModel.from_policies([tiny("llama", 1).bfloat16(), tiny("gpt2", 2)])
    with pytest.raises(ValueError, match=r"one dtype.*'torch.bfloat16', 'torch.float32'"):
        mixture.save_pretrained(tmp_path)
    mixture.to(torch.bfloat16).save_pretrained(tmp_path)
    assert {backbone.dtype for backbone in MixturePolicyModel.from_pretrained(tmp_path).backbones} == {torch.bfloat16}


def test_half_precision_mixture_saved_whole_comes_back_in_half_precision(folders, tmp_path):
    policies = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in (folders.base, folders.gpt2)
    ]
    mixture = MixturePolicyModel.from_policies(policies)
    mixture.save_pretrained(tmp_path)
    opened = MixturePolicyModel.from_pretrained(tmp_path)
    assert opened.dtype == torch.bfloat16
    assert_same(opened, mixture)


def test_half_in_memory_half_on_file_cannot_be_saved(folders, tmp_path):
    mixture = MixturePolicyModel.from_policies([tiny("llama", 1), folders.gpt2], labels=["ours", "theirs"])
    with pytest.raises(ValueError, match=r"\['ours'\] were given in memory"):
        mixture.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_in_memory_that_share_one_backbone_cannot_be_saved(folders, tmp_path):
    model = tiny("llama", 1)
    for policies in ([model, model], [load_lora(folders.kind, folders.base)]):
        with pytest.raises(ValueError, match="share one model in memory"):
            MixturePolicyModel.from_policies(policies).save_pretrained(tmp_path)
    assert not os.listdir(tmp_path)


# ---- what is refused ----


def vision_language():
    """A Qwen2-VL."""
    rope = {"rope_type": "default", "mrope_section": [1, 2, 1], "rope_theta": 1e4}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "mlp_ratio": 1}
    ids = {"image_token_id": 28, "video_token_id": 29, "vision_start_token_id": 30, "vision_end_token_id": 31}
    config = Qwen2VLConfig(text_config={**SIZES, "rope_parameters": rope}, vision_config=vision, **ids)
    return Qwen2VLForConditionalGeneration(config).eval()


class Doubled(LlamaForCausalLM):
    """A model of somebody's own, whose config is that of another."""

    def get_output_embeddings(self):
        return None


def resized():
    model = tiny("llama", 1)
    model.lm_head = torch.nn.Linear(SIZES["hidden_size"], SIZES["vocab_size"])  # with a bias
    return model


CANNOT_BE_OPENED = {
    "vision and language": (vision_language, "cannot open it again, so that it is mixed in memory only"),
    "a class of its own": (lambda: Doubled(tiny("llama", 1).config), "would open as a LlamaForCausalLM"),
    "a changed head": (resized, "would open as a LlamaForCausalLM, in which 'lm_head.bias' differs"),
}


@pytest.mark.parametrize(("make", "reason"), CANNOT_BE_OPENED.values(), ids=CANNOT_BE_OPENED.keys())
def test_what_could_not_be_opened_again_is_not_saved(make, reason, tmp_path):
    mixture = MixturePolicyModel.from_policies([make(), tiny("llama", 2)], labels=["odd", "plain"], vocab_size=32)
    with pytest.raises(ValueError, match=rf"'odd' .*cannot be saved with the mixture.*{reason}"):
        mixture.save_pretrained(tmp_path / "mixture")
    assert not (tmp_path / "mixture").exists()


def test_a_mixture_that_peft_wrapped_is_not_saved_without_its_adapter(tmp_path):
    mixture = MixturePolicyModel.from_policies([tiny("llama", 1), tiny("llama", 2)])
    adapted = get_peft_model(mixture, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="q_proj.base_layer.weight' differs"):
        mixture.save_pretrained(tmp_path / "mixture")
    adapted.unload().save_pretrained(tmp_path / "mixture")
    opened = MixturePolicyModel.from_pretrained(tmp_path / "mixture")
    expected = MixturePolicyModel.from_policies([tiny("llama", 1), tiny("llama", 2)])
    torch.testing.assert_close(opened(IDS).logits, expected(IDS).logits, **CLOSE)


def test_models_that_transformers_opened_from_adapters_are_not_saved_with_their_bases_alone(folders, tmp_path):
    models = [AutoModelForCausalLM.from_pretrained(adapter) for adapter in (folders.kind, folders.terse)]
    mixture = MixturePolicyModel.from_policies(models)
    expected = [load_lora(adapter, folders.base) for adapter in (folders.kind, folders.terse)]
    logits = sum(model(IDS).logits.log_softmax(-1) / 2 for model in expected)
    torch.testing.assert_close(mixture(IDS).logits, logits, **CLOSE)
    with pytest.raises(ValueError, match=r"base_layer.weight' differs.*by those of the adapters"):
        mixture.save_pretrained(tmp_path / "mixture")
    again = MixturePolicyModel.from_policies([folders.kind, folders.terse])  # what the message proposes
    again.save_pretrained(tmp_path / "mixture")
    assert_same(MixturePolicyModel.from_pretrained(tmp_path / "mixture"), again)


def test_folder_of_another_model_is_refused(folders):
    with pytest.raises(ValueError, match="'llama', not a mixture"):
        MixturePolicyModel.from_pretrained(folders.base)


BROKEN = {
    "no components": ({"components": [], "mixture_weights": [], "component_configs": []}, "lists no components"),
    "nameless component": ({"components": [{}, {"name_or_path": "a"}, {}]}, "'policy_0'.*`name_or_path`"),
    "adapter without base": ({"components": [{"adapter": "a"}, {"name_or_path": "b"}] * 2}, "4 `components`"),
    "weights": ({"mixture_weights": [0.5, 0.5]}, r"Expected 3.*\[0.5, 0.5\]"),
    "vocabulary": ({"vocab_size": 640}, "640"),
    "vocabulary without configs": ({"vocab_size": 640, "component_configs": []}, "640"),
}


@pytest.mark.parametrize("fields, message", BROKEN.values(), ids=BROKEN.keys())
def test_config_edited_into_nonsense_does_not_open(mixture, tmp_path, fields, message):
    mixture.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        MixturePolicyModel.from_pretrained(edit_config(tmp_path, **fields))


def test_trust_in_a_mixture_is_not_trust_in_its_components(folders, tmp_path, monkeypatch):
    theirs, marker = tmp_path / "theirs", tmp_path / "code has run"
    shutil.copytree(folders.base, theirs)
    shutil.copy(PROGRAMS / "their_model.py", theirs)
    monkeypatch.setenv("MARK", str(marker))
    auto_map = {"AutoConfig": "their_model.TheirConfig", "AutoModelForCausalLM": "their_model.TheirModel"}
    edit_config(theirs, model_type="theirs", auto_map=auto_map)
    MixturePolicyConfig(components=[{"name_or_path": str(theirs)}]).save_pretrained(tmp_path / "mixture")
    for open_model in (AutoModelForCausalLM.from_pretrained, MixturePolicyModel.from_pretrained):
        with pytest.raises(ValueError, match="trust_remote_code"):
            open_model(tmp_path / "mixture", trust_remote_code=True)
    assert not marker.exists()
    trusting = {"component_kwargs": {"trust_remote_code": True}}
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture", **trusting)
    assert marker.exists() and type(opened.backbones[0]).__name__ == "TheirModel"
    assert_same(opened, MixturePolicyModel.from_policies([folders.base]))


def test_command_line_and_trainer_push_by_default_as_the_model_does():
    options = {
        field.name: field.default
        for field in dataclasses.fields(PushArguments)
        if field.name not in ("repo_id", "trust_remote_code")
    }
    options["pin_revisions"] = options.pop("pin")
    settings = {field.name.removeprefix("hub_"): field.default for field in dataclasses.fields(MPOConfig)}
    settings = {name: settings[name] for name in ("pin_revisions", "upload_adapters", "with_code")}
    for given in (options, settings):
        # a switch that is off may stand for an argument that is left out
        assert {name: bool(value) for name, value in given.items()} == {
            name: bool(PUSH_ARGUMENTS[name]) for name in given
        }
