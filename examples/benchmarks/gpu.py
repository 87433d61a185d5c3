"""
Tokens per second of `generate()` with a mixture of LoRA adapters, relative to the base model alone, on a GPU.

    python examples/benchmarks/gpu.py --output gpu.json
    python examples/benchmarks/gpu.py --shapes tiny --device cpu  # to check that it runs

Models are built from a configuration on the device, with random weights: the time of a step depends on shapes, not on text.
The methods take turns, one run each:

- base: the base model alone
- floor: the base model alone on K times as many rows
- ours: the mixture with its defaults, all adapters in one forward pass
- loop: a forward pass for every adapter, one after another (`model.stack_adapters = False`)
- names: PEFT's batch of several adapters (`adapter_names`), whose logits are pooled by a processor

in two modes: "compiled", which is what `cache_implementation="static"` does on a GPU (torch.compile with CUDA graphs), and
"eager", with a growing cache. A run measures the median step after the prompt; `generate` synchronizes with the device at every
step, so these are the device's times too. The median and quartiles of the ratios within one turn are printed, and
the goal is checked: compiled, at most 1.15 times the base for three adapters of rank 16 on the shape 8B.

The most important cases are measured first, each case is printed and written when it is done, and no case is started after
`--minutes`. Compilation takes most of the time: `--ways ours` leaves out the other methods. Memory for 8B: 16 GiB for the base,
1 GiB more for three adapters in float32 and their stacked copies, and 5 GiB for the keys and values of 3 times 64 rows.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from itertools import product
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

from mpo_hf.mixture.pooling import log_linear_pool


OURS = "ours"
GOAL = {"shape": "8B", "batch": 1, "count": 3, "rank": 16, "ratio": 1.15}
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
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["8B", "1B", "135M"])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--modes", nargs="+", choices=["compiled", "eager"], default=["compiled", "eager"])
    ways = ["floor", OURS, "loop", "names"]
    parser.add_argument("--ways", nargs="+", choices=ways, default=ways)
    parser.add_argument("--minutes", type=float, help="no case is started later than this")
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
    args = parser.parse_args()
    if args.new_tokens < 3:
        parser.error(f"--new_tokens must be 3 at least, for a step that is timed, got {args.new_tokens}")
    return args


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
    """Pools blocks of rows, one for each policy, and returns the result for all of them."""

    def __init__(self, weights: list[float]):
        self.weights = weights

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return log_linear_pool(scores.chunk(len(self.weights)), self.weights).repeat(len(self.weights), 1)


class Stopwatch(LogitsProcessor):
    """Records the time of each token. It does not synchronize: `generate` does so at every step, to check for the end."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores

    def step(self) -> float:
        """Seconds of the median step. The first step is left out: it waits for the prompt, and may record a CUDA graph."""
        return statistics.median(after - before for before, after in zip(self.times[1:], self.times[2:]))


def make_ways(
    base: PreTrainedModel, model: PeftModel, batch_size: int, mode: str, args: argparse.Namespace
) -> dict[str, Callable[[], tuple[float, list]]]:
    """For every method, a function that generates once: the seconds of a step, and the tokens."""
    ids = torch.randint(2, 100, (batch_size, args.prompt_length)).to(args.device)
    settings = {"max_new_tokens": args.new_tokens, "do_sample": False, "pad_token_id": 0}
    if mode == "compiled":
        mode = "reduce-overhead" if args.backend == "inductor" else None
        # not dynamic: methods with other numbers of rows run the same code, which would then be compiled for any number
        compiling = CompileConfig(backend=args.backend, mode=mode, dynamic=False)
        compiling._compile_all_devices = True  # by default Transformers compiles on accelerators only
        settings |= {"cache_implementation": "static", "compile_config": compiling}

    def run(which: torch.nn.Module, rows: torch.Tensor, processors: list, **kwargs) -> tuple[float, list]:
        watch = Stopwatch()
        output = which.generate(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            logits_processor=LogitsProcessorList([watch, *processors]),
            **settings,
            **kwargs,
        )
        return watch.step(), output[:batch_size, args.prompt_length :].tolist()

    mixture, loop = mix(model, args.count), mix(model, args.count)
    loop.stack_adapters = False
    weights = mixture.config.mixture_weights
    names = [str(k) for k in range(args.count) for _ in range(batch_size)]

    def run_names() -> tuple[float, list]:
        model.base_model.enable_adapter_layers()
        return run(model, ids.repeat(args.count, 1), [Pool(weights)], adapter_names=names)

    ways = {OURS: lambda: run(mixture, ids, []), "loop": lambda: run(loop, ids, []), "names": run_names}
    ways["floor"] = lambda: run(base, ids.repeat(args.count, 1), [])
    return {"base": lambda: run(base, ids, []), **{name: ways[name] for name in args.ways}}


def with_peak(way: Callable[[], tuple[float, list]], device: str) -> tuple[float | None, list]:
    """The peak memory of a method, and the tokens it generates."""
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
    ways = make_ways(base, model, batch_size, mode, args)
    tokens, failed, peaks = {}, {}, {}
    # compiles and records CUDA graphs, then once more after all methods have run
    for _ in range(3 if mode == "compiled" else 1):
        for name, way in ways.items():
            try:
                if name not in failed:
                    peaks[name], tokens[name] = with_peak(way, args.device)
            except Exception as error:  # failures to compile and lack of memory are results too
                failed[name] = f"{type(error).__name__}: {str(error)[:200].partition(chr(10))[0]}"
    seconds: dict[str, list[float]] = {name: [] for name in ways if name not in failed}
    for turn in range(args.repetitions):
        names = list(seconds)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(ways[name]()[0])
    to_base, to_floor = (ratios(seconds, to) if to in seconds else {} for to in ("base", "floor"))
    rows = []
    for name in ways:
        row = {"shape": shape, "batch": batch_size, "mode": mode, "way": name, "failed": failed.get(name)}
        if name in seconds:
            step = quartiles(seconds[name])[0]
            row |= {"step_ms": 1000 * step, "tokens_per_second": batch_size / step}
            row |= {"to_base": to_base.get(name), "to_floor": to_floor.get(name)}
            row |= {"peak_gib": peaks[name], "same_tokens": tokens[name] == tokens.get(OURS)}
        rows.append(row)
    return rows


def render(rows: list[dict]) -> str:
    cells = []
    for row in rows:
        case = [row["shape"], row["batch"], row["mode"], row["way"]]
        if row["failed"]:
            cells.append([*case, row["failed"], "", "", "", ""])
        else:
            peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
            speed = f"{row['step_ms']:.2f}", f"{row['tokens_per_second']:.0f}"
            cells.append([*case, *speed, show(row["to_base"]), show(row["to_floor"]), peak])
    header = [
        "shape",
        "batch",
        "mode",
        "way",
        "step, ms",
        "tokens a second",
        "time ÷ base",
        "time ÷ floor",
        "peak, GiB",
    ]
    return table(header, cells)


def check_goal(rows: list[dict], args: argparse.Namespace) -> str:
    goal = f"at most {GOAL['ratio']} times the base, compiled, at batch {GOAL['batch']} on the shape {GOAL['shape']}"
    case = {"way": OURS, "mode": "compiled", "shape": GOAL["shape"], "batch": GOAL["batch"]}
    own = [row for row in rows if case.items() <= row.items() and row.get("to_base")]
    if not own or (args.count, args.rank) != (GOAL["count"], GOAL["rank"]):
        return f"Goal ({goal}): not measured."
    verdict = "met" if own[0]["to_base"][0] <= GOAL["ratio"] else "missed"
    return f"Goal ({goal}): {show(own[0]['to_base'])}, {verdict}."


def main() -> None:
    args = parse_args()
    started = time.monotonic()
    rows: list[dict] = []
    for shape in args.shapes:
        base = model = None
        for mode, batch_size in product(args.modes, args.batch_sizes):
            case = f"{shape}, batch {batch_size}, {mode}"
            if args.minutes is not None and time.monotonic() - started > 60 * args.minutes:
                print(f"{case}: not started, {args.minutes:g} minutes are over")
                continue
            if base is None:
                base, model = build(shape, args)
            before = time.monotonic()
            new = measure(base, model, shape, batch_size, mode, args)
            print(f"{case}: {time.monotonic() - before:.0f} s\n{render(new)}\n", flush=True)
            rows += new
            write(rows, args)
            free(args.device)
        del base, model
        free(args.device)
    print(f"{render(rows)}\n\n{check_goal(rows, args)}\n")
    print(
        f"K = {args.count}, rank {args.rank}, {args.dtype}, adapters in "
        f"{args.dtype if args.adapters_in_dtype else 'float32'}, {args.new_tokens} tokens behind {args.prompt_length}. "
        f"{describe_machine()}"
    )


def write(rows: list[dict], args: argparse.Namespace) -> None:
    if args.output:
        result = {"machine": describe_machine(), "settings": vars(args), "rows": rows}
        args.output.write_text(json.dumps(result, indent=1, default=str))


def free(device: str) -> None:
    """Frees the memory of the last case."""
    torch._dynamo.reset()  # including CUDA graphs and their memory
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
