"""A Python environment that has some packages of this one, with what they require, and no others."""

import re
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


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
