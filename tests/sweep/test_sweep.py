"""Mixtures of every decoder of Transformers are right in every mode, or say why not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))

from modes import MODES, outcome, try_decoder  # noqa: E402
from page import read_page, worse, write_page  # noqa: E402


def run(results, *arguments):
    command = [sys.executable, HERE / "sweep.py", "--results", results, "--processes", "2", *arguments]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


@pytest.mark.slow
def test_every_decoder_is_right_or_refused_with_a_reason(tmp_path):
    done = run(tmp_path / "results")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    right = [
        all(found[0] == "right" for found in json.loads(line)["modes"].values())
        for line in (tmp_path / "results").open()
    ]
    assert sum(right) > 100


@pytest.mark.parametrize(
    ("name", "mode"),
    [("roberta", "stacked"), ("nemotron_h", "padding"), ("falcon_mamba", "adapters"), ("mpt", "stacked")],
)
def test_families_that_a_rule_once_forgot(name, mode):
    assert try_decoder(name, [mode])[mode][0] not in ("wrong", "fails")


def test_a_planted_fault_is_found(monkeypatch):
    assert try_decoder("gpt2", ["processor"])["processor"][0] == "right"
    monkeypatch.setattr("mpo_hf.mixture.component_running.positions_from_mask", lambda positions, *_: positions)
    assert try_decoder("gpt2", ["processor"])["processor"][0] == "wrong"


def test_a_page_is_read_as_it_was_written_and_losses_are_found(tmp_path):
    results = {"a": dict.fromkeys(MODES, ("right", "")), "b": dict.fromkeys(MODES, ("alone", "wrong: 0.1 apart"))}
    write_page(tmp_path / "page.md", {**results, "c": {"none": ("fails", "no model")}}, {"transformers": "5"})
    before = read_page(tmp_path / "page.md")
    assert before == {name: {mode: kind for mode, (kind, _) in modes.items()} for name, modes in results.items()}
    assert worse(before, results) == []
    results["a"]["beams"] = results["b"]["beams"] = ("wrong", "0.1 apart")
    assert worse(before, results) == [("a", "beams")]


def test_only_a_sentence_that_is_raised_on_purpose_counts_as_a_refusal():
    from mpo_hf import MixturePolicyModel

    assert outcome(MixturePolicyModel.from_policies, [])[0] == "refused"
    assert outcome(lambda: (lambda a, b: None)(*range(3)))[0] == "fails"
    assert outcome(int, "x")[0] == "fails"  # a ValueError of Python's own
