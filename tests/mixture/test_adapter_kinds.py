"""Which adapters can be mixed: those that replace layers of their base, and act in these alone."""

import dataclasses
import itertools

import peft
import pytest
import torch
from helpers import BOS, CLOSE, load_lora, save_lora, save_tiny
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    AdaptionPromptConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PolyConfig,
    VBLoRAConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from mpo_hf import MixturePolicyModel
from mpo_hf.mixture.adapter_loading import check_adapter_kind
from mpo_hf.mixture.compat import CACHE_NAME


IDS = torch.tensor([[BOS, 7, 11, 3, 22, 8, 14]])
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
needs_peft_21 = pytest.mark.skipif(not hasattr(peft, "ShadowConfig"), reason="PEFT has these kinds since 0.21")
IA3 = {"target_modules": ["q_proj"], "feedforward_modules": [], "init_ia3_weights": False}


@torch.no_grad()
def logps(model):
    return model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)


def by_hand(models, weights, steps=GREEDY["max_new_tokens"]):
    """Greedy decoding without a cache."""
    ids = IDS
    for _ in range(steps):
        with torch.no_grad():
            scores = [model(input_ids=ids, use_cache=False).logits[:, -1].log_softmax(-1) for model in models]
        ids = torch.cat([ids, sum(w * s for w, s in zip(weights, scores)).argmax(-1, keepdim=True)], 1)
    return ids.tolist()


def assert_acts_as_in_peft(adapter, base):
    """An adapter, and its base beside it, with a cache and without."""
    alone = load_lora(adapter, base)
    assert (logps(alone) - logps(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 1e-3
    mixture = MixturePolicyModel.from_policies([adapter, base], [0.6, 0.4])
    expected = [alone, AutoModelForCausalLM.from_pretrained(base)]
    for k in (0, 1, 0):
        torch.testing.assert_close(logps(mixture.policy(k)), logps(expected[k]), **CLOSE)
    policy = mixture.policy(0)
    with torch.no_grad():
        first = policy(IDS[:, :4], use_cache=True)
        later = policy(IDS[:, 4:], use_cache=True, **{CACHE_NAME: first[CACHE_NAME]})
    torch.testing.assert_close(torch.cat([first.logits, later.logits], 1), logps(alone), **CLOSE)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), **GREEDY}
    assert mixture.policy(0).generate(**inputs).tolist() == alone.generate(**inputs).tolist()
    assert mixture.generate(**inputs).tolist() == by_hand(expected, [0.6, 0.4])


# ---- what can be mixed ----


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, target_modules=["q_proj", "v_proj"], init_weights=False),
        # weights that all layers share, of which the file has one copy
        VBLoRAConfig(num_vectors=8, vector_length=4, topk=2, target_modules=["q_proj", "v_proj"]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_adapters_that_replace_layers_act_as_in_peft(config, folders, tmp_path):
    config.task_type = "CAUSAL_LM"
    assert_acts_as_in_peft(save_lora(tmp_path / "adapter", folders.base, 33, config), folders.base)


SIZES = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": IA3,
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "MISS": {"r": 2},
    "OFT": {"oft_block_size": 4, "r": 0},
    "PSOFT": {"r": 2},
    "RANDLORA": {"r": 2},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [7, 11, 22], "target_modules": ["embed_tokens"]},
    "VBLORA": {"num_vectors": 8, "vector_length": 4, "topk": 2},
    "WAVEFT": {"n_frequency": 20},
}
OTHERS = {  # refused, each in one of the tests below, and Shadow, which its hooks tell
    *("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "POLY", "PREFIX_TUNING"),
    *("LILY", "PROMPT_TUNING", "SHADOW", "XLORA"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind.value not in OTHERS)
)
def test_every_kind_that_peft_has_acts_as_in_peft(kind, folders, tmp_path):
    """A kind that fails here acts outside of its layers, or across tokens, and belongs to those that are refused."""
    assert_random_acts_as_in_peft(PEFT_TYPE_TO_CONFIG_MAPPING[kind], SIZES.get(kind, {}), folders.base, tmp_path)


def assert_random_acts_as_in_peft(kind, settings, base, folder):
    names = {field.name for field in dataclasses.fields(kind)}
    targets = {"target_modules": ["q_proj", "v_proj"]} if "target_modules" in names else {}
    config = kind(**{"task_type": "CAUSAL_LM", **targets, **settings})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # many kinds begin as the base
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    assert_acts_as_in_peft(str(folder), base)


VARIANTS = {
    "use_dora": True,
    "use_qalora": True,
    "lora_bias": True,
    "use_rslora": True,
    "trainable_token_indices": [7, 11],
    "target_parameters": ["q_proj.weight"],
    "modules_to_save": ["lm_head"],
    "exclude_modules": ["v_proj"],
    "velora_config": {},
    "monteclora_config": "MontecloraConfig",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_of_lora_acts_as_in_peft(name, folders, tmp_path):
    if name not in {field.name for field in dataclasses.fields(LoraConfig)}:
        pytest.skip("this version of PEFT does not have it")
    value = VARIANTS[name]
    settings = {name: getattr(peft.tuners.lora.config, value)() if isinstance(value, str) else value}
    more = {"target_parameters": {"target_modules": []}, "use_qalora": {"qalora_group_size": 8}}
    assert_random_acts_as_in_peft(LoraConfig, {"r": 4, **settings, **more.get(name, {})}, folders.base, tmp_path)


# ---- what acts outside of its layers ----

REFUSED = {
    "aLoRA": ({"alora_invocation_tokens": [3, 22]}, r"alora_invocation_tokens"),
    "layer replication": ({"layer_replication": [[0, 2], [1, 2]]}, "repeats layers"),
    "adaption prompt": (
        AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),
        "learns a prompt",
    ),
    "poly": (PolyConfig(n_tasks=2, n_skills=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), "a call as a whole"),
}


@pytest.mark.parametrize(("settings", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_adapters_that_act_outside_of_their_layers_are_refused(settings, reason, folders, tmp_path, monkeypatch):
    changes = settings if isinstance(settings, dict) else {"config": settings}
    adapter = save_lora(tmp_path / "adapter", folders.base, 33, **changes)
    with pytest.raises(ValueError, match=rf"in memory.*{reason}"):
        MixturePolicyModel.from_policies([load_lora(adapter, folders.base)])
    # before any weights are loaded
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    for policies in ([adapter], [folders.base, adapter]):
        with pytest.raises(ValueError, match=rf"adapter' .*{reason}"):
            MixturePolicyModel.from_policies(policies)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "XLORA"}, "a call as a whole"),
        pytest.param({"peft_type": "LILY"}, "the mean of all tokens", marks=needs_peft_21),
        ({"peft_type": "LORA", "arrow_config": {"top_k": 1}}, "routes tokens"),
        (
            {"peft_type": "OF_TOMORROW"},
            r"'OF_TOMORROW' \(`peft_type`\), which the installed version of PEFT does not know",
        ),
        ({"peft_type": None}, "of type None"),
    ],
)
def test_kinds_that_need_other_adapters_or_another_peft_are_refused(config, reason):
    with pytest.raises(ValueError, match=reason):
        check_adapter_kind(config, "'org/lora'")


@needs_peft_21
def test_adapter_that_puts_hooks_on_its_base_is_refused(folders, tmp_path):
    adapter = save_lora(tmp_path / "adapter", folders.base, 33, peft.ShadowConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="adapter' does more to its base than replace layers"):
        MixturePolicyModel.from_policies([adapter])


# ---- adapters beside one another ----


def test_adapters_of_two_types_over_one_base_are_refused_by_type(folders, tmp_path):
    ia3 = save_lora(tmp_path / "ia3", folders.base, 34, IA3Config(task_type="CAUSAL_LM", **IA3))
    for first, second in itertools.permutations([folders.kind, ia3]):
        with pytest.raises(
            ValueError, match=r"is of type (LORA, beside one of type IA3|IA3, beside one of type LORA)"
        ):
            MixturePolicyModel.from_policies([first, second])


def test_adapters_that_tie_their_layers_over_a_tied_base_are_refused_in_company(tmp_path):
    """PEFT ties the layers of the first such adapter only. Alone, one is as in PEFT."""
    base = save_tiny(tmp_path / "base", "qwen2", 20, tie_word_embeddings=True)
    ways = [{"target_modules": ["q_proj", "embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}]
    if "ensure_weight_tying" not in {field.name for field in dataclasses.fields(LoraConfig)}:
        pytest.skip("this version of PEFT does not tie layers of adapters")
    for i, way in enumerate(ways):
        first, second = (
            save_lora(tmp_path / f"{i}_{k}", base, 30 + k, ensure_weight_tying=True, **way) for k in (0, 1)
        )
        mixture = MixturePolicyModel.from_policies([base, second])
        torch.testing.assert_close(logps(mixture.policy(1)), logps(load_lora(second, base)), **CLOSE)
        with pytest.raises(ValueError, match=rf"{i}_1' over .*no place for '[\w.]*lm_head.*merge_and_unload"):
            MixturePolicyModel.from_policies([first, second])


# ---- adapters of a model in memory ----


def switched_off(model):
    model.base_model.disable_adapter_layers()


STATES = {
    "two active": (lambda model: model.base_model.set_adapter(["default", "terse"]), "has 2 active adapters"),
    "off": (switched_off, "switched off"),
    "merged": (lambda model: model.merge_adapter(), "merged into its base"),
}


@pytest.mark.parametrize(("change", "reason"), STATES.values(), ids=STATES.keys())
def test_state_of_a_model_in_memory_that_switching_would_lose_is_refused(change, reason, folders):
    model = load_lora(folders.kind, folders.base)
    model.load_adapter(folders.terse, "terse")
    change(model)
    before = logps(model)
    with pytest.raises(ValueError, match=reason):
        MixturePolicyModel.from_policies([model, folders.gpt2])
    torch.testing.assert_close(logps(model), before, rtol=0, atol=0)


def test_a_base_that_carries_an_adapter_takes_no_second_one(folders, tmp_path):
    """Transformers opens a folder with a model and an adapter as both; what lies over it would act beside that."""
    both = tmp_path / "both"
    load_lora(folders.kind, folders.base).save_pretrained(both)
    AutoModelForCausalLM.from_pretrained(folders.base).save_pretrained(both)
    mixture = MixturePolicyModel.from_policies([str(both)])
    torch.testing.assert_close(logps(mixture), logps(AutoModelForCausalLM.from_pretrained(both)), **CLOSE)
    with pytest.raises(ValueError, match="terse' cannot lie over .*both', which has one already"):
        MixturePolicyModel.from_policies([{"name_or_path": str(both), "adapter": folders.terse}])
