"""
Tokens a second of `generate()` with a mixture of LoRA adapters, next to the base model alone, on a GPU.

    python examples/benchmarks/gpu.py
    python examples/benchmarks/gpu.py --shapes tiny --device cpu  # to see that it runs

Models are built from a configuration on the device, with random weights: the time of a step depends on shapes, not on words.
Four ways take turns, one run each:

- base: the base model alone
- this project: the mixture as it runs by default, all adapters in one forward pass
- one after another: a forward pass for every adapter (`model.stack_adapters = False`)
- PEFT adapter_names: PEFT's batch of several adapters, whose logits are pooled by a processor

in two modes: "eager", with a cache that grows, and "compiled", which is what `cache_implementation="static"` does on a GPU
(torch.compile with CUDA graphs). The prompt is not timed. Ratios of runs of one turn are what counts; their median and
quartiles are printed, and the goal is checked: at most 1.15 times the base for three adapters of rank 16 on the shape 8B.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import TINY, add_random_adapters, describe_machine, mix, quartiles, ratios, show, table
from peft import PeftModel
from transformers import (
    CompileConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from mpo_hf.pooling import log_linear_pool


OURS = "this project"
GOAL = {"shape": "8B", "batch": 1, "ratio": 1.15}
SHAPES = {
    "tiny": TINY,
    "135M": {  # SmolLM2
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "1B": {  # Llama 3.2
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "8B": {  # Llama 3.1
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["135M", "1B", "8B"])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--count", type=int, default=3, help="adapters, K")
    parser.add_argument("--rank", type=int, default=16, help="of every adapter, on all linear layers")
    parser.add_argument("--prompt_length", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", help="of the base")
    parser.add_argument(
        "--adapters_in_dtype", action="store_true", help="adapters in the dtype of the base, not in PEFT's float32"
    )
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--output", type=Path, help="JSON file for what was measured")
    return parser.parse_args()


def build(shape: str, args: argparse.Namespace) -> tuple[PreTrainedModel, PeftModel]:
    """A random base, and adapters over the same parameters."""
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, args.dtype))
    with torch.device(args.device):
        base = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], bos_token_id=None, eos_token_id=None)).eval()
        model = add_random_adapters(base, args.count, args.rank, autocast_adapter_dtype=not args.adapters_in_dtype)
    torch.set_default_dtype(torch.float32)
    return base, model


class Pool(LogitsProcessor):
    """Pools blocks of rows, one for each policy, and gives all of them the result."""

    def __init__(self, weights: list[float]):
        self.weights = weights

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return log_linear_pool(scores.chunk(len(self.weights)), self.weights).repeat(len(self.weights), 1)


class Stopwatch(LogitsProcessor):
    """Starts when the first token is chosen, behind the prompt."""

    def __init__(self, device: str):
        self.is_cuda = device.startswith("cuda")
        self.started: float | None = None

    def now(self) -> float:
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.started is None:
            self.started = self.now()
        return scores


def make_ways(
    base: PreTrainedModel, model: PeftModel, batch_size: int, mode: str, args: argparse.Namespace
) -> dict[str, Callable[[], tuple[float, list]]]:
    """For every way a function that generates once: the seconds a token behind the first, and the tokens."""
    ids = torch.randint(2, 100, (batch_size, args.prompt_length)).to(args.device)
    settings = {"max_new_tokens": args.new_tokens, "do_sample": False, "pad_token_id": 0}
    if mode == "compiled":
        compiling = CompileConfig(backend=args.backend, mode="reduce-overhead" if args.backend == "inductor" else None)
        compiling._compile_all_devices = True  # Transformers compiles on accelerators only, unless told so
        settings |= {"cache_implementation": "static", "compile_config": compiling}

    def run(which: torch.nn.Module, rows: torch.Tensor, processors: list, **kwargs) -> tuple[float, list]:
        watch = Stopwatch(args.device)
        output = which.generate(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            logits_processor=LogitsProcessorList([watch, *processors]),
            **settings,
            **kwargs,
        )
        seconds = (watch.now() - watch.started) / (args.new_tokens - 1)
        return seconds, output[:batch_size, args.prompt_length :].tolist()

    mixture, loop = mix(model, args.count), mix(model, args.count)
    loop.stack_adapters = False
    weights = mixture.config.mixture_weights
    names = [str(k) for k in range(args.count) for _ in range(batch_size)]

    def run_names() -> tuple[float, list]:
        model.base_model.enable_adapter_layers()
        return run(model, ids.repeat(args.count, 1), [Pool(weights)], adapter_names=names)

    return {
        "base": lambda: run(base, ids, []),
        OURS: lambda: run(mixture, ids, []),
        "one after another": lambda: run(loop, ids, []),
        "PEFT adapter_names": run_names,
    }


def with_peak(way: Callable[[], tuple[float, list]], device: str) -> tuple[float | None, list]:
    """The most memory that is in use while a way runs, and the tokens it writes."""
    if not device.startswith("cuda"):
        return None, way()[1]
    torch.cuda.reset_peak_memory_stats()
    _, tokens = way()
    return torch.cuda.max_memory_allocated() / 2**30, tokens


def measure(
    base: PreTrainedModel, model: PeftModel, shape: str, batch_size: int, mode: str, args: argparse.Namespace
) -> list[dict]:
    torch._dynamo.reset()
    for which in (base, model.get_base_model()):
        which.__dict__.pop("_compiled_call", None)
    case = {"shape": shape, "batch": batch_size, "mode": mode}
    ways = make_ways(base, model, batch_size, mode, args)
    tokens, failed, peaks = {}, {}, {}
    for _ in range(3):  # compiles, records CUDA graphs, and once more when all have been run
        for name, way in ways.items():
            try:
                if name not in failed:
                    peaks[name], tokens[name] = with_peak(way, args.device)
            except Exception as error:  # a peer that cannot be compiled is a result too
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    if OURS in failed or "base" in failed:
        raise RuntimeError(f"{case} failed: {failed}")
    seconds: dict[str, list[float]] = {name: [] for name in ways if name not in failed}
    for turn in range(args.repetitions):
        names = list(seconds)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(ways[name]()[0])
    to_base = ratios(seconds, "base")
    rows = []
    for name in ways:
        row = {**case, "way": name, "failed": failed.get(name)}
        if name in seconds:
            row |= {"tokens_per_second": batch_size / quartiles(seconds[name])[0], "to_base": to_base[name]}
            row |= {"peak_gib": peaks[name], "same_tokens": tokens[name] == tokens[OURS]}
        rows.append(row)
    return rows


def render(rows: list[dict]) -> str:
    cells = []
    for row in rows:
        case = [row["shape"], row["batch"], row["mode"], row["way"]]
        if row["failed"]:
            cells.append([*case, row["failed"], "", ""])
        else:
            peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
            cells.append([*case, f"{row['tokens_per_second']:.0f}", show(row["to_base"]), peak])
    return table(["shape", "batch", "mode", "way", "tokens a second", "time ÷ base", "peak, GiB"], cells)


def check_goal(rows: list[dict]) -> str:
    own = [r for r in rows if r["way"] == OURS and (r["shape"], r["batch"]) == (GOAL["shape"], GOAL["batch"])]
    if not own:
        return f"Goal (at most {GOAL['ratio']} times the base at batch 1 on the shape 8B): not measured."
    best = min(own, key=lambda row: row["to_base"][0])
    verdict = "met" if best["to_base"][0] <= GOAL["ratio"] else "missed"
    return f"Goal: at most {GOAL['ratio']} times the base. {best['mode']}: {show(best['to_base'])}, {verdict}."


def main() -> None:
    args = parse_args()
    rows: list[dict] = []
    for shape in args.shapes:
        base, model = build(shape, args)
        for batch_size in args.batch_sizes:
            for mode in args.modes:
                rows += measure(base, model, shape, batch_size, mode, args)
                print(f"{shape}, batch {batch_size}, {mode}", flush=True)
        del base, model
        gc.collect()
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
    print(f"\n{render(rows)}\n\n{check_goal(rows)}\n")
    machine = describe_machine()
    print(
        f"K = {args.count}, rank {args.rank}, {args.dtype}, {args.new_tokens} tokens behind {args.prompt_length}. {machine}"
    )
    if args.output:
        args.output.write_text(
            json.dumps({"machine": machine, "settings": vars(args), "rows": rows}, indent=1, default=str)
        )


if __name__ == "__main__":
    main()
