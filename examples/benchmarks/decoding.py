"""
Decoding a mixture with this project, compared with other implementations and with alternatives that decode something else.

    pip install genlm-control mergekit  # without them two methods are left out
    python examples/benchmarks/decoding.py
    python examples/benchmarks/decoding.py --markdown docs/benchmarks*.md  # writes the results into the pages

Sections, each written to a JSON file of its own:

- floor: how far a step of the mixture is from the fastest step of the base alone on as many rows
- peers: a decoding step of every method that computes the same distribution, which is checked
- growth: the same with more policies, rows and tokens
- memory: the peak memory of each method, in its own process
- sequence_level: particle filters for the product of whole policies
- weight_space: averages of the policies' parameters, which decode as fast as one model but have another distribution

All methods of a section take turns, step by step or run by run. The result is the ratio of two methods measured in one turn, as
median and quartiles over the turns. Pages keep the tables of other processors, and of the other dtype.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import (
    OURS,
    Decoder,
    candidates,
    decode_adapter_names,
    decode_guidance,
    decode_loop_over_adapters,
    decode_loop_over_models,
    decode_mod,
    decode_one,
    decode_rows,
    describe_machine,
    describe_processor,
    fastest,
    forget_peak,
    full_models,
    load,
    mix,
    prompts,
    quartiles,
    ratios,
    resident,
    show,
    table,
    take_turns,
)
from decoding_alternatives import (
    measure_sequence_level,
    measure_weight_space,
    render_sequence_level,
    render_weight_space,
)
from decoding_floor import measure_floor, render_floor
from decoding_growth import measure_growth, plot_growth, render_growth
from peft import PeftModel
from transformers import PreTrainedModel


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="few steps and sizes, to see that it runs")
    parser.add_argument("--tiny", action="store_true", help="a random model in place of SmolLM2-135M")
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtype", nargs="+", dest="dtypes", choices=dtypes, default=dtypes[:1], help="of the base")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--plot", type=Path, help="file for the plot of the section growth")
    parser.add_argument(
        "--markdown",
        type=Path,
        nargs="+",
        help="pages to put the tables of earlier runs into, between their marks; measures nothing",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)  # a method of the section memory
    parser.add_argument("--base", help="a folder with the base in safetensors, which is read faster than GGUF")
    args = parser.parse_args()
    args.counts = [2] if args.quick else [1, 2, 3, 4, 6, 8]
    args.batches = [2] if args.quick else [1, 2, 4, 8, 16, 32]
    args.lengths = [64] if args.quick else [64, 256, 1024, 2048]
    args.num_steps = 4 if args.quick else 24
    return args


# ---- peers ----


def contenders(
    base: PreTrainedModel, model: PeftModel, weights: list[float], ids: torch.Tensor
) -> dict[str, Callable[[], Decoder]]:
    """Every method to decode a mixture of the first adapters of a model, and the base alone, also with as many rows and more."""
    mixture = mix(model, len(weights))
    mixture.mixture_weights = weights
    ways = {
        "base": lambda: decode_one(base, ids),
        **{f"base, {n} rows": lambda n=n: decode_rows(base, n, ids) for n in candidates(len(weights) * len(ids))},
        OURS: lambda: decode_one(mixture, ids),
        "loop over adapters": lambda: decode_loop_over_adapters(model, weights, ids),
        "loop over full models": lambda: decode_loop_over_models(full_models(model, len(weights)), weights, ids),
        "PEFT adapter_names": lambda: decode_adapter_names(model, weights, ids),
        "MOD's loop": lambda: decode_mod(model, weights, ids),
    }
    if len(weights) == 2:
        ways["classifier-free guidance"] = lambda: decode_guidance(full_models(model, 2), weights, ids)
    return ways


def measure_peers(args: argparse.Namespace) -> list[dict]:
    rows = []
    base, model = load(args, 3)
    three, two = [0.5, 0.3, 0.2], [0.6, 0.4]
    for weights, batch_size in [(three, 2), (two, 2)] if args.quick else [(three, 1), (three, 8), (two, 1)]:
        ways = contenders(base, model, weights, prompts(args, batch_size))
        decoders = {name: make() for name, make in ways.items()}
        bases = [name for name in ways if name.startswith("base")]
        same = [name for name in ways if name not in bases]
        seconds, apart = take_turns(decoders, OURS, args.num_steps, time.perf_counter, same)
        floor = fastest(seconds, bases[1:])
        to_base, to_floor, to_ours = (ratios(seconds, to) for to in ("base", floor, OURS))
        for name in ["base", floor, *same]:
            row = {"way": name, "K": len(weights), "batch": batch_size, "ms": quartiles(seconds[name])[0] * 1000}
            row |= {"to_base": to_base[name], "to_floor": to_floor[name], "to_ours": to_ours[name]}
            rows.append({**row, "apart": apart.get(name)})
    return rows


def render_peers(rows: list[dict]) -> str:
    cells = [
        [
            row["K"],
            row["batch"],
            row["way"],
            f"{row['ms']:.1f}",
            f"{row['to_base'][0]:.2f}",
            "" if row["way"].startswith("base") else show(row["to_floor"]),
            "" if row["way"].startswith("base") or row["way"] == OURS else show(row["to_ours"]),
            "" if row["apart"] is None or row["way"] == OURS else f"{row['apart']:.0e}",
        ]
        for row in rows
    ]
    header = ["K", "batch", "way", "ms a step", "÷ base", "÷ floor", "÷ this project", "log-probabilities apart"]
    return table(header, cells)


# ---- memory ----


def measure_memory(args: argparse.Namespace) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            __file__,
            "--sections",
            "memory",
            "--threads",
            str(args.threads),
            "--dtype",
            args.dtype,
        ]
        if args.tiny:
            command.append("--tiny")
        else:
            load(args, 1)[0].save_pretrained(folder)
            command += ["--base", folder]
        ways = ["base", OURS, "loop over adapters", "loop over full models", "PEFT adapter_names", "MOD's loop"]
        for way in ways[:2] if args.quick else ways:
            run = subprocess.run([*command, "--child", way], capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(f"The contender {way!r} ended with {run.returncode}:\n{run.stderr[-2000:]}")
            rows.append({"way": way, **json.loads(run.stdout.splitlines()[-1])})
            print(f"  {way}", flush=True)
    return rows


def measure_own_memory(args: argparse.Namespace) -> None:
    """The peak memory of this process while it decodes 16 tokens after 8 rows of 48, everything included."""
    base, model = load(args, 3)
    decoder = contenders(base, model, [0.5, 0.3, 0.2], prompts(args, 8))[args.child]()
    forget_peak()
    scores = next(decoder)
    for _ in range(16):
        scores = decoder.send(scores.argmax(-1))
    print(json.dumps({"peak": resident("VmHWM"), "parameters": sum(p.nbytes for p in base.parameters()) / 2**20}))


def render_memory(rows: list[dict]) -> str:
    base = next(row["peak"] for row in rows if row["way"] == "base")
    cells = [[row["way"], f"{row['peak']:.0f}", f"{row['peak'] - base:.0f}"] for row in rows]
    return table(["way", "peak, MiB", "above the base alone"], cells)


# ---- all of it ----

SECTIONS = {
    "floor": (measure_floor, render_floor),
    "peers": (measure_peers, render_peers),
    "growth": (measure_growth, render_growth),
    "memory": (measure_memory, render_memory),
    "sequence_level": (measure_sequence_level, render_sequence_level),
    "weight_space": (measure_weight_space, render_weight_space),
}


def report_path(args: argparse.Namespace, section: str) -> Path:
    return args.output_dir / f"decoding-{section}-{args.dtype}.json"


def run_section(name: str, args: argparse.Namespace) -> None:
    print(f"\n## {name}, {args.dtype}\n", flush=True)
    started = time.perf_counter()
    measure, render = SECTIONS[name]
    rows = measure(args)
    report = {"processor": describe_processor()[0], "machine": describe_machine(), "dtype": args.dtype, "rows": rows}
    report |= {"model": "tiny" if args.tiny else "SmolLM2-135M"}
    report["minutes"] = round((time.perf_counter() - started) / 60, 2)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    report_path(args, name).write_text(json.dumps(report, indent=1) + "\n")
    print(render(rows), flush=True)
    if name == "growth" and args.plot:
        plot_growth(rows, args.plot)


def put_into_page(name: str, args: argparse.Namespace) -> None:
    """The table, and if asked for the plot, of an earlier run of a section, if there was one."""
    if (path := report_path(args, name)).exists():
        report = json.loads(path.read_text())
        for page in args.markdown:
            page.write_text(fill_page(page.read_text(), name, report))
        if name == "growth" and args.plot:
            plot_growth(report["rows"], args.plot)


def fill_page(text: str, section: str, report: dict) -> str:
    """
    Writes a table into a page, between the marks of its section, `<!-- decoding: peers -->` and `<!-- end -->`. There, each table
    has a mark of its own with processor and dtype: that of another one stays, in the order of the first runs.
    """
    area = re.search(rf"<!-- decoding: {section} -->\n(.*?)<!-- end -->", text, re.DOTALL)
    if area is None:
        return text
    tables = dict(re.findall(r"<!-- on (.*?) -->\n(.*?)(?=<!-- on |\Z)", area[1], re.DOTALL))
    where = f"{report['model']}, {report['dtype']}. {report['machine']}. {report['minutes']:.1f} minutes."
    tables[f"{report['processor']}, {report['dtype']}"] = f"{SECTIONS[section][1](report['rows'])}\n\n{where}"
    filled = "".join(f"<!-- on {own} -->\n\n{lines.strip()}\n\n" for own, lines in tables.items())
    return f"{text[: area.start(1)]}\n{filled}{text[area.end(1) :]}"


@torch.no_grad()
def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for dtype, name in itertools.product(args.dtypes, args.sections):
        args.dtype = dtype
        if args.child:
            measure_own_memory(args)
        elif args.markdown:
            put_into_page(name, args)
        else:
            run_section(name, args)


if __name__ == "__main__":
    main()
