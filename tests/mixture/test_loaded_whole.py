"""Nothing of a component is left out or made up when it is loaded, and nothing is changed that others use."""

import json
import pathlib
import shutil

import pytest
import torch
from helpers import BOS, CLOSE, SIZES, load_lora, save_tiny, tiny
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    LlamaForSequenceClassification,
    LlamaModel,
)

from mpo_hf import MixturePolicyModel
from mpo_hf.mixture.component_running import ComponentRunningMixin


IDS = torch.tensor([[BOS, 7, 11, 3, 22, 8, 14]])


@torch.no_grad()
def logps(model):
    return model(input_ids=IDS).logits.log_softmax(-1)


def edit(folder: str, target: pathlib.Path, change) -> str:
    """A copy of a folder whose weights, a dictionary, were changed."""
    shutil.copytree(folder, target)
    (path,) = target.glob("*.safetensors")
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
    return str(target)


def without(*names):
    """A change that takes weights out."""

    def change(weights):
        for key in [key for key in weights if any(name in key for name in names)]:
            del weights[key]

    return change


# ---- checkpoints ----

BROKEN = {
    "a weight is missing": (
        without("layers.1.mlp.up_proj"),
        r"lacks 'model.layers.1.mlp.up_proj.weight'.*\(1 weight\)",
    ),
    "a layer is missing": (without("layers.1."), r"lacks 'model.layers.1.*the first of 9 weights"),
    "a head of another kind": (
        lambda weights: weights.update({"score.weight": weights.pop("lm_head.weight")[:1]}),
        r"lacks 'lm_head.weight'.*no place for 'score.weight'",
    ),
    "a layer too many": (
        lambda weights: weights.update({"model.layers.2.mlp.up_proj.weight": torch.ones(24, 16)}),
        r"no place for 'model.layers.2.mlp.up_proj.weight' \(1 weight\)",
    ),
}


@pytest.mark.parametrize(("change", "found"), BROKEN.values(), ids=BROKEN.keys())
def test_checkpoint_that_is_not_the_models_is_refused_by_its_first_weight(change, found, folders, tmp_path):
    broken = edit(folders.base, tmp_path / "broken", change)
    for policy in ({"name_or_path": broken}, {"name_or_path": broken, "adapter": folders.kind}):
        with pytest.raises(ValueError, match=rf"broken' does not fit .*{found}.*allow_unmatched_weights=True"):
            MixturePolicyModel.from_policies([policy])


def test_models_without_a_language_modeling_head_are_refused(tmp_path):
    config = tiny("llama", 0).config
    for name, model in (("reward", LlamaForSequenceClassification(config)), ("headless", LlamaModel(config))):
        model.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name}' does not fit .*lacks 'lm_head.weight'"):
            MixturePolicyModel.from_policies([str(tmp_path / name)])


def test_weights_of_another_shape_are_refused_also_where_transformers_was_told_to_ignore_them(folders, tmp_path):
    wide = edit(folders.base, tmp_path / "wide", lambda weights: weights.update({"model.norm.weight": torch.ones(17)}))
    with pytest.raises((ValueError, RuntimeError)):
        MixturePolicyModel.from_policies([wide])
    with pytest.raises(ValueError, match=r"lacks 'model.norm.weight', or has it in another shape"):
        MixturePolicyModel.from_policies([wide], ignore_mismatched_sizes=True)


def test_what_is_no_weight_of_its_own_may_be_missing_or_left_over(tmp_path):
    tied = save_tiny(tmp_path / "tied", "llama", 20, tie_word_embeddings=True)
    tiny("llama", 21).save_pretrained(tmp_path / "sharded", max_shard_size="2KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    headless = tiny("llama", 22, tie_word_embeddings=True).model
    headless.save_pretrained(tmp_path / "headless")
    constants = {
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4),
    }
    old = edit(save_tiny(tmp_path / "gpt2", "gpt2", 23), tmp_path / "old", lambda weights: weights.update(constants))
    policies = [tied, str(tmp_path / "sharded"), str(tmp_path / "headless"), old]
    mixture = MixturePolicyModel.from_policies(policies)
    expected = [
        tiny("llama", 20, tie_word_embeddings=True),
        tiny("llama", 21),
        tiny("llama", 22, tie_word_embeddings=True),
    ]
    for k, model in enumerate([*expected, tiny("gpt2", 23)]):
        torch.testing.assert_close(logps(mixture.policy(k)), logps(model), **CLOSE)


def test_who_knows_can_accept_unmatched_weights(folders, tmp_path):
    """A value head beside a policy; no config can say so."""
    head = {"v_head.summary.weight": torch.ones(1, 16)}
    valued = edit(folders.base, tmp_path / "valued", lambda weights: weights.update(head))
    mixture = MixturePolicyModel.from_policies([valued, folders.gpt2], allow_unmatched_weights=True)
    torch.testing.assert_close(
        logps(mixture.policy(0)), logps(AutoModelForCausalLM.from_pretrained(folders.base)), **CLOSE
    )
    mixture.save_pretrained(tmp_path / "mixture")
    assert "allow_unmatched" not in (tmp_path / "mixture/config.json").read_text()
    for open_model in (AutoModelForCausalLM.from_pretrained, MixturePolicyModel.from_pretrained):
        with pytest.raises(ValueError, match="no place for 'v_head.summary.weight'"):
            open_model(tmp_path / "mixture")
        torch.testing.assert_close(
            open_model(tmp_path / "mixture", allow_unmatched_weights=True)(IDS).logits, mixture(IDS).logits, **CLOSE
        )
    with pytest.raises(ValueError, match="`allow_unmatched_weights` must be True or False, got 'no'"):
        MixturePolicyModel.from_policies([valued], allow_unmatched_weights="no")
    path = tmp_path / "mixture/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "allow_unmatched_weights": True}))
    with pytest.raises(ValueError, match="v_head.summary.weight|allow_unmatched_weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")


def test_mixture_saved_whole_that_lacks_weights_is_refused(tmp_path):
    MixturePolicyModel.from_policies([tiny("llama", 3), tiny("gpt2", 4)]).save_pretrained(tmp_path / "whole")
    broken = edit(str(tmp_path / "whole"), tmp_path / "broken", without("backbone_1.transformer.ln_f"))
    for open_model in (AutoModelForCausalLM.from_pretrained, MixturePolicyModel.from_pretrained):
        with pytest.raises(ValueError, match="mixture .*broken' does not fit .*backbone_1.transformer.ln_f"):
            open_model(broken)
    opened, info = MixturePolicyModel.from_pretrained(broken, allow_unmatched_weights=True, output_loading_info=True)
    assert len(info["missing_keys"]) == 2 and len(opened.policies) == 2


# ---- adapters ----


def test_adapter_of_the_text_model_over_its_multimodal_checkpoint_is_refused(tmp_path):
    """PEFT warns, and the policy is the base."""
    text = {**SIZES, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"image_token_index": 28, "boi_token_index": 29, "eoi_token_index": 30, "mm_tokens_per_image": 1}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 8, "patch_size": 4}, **ids)
    base = str(tmp_path / "base")
    Gemma3ForConditionalGeneration(config).save_pretrained(base)
    text_model = Gemma3ForCausalLM.from_pretrained(base)
    settings = {"target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    get_peft_model(text_model, LoraConfig(**settings)).save_pretrained(tmp_path / "lora")
    adapter = {"name_or_path": base, "adapter": str(tmp_path / "lora")}
    with pytest.raises(ValueError, match=r"lora' over .*lacks '.*language_model.*no place for '.*model.layers.0"):
        MixturePolicyModel.from_policies([adapter])
    Gemma3ForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "text")  # what it was trained over
    adapter["name_or_path"] = str(tmp_path / "text")
    mixture = MixturePolicyModel.from_policies([adapter])
    torch.testing.assert_close(logps(mixture), logps(load_lora(adapter["adapter"], str(tmp_path / "text"))), **CLOSE)


PARTIAL = {
    "half of it": (without("layers.1."), "lacks 'base_model.model.model.layers.1"),
    "one factor": (without("layers.0.self_attn.q_proj.lora_B"), r"lacks '[\w.]*q_proj.lora_B[\w.]*'.*\(1 weight\)"),
    "nothing": (lambda weights: [weights.pop(key) for key in list(weights)[1:]], "lacks"),
    "another prefix": (
        lambda weights: [weights.update({f"base_model.{key}": weights.pop(key)}) for key in list(weights)],
        "lacks .*no place for 'base_model.base_model",
    ),
    "a layer too many": (
        lambda weights: weights.update(
            {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 16)}
        ),
        r"no place for '[\w.]*layers.7",
    ),
}


@pytest.mark.parametrize(("change", "found"), PARTIAL.values(), ids=PARTIAL.keys())
def test_adapter_that_is_not_loaded_as_a_whole_is_refused_by_its_first_weight(change, found, folders, tmp_path):
    broken = edit(folders.kind, tmp_path / "broken", change)
    for policies in ([broken], [folders.terse, broken]):
        with pytest.raises(ValueError, match=rf"broken' over .* does not fit .*{found}.*allow_unmatched_weights=True"):
            MixturePolicyModel.from_policies(policies)


def test_reference_is_verified_when_it_is_loaded(folders, tmp_path):
    broken = edit(folders.kind, tmp_path / "broken", without("layers.1."))
    with pytest.raises(ValueError, match=r"broken' over .*lacks 'base_model.model.model.layers.1"):
        _ = MixturePolicyModel.from_policies([folders.terse], reference=broken).reference_policy
    mixture = MixturePolicyModel.from_policies([folders.terse], reference=broken, allow_unmatched_weights=True)
    assert mixture.reference_policy is not None


# ---- what others use ----


def test_adapter_as_reference_leaves_models_alone_that_share_its_base(folders):
    """The base is in memory already, as a component, in a view of that component, and in another mixture."""
    first = MixturePolicyModel.from_policies([folders.base])
    second = MixturePolicyModel.from_policies([first, folders.gpt2], reference=folders.kind)
    view = second.policy(0)
    before = [logps(model) for model in (first, second, view)]
    torch.testing.assert_close(logps(second.reference_policy), logps(load_lora(folders.kind, folders.base)), **CLOSE)
    for model, expected in zip((first, second, view), before):
        torch.testing.assert_close(logps(model), expected, **CLOSE)
    # the weights are held once all the same
    held = {parameter.data_ptr() for parameter in second.parameters()}
    assert {parameter.data_ptr() for parameter in first.parameters()} <= held


def test_building_and_running_a_mixture_changes_nothing_of_models_in_memory_but_their_mode(folders):
    adapted = load_lora(folders.kind, folders.base)
    adapted.load_adapter(folders.terse, "terse")
    models = [adapted, tiny("gpt2", 2), tiny("llama", 3, tie_word_embeddings=True)]
    for model in models:
        next(iter(model.parameters())).requires_grad = True
        model.generation_config.temperature = 0.7

    def state(model):
        modules = [(module, len(module._forward_hooks), vars(module).keys()) for module in model.modules()]
        parameters = [(p.data_ptr(), p.dtype, p.requires_grad) for p in model.parameters()]
        return (
            modules,
            parameters,
            model.config.to_dict(),
            model.generation_config.to_dict(),
            vars(model.config).copy(),
        )

    before = [state(model) for model in models]
    mixture = MixturePolicyModel.from_policies(models, reference=tiny("llama", 5))
    with torch.no_grad():
        mixture(IDS)
        mixture.generate(IDS, max_new_tokens=2, do_sample=True)
        mixture.reference_policy(IDS)
    assert [state(model) for model in models] == before
    assert not any(module.training for model in models for module in model.modules())


def test_errors_inside_of_a_property_are_not_taken_for_a_missing_one(folders, monkeypatch):
    mixture = MixturePolicyModel.from_policies([folders.kind, folders.terse])

    def fails(*_):
        raise AttributeError("'Layer' object has no attribute 'weight'")

    monkeypatch.setattr(ComponentRunningMixin, "_stackable", fails)
    monkeypatch.setattr(MixturePolicyModel, "_load_reference", fails)
    for name in ("stacked_components", "reference_policy"):
        with pytest.raises(RuntimeError, match=f"`{name}` failed: .*'Layer' object has no attribute 'weight'"):
            getattr(mixture, name)
    assert not hasattr(mixture, "hf_device_map")  # as of other models
