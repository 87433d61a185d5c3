"""Adapters from full fine-tunes: exact where the difference has low rank, and an honest report where it has not."""

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from helpers import (
    BOS,
    CLOSE,
    ROOT,
    VOCAB,
    close,
    fake_hub,
    load_lora,
    save_gguf,
    save_lora,
    save_tiny,
    tiny,
    tiny_tokenizer,
)
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from mpo_hf import MixturePolicyModel
from mpo_hf.cli.main import main
from mpo_hf.extraction.adapter_extraction import extract_adapter
from mpo_hf.extraction.checkpoint import Checkpoint
from mpo_hf.extraction.low_rank import low_rank_factors


EXAMPLES = ROOT / "examples"
sys.path.append(str(EXAMPLES))

from smollm2 import load_base, load_tokenizer  # noqa: E402


IDS = torch.tensor([[BOS, 7, 11, 3, 22, 8, 14], [BOS, 30, 5, 6, 9, 2, 4]])
NORMS = {
    "llama": ["norm", "input_layernorm", "post_attention_layernorm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def merged(base: str, folder, **changes) -> str:
    """A full model whose difference from its base has rank 3, saved."""
    lora = save_lora(folder / "lora", base, 2, r=3, **changes)
    model = load_lora(lora, base).merge_and_unload()
    model.save_pretrained(folder / "full")
    return str(folder / "full")


def tuned(base: str, folder, scale=0.05) -> str:
    """A full model all of whose parameters differ from its base."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    model.save_pretrained(folder / "tuned")
    return str(folder / "tuned")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base and a fine-tune of everything in it."""
    root = tmp_path_factory.mktemp("pair")
    base = save_tiny(root / "base", "llama", 1)
    full = tuned(base, root)
    tiny_tokenizer([f"t{i}" for i in range(VOCAB)]).save_pretrained(full)
    return base, full


# ---- what is extracted ----


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "mistral", "gemma3"])
def test_low_rank_difference_is_extracted_exactly(architecture, tmp_path):
    settings = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True} if architecture == "gpt2" else {}
    base = save_tiny(tmp_path / "base", architecture, 1)
    full = merged(base, tmp_path, **settings)
    adapter = extract_adapter(full, base, energy=1.0)
    adapter.save_pretrained(tmp_path / "extracted")
    assert sorted(path.name for path in (tmp_path / "extracted").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = load_lora(tmp_path / "extracted", base)
    torch.testing.assert_close(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(full)), **CLOSE)
    assert {module.rank for module in adapter.report.modules} == {3}
    assert adapter.report.left_out == []
    assert adapter.report.relative_error < CLOSE["atol"]
    given = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora").peft_config
    assert adapter.config.target_modules == set(given["default"].target_modules)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_everything_is_kept_when_asked_for(architecture, tied, tmp_path):
    """All ranks, embeddings, norms and biases: nothing is left to lose."""
    base = save_tiny(tmp_path / "base", architecture, 1, tie_word_embeddings=tied)
    full = tuned(base, tmp_path)
    adapter = extract_adapter(full, base, energy=1.0, embeddings=True, modules_to_save=NORMS[architecture])
    adapter.save_pretrained(tmp_path / "extracted")
    report = adapter.report
    # biases are part of a layer of LoRA where all layers have them, which embeddings have not
    assert all(parameter.name.endswith(".bias") for parameter in report.left_out)
    assert bool(report.left_out) == (architecture == "gpt2")
    assert report.kept_energy == pytest.approx(1 - sum(p.squared_norm for p in report.left_out) / total(report))
    if architecture == "llama":
        loaded = load_lora(tmp_path / "extracted", base)
        torch.testing.assert_close(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(full)), **CLOSE)


def total(report) -> float:
    return sum(part.squared_norm for part in (*report.modules, *report.saved, *report.left_out))


def test_biases_of_all_layers_become_biases_of_the_adapter(tmp_path):
    base = save_tiny(tmp_path / "base", "gpt2", 1)
    full = AutoModelForCausalLM.from_pretrained(tuned(base, tmp_path))
    origin = AutoModelForCausalLM.from_pretrained(base)
    # embeddings stay as they are here
    full.transformer.wte.weight.data = origin.transformer.wte.weight.data
    full.transformer.wpe.weight.data = origin.transformer.wpe.weight.data
    adapter = extract_adapter(full, origin, energy=1.0, modules_to_save=NORMS["gpt2"])
    adapter.save_pretrained(tmp_path / "extracted")
    assert adapter.config.lora_bias and adapter.report.left_out == []
    torch.testing.assert_close(logits(load_lora(tmp_path / "extracted", base)), logits(full), **CLOSE)


def test_what_has_no_factors_is_left_out_by_name(pair):
    report = extract_adapter(pair[1], pair[0], rank=2).report
    assert {parameter.name.split(".")[-2] for parameter in report.left_out} == {"embed_tokens", *NORMS["llama"]}
    assert "left out  embed_tokens.weight, 2 x input_layernorm.weight" in str(report)
    assert "592 parameters" in str(report)  # 32 x 16 embeddings and 5 norms of 16


def test_layers_are_chosen_by_name(pair):
    report = extract_adapter(pair[1], pair[0], target_modules=["q_proj", "layers.1.mlp.up_proj"]).report
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert [module.name for module in report.modules] == [*names, "model.layers.1.mlp.up_proj"]
    kept = sum(module.kept_energy * module.squared_norm for module in report.modules)
    assert report.kept_energy == pytest.approx(kept / total(report))


# ---- how much is kept ----


def test_more_energy_is_more_rank_and_less_error(pair):
    reports = [extract_adapter(pair[1], pair[0], energy=e, texts=["t3 t8 t5 t21"]).report for e in (0.3, 0.6, 0.9, 1)]
    for report, energy in zip(reports, (0.3, 0.6, 0.9, 1 - 1e-6)):
        assert all(module.kept_energy >= energy for module in report.modules)
    for less, more in zip(reports, reports[1:]):
        assert all(a.rank <= b.rank for a, b in zip(less.modules, more.modules))
        assert less.adapter_parameters < more.adapter_parameters
        assert less.relative_error > more.relative_error
    assert reports[-1].mean_kl < reports[0].mean_kl
    # one rank less would have been too little
    tight = reports[2].modules[0]
    capped = extract_adapter(pair[1], pair[0], energy=0.9, rank=tight.rank - 1).report.modules[0]
    assert capped.rank == tight.rank - 1 and capped.kept_energy < 0.9


def test_report_agrees_with_what_peft_adds_to_the_weights(pair, tmp_path):
    adapter = extract_adapter(pair[1], pair[0], energy=0.8)
    adapter.save_pretrained(tmp_path)
    base, full = (dict(AutoModelForCausalLM.from_pretrained(path).named_modules()) for path in pair)
    loaded = dict(load_lora(tmp_path, pair[0]).get_base_model().named_modules())
    assert len(adapter.report.modules) == 15
    assert len({module.rank for module in adapter.report.modules}) > 1
    for module in adapter.report.modules:
        difference = full[module.name].weight - base[module.name].weight
        lost = (difference - loaded[module.name].get_delta_weight("default")).norm() / difference.norm()
        assert module.relative_error == close(lost.item())
        assert module.rank == loaded[module.name].r["default"]
    described = str(adapter.report)
    assert "q_proj" in described and f"{adapter.report.adapter_parameters:,} of an adapter" in described


def test_divergence_on_texts_is_that_of_the_models(pair, tokenizer):
    base, full = (AutoModelForCausalLM.from_pretrained(path).eval() for path in pair)
    before = copy.deepcopy(base.state_dict())
    texts = ["t3 t8 t5 t21", "t9", ""]
    report = extract_adapter(full, base, rank=2, texts=texts, processing_class=tokenizer).report
    expected = []
    for ids in ([3, 8, 5, 21], [9]):
        ours, theirs = (model(torch.tensor([ids])).logits.double().log_softmax(-1) for model in (full, base))
        expected += (ours.exp() * (ours - theirs)).sum(-1).flatten().tolist()
    assert report.num_tokens == 5
    assert report.mean_kl_base == close(sum(expected) / 5)
    assert 0 < report.mean_kl < report.mean_kl_base
    assert f"KL to the fine-tune  {report.mean_kl:.3g} nats a token" in str(report)
    # a base in memory is left as it was
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("way", [{"rank": 12}, {"energy": 0.9}, {"energy": 0.9, "rank": 12}], ids=str)
def test_sketched_factors_are_as_good_as_the_best(way):
    torch.manual_seed(0)
    spectrum = 0.8 ** torch.arange(250.0)
    left, right = (torch.linalg.qr(torch.randn(n, 250)).Q for n in (300, 250))
    matrix = (left * spectrum) @ right.T
    state = torch.random.get_rng_state()
    first, second = low_rank_factors(matrix, **way)
    assert torch.equal(torch.random.get_rng_state(), state)
    rank = len(first)
    best = spectrum[rank:].norm()
    assert (matrix - second @ first).norm() <= 1.001 * best
    if "energy" in way:
        shares = spectrum.square().cumsum(0) / spectrum.square().sum()
        assert rank == min(way.get("rank", 250), (shares < 0.9).sum().item() + 1)
    again = low_rank_factors(matrix, **way)
    assert torch.equal(again[0], first) and torch.equal(again[1], second)


# ---- where models come from ----


def assert_same_adapter(adapter, other):
    assert adapter.state_dict.keys() == other.state_dict.keys()
    for name, tensor in adapter.state_dict.items():
        torch.testing.assert_close(other.state_dict[name], tensor, **CLOSE, msg=name)


def test_files_are_read_tensor_by_tensor(pair, tmp_path):
    expected = extract_adapter(*(AutoModelForCausalLM.from_pretrained(path) for path in pair[::-1]), rank=4)
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    for folder in (pair[1], tmp_path / "sharded"):
        assert_same_adapter(extract_adapter(folder, pair[0], rank=4), expected)
        assert all(p.is_meta for p in Checkpoint(folder).skeleton.parameters())


def test_files_of_the_headless_class_have_names_of_their_own(tmp_path):
    base, full = tiny("gpt2", 1), tiny("gpt2", 2)
    expected = extract_adapter(full, base, rank=2)
    full.transformer.save_pretrained(tmp_path / "full")
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    (tmp_path / "full" / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    base.save_pretrained(tmp_path / "base")
    assert_same_adapter(extract_adapter(tmp_path / "full", tmp_path / "base", rank=2), expected)


def test_files_with_other_names_are_loaded_whole(tmp_path):
    base, full = tiny("llama", 1), tiny("llama", 2)
    save_gguf(tmp_path / "full.gguf", full)
    adapter = extract_adapter({"name_or_path": str(tmp_path), "gguf_file": "full.gguf"}, base, rank=2)
    assert_same_adapter(adapter, extract_adapter(full, base, rank=2))


def test_adapter_is_kept_in_the_dtype_of_the_fine_tune(pair, tmp_path):
    AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.bfloat16).save_pretrained(tmp_path / "full")
    exact = extract_adapter(tmp_path / "full", pair[0], rank=4, dtype=torch.float32)
    rounded = extract_adapter(tmp_path / "full", pair[0], rank=4)
    assert {tensor.dtype for tensor in exact.state_dict.values()} == {torch.float32}
    assert {tensor.dtype for tensor in rounded.state_dict.values()} == {torch.bfloat16}
    # and the report is about the rounded one
    assert rounded.report.relative_error > exact.report.relative_error


def test_adapter_names_the_commit_of_its_base(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    base, full = (fake_hub(tmp_path, f"my-team/{name}", path, "v1") for name, path in zip(("sft", "full"), pair))
    located = [{"name_or_path": repo, "revision": "v1"} for repo in (full, base)]
    config = extract_adapter(*located, rank=1, cache_dir=str(tmp_path)).config
    assert config.base_model_name_or_path == "my-team/sft"
    assert len(config.revision) == 40


def test_extracted_adapters_run_in_one_pass_of_a_mixture(tmp_path):
    base = save_tiny(tmp_path / "base", "llama", 1)
    full = []
    for k in range(2):
        model = load_lora(save_lora(tmp_path / f"lora_{k}", base, k, r=2 + k), base).merge_and_unload()
        full.append(model.eval())
        extract_adapter(model, base, energy=1.0).save_pretrained(tmp_path / f"extracted_{k}")
    mixture = MixturePolicyModel.from_policies([tmp_path / f"extracted_{k}" for k in range(2)], [0.3, 0.7])
    assert mixture.stacked_components == [[0, 1]]
    assert len(mixture.backbones) == 1
    torch.testing.assert_close(logits(mixture), logits(MixturePolicyModel.from_policies(full, [0.3, 0.7])), **CLOSE)


# ---- what is refused ----


def test_models_that_have_no_difference_of_low_rank_are_refused(pair, tmp_path):
    base, full = pair
    other = {name: save_tiny(tmp_path / name, "llama", 5, **changes) for name, changes in {
        "wider": {"intermediate_size": 32}, "vocabulary": {"vocab_size": VOCAB + 2}, "deeper": {"num_hidden_layers": 3},
    }.items()}  # fmt: skip
    gpt2 = save_tiny(tmp_path / "gpt2", "gpt2", 1)
    lora = save_lora(tmp_path / "lora", base, 2)
    mixture = MixturePolicyModel.from_policies([base, full])
    mixture.save_pretrained(tmp_path / "mix")
    quantized = save_tiny(tmp_path / "quantized", "llama", 1)
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    for wrong, message in {
        gpt2: "is a gpt2 and .* a llama",
        other["wider"]: r"gate_proj.weight first \(\(32, 16\), \(24, 16\)\)",
        other["vocabulary"]: "has 34 tokens, that of .* 32. Resize",
        other["deeper"]: r"parameters, model.layers.2.* none\)",
        lora: "is an adapter already",
        base: "None of the layers .* differs",
        str(tmp_path / "mix"): "is a mixture",
        quantized: "is quantized",
        str(tmp_path / "nothing"): "nothing",
    }.items():
        with pytest.raises((ValueError, OSError), match=message):
            extract_adapter(wrong, base)
    for model in (mixture, load_lora(lora, base)):
        with pytest.raises(ValueError, match="mixture|without adapters"):
            extract_adapter(model, base)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "`rank` must be a positive integer, got 0"),
        ({"rank": 0.5}, "`rank` must be a positive integer, got 0.5"),
        ({"energy": 1.5}, "`energy` is a share.*got 1.5"),
        ({"target_modules": ["query"]}, "`target_modules` names 'query', but .* has no such module.*q_proj"),
        ({"target_modules": ["norm"]}, "`target_modules` names model.norm, a LlamaRMSNorm"),
        ({"target_modules": "q_proj"}, "must be a list of names, got 'q_proj'"),
        ({"modules_to_save": ["ln"]}, "`modules_to_save` names 'ln'"),
        ({"texts": "t1"}, "`texts` must be a list"),
        ({"texts": [""]}, "all empty"),
        ({"revision": "main"}, "`revision='main'` would be one revision for all"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_refused(pair, arguments, message):
    with pytest.raises(ValueError, match=message):
        extract_adapter(pair[1], pair[0], **arguments)


def test_texts_need_a_tokenizer(pair):
    base, full = (AutoModelForCausalLM.from_pretrained(path) for path in pair)
    with pytest.raises(ValueError, match="`processing_class`"):
        extract_adapter(full, base, texts=["t1"])
    with pytest.raises(ValueError, match="has no tokenizer that can be read"):
        extract_adapter(pair[0], pair[1], texts=["t1"])


# ---- the command line, and a real model ----


def test_command_writes_an_adapter_and_says_what_is_lost(pair, tmp_path, capsys):
    base, full = pair
    (tmp_path / "texts.txt").write_text("t3 t8 t5\n\nt21 t4\n")
    options = [
        "--rank",
        "3",
        "--text-file",
        str(tmp_path / "texts.txt"),
        "--modules_to_save",
        "norm",
        "--dtype",
        "bfloat16",
    ]
    assert main(["extract-adapter", full, "--base", base, "--output_dir", str(tmp_path / "out"), *options]) == 0
    out = capsys.readouterr().out
    config = load_lora(tmp_path / "out", base).peft_config["default"]
    assert (config.r, config.base_model_name_or_path) == (3, base)
    expected = extract_adapter(full, base, rank=3, modules_to_save=["norm"], dtype=torch.bfloat16)
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(expected.state_dict)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in expected.state_dict.items())
    assert str(expected.report).splitlines()[:5] == out.splitlines()[:5]
    assert "nats a token, without the adapter" in out and "(5 tokens)" in out
    assert f"The adapter is in {tmp_path / 'out'}." in out


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--rank", "0"], 1, "--rank must be a positive integer, got 0"),
        (["--dtype", "int8"], 2, "--dtype must name a floating point type of torch, such as bfloat16, got 'int8'"),
        (["--revision", "v9", "--base", "nowhere/at-all"], 1, "cannot be opened"),
    ],
    ids=str,
)
def test_mistakes_on_the_command_line_are_told_in_one_line(pair, tmp_path, capsys, options, status, message):
    arguments = ["extract-adapter", pair[1], "--base", pair[0], "--output_dir", str(tmp_path / "out"), *options]
    assert main(arguments) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow  # singular values of a real model: two minutes
def test_adapter_of_a_real_model_is_found_again():
    """The policy of an example, merged into its base: what comes out is the adapter that went in."""
    base, tokenizer = load_base(), load_tokenizer()
    full = PeftModel.from_pretrained(copy.deepcopy(base), EXAMPLES / "policies" / "positive").merge_and_unload()
    texts = ["The weather in Paris is mild, and the food is", "A cloud is made of water."]
    report = extract_adapter(full, base, energy=0.9999, texts=texts, processing_class=tokenizer).report
    assert len(report.modules) == 30 * 4 and report.left_out == []
    assert max(module.rank for module in report.modules) <= 8
    assert report.mean_kl_base > 1e-2
    assert report.mean_kl < 1e-4 * report.mean_kl_base


@pytest.mark.slow
def test_benchmark_of_full_checkpoints_runs():
    script = EXAMPLES / "benchmarks" / "full_checkpoints.py"
    options = ["--shapes", "tiny", "--counts", "3", "--batch_sizes", "2", "--repetitions", "4", "--threads", "1"]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"\| tiny \| 3 \| 2 \| [\d.]+( \| [\d.]+ \([\d.]+ to [\d.]+\)){4} \|", done.stdout)
