"""
Runs Transformers' own tests against mixtures, and prints how many passed, failed and were skipped.

    python tests/conformance/run.py [--only {families,adapters}] [--cache FOLDER] [-k EXPRESSION]

The tests are those of the installed version, from its source distribution, which pip downloads. Two environment
variables ask for more: `RUN_SLOW=1` for slow tests, as in Transformers, and `TRANSFORMERS_TESTS`, the `tests` folder of
a checkout of Transformers, for the generation, export and pipeline tests, which a source distribution lacks. When the
checkout is of another version than the installed one, its tests may fail for any model: what fails is run again on a
plain Llama, and does not count when it fails there as well.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fetching import add_checkout, fetch_tests, missing_requirements
from skips import OURS


HERE = Path(__file__).resolve().parent
MIXTURES = {"families": "TestFamilies", "adapters": "TestAdapters"}
CONTROL = "TestPlainLlama"


@dataclass
class Outcome:
    """A pytest plugin that keeps what came of every test of one run."""

    passed: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("::")[-1]
        if report.failed:  # a test, its set-up, or one of its subtests
            self.failed[name] = report.longreprtext
        elif report.skipped:
            reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.skipped[name] = reason.removeprefix("Skipped: ")
        elif report.when == "call":
            self.passed.add(name)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed[report.nodeid] = report.longreprtext

    def split(self) -> tuple[set[str], dict[str, str], dict[str, str]]:
        """What passed, what Transformers skipped, and what we skip; a test with a failure is none of these."""
        passed = self.passed - self.failed.keys()
        skipped = {n: r for n, r in self.skipped.items() if n not in self.failed and n not in passed}
        ours = {name: reason.removeprefix(OURS) for name, reason in skipped.items() if reason.startswith(OURS)}
        return passed, {n: r for n, r in skipped.items() if n not in ours}, ours


def run_suite(root: Path, test_class: str, names: Sequence[str] = (), options: Sequence[str] = ()) -> Outcome:
    """Runs the tests of one class of `suites.py`, all of them or those of the given names."""
    outcome = Outcome()
    node = f"{HERE / 'suites.py'}::{test_class}"
    nodes = [f"{node}::{name}" for name in names] or [node]
    # Transformers' configuration of pytest in place of ours, without its logging to the terminal
    fixed = ["-c", str(root / "pyproject.toml"), "--rootdir", str(root), "--noconftest", "-o", "log_cli=0"]
    shown = ["-q", "--tb=short", "--no-summary", "--disable-warnings", "-p", "no:cacheprovider", "--timeout", "900"]
    code = pytest.main([*nodes, *fixed, *shown, *options], plugins=[outcome])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        outcome.failed.setdefault(test_class, f"pytest ended with {code!r}.")
    return outcome


def report(mixture: str, outcome: Outcome, not_ours: Sequence[str]) -> None:
    """Prints the numbers, every skip of ours with its reason, and every failure."""
    passed, theirs, ours = outcome.split()
    failed = [name for name in outcome.failed if name not in not_ours]
    print(
        f"\n{mixture}: {len(passed)} passed, {len(failed)} failed, {len(theirs)} skipped by Transformers itself, ",
        end="",
    )
    print(f"{len(ours)} skipped by us" + (f", {len(not_ours)} failed for a plain Llama too" if not_ours else ""))
    for name, reason in ours.items():
        print(f"  skipped {name}: {reason}")
    for name in not_ours:
        print(f"  fails for a plain Llama too: {name}")
    for name in failed:
        print(f"  FAILED {name}\n{outcome.failed[name]}")


def main() -> int:
    """Returns 0 when nothing failed that works for a plain model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MIXTURES, help="which mixture; all of them without")
    parser.add_argument("--cache", type=Path, help="where downloaded tests are kept")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="only tests that match, as in pytest")
    args = parser.parse_args()
    if missing := missing_requirements():
        parser.error(f"these are needed: pip install {' '.join(missing)}")
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = fetch_tests(args.cache or user_cache / "mpo_hf" / "transformers_tests")
    with tempfile.TemporaryDirectory() as folder:
        if checkout := os.environ.get("TRANSFORMERS_TESTS"):
            root = add_checkout(root, Path(checkout).resolve(), Path(folder) / "transformers")
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")
        sys.path[:0] = [str(HERE), str(root), str(HERE.parents[1])]
        count = 0
        for mixture in [args.only] if args.only else MIXTURES:
            outcome = run_suite(root, MIXTURES[mixture], options=["-k", args.k])
            control = run_suite(root, CONTROL, list(outcome.failed)) if checkout and outcome.failed else Outcome()
            not_ours = [name for name in outcome.failed if name in control.failed]
            report(mixture, outcome, not_ours)
            count += len(outcome.failed) - len(not_ours)
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
