"""
The section `floor` of `decoding.py`: how far a step of the mixture is from the fastest step of the base on as many rows.

K policies over B rows are a pass of the base over K·B rows and more. So the floor of a step is the fastest step of the plain base
with at least K·B rows: the same question on every processor, however much slower than one row it makes several. A mixture whose
products take faster layouts can be below it, so the base is also measured in a mixture of it alone, with the same layouts.
"""

import argparse
import time
from collections.abc import Callable

import torch
from common import (
    OURS,
    decode_one,
    fastest,
    interleaved,
    load,
    mix,
    prompts,
    quartiles,
    ratios,
    share_parameters,
    show,
    table,
)
from transformers import PreTrainedModel

from mpo_hf import MixturePolicyModel, set_product_layouts


ROWS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
POINTS = [(1, 1), (2, 1), (3, 1), (4, 1), (8, 1), (3, 4), (3, 8)]
LAYOUTS = ["measured", "plain"]
PEFT = "PEFT"


def stepper(model: PreTrainedModel, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A decoding step after prompts. All steps read the same tokens: their time does not depend on these."""
    decoder = decode_one(model, ids)
    tokens = next(decoder).argmax(-1)
    return lambda: decoder.send(tokens)


def measure_floor(args: argparse.Namespace) -> list[dict]:
    numbers, points = ([1, 2, 4], [(1, 1), (2, 2)]) if args.quick else (ROWS, POINTS)
    base, model = load(args, max(count for count, _ in points))
    ids = prompts(args, max(numbers))
    rows = []
    for layouts in LAYOUTS:  # of the whole process, so mixtures with others cannot take turns
        set_product_layouts(layouts)
        ways = {f"base {n}": stepper(base, ids[:n]) for n in numbers}
        for n in numbers:
            ways[f"own {n}"] = stepper(MixturePolicyModel.from_policies([share_parameters(base)]), ids[:n])
        for count, batch_size in points:
            ways[f"{count} x {batch_size}"] = stepper(mix(model, count), ids[:batch_size])
        model.set_adapter("0", inference_mode=True)
        ways[PEFT] = stepper(model, ids[:1])
        seconds = interleaved(ways, args.num_steps, time.perf_counter)
        rows += [{**row, "layouts": layouts} for row in summarize(seconds, numbers, points)]
    set_product_layouts("measured")
    return rows


def summarize(seconds: dict[str, list[float]], numbers: list[int], points: list[tuple[int, int]]) -> list[dict]:
    ms = {name: quartiles(taken)[0] * 1000 for name, taken in seconds.items()}
    rows: list[dict] = [{"base_rows": n, "ms": ms[f"base {n}"], "own_ms": ms[f"own {n}"]} for n in numbers]
    rows.append({"way": PEFT, "ms": ms[PEFT]})
    for count, batch_size in points:
        way, enough = f"{count} x {batch_size}", [n for n in numbers if n >= count * batch_size]
        floor, own_floor = (fastest(seconds, [f"{of} {n}" for n in enough]) for of in ("base", "own"))
        row = {"way": OURS, "K": count, "batch": batch_size, "ms": ms[way]}
        row |= {"floor_rows": int(floor.split()[1]), "floor_ms": ms[floor]}
        references = {"to_floor": floor, "to_own_floor": own_floor, "to_base": f"base {batch_size}", "to_peft": PEFT}
        rows.append({**row, **{key: ratios(seconds, to)[way] for key, to in references.items()}})
    return rows


def render_floor(rows: list[dict]) -> str:
    measured, plain = ([row for row in rows if row["layouts"] == layouts] for layouts in LAYOUTS)
    base = [row for row in measured if "base_rows" in row]
    lines = [
        [name, *(f"{row[key]:.1f}" for row in base)]
        for name, key in {"alone, ms": "ms", "in a mixture of it, ms": "own_ms"}.items()
    ]
    cells, single = [], []
    for own, other in zip(measured, plain):
        if own.get("way") == OURS:
            cells.append([own["K"], own["batch"], f"{own['floor_ms']:.1f} ({own['floor_rows']})", f"{own['ms']:.1f}"])
            cells[-1] += [
                show(own["to_floor"]),
                show(own["to_own_floor"]),
                f"{own['to_base'][0]:.2f}",
                show(other["to_floor"]),
            ]
            if (own["K"], own["batch"]) == (1, 1):
                single = [show(own["to_peft"]), show(other["to_peft"])]
    header = ["K", "batch", "floor, ms (rows)", "mixture, ms", "÷ floor", "÷ floor in a mixture", "÷ base"]
    header.append("plain products ÷ floor")
    peft = next(row["ms"] for row in measured if row.get("way") == PEFT)
    note = (
        f"One adapter in PEFT's own model, not merged: {peft:.1f} ms; the mixture with K = 1 takes {single[0]} times that, with "
        f"plain products {single[1]}."
    )
    alone = table(["rows of the base", *(row["base_rows"] for row in base)], lines)
    return f"{alone}\n\n{table(header, cells)}\n\n{note}"
