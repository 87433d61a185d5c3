"""
The core tests with the lowest versions that pyproject.toml allows, in an environment that has exactly these.

torch is the exception: what runs is the version of the present environment, so its own bound is not tested.
"""

import json
import os
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it along there


ROOT = Path(__file__).parent.parent
# a file for each part that leans on Transformers, TRL, PEFT, Datasets or the Hub
CORE = [
    "configuration",
    "cli",
    "modeling",
    "generation",
    "adapters",
    "loading",
    "saving",
    "hub",
    "logits_process",
    "rewards",
    "rollouts",
    "trainer",
    "stacked_models",
    "compiled_decoding",
]


def lowest_versions() -> dict[str, str]:
    """The lower bound of every dependency, by name."""
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = dict(requirement.split(">=") for requirement in requirements)
    return {**bounds, "torch": version("torch").partition("+")[0]}


@pytest.mark.slow
def test_core_works_with_the_lowest_versions(tmp_path):
    bounds = lowest_versions()
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    exact = [f"{name}=={bound}" for name, bound in bounds.items()]
    testing = ["gguf>=0.17", "matplotlib>=3.8", "pytest>=8", "scipy>=1.11"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *exact, *testing], check=True)
    code = (
        f"import json; from importlib.metadata import version; print(json.dumps([version(n) for n in {list(bounds)}]))"
    )
    installed = json.loads(subprocess.check_output([python, "-c", code]))
    for (name, bound), found in zip(bounds.items(), installed, strict=True):
        assert Version(found).release[:2] == Version(bound).release[:2], f"{name}: {found} is not the lowest, {bound}"

    files = [ROOT / "tests" / f"test_{name}.py" for name in CORE]
    # older versions of huggingface_hub ask huggingface.co itself whether a card is valid
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", "not cards_are_valid"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-5_000:]
