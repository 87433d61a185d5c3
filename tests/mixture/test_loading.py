"""`from_policies` and `from_pretrained`: where policies may come from, and what is refused before anything is loaded."""

import json
import pathlib
import shutil

import pytest
import torch
from helpers import BOS, CLOSE, VOCAB, fake_hub, load_lora, save_gguf, save_tiny, tiny
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from mpo_hf import MixtureComponent, MixturePolicyConfig, MixturePolicyModel


IDS = torch.tensor([[BOS, 7, 11, 3, 22, 8, 14], [BOS, 30, 5, 6, 9, 2, 4]])


@torch.no_grad()
def logps(model):
    return model(input_ids=IDS).logits.log_softmax(-1)


@torch.no_grad()
def assert_mixes(mixture, components, weights):
    expected = sum(weight * logps(component) for weight, component in zip(weights, components, strict=True))
    torch.testing.assert_close(mixture(IDS).logits, expected, **CLOSE)


@pytest.fixture
def components(folders):
    """What the saved policies are, as models of their own."""
    return {
        "base": AutoModelForCausalLM.from_pretrained(folders.base),
        "gpt2": AutoModelForCausalLM.from_pretrained(folders.gpt2),
        "kind": load_lora(folders.kind, folders.base),
        "terse": load_lora(folders.terse, folders.base),
    }


# ---- where policies come from ----


def test_policies_may_be_folders_paths_dictionaries_components_and_models(folders, components):
    policies = [
        folders.base,
        pathlib.Path(folders.gpt2),
        {"name_or_path": folders.base, "adapter": folders.kind, "label": "kind"},
        MixtureComponent(folders.base, adapter=folders.terse),
        components["gpt2"],
        components["terse"],
    ]
    weights = [0.3, 0.1, 0.2, 0.15, 0.2, 0.05]
    mixture = MixturePolicyModel.from_policies(policies, weights)
    assert_mixes(mixture, [components[name] for name in ("base", "gpt2", "kind", "terse", "gpt2", "terse")], weights)
    assert mixture.config.labels == ["policy_0", "policy_1", "kind", "policy_3", "policy_4", "policy_5"]
    assert mixture.config.mixture_weights == pytest.approx(weights)
    assert not mixture.training


def test_weights_default_to_uniform_and_labels_name_the_objectives(folders, components):
    mixture = MixturePolicyModel.from_policies([folders.base, folders.gpt2], labels=["kind", "terse"])
    assert_mixes(mixture, [components["base"], components["gpt2"]], [0.5, 0.5])
    assert mixture.config.labels == ["kind", "terse"]


def test_folder_of_an_adapter_is_split_into_adapter_and_base(folders, components):
    for given in (folders.kind, pathlib.Path(folders.kind), {"adapter": folders.kind}):
        mixture = MixturePolicyModel.from_policies([given])
        (component,) = mixture.config.components
        assert component.to_dict() == {"name_or_path": folders.base, "adapter": folders.kind}
        assert_mixes(mixture, [components["kind"]], [1.0])


def test_folders_become_absolute(folders, components, monkeypatch):
    monkeypatch.chdir(folders.root)
    mixture = MixturePolicyModel.from_policies(["gpt2", {"name_or_path": "./base", "adapter": "kind"}])
    paths = [(component.name_or_path, component.adapter) for component in mixture.config.components]
    assert paths == [(folders.gpt2, None), (folders.base, folders.kind)]


def test_subfolder_and_variant_belong_to_their_component(tmp_path):
    model = tiny("llama", 3)
    model.save_pretrained(tmp_path / "deep/inner", variant="special")
    component = {"name_or_path": str(tmp_path / "deep"), "subfolder": "inner", "variant": "special"}
    assert_mixes(MixturePolicyModel.from_policies([component]), [model], [1.0])
    with pytest.raises(OSError, match="deep"):
        MixturePolicyModel.from_policies([{**component, "variant": "other"}])
    with pytest.raises((OSError, ValueError), match="deep"):
        MixturePolicyModel.from_policies([str(tmp_path / "deep")])


def test_gguf_file_belongs_to_its_component(tmp_path):
    model = tiny("llama", 3)
    save_gguf(tmp_path / "model.gguf", model)
    component = {"name_or_path": str(tmp_path), "gguf_file": "model.gguf"}
    mixture = MixturePolicyModel.from_policies([component, tiny("gpt2", 2)], [0.7, 0.3])
    assert_mixes(mixture, [model, tiny("gpt2", 2)], [0.7, 0.3])


def test_components_come_from_repositories_at_their_revision(folders, components, tmp_path):
    for revision, folder in (("main", folders.base), ("v2", folders.gpt2)):
        fake_hub(tmp_path, "org/policy", folder, revision)
    policies = ["org/policy", {"name_or_path": "org/policy", "revision": "v2"}]
    mixture = MixturePolicyModel.from_policies(policies, [0.4, 0.6], cache_dir=tmp_path)
    assert_mixes(mixture, [components["base"], components["gpt2"]], [0.4, 0.6])
    assert [component.name_or_path for component in mixture.config.components] == ["org/policy"] * 2


def test_adapters_come_from_repositories_with_a_revision_of_their_own(folders, components, tmp_path):
    fake_hub(tmp_path, "org/base", folders.base, "pinned")
    for revision, folder in (("main", folders.kind), ("v2", folders.terse)):
        copy = tmp_path / revision
        shutil.copytree(folder, copy)
        fields = json.loads((copy / "adapter_config.json").read_text())
        fields |= {"base_model_name_or_path": "org/base", "revision": "pinned"}
        (copy / "adapter_config.json").write_text(json.dumps(fields))
        fake_hub(tmp_path, "org/lora", copy, revision)
    policies = ["org/lora", {"adapter": "org/lora", "adapter_revision": "v2"}]
    mixture = MixturePolicyModel.from_policies(policies, [0.4, 0.6], cache_dir=tmp_path)
    assert_mixes(mixture, [components["kind"], components["terse"]], [0.4, 0.6])
    assert [c.revision for c in mixture.config.components] == ["pinned"] * 2
    assert len(mixture.backbones) == 1


def test_dtype_may_differ_between_components(folders):
    policies = [{"name_or_path": folders.base, "dtype": "bfloat16"}, folders.base]
    mixture = MixturePolicyModel.from_policies(policies)
    assert [backbone.dtype for backbone in mixture.backbones] == [torch.bfloat16, torch.float32]
    assert mixture(IDS).logits.dtype == torch.float32


def test_loading_arguments_reach_every_component(folders):
    policies = [folders.base, folders.gpt2, folders.kind]
    mixture = MixturePolicyModel.from_policies(
        policies, dtype=torch.bfloat16, device_map="cpu", attn_implementation="eager"
    )
    assert {backbone.dtype for backbone in mixture.backbones} == {torch.bfloat16} and mixture.device.type == "cpu"
    assert {backbone.config._attn_implementation for backbone in mixture.backbones} == {"eager"}
    assert mixture.generate(IDS, max_new_tokens=2).shape[0] == 2


# ---- mixtures of mixtures ----


def test_mixtures_are_flattened_with_their_weights_multiplied(folders, components, tmp_path):
    inner = MixturePolicyModel.from_policies([folders.base, folders.kind], [0.25, 0.75], labels=["base", "kind"])
    inner.save_pretrained(tmp_path / "saved")
    weights = [0.1, 0.3, 0.6]
    for mixture in (inner, str(tmp_path / "saved"), pathlib.Path(tmp_path / "saved")):
        outer = MixturePolicyModel.from_policies([mixture, folders.gpt2], [0.4, 0.6])
        assert outer.config.mixture_weights == pytest.approx(weights)
        assert_mixes(outer, [components["base"], components["kind"], components["gpt2"]], weights)
        sources = [component.source for component in outer.config.components]
        assert sources == [folders.base, folders.kind, folders.gpt2]
        assert outer.config.labels == ["base", "kind", "policy_2"]
    twice = MixturePolicyModel.from_policies([outer, components["terse"]], [0.5, 0.5])
    assert twice.config.mixture_weights == pytest.approx([0.05, 0.15, 0.3, 0.5])
    assert_mixes(twice, [components[name] for name in ("base", "kind", "gpt2", "terse")], [0.05, 0.15, 0.3, 0.5])


def test_mixture_saved_whole_is_flattened_too(components, tmp_path):
    MixturePolicyModel.from_policies([components["base"], components["gpt2"]], [0.2, 0.8]).save_pretrained(tmp_path)
    outer = MixturePolicyModel.from_policies([str(tmp_path), components["kind"]], [0.5, 0.5])
    assert_mixes(outer, [components["base"], components["gpt2"], components["kind"]], [0.1, 0.4, 0.5])


def test_relative_paths_of_a_flattened_mixture_are_resolved(folders, components, tmp_path):
    shutil.copytree(folders.gpt2, tmp_path / "mixture/policies/gpt2")
    config = MixturePolicyConfig(components=[{"name_or_path": "policies/gpt2"}, {"name_or_path": folders.base}])
    config.save_pretrained(tmp_path / "mixture")
    outer = MixturePolicyModel.from_policies([str(tmp_path / "mixture"), folders.kind])
    assert_mixes(outer, [components["gpt2"], components["base"], components["kind"]], [0.25, 0.25, 0.5])


def test_saved_mixture_of_mixtures_is_refused(folders, tmp_path):
    MixturePolicyConfig(components=[{"name_or_path": "."}]).save_pretrained(tmp_path)
    for refused in (MixturePolicyModel.from_pretrained, lambda path: MixturePolicyModel.from_policies([path])):
        with pytest.raises(ValueError, match="is a mixture again"):
            refused(str(tmp_path))
    with pytest.raises(ValueError, match="lies over the mixture"):
        MixturePolicyModel.from_policies([{"name_or_path": str(tmp_path), "adapter": folders.kind}])


# ---- the reference ----


def test_reference_may_be_given_like_a_policy(folders, components):
    for reference in (folders.gpt2, {"name_or_path": folders.gpt2}, components["gpt2"]):
        mixture = MixturePolicyModel.from_policies([folders.kind, folders.base], reference=reference)
        torch.testing.assert_close(logps(mixture.reference_policy), logps(components["gpt2"]), **CLOSE)
        assert_mixes(mixture, [components["kind"], components["base"]], [0.5, 0.5])


def test_reference_is_loaded_when_it_is_asked_for(folders):
    mixture = MixturePolicyModel.from_policies([folders.kind, folders.terse], reference=folders.gpt2)
    before = sum(parameter.numel() for parameter in mixture.parameters())
    assert len(mixture.backbones) == 1
    reference = mixture.reference_policy
    added = sum(parameter.numel() for parameter in reference.parameters())
    assert sum(parameter.numel() for parameter in mixture.parameters()) == before + added
    assert len(mixture.backbones) == 2 and mixture.reference_policy.backbones[0] is reference.backbones[0]


def test_reference_shares_the_model_of_a_component(folders, components):
    mixture = MixturePolicyModel.from_policies([folders.base, folders.gpt2], reference=folders.gpt2)
    assert mixture.reference_policy.backbones[0] is mixture.backbones[1]
    mixture = MixturePolicyModel.from_policies([folders.base, folders.gpt2], reference=folders.kind)
    torch.testing.assert_close(logps(mixture.reference_policy), logps(components["kind"]), **CLOSE)
    assert len(mixture.backbones) == 2
    # the adapter was put on the base that a component runs on
    assert_mixes(mixture, [components["base"], components["gpt2"]], [0.5, 0.5])


def test_mixture_has_no_reference_unless_adapters_agree_on_a_base(folders):
    for policies in ([folders.base, folders.gpt2], [folders.base, folders.kind]):
        assert MixturePolicyModel.from_policies(policies).reference_policy is None


def test_reference_of_several_policies_is_refused(folders):
    several = MixturePolicyModel.from_policies([folders.base, folders.gpt2])
    with pytest.raises(ValueError, match="one policy"):
        MixturePolicyModel.from_policies([folders.base], reference=several)


# ---- what is refused ----


@pytest.mark.parametrize("name", ["revision", "subfolder", "variant", "gguf_file"])
def test_what_differs_between_components_is_not_one_argument(name, folders, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}='v1'` would be one {name} for all"):
        MixturePolicyModel.from_policies([folders.base, folders.gpt2], **{name: "v1"})
    MixturePolicyConfig(components=[{"name_or_path": folders.base}]).save_pretrained(tmp_path)
    if name in ("variant", "gguf_file"):  # the others say where the mixture's own config is
        with pytest.raises(ValueError, match=f"`{name}='v1'` would be one {name} for all"):
            MixturePolicyModel.from_pretrained(tmp_path, **{name: "v1"})


def test_arguments_are_checked_before_anything_is_opened():
    nowhere = ["/nowhere/a", "/nowhere/b"]
    with pytest.raises(ValueError, match="Expected 2 mixture weights"):
        MixturePolicyModel.from_policies(nowhere, [1.0])
    with pytest.raises(ValueError, match=r"\[0.7, 0.7\]"):
        MixturePolicyModel.from_policies(nowhere, [0.7, 0.7])
    with pytest.raises(ValueError, match="one weight a policy"):
        MixturePolicyModel.from_policies(nowhere, [[0.5, 0.5], [0.1, 0.9]])
    with pytest.raises(ValueError, match="3 labels for 2 policies"):
        MixturePolicyModel.from_policies(nowhere, labels=["a", "b", "c"])
    with pytest.raises(ValueError, match="`revision='v1'`"):
        MixturePolicyModel.from_policies(nowhere, revision="v1")


@pytest.mark.parametrize("missing", ["/nowhere/at/all", "no-such-org/no-such-policy", "not a name"])
def test_policy_that_does_not_exist_is_named(missing, folders):
    for given in (missing, {"name_or_path": missing}, {"name_or_path": folders.base, "adapter": missing}):
        with pytest.raises((OSError, ValueError), match=missing):
            MixturePolicyModel.from_policies([folders.base, given])
    with pytest.raises((OSError, ValueError), match=missing):
        MixturePolicyModel.from_policies([folders.base], reference=missing)


def test_missing_component_is_noticed_before_the_others_are_loaded(tmp_path):
    # a folder with a config and no weights: loading it would fail
    hollow = save_tiny(tmp_path / "hollow", "llama", 0)
    (tmp_path / "hollow/model.safetensors").unlink()
    with pytest.raises(OSError, match="/nowhere"):
        MixturePolicyModel.from_policies([hollow, {"name_or_path": "/nowhere"}])
    with pytest.raises(OSError, match="hollow"):
        MixturePolicyModel.from_policies([hollow])


@pytest.mark.parametrize("policy", [{}, {"label": "kind"}, 3, None, {"path": "a"}])
def test_policies_that_name_nothing_are_refused(policy):
    with pytest.raises(ValueError, match="needs a `name_or_path`|is described by a dictionary"):
        MixturePolicyModel.from_policies([policy])


def test_policies_must_be_a_list(folders):
    for policies in (folders.base, pathlib.Path(folders.base), {"name_or_path": folders.base}, [], tiny("llama", 0)):
        with pytest.raises(ValueError, match="list of at least one policy"):
            MixturePolicyModel.from_policies(policies)


def test_only_causal_language_models_can_be_mixed(tmp_path):
    sizes = {"vocab_size": VOCAB, "d_model": 16, "num_layers": 1, "d_ff": 16, "num_heads": 2, "d_kv": 8}
    encoder_decoder = T5ForConditionalGeneration(T5Config(**sizes))
    with pytest.raises(ValueError, match="encoder-decoder"):
        MixturePolicyModel.from_policies([encoder_decoder])
    encoder_decoder.save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"t5.*T5Config"):
        MixturePolicyModel.from_policies([str(tmp_path / "t5")])
    headless = AutoModel.from_config(tiny("llama", 0).config)
    for model in (headless, LlamaForSequenceClassification(tiny("llama", 0).config)):
        with pytest.raises(ValueError, match=f"{type(model).__name__}.*not a causal language model"):
            MixturePolicyModel.from_policies([model])
    with pytest.raises(ValueError, match="must be a PreTrainedModel or a PeftModel, got Linear"):
        MixturePolicyModel.from_policies([torch.nn.Linear(2, 2)])


def test_pickled_weights_are_opened_only_when_told_to(tmp_path):
    model = tiny("llama", 3)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="model.safetensors"):
        MixturePolicyModel.from_policies([str(tmp_path)])
    assert_mixes(MixturePolicyModel.from_policies([str(tmp_path)], use_safetensors=False), [model], [1.0])
