"""The section `growth` of `decoding.py`: the cost of a step with more policies, more rows and more tokens in the cache."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import OURS, candidates, fastest, interleaved, load, mix, quartiles, ratios, show, table
from peft import PeftModel
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from mpo_hf.mixture.compat import CACHE_NAME
from mpo_hf.mixture.pooling import log_linear_pool


# with more rows the caches of all methods do not fit into the memory of a small machine together
MOST_ROWS = 128


def filled(model: PreTrainedModel, like: PreTrainedConfig, rows: int, context: int) -> DynamicCache:
    """A cache of a model that holds a context, with layers like another's; the time of a step does not depend on the keys."""
    cache = DynamicCache(config=model.config)
    shape = (rows, like.num_key_value_heads, context, like.head_dim)
    for layer in cache.layers:
        layer.update(torch.randn(shape, dtype=model.dtype), torch.randn(shape, dtype=model.dtype))
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
    caches["names"] = filled(base, base.config, len(rows), context)

    def run_mixture(name: str) -> torch.Tensor:
        mixture.stack_adapters = name == OURS
        return mixture(ids, cache=caches[name]).logits

    def run_names() -> torch.Tensor:
        model.base_model.enable_adapter_layers()
        logits = model(input_ids=rows, adapter_names=names, **{CACHE_NAME: caches["names"]}).logits
        return log_linear_pool(logits.chunk(count), weights)

    def base_on(number: int) -> Callable[[], torch.Tensor]:
        cache, own = filled(base, base.config, number, context), torch.randint(100, (number, 1))
        return lambda: base(own, **{CACHE_NAME: cache}).logits

    floors = [number for number in candidates(count * batch_size) if number <= MOST_ROWS and number != batch_size]
    return {
        "base": base_on(batch_size),
        **{f"base, {number} rows": base_on(number) for number in floors},
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
        bases = [name for name in ways if name.startswith("base")]
        # the base itself has fewer rows than the floor, but for one policy
        floor = fastest(seconds, bases if count == 1 else bases[1:])
        point["base_ms"] = quartiles(seconds["base"])[0] * 1000
        to_base, to_floor = ratios(seconds, "base"), ratios(seconds, floor)
        shown = {"floor": floor, **{name: name for name in ways if name not in bases}}
        rows += [
            {**point, "way": way, "to_base": to_base[name], "to_floor": to_floor[name]} for way, name in shown.items()
        ]
        print(f"  {axis}: K {count}, batch {batch_size}, context {context}", flush=True)
    return rows


def render_growth(rows: list[dict]) -> str:
    ways = list(dict.fromkeys(row["way"] for row in rows))
    points: dict[tuple, dict] = {}
    for row in rows:
        key = (row["axis"], row["K"], row["batch"], row["context"])
        point = points.setdefault(key, {"base_ms": row["base_ms"]})
        point[row["way"]] = row["to_base"]
        if row["way"] == OURS:
            point["to_floor"] = row["to_floor"]
    cells = [
        [*key, f"{point['base_ms']:.0f}", show(point["to_floor"]), *(f"{point[way][0]:.2f}" for way in ways)]
        for key, point in points.items()
    ]
    header = ["along", "K", "batch", "context", "base, ms", f"{OURS} ÷ floor", *(f"{way} ÷ base" for way in ways)]
    return table(header, cells)


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
            style = {"color": "gray", "linestyle": "--"} if way == "floor" else {}
            (curve,) = panel.plot(x, middle, marker="o", markersize=4, label=way, **style)
            panel.fill_between(x, low, high, alpha=0.2, color=curve.get_color())
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
