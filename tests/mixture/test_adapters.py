"""Adapters as components: one copy of their base, PEFT's own results, and no trace of one another."""

import json
import os
import pathlib
import re
import shutil

import pytest
import torch
from helpers import BOS, CLOSE, fake_hub, load_lora, save_lora, save_tiny, tiny
from peft import IA3Config, PrefixTuningConfig, PromptTuningConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mpo_hf import MixturePolicyConfig, MixturePolicyModel
from mpo_hf.mixture.component_loading import PolicyHandle


IDS = torch.tensor([[BOS, 7, 11, 3, 22, 8, 14], [BOS, 30, 5, 6, 9, 2, 4]])


@torch.no_grad()
def logps(model):
    return model(input_ids=IDS).logits.log_softmax(-1)


def assert_components_are(mixture, expected):
    """Every component alone is the model that is expected, whichever ran before it."""
    count = len(expected)
    for k in [*range(count), *reversed(range(count))]:
        with torch.no_grad():
            alone = mixture(IDS, mixture_weights=torch.eye(count)[k]).logits
        torch.testing.assert_close(alone, logps(expected[k]), **CLOSE)


def rewritten(adapter: str, folder: pathlib.Path, **fields) -> str:
    """A copy of an adapter with other fields in its config."""
    shutil.copytree(adapter, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return str(folder)


def saved_biases(adapter: str) -> list[str]:
    return [name for name in load_file(os.path.join(adapter, "adapter_model.safetensors")) if name.endswith(".bias")]


# ---- sharing ----


def test_adapters_share_one_copy_of_their_base(folders):
    policies = [folders.kind, folders.base, {"name_or_path": folders.base, "adapter": folders.terse}]
    mixture = MixturePolicyModel.from_policies(policies, reference=folders.base)
    alone = [load_lora(folders.kind, folders.base), load_lora(folders.terse, folders.base)]
    base = sum(parameter.numel() for parameter in tiny("llama", 20).parameters())
    adapters = sum(sum(parameter.numel() for parameter in model.parameters()) - base for model in alone)
    assert len(mixture.backbones) == 1
    assert mixture.reference_policy.backbones[0] is mixture.backbones[0]
    assert sum(parameter.numel() for parameter in mixture.parameters()) == base + adapters
    projections = [
        view.backbones[0].get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.data_ptr()
        for view in (mixture.policy(0), mixture.policy(1), mixture.policy(2), mixture.reference_policy)
    ]
    assert len(set(projections)) == 1


def test_adapters_over_different_bases_share_nothing(folders, tmp_path):
    other = save_tiny(tmp_path / "other", "llama", 22)
    over_other = save_lora(tmp_path / "adapter", other, 32)
    mixture = MixturePolicyModel.from_policies([folders.kind, over_other])
    assert len(mixture.backbones) == 2 and mixture.reference_policy is None
    assert_components_are(mixture, [load_lora(folders.kind, folders.base), load_lora(over_other, other)])


def test_one_base_in_two_precisions_is_loaded_twice(folders):
    policies = [{"adapter": folders.kind, "dtype": "bfloat16"}, {"adapter": folders.terse, "dtype": "float32"}]
    mixture = MixturePolicyModel.from_policies(policies)
    assert [backbone.dtype for backbone in mixture.backbones] == [torch.bfloat16, torch.float32]


# ---- right results ----


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"r": 2, "lora_alpha": 64, "use_rslora": True},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "lora_bias": True},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=lambda settings: ",".join(settings) or "plain",
)
def test_adapters_equal_what_peft_computes(settings, folders, tmp_path):
    adapter = save_lora(tmp_path / "adapter", folders.base, 33, **settings)
    mixture = MixturePolicyModel.from_policies([adapter, folders.base, folders.terse])
    expected = [
        load_lora(adapter, folders.base),
        AutoModelForCausalLM.from_pretrained(folders.base),
        load_lora(folders.terse, folders.base),
    ]
    assert_components_are(mixture, expected)


def test_other_kinds_of_adapters_are_mixed(folders, tmp_path):
    config = IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    )
    adapter = save_lora(tmp_path / "adapter", folders.base, 34, config)
    mixture = MixturePolicyModel.from_policies([folders.base, adapter])
    assert_components_are(
        mixture, [AutoModelForCausalLM.from_pretrained(folders.base), load_lora(adapter, folders.base)]
    )


def test_adapter_with_trained_tokens_works_alone_and_is_refused_beside_others(folders, tmp_path):
    adapter = save_lora(tmp_path / "adapter", folders.base, 33, trainable_token_indices=[3, 7, 22])
    mixture = MixturePolicyModel.from_policies([adapter, folders.base])
    assert_components_are(
        mixture, [load_lora(adapter, folders.base), AutoModelForCausalLM.from_pretrained(folders.base)]
    )
    # PEFT looks for trained tokens in the second adapter too
    with pytest.raises(ValueError, match="kind.*does not fit"):
        MixturePolicyModel.from_policies([adapter, folders.kind])


def test_reference_equals_the_base_although_adapters_were_active(folders):
    mixture = MixturePolicyModel.from_policies([folders.kind, folders.terse])
    assert mixture.config.reference.to_dict() == {"name_or_path": folders.base}
    base = AutoModelForCausalLM.from_pretrained(folders.base)
    before = mixture(IDS).logits
    for _ in range(2):
        torch.testing.assert_close(logps(mixture.reference_policy), logps(base), **CLOSE)
        torch.testing.assert_close(mixture(IDS).logits, before, **CLOSE)


def test_every_policy_of_a_mixture_can_be_used_in_turn(folders):
    mixture = MixturePolicyModel.from_policies([folders.kind, folders.terse])
    views = [mixture.policy(0), mixture.reference_policy, mixture.policy(1)]
    base = AutoModelForCausalLM.from_pretrained(folders.base)
    expected = [load_lora(folders.kind, folders.base), base, load_lora(folders.terse, folders.base)]
    for order in ([0, 1, 2], [2, 1, 0], [1, 1, 0, 2]):
        for i in order:
            torch.testing.assert_close(logps(views[i]), logps(expected[i]), **CLOSE)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": []}
    for view, model in zip(views, expected):
        assert view.generate(IDS, **settings).tolist() == model.generate(IDS, **settings).tolist()


def test_adapter_in_memory_runs_as_it_was_active(folders):
    model = load_lora(folders.kind, folders.base)
    model.load_adapter(folders.terse, "terse")
    model.set_adapter("terse")
    mixture = MixturePolicyModel.from_policies([model, AutoModelForCausalLM.from_pretrained(folders.base)])
    expected = [load_lora(folders.terse, folders.base), AutoModelForCausalLM.from_pretrained(folders.base)]
    assert_components_are(mixture, expected)


def test_loading_an_adapter_leaves_a_mixture_over_the_same_base_alone(folders):
    first = MixturePolicyModel.from_policies([folders.base])
    before = first(IDS).logits
    MixturePolicyModel.from_policies([first, folders.kind])
    torch.testing.assert_close(first(IDS).logits, before, rtol=0, atol=0)


# ---- training, compiling, tied weights ----


def two_trained(folders, tmp_path, **changes):
    """Two adapters of one model in memory, both to be trained, and their mixture."""
    folder = save_lora(tmp_path / "more", folders.base, 33, **changes)
    model = load_lora(folders.kind, folders.base)
    model.load_adapter(folder, "more")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name
    config = MixturePolicyConfig(component_configs=[model.config] * 2, mixture_weights=[0.3, 0.7])
    mixture = MixturePolicyModel(config, [model], [PolicyHandle(0, "default"), PolicyHandle(0, "more")])
    return mixture.eval(), [load_lora(folders.kind, folders.base), load_lora(folder, folders.base)]


@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["lm_head"]}], ids=["lora", "lora and a module"])
def test_every_adapter_that_is_trained_gets_its_gradient(folders, tmp_path, changes):
    mixture, alone = two_trained(folders, tmp_path, **changes)
    trained = {name for name, parameter in mixture.named_parameters() if parameter.requires_grad}
    mixture(IDS).logits[..., 5].sum().backward()
    assert {name for name, parameter in mixture.named_parameters() if parameter.requires_grad} == trained
    gradients = dict(mixture.named_parameters())
    for weight, adapter, model in zip([0.3, 0.7], ["default", "more"], alone, strict=True):
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "lora_" in name
        (weight * model(IDS).logits.log_softmax(-1)[..., 5].sum()).backward()
        own = {name: parameter.grad for name, parameter in model.named_parameters() if "lora_" in name}
        assert own and all(gradient.any() for gradient in own.values())
        for name, gradient in own.items():
            found = gradients["backbone_0." + name.replace(".default.", f".{adapter}.")].grad
            torch.testing.assert_close(found, gradient, **CLOSE)


def test_gradients_are_not_recomputed_with_the_adapter_that_ran_last(folders, tmp_path):
    mixture, _ = two_trained(folders, tmp_path)
    # Transformers calls it the former since 5.23
    getattr(mixture, "activation_checkpointing_enable", mixture.gradient_checkpointing_enable)()
    expected = mixture(IDS).logits
    mixture.train()
    with pytest.raises(ValueError, match="Train adapters of one model without it"):
        mixture(IDS)
    with torch.no_grad():
        torch.testing.assert_close(mixture(IDS).logits, expected, **CLOSE)
    alone = mixture.policy(0).train()
    alone(IDS).logits[..., 5].sum().backward()
    assert any(parameter.grad is not None for parameter in alone.parameters())


def test_mixture_of_adapters_is_one_graph(folders):
    mixture = MixturePolicyModel.from_policies([folders.kind, folders.terse, folders.base], weights=[0.2, 0.3, 0.5])
    compiled = torch.compile(mixture, backend="eager", fullgraph=True)
    with torch.no_grad():
        for ids in (IDS, IDS.flip(0)):  # the adapter that ran last is active when the second starts
            torch.testing.assert_close(compiled(ids).logits, mixture(ids).logits, **CLOSE)


def test_tied_weights_stay_tied_where_an_adapter_lies_over_them(tmp_path):
    base = save_tiny(tmp_path / "base", "llama", 20, tie_word_embeddings=True)
    adapter = save_lora(tmp_path / "adapter", base, 34, target_modules=["lm_head"])
    mixture = MixturePolicyModel.from_policies([adapter, base])
    before = mixture(IDS).logits
    mixture.tie_weights()
    torch.testing.assert_close(mixture(IDS).logits, before, rtol=0, atol=0)
    parameters = dict(mixture.named_parameters(remove_duplicate=False))
    assert mixture.all_tied_weights_keys
    for target, source in mixture.all_tied_weights_keys.items():
        assert parameters[target] is parameters[source]


def test_plans_to_split_a_mixture_name_modules_of_it(folders, tmp_path):
    mixture = MixturePolicyModel.from_policies([folders.kind, save_tiny(tmp_path / "other", "llama", 22)])
    modules = {re.sub(r"\.\d+", ".*", name) for name, _ in mixture.named_modules()}
    assert len(mixture.tp_plan) > 2 and mixture.tp_plan.keys() <= modules


# ---- what is refused ----

# Each of these writes to the base when it is loaded: its own results would be right, those of all others wrong.
BASE_CHANGING = {
    "bias": {"bias": "all"},
    "lora only bias": {"bias": "lora_only"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


@pytest.mark.parametrize("settings", BASE_CHANGING.values(), ids=BASE_CHANGING.keys())
def test_adapters_that_change_their_base_are_refused(settings, tmp_path):
    base = save_tiny(tmp_path / "base", "llama", 20, attention_bias=True)
    harmless = save_lora(tmp_path / "harmless", base, 35)
    adapter = save_lora(tmp_path / "adapter", base, 36, **settings)
    if settings == {"bias": "lora_only"} and not saved_biases(adapter):
        pytest.skip("PEFT before 0.21 does not save these biases, so there is nothing that could change the base")
    for policies in ([adapter], [base, adapter], [harmless, adapter], [adapter, harmless]):
        with pytest.raises(ValueError, match="changes weights of its base"):
            MixturePolicyModel.from_policies(policies)
    # what the message proposes
    load_lora(adapter, base).merge_and_unload().save_pretrained(tmp_path / "merged")
    mixture = MixturePolicyModel.from_policies([str(tmp_path / "merged"), harmless])
    torch.testing.assert_close(logps(mixture.policy(0)), logps(load_lora(adapter, base)), **CLOSE)
    torch.testing.assert_close(logps(mixture.policy(1)), logps(load_lora(harmless, base)), **CLOSE)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_adapters_that_learn_a_prompt_are_refused(kind, folders, tmp_path):
    adapter = save_lora(tmp_path / "adapter", folders.base, 37, kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="adapter.*learns a prompt"):
        MixturePolicyModel.from_policies([adapter])
    with pytest.raises(ValueError, match="in memory learns a prompt"):
        MixturePolicyModel.from_policies([load_lora(adapter, folders.base)])


def test_adapter_over_a_base_of_another_shape_is_refused(folders, tmp_path):
    wide = save_tiny(tmp_path / "wide", "llama", 23, hidden_size=24, head_dim=8)
    with pytest.raises(ValueError, match="kind.*does not fit the base.*wide"):
        MixturePolicyModel.from_policies([{"name_or_path": wide, "adapter": folders.kind}])
    with pytest.raises(ValueError, match="kind.*does not fit the base.*gpt2"):
        MixturePolicyModel.from_policies([{"name_or_path": folders.gpt2, "adapter": folders.kind}])


def test_adapter_over_a_base_of_another_name_is_refused(folders, tmp_path):
    adapter = rewritten(folders.kind, tmp_path / "lora", base_model_name_or_path="org/one")
    for repo in ("org/one", "org/two"):
        fake_hub(tmp_path, repo, folders.base)
    with pytest.raises(ValueError, match="trained over 'org/one', not over 'org/two'"):
        MixturePolicyModel.from_policies([{"name_or_path": "org/two", "adapter": adapter}], cache_dir=tmp_path)
    for right in ("org/one", folders.base):  # a folder may be a copy of anything
        policies = [{"name_or_path": right, "adapter": adapter}]
        mixture = MixturePolicyModel.from_policies(policies, cache_dir=tmp_path)
        assert_components_are(mixture, [load_lora(folders.kind, folders.base)])


def test_adapter_that_names_no_base_needs_one(folders, tmp_path):
    adapter = rewritten(folders.kind, tmp_path / "lora", base_model_name_or_path=None)
    with pytest.raises(ValueError, match="lora.*does not say which base"):
        MixturePolicyModel.from_policies([adapter])
    mixture = MixturePolicyModel.from_policies([{"name_or_path": folders.base, "adapter": adapter}])
    assert_components_are(mixture, [load_lora(folders.kind, folders.base)])


def test_model_in_place_of_an_adapter_is_refused(folders):
    for policy in ({"name_or_path": folders.base, "adapter": folders.gpt2}, {"adapter": folders.gpt2}):
        with pytest.raises(OSError, match="gpt2.*(no|not appear to have a file named) adapter_config.json"):
            MixturePolicyModel.from_policies([policy])


def test_pickled_adapters_are_opened_only_when_told_to(folders, tmp_path):
    adapter = str(tmp_path / "pickled")
    model = load_lora(folders.kind, folders.base)
    model.save_pretrained(adapter)
    state = {k: v for k, v in model.state_dict().items() if "lora_" in k}
    os.remove(f"{adapter}/adapter_model.safetensors")
    torch.save({k.replace(".default", ""): v for k, v in state.items()}, f"{adapter}/adapter_model.bin")
    with pytest.raises(OSError, match="pickled.*no adapter_model.safetensors"):
        MixturePolicyModel.from_policies([adapter])
    mixture = MixturePolicyModel.from_policies(
        [{"name_or_path": folders.base, "adapter": adapter}], use_safetensors=None
    )
    assert_components_are(mixture, [model])
