"""The benchmarks of decoding run, at their smallest; what they say on a real model is in docs/benchmarks.md."""

import json
import math
import subprocess
import sys

import pytest
from helpers import CLOSE, ROOT


pytestmark = pytest.mark.integration


def run_benchmark(script: str, *options: str) -> str:
    command = [sys.executable, f"examples/benchmarks/{script}", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def assert_ratios(rows: list[dict]) -> None:
    for row in rows:
        assert all(math.isfinite(ratio) and ratio > 0 for ratio in row["to_base"]), row


def assert_floor(rows: list[dict]) -> None:
    for layouts in ("measured", "plain"):
        own = [row for row in rows if row["layouts"] == layouts]
        mixtures = [row for row in own if row.get("way") == "this project"]
        assert [(row["K"], row["batch"]) for row in mixtures] == [(1, 1), (2, 2)]
        base = {row["base_rows"]: row["ms"] for row in own if "base_rows" in row}
        for row in mixtures:
            assert row["floor_ms"] == min(ms for number, ms in base.items() if number >= row["K"] * row["batch"])
            assert all(ratio > 0 for key in ("to_floor", "to_own_floor", "to_base", "to_peft") for ratio in row[key])


def test_ways_to_decode_give_one_distribution_and_a_table(tmp_path):
    options = ["--tiny", "--quick", "--threads", "1", "--output_dir", str(tmp_path)]
    sections = ["floor", "peers", "growth"]
    output = run_benchmark("decoding.py", *options, "--sections", *sections, "--plot", str(tmp_path / "a.png"))
    rows = {name: json.loads((tmp_path / f"decoding-{name}-float32.json").read_text())["rows"] for name in sections}
    assert_floor(rows["floor"])
    ways = {"this project", "loop over adapters", "loop over full models", "PEFT adapter_names", "MOD's loop"}
    peers = [row for row in rows["peers"] if not row["way"].startswith("base")]
    assert {row["way"] for row in peers if row["K"] == 3} == ways
    assert {row["way"] for row in peers if row["K"] == 2} == ways | {"classifier-free guidance"}
    assert all(row["apart"] < CLOSE["atol"] for row in peers)
    assert {row["axis"] for row in rows["growth"]} == {"K", "batch", "context"}
    assert_ratios(rows["peers"] + rows["growth"])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "classifier-free guidance" in output

    own = json.loads((tmp_path / "decoding-peers-float32.json").read_text())["processor"]
    page = tmp_path / "page.md"
    other = "<!-- on another, float32 -->\n\nits table\n\n"
    before = f"# Before\n\n<!-- decoding: peers -->\n\n{other}<!-- on {own}, float32 -->\n\n"
    page.write_text(f"{before}an old table\n\n<!-- end -->\n\nBehind\n")
    run_benchmark("decoding.py", *options, "--markdown", str(page))
    text = page.read_text()
    assert text.startswith(f"{before}| K | batch | way |") and "an old table" not in text
    assert text.endswith("minutes.\n\n<!-- end -->\n\nBehind\n")


@pytest.mark.slow
def test_other_sections_of_decoding(tmp_path):
    options = ["--tiny", "--quick", "--threads", "1", "--output_dir", str(tmp_path)]
    run_benchmark("decoding.py", *options, "--sections", "memory", "sequence_level", "weight_space")
    rows = json.loads((tmp_path / "decoding-weight_space-float32.json").read_text())["rows"]
    apart = {row["way"]: row["kl"] for row in rows}
    assert apart["this project"] < CLOSE["atol"] < apart["PEFT, cat"] < apart["PEFT, linear"]
    assert_ratios(rows)
    memory = json.loads((tmp_path / "decoding-memory-float32.json").read_text())["rows"]
    assert all(row["peak"] > row["parameters"] > 0 for row in memory)


@pytest.mark.parametrize("mode", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_benchmark_for_a_gpu_runs_on_the_cpu(mode, tmp_path):
    options = ["--shapes", "tiny", "--device", "cpu", "--dtype", "float32", "--batch_sizes", "2", "--modes", mode]
    options += ["--prompt_length", "4", "--new_tokens", "4", "--repetitions", "2"]
    output = run_benchmark("gpu.py", *options, "--output", str(tmp_path / "gpu.json"))
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    ways = ["base", "floor", "ours", "loop", "names"]
    assert [(row["mode"], row["way"], row["failed"]) for row in rows] == [(mode, way, None) for way in ways]
    assert_ratios(rows)
    assert all(row["same_tokens"] for row in rows if row["way"] not in ("base", "floor"))
    assert [row["to_floor"] for row in rows if row["way"] == "floor"] == [[1, 1, 1]]
    assert "Goal (at most 1.15 times the base, compiled, at batch 1 on the shape 8B): not measured." in output


def test_coverage_of_the_bound_is_a_table():
    options = [
        "--size",
        "12",
        "60",
        "--populations",
        "normal-2",
        "--prompts",
        "10",
        "--completions",
        "8",
        "--fits",
        "3",
    ]
    header, _, row = run_benchmark("bound_coverage.py", *options).split("\n\n")[1].splitlines()
    cells = dict(zip(header.split(" | "), row.split(" | ")))
    assert 0 <= float(cells["covered"].rstrip("%")) <= 100 and float(cells["gap"]) > 0
    assert run_benchmark("bound_coverage.py", *options, "--stopping").count("\n| normal-2") == 1
