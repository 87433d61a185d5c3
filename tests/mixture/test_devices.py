"""Components on devices of their own, offloaded, quantised: the mixture is that of the components so placed."""

import json
import subprocess

import pytest
import torch
from helpers import (
    CLOSE,
    EOS,
    VOCAB,
    completions_of,
    greedy,
    left_pad,
    program,
    save_lora,
    save_tiny,
    tiny,
    tiny_tokenizer,
)
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    QuantoConfig,
    pipeline,
)

from mpo_hf import MixturePolicyModel
from mpo_hf.rewards import make_reward_functions


pytestmark = pytest.mark.integration
PROMPTS = [[1, 7, 11, 3, 22], [1, 30], [1, 6, 19]]
IDS = torch.tensor([[1, 5, 9, 11, 4]])
WEIGHTS = [0.6, 0.4]
IN_PARTS = {
    "model.embed_tokens": "disk",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    root = tmp_path_factory.mktemp("policies")
    return [save_tiny(root / name, name, seed) for seed, name in enumerate(["llama", "gpt2"])]


@pytest.fixture(scope="module")
def plain(policies):
    return MixturePolicyModel.from_policies(policies, WEIGHTS)


def generate(model, **kwargs):
    inputs = left_pad(PROMPTS)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": [EOS]}
    return completions_of(model.generate(**inputs, **{**settings, **kwargs}), inputs)


PLACES = {
    "all on disk": ("disk", None),
    "all on disk, as a dictionary": ({"": "disk"}, None),
    "second on disk": ({"component_0": "cpu", "component_1": "disk"}, {"backbone_0": "cpu", "backbone_1": "disk"}),
    "first on disk": ({"component_0": "disk"}, {"backbone_0": "disk", "backbone_1": "cpu"}),
    "first in parts": (
        {"component_0": IN_PARTS, "component_1": "cpu"},
        {**{f"backbone_0.{name}": device for name, device in IN_PARTS.items()}, "backbone_1": "cpu"},
    ),
    "automatic": ("auto", None),
}


@pytest.mark.parametrize(("device_map", "found"), PLACES.values(), ids=PLACES.keys())
def test_offloaded_components_compute_the_same(policies, plain, tmp_path, device_map, found):
    model = MixturePolicyModel.from_policies(policies, WEIGHTS, device_map=device_map, offload_folder=tmp_path)
    assert getattr(model, "hf_device_map", None) == found
    assert model.device.type == "cpu" and model.mixture_weights.tolist() == pytest.approx(WEIGHTS)
    on_disk = sum(parameter.is_meta for parameter in model.parameters())
    assert (on_disk > 0) == ("disk" in str(device_map))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, atol=0, rtol=0)
    for options in (
        {},
        {"use_cache": False},
        {"cache_implementation": "static", "prefill_chunk_size": 2},
        {"num_beams": 3},
    ):
        assert generate(model, **options) == generate(plain, **options)
    ids = torch.tensor(PROMPTS[:1])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": []}
    drafted = model.generate(ids, assistant_model=model.policy(1), **options)
    assert drafted.tolist() == plain.generate(ids, **options).tolist()


def test_device_map_of_a_saved_mixture(policies, plain, tmp_path):
    plain.save_pretrained(tmp_path / "mix")
    device_map = {"component_0": "cpu", "component_1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "mix", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert model.hf_device_map == {"backbone_0": "cpu", "backbone_1": "disk"}
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, atol=0, rtol=0)


def test_device_map_of_a_mixture_in_one_checkpoint(tmp_path):
    plain = MixturePolicyModel.from_policies([tiny("llama", 1), tiny("gpt2", 2)], WEIGHTS)
    plain.save_pretrained(tmp_path / "mix")
    device_map = {"component_0": "disk", "component_1": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "mix", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert model.hf_device_map == {"backbone_0": "disk", "backbone_1": "cpu"} and model.device.type == "cpu"
    assert generate(model) == generate(plain)


@pytest.mark.parametrize("device_map", ["disk", {"component_0": "disk", "component_1": "cpu"}])
def test_offloaded_mixture_in_a_pipeline_and_moved(policies, plain, tmp_path, device_map):
    model = MixturePolicyModel.from_policies(policies, WEIGHTS, device_map=device_map, offload_folder=tmp_path)
    tokenizer = tiny_tokenizer([f"t{i}" for i in range(VOCAB)])
    texts = [
        pipeline("text-generation", model=each, tokenizer=tokenizer)("t1 t5 t9", max_new_tokens=4, do_sample=False)
        for each in (model, plain)
    ]
    assert texts[0] == texts[1]
    assert model.to("cpu") is model
    for there in ("cuda:0", torch.bfloat16):
        with pytest.raises(ValueError, match=f"offloaded.*{there}"):
            model.to(there)


def test_reference_goes_where_it_is_told_or_where_the_first_component_is(policies, tmp_path):
    reference = save_tiny(tmp_path / "reference", "llama", 9)
    expected = AutoModelForCausalLM.from_pretrained(reference)(IDS).logits.log_softmax(-1)
    for device_map, offloaded in (
        ({"component_0": "cpu", "reference": "disk"}, True),
        ({"component_0": "disk", "component_1": "cpu"}, True),
        ({"component_0": "cpu", "component_1": "disk"}, False),
    ):
        model = MixturePolicyModel.from_policies(
            policies, reference=reference, device_map=device_map, offload_folder=tmp_path / "offload"
        )
        view = model.reference_policy
        assert all(parameter.is_meta == offloaded for parameter in view.parameters())
        torch.testing.assert_close(view(IDS).logits, expected, **CLOSE)


def test_device_maps_that_make_no_sense_are_refused(policies, tmp_path):
    adapters = [save_lora(tmp_path / str(seed), policies[0], seed) for seed in (3, 4)]
    offload = {"offload_folder": tmp_path / "offload"}
    for given, device_map, message in (
        (policies, {"component_0": "cpu", "component_2": "cpu"}, r"\['component_2'\] are none of"),
        (policies, {"component_0": "cpu", "model.norm": "cpu"}, r"\['model.norm'\] are none of"),
        (adapters, {"component_0": "cpu", "component_1": "disk"}, "component_1 is 'disk', but it shares its model"),
        (adapters, "disk", "adapter .* cannot be put on .* offloaded"),
        ([tiny("llama", 1), policies[1]], {"component_0": "cpu"}, "component_0 cannot be chosen any more"),
    ):
        with pytest.raises(ValueError, match=message):
            MixturePolicyModel.from_policies(given, device_map=device_map, **offload)


def test_dtype_by_component(policies):
    model = MixturePolicyModel.from_policies(policies, WEIGHTS, dtype={"component_1": "bfloat16"})
    assert [backbone.dtype for backbone in model.backbones] == [torch.float32, torch.bfloat16]
    components = [AutoModelForCausalLM.from_pretrained(policies[0])]
    components.append(AutoModelForCausalLM.from_pretrained(policies[1], dtype="bfloat16"))
    logps = [component(IDS).logits.float().log_softmax(-1) for component in components]
    torch.testing.assert_close(model(IDS).logits, sum(w * logp for w, logp in zip(WEIGHTS, logps)), **CLOSE)


@pytest.mark.parametrize("device_map", [{"": "disk"}, IN_PARTS | {"score": "cpu"}], ids=["on disk", "in parts"])
def test_offloaded_reward_models_score_the_same(policies, tmp_path, device_map):
    config = AutoConfig.from_pretrained(policies[0], num_labels=1, pad_token_id=0)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "reward")
    tokenizer = tiny_tokenizer([f"t{i}" for i in range(VOCAB)])
    tokenizer.pad_token = "t0"
    found = []
    for kwargs in ({}, {"device_map": device_map, "offload_folder": tmp_path / "offload"}):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", **kwargs)
        assert next(model.parameters()).is_meta == bool(kwargs)
        (reward,) = make_reward_functions([model], processing_classes=[tokenizer])
        found.append(reward(["t1 t5", "t9"], [" t3", " t4 t8 t2"]).tolist())
    assert found[0] == found[1] and found[0][0] != found[0][1]


def test_fits_with_policies_on_different_devices_find_the_same_weights(tmp_path):
    """In a process of its own: the device is there for all of it."""
    values = {"out": str(tmp_path)}
    done = subprocess.run(**program("fits_on_two_devices.py", values), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    fits = json.loads(done.stdout.splitlines()[-1])
    assert len(fits) == 6
    for in_one_place, apart in fits.values():
        assert in_one_place == apart != [0.5, 0.5]


def test_a_device_has_its_inputs_before_another_is_busy():
    """A copy waits for what the device that it comes from was told to do before."""
    done = subprocess.run(**program("order_of_copies.py"), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    *copies, last = json.loads(done.stdout.splitlines()[-1])
    assert last == "first runs" and set(copies) == {"copied"}


# ---- quantisation ----

WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Policies with matrices that are wide enough to be quantised."""
    root = tmp_path_factory.mktemp("wide")
    return [save_tiny(root / name, name, seed, **WIDE) for seed, name in enumerate(["llama", "qwen2"])]


def load(policy, quantised):
    config = QuantoConfig(weights="int8") if quantised else None
    return AutoModelForCausalLM.from_pretrained(policy, quantization_config=config).eval()


@pytest.mark.parametrize("which", [[0, 1], [1]])
def test_quantised_components_are_those_quantised_alone(wide, which, tmp_path):
    config = QuantoConfig(weights="int8")
    given = config if len(which) == 2 else {f"component_{k}": config for k in which}
    model = MixturePolicyModel.from_policies(wide, WEIGHTS, quantization_config=given)
    components = [load(policy, k in which) for k, policy in enumerate(wide)]
    with torch.no_grad():
        logps = [component(IDS).logits.float().log_softmax(-1) for component in components]
        torch.testing.assert_close(model(IDS).logits, sum(w * logp for w, logp in zip(WEIGHTS, logps)), **CLOSE)
        full = MixturePolicyModel.from_policies(wide, WEIGHTS)
        assert (model(IDS).logits - full(IDS).logits).abs().max() > 1e-3
    assert generate(model) == greedy(components, WEIGHTS, PROMPTS, 5)
    # how components are loaded is no part of the mixture
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, full(IDS).logits, **CLOSE)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=given)
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, **CLOSE)


def test_adapters_go_on_a_quantised_base(wide, tmp_path):
    adapters = [save_lora(tmp_path / str(seed), wide[0], seed) for seed in (3, 4)]
    config = QuantoConfig(weights="int8")
    model = MixturePolicyModel.from_policies(adapters, WEIGHTS, quantization_config=config)
    components = [PeftModel.from_pretrained(load(wide[0], True), adapter).eval() for adapter in adapters]
    with torch.no_grad():
        logps = [component(IDS).logits.log_softmax(-1) for component in components]
        torch.testing.assert_close(model(IDS).logits, sum(w * logp for w, logp in zip(WEIGHTS, logps)), **CLOSE)
    assert len(model.backbones) == 1 and generate(model) == greedy(components, WEIGHTS, PROMPTS, 5)
