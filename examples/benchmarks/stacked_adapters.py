"""
What a step of decoding costs when K adapters over one base are mixed, next to the base model alone.

    python examples/benchmarks/stacked_adapters.py --threads 2

Four ways take turns, step by step, so that they meet the same load of the machine; what counts is the ratio to the base,
whose median over the repetitions is printed with its quartiles:

- one after another: `set_adapter` and a forward pass for every adapter (`model.stack_adapters = False`)
- adapter_names: PEFT's batch of several adapters, whose logits are pooled as a mixture does
- side by side: the mixture as it runs by default

The adapters are the three of `examples/policies/`, some of them several times beyond K = 3.
"""

import argparse
import copy
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel

from mpo_hf import MixturePolicyModel
from mpo_hf.pooling import log_linear_pool


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from smollm2 import load_base  # noqa: E402


ADAPTERS = ["positive", "concise", "readable"]
WAYS = ["one after another", "adapter_names", "side by side"]
# beyond this many rows the caches of all ways do not fit beside one another into a small machine
MOST_ROWS = 128

Step = Callable[[], torch.Tensor]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 3, 4, 8], help="numbers of adapters, K")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=256, help="tokens in the cache before the first step")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cpu_time", action="store_true", help="count the CPU time of the process, for machines that have other work"
    )
    return parser.parse_args()


def load_policies(base: PreTrainedModel, count: int) -> PeftModel:
    """One PEFT model with adapters named 0, 1 and so on."""
    folders = [HERE.parent / "policies" / ADAPTERS[k % len(ADAPTERS)] for k in range(count)]
    model = PeftModel.from_pretrained(base, folders[0], "0")
    for k, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, str(k))
    return model.eval()


def mix(model: PeftModel, count: int) -> MixturePolicyModel:
    """The first `count` adapters of a model in memory as a mixture."""
    policies = []
    for k in range(count):
        model.set_adapter(str(k), inference_mode=True)
        policies.append(MixturePolicyModel.from_policies([model]))
    return MixturePolicyModel.from_policies(policies)


def fill(cache: DynamicCache, rows: int, context: int, config) -> None:
    """Puts keys and values of a context into a cache; for the time of a step any will do."""
    shape = (rows, config.num_key_value_heads, context, config.head_dim)
    for layer in cache.layers:
        layer.update(torch.randn(shape), torch.randn(shape))


def steps(
    base: PreTrainedModel, model: PeftModel, count: int, batch_size: int, context: int
) -> tuple[dict[str, Step], dict[str, DynamicCache]]:
    """One step of decoding by every way, each with a cache of its own."""
    caches = {name: DynamicCache(config=base.config) for name in ("base", "adapter_names")}
    ids = torch.randint(1000, (batch_size, 1))
    rows = ids.repeat(count, 1)
    names = [str(k) for k in range(count) for _ in range(batch_size)]
    mixture = mix(model, count)
    weights = mixture.mixture_weights
    for name in ("one after another", "side by side"):
        caches[name] = DynamicCache(config=mixture.config)
        mixture(ids, past_key_values=caches[name])
    for name, cache in caches.items():
        fill(cache, len(rows) if name == "adapter_names" else batch_size, context, base.config)

    def run_mixture(name: str) -> torch.Tensor:
        mixture.stack_adapters = name == "side by side"
        return mixture(ids, past_key_values=caches[name]).logits

    def run_names() -> torch.Tensor:
        model.base_model.enable_adapter_layers()
        logits = model(input_ids=rows, adapter_names=names, past_key_values=caches["adapter_names"]).logits
        return log_linear_pool(logits.chunk(count), weights)

    ways = {
        "base": lambda: base(ids, past_key_values=caches["base"]).logits,
        "one after another": lambda: run_mixture("one after another"),
        "adapter_names": run_names,
        "side by side": lambda: run_mixture("side by side"),
    }
    return ways, caches


def interleaved(ways: dict[str, Step], repetitions: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds a step, every way once in each repetition. The first three are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repetitions + 3):
        for name, step in ways.items():
            start = clock()
            step()
            if repetition >= 3:
                seconds[name].append(clock() - start)
    return seconds


def resident(field: str) -> float:
    """Memory of this process in MiB: `VmRSS` now, `VmHWM` at its highest."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def peak_memory(step: Step) -> float:
    """MiB that a step takes on top of what is held before it (Linux)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts anew
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def quartiles(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


@torch.no_grad()
def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = time.process_time if args.cpu_time else time.perf_counter
    base = load_base()
    model = load_policies(copy.deepcopy(base), max(args.counts))
    print(
        f"SmolLM2-135M, float32, {args.threads} threads, {args.context} tokens of context, {clock.__name__}. Ratios to the base alone:\n"
    )
    print("| batch | K | base, ms | " + " | ".join(WAYS) + " | one after another / side by side | peak memory, MiB |")
    print("|" + "---|" * 8)
    for batch_size in args.batch_sizes:
        for count in args.counts:
            if count * batch_size > MOST_ROWS:
                continue
            ways, caches = steps(base, model, count, batch_size, args.context)
            seconds = interleaved(ways, args.repetitions, clock)
            ratios = {name: [s / b for s, b in zip(seconds[name], seconds["base"])] for name in WAYS}
            gain = [s / t for s, t in zip(seconds["one after another"], seconds["side by side"])]
            cells = [f"{statistics.median(seconds['base']) * 1000:.0f}", *(quartiles(ratios[name]) for name in WAYS)]
            memory = ", ".join(f"{peak_memory(ways[name]):.0f}" for name in WAYS)
            print(f"| {batch_size} | {count} | " + " | ".join([*cells, quartiles(gain), memory]) + " |", flush=True)
            caches.clear()
            del ways


if __name__ == "__main__":
    main()
