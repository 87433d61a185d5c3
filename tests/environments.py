"""Virtual environments that have less than this one, or other versions, and the core tests in them."""

import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it along there


ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# what the core tests need beside what the package itself does
TESTING = ["gguf>=0.17", "matplotlib>=3.8", "pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6"]
# a file for each part that leans on Transformers, TRL, PEFT, Datasets or the Hub
CORE = [
    "adapters",
    "cache_names",
    "cli",
    "compiled_decoding",
    "configuration",
    "generation",
    "hub",
    "loading",
    "logits_process",
    "modeling",
    "public_names",
    "recurrent",
    "rewards",
    "rollouts",
    "saving",
    "stacked_models",
    "trainer",
]


def requirements_of(*names: str) -> set[str]:
    """Names of the distributions that installing `names` alone would bring."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name not in found:
            found.add(name)
            requirements = map(Requirement, metadata.requires(name) or [])
            waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def bare_environment(folder: Path, *names: str) -> Path:
    """Makes a virtual environment out of links to the installed files of `names` and what they require."""
    venv.create(folder, symlinks=True)
    packages = folder / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    for name in requirements_of(*names):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))
    return folder / "bin" / "python"


def empty_environment(folder: Path) -> Path:
    """Makes a virtual environment that has pip only."""
    venv.create(folder, symlinks=True, with_pip=True)
    return folder / "bin" / "python"


def install(python: Path, *names: str) -> None:
    """Installs `names`, at the versions that this environment has."""
    pinned = [f"{name}=={metadata.version(name).split('+')[0]}" for name in names]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *pinned], check=True)


def installed_torch() -> str:
    """The version of torch here, which other environments take as well: a newer one may be gigabytes of CUDA."""
    return metadata.version("torch").partition("+")[0]


def make_environment(folder: Path, *requirements: str) -> Path:
    """Makes a virtual environment that has what is required, and returns its interpreter."""
    python = empty_environment(folder)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
    return python


def installed_versions(python: Path) -> dict[str, str]:
    """The version of every distribution that an interpreter finds, by its name in lower case with hyphens."""
    listed = json.loads(subprocess.check_output([python, "-m", "pip", "list", "--format", "json"]))
    return {package["name"].lower().replace("_", "-"): package["version"] for package in listed}


def file_of(name: str) -> Path:
    """The file of the tests called `name`, whatever folder it is in."""
    (path,) = (ROOT / "tests").rglob(f"test_{name}.py")
    return path


def run_core_tests(python: Path, skipped: Sequence[str] = ()) -> None:
    """Runs the core tests with another interpreter, all but those whose names contain one of `skipped`."""
    files = [file_of(name) for name in CORE]
    command = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider", *files]
    if skipped:
        command += ["-k", " and ".join(f"not {name}" for name in skipped)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    print(result.stdout[-300:])
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-5_000:]
