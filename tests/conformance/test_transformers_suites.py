"""Transformers' own tests, run against mixtures in a process of their own; see `run.py`."""

import subprocess
import sys
from pathlib import Path

import pytest


RUN = Path(__file__).parent / "run.py"


@pytest.mark.slow
@pytest.mark.parametrize("mixture", ["families", "adapters"])
def test_transformers_suites(mixture: str):
    result = subprocess.run([sys.executable, RUN, "--only", mixture], capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-5_000:]
