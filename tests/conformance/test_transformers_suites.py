"""Transformers' own tests, run against mixtures in a process of their own; see `run.py`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.integration
RUN = Path(__file__).parent / "run.py"


CASES = [
    pytest.param("families", False, id="families"),
    pytest.param("families", True, id="families-with slow tests", marks=pytest.mark.slow),
    pytest.param("adapters", True, id="adapters-with slow tests", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("mixture, slow", CASES)
def test_transformers_suites(mixture: str, slow: bool):
    env = {**os.environ, "RUN_SLOW": str(int(slow))}
    result = subprocess.run([sys.executable, RUN, "--only", mixture], capture_output=True, text=True, env=env)
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-5_000:]
    (passed,) = re.findall(rf"^{mixture}: (\d+) passed, 0 failed", result.stdout, re.MULTILINE)
    assert int(passed) >= 100, result.stdout
