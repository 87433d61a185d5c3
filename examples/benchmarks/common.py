"""Shared by the benchmarks of decoding: policies over one base, methods to decode them, timing and tables."""

import argparse
import copy
import ctypes
import gc
import itertools
import os
import platform
import statistics
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from mpo_hf import MixturePolicyModel
from mpo_hf.mixture.compat import CACHE_NAME
from mpo_hf.mixture.pooling import log_linear_pool


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

ADAPTERS = ["positive", "concise", "readable"]
TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}

OURS = "this project"

# More rows can be faster than fewer, so these are tried for the fastest pass with at least some number of rows.
ROWS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]

# Instructions that products of matrices use, as /proc/cpuinfo names them.
FEATURES = ["avx2", "avx512f", "avx512_bf16", "amx_bf16"]

# A decoder: takes prompts, yields scores of the next token, is sent that token, yields scores of the one after it.
Decoder = Generator[torch.Tensor, torch.Tensor, None]


# ---- models ----


def share_parameters(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model's modules over the same parameters, so that adapters leave the model itself unchanged."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def load_smollm2(
    count: int, folder: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PeftModel]:
    """
    SmolLM2-135M, and a PEFT model over its parameters with adapters named 0, 1 and so on: those of `examples/policies`,
    repeated beyond three. They are in float32, as PEFT loads them. Loading is faster from a `folder` that the base was
    saved to.
    """
    from smollm2 import load_base

    base = LlamaForCausalLM.from_pretrained(folder, dtype=dtype) if folder else load_base().to(dtype)
    base.eval()
    folders = [HERE.parent / "policies" / ADAPTERS[k % len(ADAPTERS)] for k in range(count)]
    model = PeftModel.from_pretrained(share_parameters(base), folders[0], "0")
    for k, adapter in enumerate(folders[1:], start=1):
        model.load_adapter(adapter, str(k))
    return base, model.eval()


def add_random_adapters(base: PreTrainedModel, count: int, rank: int, **kwargs) -> PeftModel:
    """Random adapters on all linear layers of a copy of `base` that shares its parameters."""
    config = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(share_parameters(base), config, "0", **kwargs)
    for k in range(1, count):
        model.add_adapter(str(k), copy.deepcopy(config), **kwargs)
    return model.eval().requires_grad_(False)


def load_tiny(count: int, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PeftModel]:
    """A random model of a few thousand parameters, for trying out a benchmark."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**TINY)).eval().to(dtype)
    return base, add_random_adapters(base, count, rank=4)


def mix(model: PeftModel, count: int) -> MixturePolicyModel:
    """The first `count` adapters of a model in memory as a mixture."""
    policies = []
    for k in range(count):
        model.set_adapter(str(k), inference_mode=True)
        policies.append(MixturePolicyModel.from_policies([model]))
    return MixturePolicyModel.from_policies(policies)


def merge(model: PeftModel, adapter: str) -> PreTrainedModel:
    """A full model of its own: the base with one adapter merged into it."""
    return copy.deepcopy(model).merge_and_unload(adapter_names=[adapter]).eval()


def load(args: argparse.Namespace, count: int) -> tuple[PreTrainedModel, PeftModel]:
    """The base and its adapters, for the options of a command."""
    dtype = getattr(torch, args.dtype)
    return load_tiny(count, dtype) if args.tiny else load_smollm2(count, args.base, dtype)


def prompts(args: argparse.Namespace, batch_size: int, length: int = 48) -> torch.Tensor:
    """Prompts of one length, so that no method has to handle padding."""
    if args.tiny:
        return torch.randint(2, 100, (batch_size, length), generator=torch.Generator().manual_seed(0))
    from prompts import load_prompts
    from smollm2 import load_tokenizer

    texts = itertools.islice(itertools.cycle(load_prompts("test")["prompt"]), batch_size)
    tokenizer = load_tokenizer()
    rows = [tokenizer.apply_chat_template(text, add_generation_prompt=True)["input_ids"] for text in texts]
    shortest = min(len(row) for row in rows)
    return torch.tensor([row[-min(shortest, length) :] for row in rows])


def full_models(model: PeftModel, count: int) -> list[PreTrainedModel]:
    return [merge(model, str(k)) for k in range(count)]


# ---- decoders ----


def decode_one(model: PreTrainedModel, ids: torch.Tensor) -> Decoder:
    """A single model: the base, one policy, or a mixture."""
    cache = DynamicCache(config=model.config)
    while True:
        logits = model(input_ids=ids, **{CACHE_NAME: cache}, logits_to_keep=1).logits[:, -1]
        ids = (yield logits)[:, None]


def decode_rows(model: PreTrainedModel, rows: int, ids: torch.Tensor) -> Decoder:
    """A single model on at least as many rows as it is given: those are repeated, and only their scores are returned."""
    few = len(ids)
    repeated = torch.arange(rows) % few
    decoder = decode_one(model, ids[repeated])
    scores = next(decoder)
    while True:
        tokens = yield scores[:few]
        scores = decoder.send(tokens[repeated])


def decode_loop_over_adapters(model: PeftModel, weights: Sequence[float], ids: torch.Tensor) -> Decoder:
    """The plain loop: `set_adapter` and a pass for every policy."""
    caches = [DynamicCache(config=model.config) for _ in weights]
    while True:
        scores = 0
        for k, (weight, cache) in enumerate(zip(weights, caches)):
            model.set_adapter(str(k))
            logits = model(input_ids=ids, **{CACHE_NAME: cache}, logits_to_keep=1).logits[:, -1]
            scores = scores + weight * logits.log_softmax(-1)
        ids = (yield scores)[:, None]


def decode_loop_over_models(models: Sequence[PreTrainedModel], weights: Sequence[float], ids: torch.Tensor) -> Decoder:
    """A pass of each of several full models."""
    decoders = [decode_one(model, ids) for model in models]
    outputs = [next(decoder) for decoder in decoders]
    while True:
        tokens = yield sum(weight * logits.log_softmax(-1) for weight, logits in zip(weights, outputs))
        outputs = [decoder.send(tokens) for decoder in decoders]


def decode_adapter_names(model: PeftModel, weights: Sequence[float], ids: torch.Tensor) -> Decoder:
    """PEFT's batch of several adapters: every row is repeated for each policy, with the name of its adapter."""
    model.base_model.enable_adapter_layers()
    names = [str(k) for k in range(len(weights)) for _ in range(len(ids))]
    cache = DynamicCache(config=model.config)
    while True:
        rows = ids.repeat(len(weights), 1)
        logits = model(input_ids=rows, adapter_names=names, **{CACHE_NAME: cache}, logits_to_keep=1).logits[:, -1]
        ids = (yield log_linear_pool(logits.chunk(len(weights)), weights))[:, None]


def decode_mod(model: PeftModel, weights: Sequence[float], ids: torch.Tensor) -> Decoder:
    """
    The greedy loop of multi-objective decoding (https://huggingface.co/papers/2406.18853), as in its published code
    for the reverse KL divergence: adapters in turn, then the base, which that divergence does not use; the log-probabilities of
    the tokens so far under every policy are accumulated.
    """
    caches = [DynamicCache(config=model.config) for _ in range(len(weights) + 1)]
    carried = 0.0
    while True:
        logits = []
        for k in range(len(weights)):
            model.set_adapter(str(k))
            logits.append(model(input_ids=ids, **{CACHE_NAME: caches[k]}).logits[:, -1])
        with model.disable_adapter():
            logits.append(model(input_ids=ids, **{CACHE_NAME: caches[-1]}).logits[:, -1])
        totals = torch.stack(logits) + carried
        tokens = yield torch.stack([weight * total for weight, total in zip(weights, totals)]).sum(0)
        carried = totals.gather(-1, tokens.expand(len(totals), -1)[..., None])
        ids = tokens[:, None]


def decode_guidance(models: Sequence[PreTrainedModel], weights: Sequence[float], ids: torch.Tensor) -> Decoder:
    """Transformers' classifier-free guidance, with a second model in place of a second prompt."""
    first, second = models
    processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(weights[0], second, unconditional_ids=ids)
    decoder = decode_one(first, ids)
    logits = next(decoder)
    while True:
        tokens = yield processor(ids, logits)
        ids = torch.cat([ids, tokens[:, None]], dim=1)
        logits = decoder.send(tokens)


# ---- timing ----


def take_turns(
    decoders: dict[str, Decoder], lead: str, num_steps: int, clock: Callable[[], float], same: Sequence[str] = ()
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """
    Decodes the same tokens with several methods in turn, step by step, so that all of them see the same load of the machine.

    Args:
        decoders (`dict[str, Decoder]`): the methods.
        lead (`str`): the method whose greedy choice is decoded.
        num_steps (`int`): steps that are timed, after two warm-up steps.
        clock (`Callable[[], float]`): returns the time in seconds.
        same (`Sequence[str]`): methods that must give the same distribution as `lead`.

    Returns:
        `tuple[dict[str, list[float]], dict[str, float]]`: seconds of every step, and the largest difference between the
        log-probabilities of the methods in `same` and those of `lead`.
    """
    scores = {name: next(decoder) for name, decoder in decoders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    apart = dict.fromkeys(same, 0.0)
    names = list(decoders)
    for step in range(num_steps + 2):
        logps = scores[lead].log_softmax(-1)
        for name in same:
            apart[name] = max(apart[name], (scores[name].log_softmax(-1) - logps).abs().max().item())
        tokens = logps.argmax(-1)
        turn = step % len(names)
        for name in names[turn:] + names[:turn]:
            start = clock()
            scores[name] = decoders[name].send(tokens)
            if step >= 2:
                seconds[name].append(clock() - start)
    return seconds, apart


def interleaved(
    ways: dict[str, Callable[[], object]], repetitions: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of every method in each repetition. The first three repetitions are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repetitions + 3):
        for name, step in ways.items():
            start = clock()
            step()
            if repetition >= 3:
                seconds[name].append(clock() - start)
    return seconds


def quartiles(numbers: Sequence[float]) -> list[float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return [middle, low, high]


def ratios(seconds: dict[str, list[float]], to: str) -> dict[str, list[float]]:
    """Quartiles of the ratios of every method to one of them, turn by turn."""
    return {name: quartiles([s / t for s, t in zip(own, seconds[to])]) for name, own in seconds.items()}


def candidates(count: int) -> list[int]:
    """Numbers of rows, from `count` on, that the fastest pass with at least `count` rows is looked for among."""
    return [count, *(rows for rows in ROWS if rows > count)][:4]


def fastest(seconds: dict[str, list[float]], names: Sequence[str]) -> str:
    """The method with the smallest median."""
    return min(names, key=lambda name: statistics.median(seconds[name]))


def show(numbers: Sequence[float] | None) -> str:
    """A median with its quartiles, as a cell of a table."""
    return "" if numbers is None else f"{numbers[0]:.2f} ({numbers[1]:.2f} to {numbers[2]:.2f})"


def resident(field: str) -> float:
    """Memory of this process in MiB (Linux): `VmRSS` is the current value, `VmHWM` the peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def forget_peak() -> None:
    """Returns free memory to the system, and resets the peak of `resident`."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory(step: Callable[[], object]) -> float:
    """MiB that a step takes in addition to what was held before it."""
    forget_peak()
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def describe_processor() -> tuple[str, list[str]]:
    """The processor, by family and model too because its name alone may say little, and which of `FEATURES` it has."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in fields:
        return platform.processor() or platform.machine(), []
    flags = fields.get("flags", "").split()
    name = f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"
    return name, [feature for feature in FEATURES if feature in flags]


def describe_machine() -> str:
    name, features = describe_processor()
    cpu = f"{name} with {', '.join(features)};" if features else f"{name},"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu} {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}"


# ---- tables ----


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
