"""
Decoding a mixture with this project, compared with other implementations and with alternatives that decode something else.

    pip install genlm-control mergekit  # without them two methods are left out
    python examples/benchmarks/decoding.py
    python examples/benchmarks/decoding.py --markdown docs/benchmarks.md  # writes the results into the page

Sections, each written to a JSON file of its own:

- peers: a decoding step of every method that computes the same distribution, which is checked
- growth: the same with more policies, rows and tokens
- memory: the peak memory of each method, in its own process
- sequence_level: particle filters for the product of whole policies
- weight_space: averages of the policies' parameters, which decode as fast as one model but have another distribution

All methods of a section take turns, step by step or run by run. The result is the ratio of two methods measured in one turn, as
median and quartiles over the turns.
"""

import argparse
import asyncio
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import (
    Decoder,
    decode_adapter_names,
    decode_guidance,
    decode_loop_over_adapters,
    decode_loop_over_models,
    decode_mod,
    decode_one,
    describe_machine,
    forget_peak,
    interleaved,
    load_smollm2,
    load_tiny,
    merge,
    mix,
    quartiles,
    ratios,
    resident,
    show,
    table,
    take_turns,
)
from peft import PeftModel
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, set_seed

from mpo_hf import sequential_monte_carlo
from mpo_hf.mixture.compat import CACHE_NAME
from mpo_hf.mixture.pooling import log_linear_pool


SECTIONS = ["peers", "growth", "memory", "sequence_level", "weight_space"]
OURS = "this project"
PLOT = "images/decoding_growth.png"  # beside the page that shows it
# with more rows the caches of all methods do not fit into the memory of a small machine together
MOST_ROWS = 128


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--quick", action="store_true", help="few steps and sizes, to see that it runs")
    parser.add_argument("--tiny", action="store_true", help="a random model in place of SmolLM2-135M")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--plot", type=Path, help="file for the plot of the section growth")
    parser.add_argument(
        "--markdown",
        type=Path,
        help="page to put the tables of earlier runs into, between its marks; measures nothing",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)  # a method of the section memory
    parser.add_argument("--base", help=argparse.SUPPRESS)  # a folder with the base, for that section
    args = parser.parse_args()
    args.counts = [2] if args.quick else [1, 2, 3, 4, 6, 8]
    args.batches = [2] if args.quick else [1, 2, 4, 8, 16, 32]
    args.lengths = [64] if args.quick else [64, 256, 1024, 2048]
    args.num_steps = 4 if args.quick else 24
    return args


def load(args: argparse.Namespace, count: int) -> tuple[PreTrainedModel, PeftModel]:
    return load_tiny(count) if args.tiny else load_smollm2(count, args.base)


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


# ---- peers ----


def contenders(
    base: PreTrainedModel, model: PeftModel, weights: list[float], ids: torch.Tensor
) -> dict[str, Callable[[], Decoder]]:
    """Every method to decode a mixture of the first adapters of a model, and the base alone."""
    mixture = mix(model, len(weights))
    mixture.mixture_weights = weights
    ways = {
        "base": lambda: decode_one(base, ids),
        OURS: lambda: decode_one(mixture, ids),
        "loop over adapters": lambda: decode_loop_over_adapters(model, weights, ids),
        "loop over full models": lambda: decode_loop_over_models(full_models(model, len(weights)), weights, ids),
        "PEFT adapter_names": lambda: decode_adapter_names(model, weights, ids),
        "MOD's loop": lambda: decode_mod(model, weights, ids),
    }
    if len(weights) == 2:
        ways["classifier-free guidance"] = lambda: decode_guidance(full_models(model, 2), weights, ids)
    return ways


def full_models(model: PeftModel, count: int) -> list[PreTrainedModel]:
    return [merge(model, str(k)) for k in range(count)]


def measure_peers(args: argparse.Namespace) -> list[dict]:
    rows = []
    base, model = load(args, 3)
    for weights, batch_size in itertools.product(
        ([0.5, 0.3, 0.2], [0.6, 0.4]), args.batches if args.quick else [1, 8]
    ):
        ways = contenders(base, model, weights, prompts(args, batch_size))
        decoders = {name: make() for name, make in ways.items()}
        same = [name for name in ways if name != "base"]
        seconds, apart = take_turns(decoders, OURS, args.num_steps, time.perf_counter, same)
        to_base, to_ours = ratios(seconds, "base"), ratios(seconds, OURS)
        for name in ways:
            row = {"way": name, "K": len(weights), "batch": batch_size, "ms": quartiles(seconds[name])[0] * 1000}
            row |= {"to_base": to_base[name], "to_ours": to_ours[name], "apart": apart.get(name)}
            rows.append(row)
    return rows


def render_peers(rows: list[dict]) -> str:
    cells = [
        [
            row["K"],
            row["batch"],
            row["way"],
            f"{row['ms']:.1f}",
            show(row["to_base"]),
            "" if row["way"] in ("base", OURS) else show(row["to_ours"]),
            "" if row["apart"] is None or row["way"] == OURS else f"{row['apart']:.0e}",
        ]
        for row in rows
    ]
    return table(["K", "batch", "way", "ms a step", "÷ base", "÷ this project", "log-probabilities apart"], cells)


# ---- growth ----


def filled(model: PreTrainedModel, like: PreTrainedConfig, rows: int, context: int) -> DynamicCache:
    """A cache of a model that holds a context, with layers like another's; the time of a step does not depend on the keys."""
    cache = DynamicCache(config=model.config)
    shape = (rows, like.num_key_value_heads, context, like.head_dim)
    for layer in cache.layers:
        layer.update(torch.randn(shape), torch.randn(shape))
    return cache


def steps(
    base: PreTrainedModel, model: PeftModel, count: int, batch_size: int, context: int
) -> dict[str, Callable[[], torch.Tensor]]:
    """One decoding step after a context, by every method that does not hold separate weights for each policy."""
    ids = torch.randint(100, (batch_size, 1))
    rows, names = ids.repeat(count, 1), [str(k) for k in range(count) for _ in range(batch_size)]
    mixture = mix(model, count)
    weights = mixture.config.mixture_weights
    caches = {name: filled(mixture, base.config, batch_size, context) for name in (OURS, "one after another")}
    for cache in caches.values():
        cache.mixture_components = tuple(range(count))  # it is filled by hand, and not by another model
    caches["base"] = filled(base, base.config, batch_size, context)
    caches["names"] = filled(base, base.config, len(rows), context)

    def run_mixture(name: str) -> torch.Tensor:
        mixture.stack_adapters = name == OURS
        return mixture(ids, cache=caches[name]).logits

    def run_names() -> torch.Tensor:
        model.base_model.enable_adapter_layers()
        logits = model(input_ids=rows, adapter_names=names, **{CACHE_NAME: caches["names"]}).logits
        return log_linear_pool(logits.chunk(count), weights)

    return {
        "base": lambda: base(ids, **{CACHE_NAME: caches["base"]}).logits,
        OURS: lambda: run_mixture(OURS),
        "one after another": lambda: run_mixture("one after another"),
        "PEFT adapter_names": run_names,
    }


def measure_growth(args: argparse.Namespace) -> list[dict]:
    three, few = (2, 1) if args.quick else (3, 1)
    points = [("K", count, few, 256) for count in args.counts]
    points += [("batch", three, batch_size, 256) for batch_size in args.batches]
    points += [("context", three, few, length) for length in args.lengths]
    base, model = load(args, max(count for _, count, _, _ in points))
    rows = []
    for axis, count, batch_size, context in points:
        if count * batch_size > MOST_ROWS:
            continue
        ways = steps(base, model, count, batch_size, context)
        seconds = interleaved(ways, max(4, args.num_steps // 2), time.perf_counter)
        point = {"axis": axis, "K": count, "batch": batch_size, "context": context}
        point["base_ms"] = quartiles(seconds["base"])[0] * 1000
        rows += [
            {**point, "way": name, "to_base": own} for name, own in ratios(seconds, "base").items() if name != "base"
        ]
        print(f"  {axis}: K {count}, batch {batch_size}, context {context}", flush=True)
    return rows


def render_growth(rows: list[dict]) -> str:
    ways = list(dict.fromkeys(row["way"] for row in rows))
    points: dict[tuple, dict] = {}
    for row in rows:
        key = (row["axis"], row["K"], row["batch"], row["context"])
        points.setdefault(key, {"base_ms": row["base_ms"]})[row["way"]] = row["to_base"]
    cells = [
        [*key, f"{point['base_ms']:.0f}", *(show(point.get(way)) for way in ways)] for key, point in points.items()
    ]
    return table(["along", "K", "batch", "context", "base, ms", *ways], cells)


def plot_growth(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes_of = {"K": "policies, K", "batch": "rows in the batch", "context": "tokens in the cache"}
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.6), sharey=True)
    for panel, (axis, label) in zip(panels, axes_of.items()):
        own = [row for row in rows if row["axis"] == axis]
        for way in dict.fromkeys(row["way"] for row in own):
            line = [row for row in own if row["way"] == way]
            x = [row[axis] for row in line]
            middle, low, high = zip(*(row["to_base"] for row in line))
            panel.plot(x, middle, marker="o", markersize=4, label=way)
            panel.fill_between(x, low, high, alpha=0.2)
        if axis != "K":
            panel.set_xscale("log", base=2)
        panel.set_xticks(x, map(str, x))
        fixed = {name: {row[name] for row in own} for name in axes_of if name != axis}
        panel.set_title(", ".join(f"{name} {min(v)}" for name, v in fixed.items()), fontsize=9)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("time of a step ÷ base alone")
    panels[0].set_ylim(bottom=0)
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


# ---- memory ----


def measure_memory(args: argparse.Namespace) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--sections", "memory", "--threads", str(args.threads)]
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


# ---- sequence level ----


def measure_sequence_level(args: argparse.Namespace) -> list[dict]:
    particles, tokens, rounds = (4, 4, 2) if args.quick else (16, 16, 4)
    base, model = load(args, 2)
    weights = [0.6, 0.4]
    ids = prompts(args, 1)
    mixture = mix(model, 2)
    mixture.mixture_weights = weights

    def run_ours() -> float:
        settings = {"do_sample": True, "top_k": 0, "max_new_tokens": tokens, "return_dict_in_generate": True}
        settings |= {"num_particles": particles, "ess_threshold": 0.5, "attention_mask": torch.ones_like(ids)}
        return mixture.generate(ids, custom_generate=sequential_monte_carlo, **settings).log_normalizer.item()

    ways = {OURS: run_ours}
    if args.tiny:
        print("  genlm-control is left out: it needs a tokenizer")
    elif importlib.util.find_spec("genlm") is None:
        print("  genlm-control is not installed, and left out")
    else:
        ways["genlm-control"] = genlm_runner(full_models(model, 2), weights, ids[0].tolist(), particles, tokens)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    log_z: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, run in ways.items():
            set_seed(turn)
            start = time.perf_counter()
            log_z[name].append(run())
            if turn:
                seconds[name].append(time.perf_counter() - start)
    to_ours = ratios(seconds, OURS)
    size = {"particles": particles, "tokens": tokens, "rounds": rounds}
    return [
        {
            "way": name,
            **size,
            "seconds": quartiles(seconds[name])[0],
            "to_ours": to_ours[name],
            "log_z": statistics.mean(log_z[name]),
            "error": statistics.stdev(log_z[name]) / len(log_z[name]) ** 0.5,
        }
        for name in ways
    ]


def genlm_runner(
    models: list[PreTrainedModel], weights: list[float], prompt: list[int], particles: int, tokens: int
) -> Callable[[], float]:
    """The geometric mean of two policies over whole completions, by genlm-control."""
    from genlm.backend.llm import AsyncTransformer
    from genlm.control import Ensemble, PromptedLLM, direct_token_sampler
    from smollm2 import load_tokenizer

    tokenizer = load_tokenizer()
    language_models = [AsyncTransformer(model, tokenizer, batch_size=particles) for model in models]
    first, second = (PromptedLLM(lm, prompt_ids=prompt) for lm in language_models)

    def run() -> float:
        for lm in language_models:
            lm.clear_cache()  # of the previous run
        ensemble = Ensemble(first, second, op="prod", a=weights[0])
        sampler = direct_token_sampler(ensemble)
        # truncated without requiring the end of the text there, as `max_new_tokens` does
        length = {"max_tokens": tokens + 1, "terminate_when": lambda context: len(context) >= tokens}
        return float(asyncio.run(sampler.smc(n_particles=particles, ess_threshold=0.5, **length)).log_ml)

    return run


def render_sequence_level(rows: list[dict]) -> str:
    cells = [
        [row["way"], f"{row['seconds']:.2f}", show(row["to_ours"]), f"{row['log_z']:.2f} ± {row['error']:.2f}"]
        for row in rows
    ]
    note = "{particles} particles of {tokens} tokens, K = 2, {rounds} rounds.".format(**rows[0])
    return table(["way", "seconds", "÷ this project", "estimate of log Z"], cells) + "\n\n" + note


# ---- weight space ----


@torch.no_grad()
def divergence(
    mixture_logps: torch.Tensor, model: PreTrainedModel, sequences: torch.Tensor, start: int
) -> list[float]:
    """KL(mixture ‖ model) at every token of completions, in nats."""
    logps = model(input_ids=sequences).logits[:, start - 1 : -1].log_softmax(-1)
    return (mixture_logps.exp() * (mixture_logps - logps)).sum(-1).flatten().tolist()


def measure_weight_space(args: argparse.Namespace) -> list[dict]:
    base, model = load(args, 3)
    weights, names = [0.5, 0.3, 0.2], ["0", "1", "2"]
    mixture = mix(model, 3)
    mixture.mixture_weights = weights
    ids = prompts(args, 2 if args.quick else 8)
    set_seed(0)
    length = 8 if args.quick else 48
    settings = {"do_sample": True, "top_k": 0, "min_new_tokens": length, "max_new_tokens": length, "pad_token_id": 0}
    sequences = mixture.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    start = ids.shape[1]
    mixture_logps = mixture(sequences).logits[:, start - 1 : -1].log_softmax(-1)

    candidates = {f"policy {k} alone": lambda k=k: merge(model, str(k)) for k in range(3)}
    for kind in ("cat", "linear"):
        model.add_weighted_adapter(names, weights, kind, combination_type=kind)
        candidates[f"PEFT, {kind}"] = lambda kind=kind: merge(model, kind)
    if importlib.util.find_spec("mergekit") is None:
        print("  mergekit is not installed, and left out")
    else:
        candidates["mergekit, linear"] = lambda: merge_by_mergekit(full_models(model, 3), weights)

    candidates[OURS] = lambda: mixture
    rows = []
    for name, make in candidates.items():
        candidate = make()
        gap = divergence(mixture_logps, candidate, sequences, start)
        row = {"way": name, "kl": statistics.mean(gap), "kl_95": sorted(gap)[int(0.95 * len(gap))], "tokens": len(gap)}
        decoders = {"base": decode_one(base, ids), name: decode_one(candidate, ids)}
        seconds, _ = take_turns(decoders, name, max(4, args.num_steps // 2), time.perf_counter)
        rows.append({**row, "to_base": ratios(seconds, "base")[name]})
        print(f"  {name}", flush=True)
    return rows


def merge_by_mergekit(models: list[PreTrainedModel], weights: list[float]) -> PreTrainedModel:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    with tempfile.TemporaryDirectory() as folder:
        entries = []
        for k, (model, weight) in enumerate(zip(models, weights)):
            model.save_pretrained(path := f"{folder}/policy_{k}")
            entries.append({"model": path, "parameters": {"weight": weight}})
        config = MergeConfiguration.model_validate({"merge_method": "linear", "dtype": "float32", "models": entries})
        run_merge(config, f"{folder}/merged", MergeOptions(copy_tokenizer=False, cuda=False))
        return LlamaForCausalLM.from_pretrained(f"{folder}/merged", dtype=torch.float32).eval()


def render_weight_space(rows: list[dict]) -> str:
    cells = [[row["way"], f"{row['kl']:.4f}", f"{row['kl_95']:.4f}", show(row["to_base"])] for row in rows]
    note = f"KL(mixture ‖ candidate), in nats a token, on {rows[0]['tokens']} tokens that the mixture wrote. K = 3."
    return table(["candidate", "mean KL", "95th percentile", "step ÷ base"], cells) + "\n\n" + note


# ---- all of it ----


def run_section(name: str, args: argparse.Namespace) -> None:
    print(f"\n## {name}\n", flush=True)
    started = time.perf_counter()
    rows = globals()[f"measure_{name}"](args)
    report = {"machine": describe_machine(), "model": "tiny" if args.tiny else "SmolLM2-135M", "rows": rows}
    report["minutes"] = round((time.perf_counter() - started) / 60, 2)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / f"decoding-{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(render(name, args.output_dir), flush=True)
    if name == "growth" and args.plot:
        plot_growth(rows, args.plot)


def fill_page(page: Path, sections: list[str], folder: Path) -> None:
    """Writes tables between the marks for them in a page: `<!-- decoding: peers -->` to `<!-- end -->`."""
    text = page.read_text()
    for name in sections:
        mark, end = f"<!-- decoding: {name} -->", "<!-- end -->"
        if (folder / f"decoding-{name}.json").exists() and mark in text:
            before, _, rest = text.partition(mark)
            _, _, behind = rest.partition(end)
            picture = f"![A step of decoding, as a multiple of the base alone]({PLOT})\n\n"
            shown = name == "growth" and (page.parent / PLOT).exists()
            text = f"{before}{mark}\n\n{picture if shown else ''}{render(name, folder)}\n\n{end}{behind}"
    page.write_text(text)


def render(name: str, folder: Path) -> str:
    """The table of a section from earlier measurements."""
    report = json.loads((folder / f"decoding-{name}.json").read_text())
    where = f"{report['model']}, float32. {report['machine']}. {report['minutes']:.1f} minutes."
    return f"{globals()[f'render_{name}'](report['rows'])}\n\n{where}"


@torch.no_grad()
def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.child:
        measure_own_memory(args)
    elif args.markdown:
        fill_page(args.markdown, args.sections, args.output_dir)
        if args.plot:
            plot_growth(json.loads((args.output_dir / "decoding-growth.json").read_text())["rows"], args.plot)
    else:
        for name in args.sections:
            run_section(name, args)


if __name__ == "__main__":
    main()
