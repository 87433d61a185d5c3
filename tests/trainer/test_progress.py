"""What a person sees of a fit while it runs: a line a step, and bars."""

import io
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import ModuleType

import pytest
import torch
from datasets import Dataset
from fits import count_b, count_c, make_args, make_trainer
from toy import LENGTH, PROMPTS, toy_tokenizer
from transformers import ProgressCallback, TrainerState

from mpo_hf import MPOTrainer
from mpo_hf.trainer import progress
from mpo_hf.trainer.progress import FitPrinter, FitProgress, drawing_bar, log_line


EVALUATED = Dataset.from_dict({"prompt": PROMPTS[:2]})


# ---- lines ----


def test_a_step_is_one_line_that_can_be_read():
    logs = {
        "loss": -0.4047,
        "learning_rate": 1.0,
        "rewards/helpful": 0.125,
        "rewards/harmless": 0.5,
        "effective_sample_size": 0.4125,
        "effective_completions": 6.6,
        "duality_gap_bound": 0.00531,
        "standard_errors/helpful": 0.01,
        "mixture_rewards/helpful": 0.3149,
        "mixture_rewards/harmless": 12.3456,
        "weights/helpful": 0.5249,
        "weights/harmless": 0.4751,
        "num_prompts": 24,
        "num_completions": 384,
        "epoch": 1.0,
    }
    state = TrainerState(global_step=12, max_steps=100)
    expected = (
        "step 12/100 · 24 prompts, 384 completions · weights helpful 0.52 harmless 0.48 · rewards of the mixture helpful 0.315 "
        "harmless 12.3 · effective 41% (6.6 of 16) · gap below 0.0053 nats"
    )
    assert log_line(logs, state) == expected
    unknown = ("mixture_rewards", "effective", "num_", "duality")
    few = {name: value for name, value in logs.items() if not name.startswith(unknown)} | {
        "duality_gap_bound": float("inf")
    }
    weights = "step 12/100 · weights helpful 0.52 harmless 0.48"
    assert log_line(few, state) == f"{weights} · rewards of the samples helpful 0.125 harmless 0.5"
    evaluated = {f"eval_{name}": value for name, value in few.items()} | {"epoch": 1.0}
    assert log_line(evaluated, state).startswith("evaluation at step 12 · weights helpful")
    near = {"eval_near_loss": 0.3, "eval_near_rewards/helpful": 0.25, "eval_near_runtime": 2.0}
    assert log_line(near, state) == "eval_near at step 12 · rewards of the samples helpful 0.25"
    assert log_line({"train_runtime": 12.345, "train_loss": 0.1}, state) == "finished in 12.35 s"
    assert log_line({"mine": 0.123456, "word": "x", "epoch": 1.0}, state) == "mine 0.1235 · word x"


def lines_of(trainer) -> list[str]:
    """What a fit prints to standard output, before the lines of its end."""
    out = io.StringIO()
    with redirect_stdout(out):
        trainer.train()
    lines, _, end = out.getvalue().partition("\n\n")
    assert re.search("^Ended after all 4 steps|^Stopped at step", end) and "\nWeights: a 0." in end
    return lines.splitlines()


@pytest.mark.parametrize("estimator", ["mis", "bsmd"])
def test_lines_say_what_the_log_says(mixture, tmp_path, estimator):
    options = {"eval_strategy": "steps", "eval_steps": 2, "estimator": estimator, "tolerance": 0}
    trainer = make_trainer(mixture, tmp_path, eval_dataset=EVALUATED, max_steps=4, **options)
    lines = lines_of(trainer)
    entries = trainer.state.log_history
    assert len(lines) == len(entries) == 4 + 2 + 1
    for line, entry in zip(lines, entries):
        title, *parts = line.split(" · ")
        if "loss" in entry:
            assert title == f"step {entry['step']}/4"
            assert f"weights a {entry['weights/a']:.2f} b {entry['weights/b']:.2f}" in parts
            count = entry["effective_completions"] / entry["effective_sample_size"]
            expected = (
                f"effective {entry['effective_sample_size']:.0%} ({entry['effective_completions']:.1f} of {count:.0f})"
            )
            assert expected in parts
        elif "eval_loss" in entry:
            assert title == f"evaluation at step {entry['step']}"
            assert f"rewards of the samples a {entry['eval_rewards/a']:.3g} b {entry['eval_rewards/b']:.3g}" in parts
        else:
            assert title.startswith("finished in")
        assert ("completions · " in line) == (estimator == "mis" and "loss" in entry)
        assert not {"'", '"', "{"} & set(line) and len(line) < 250
    if estimator == "mis":
        rows = trainer.rollout_fit.store.read(("prompt_key",))["prompt_key"]
        last = [entry for entry in entries if "loss" in entry][-1]
        assert (last["num_prompts"], last["num_completions"]) == (len(set(rows)), len(rows)) and len(rows) == 4 * 8
        assert f"{len(set(rows))} prompts, 32 completions" in "\n".join(lines)


# ---- bars ----


class Bar:
    """A bar that keeps what it was told."""

    made: list["Bar"] = []

    def __init__(self, total=None, **kwargs):
        self.total, self.kwargs, self.count, self.closed, self.texts = total, kwargs, 0, False, []
        self.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.closed = True

    def update(self, n=1):
        self.count += n

    def set_postfix_str(self, text, refresh=True):
        self.texts.append(text)


@pytest.fixture
def bars(monkeypatch):
    monkeypatch.setattr(progress, "tqdm", Bar)
    monkeypatch.setattr(progress, "COUNT_EVERY", 0)
    monkeypatch.setattr(Bar, "made", [])
    return Bar.made


@pytest.mark.parametrize("estimator", ["mis", "bsmd"])
def test_a_bar_moves_by_every_token_that_is_drawn(mixture, tmp_path, bars, estimator):
    options = {"estimator": estimator, "max_steps": 2, "disable_tqdm": False, "tolerance": 0}
    make_trainer(mixture, tmp_path / "seen", **options).train()
    assert [(bar.total, bar.count, bar.closed) for bar in bars] == [(LENGTH, LENGTH, True)] * 2
    assert all(bar.kwargs["leave"] is False for bar in bars)
    bars.clear()
    make_trainer(mixture, tmp_path / "unseen", **{**options, "disable_tqdm": True}).train()
    other = make_trainer(mixture, tmp_path / "other", **options)
    other.is_world_process_zero = lambda: False
    other.train()
    assert not bars


def test_a_bar_counts_the_completions_that_have_ended(bars):
    with drawing_bar(3, 8, [7, 9], disable=False) as move:
        for tokens in ([1, 7, 2], [1, 0, 9], [1, 0, 0], [7, 0, 0]):
            move(torch.tensor(tokens))
    assert bars[0].texts == ["1 of 3 ended", "2 of 3 ended", "2 of 3 ended", "3 of 3 ended"] and bars[0].count == 4
    with drawing_bar(3, 8, None, disable=False) as move:
        move(torch.tensor([1, 2, 3]))
    assert bars[1].texts == [] and bars[1].count == 1


def test_the_real_bars_show_up_and_nothing_else_does(toy_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0)
    options = {"estimator": "mis", "num_resamples": 20, "max_steps": 3, "disable_tqdm": False, "tolerance": 0}
    trainer = MPOTrainer(
        model=[toy_folder / "a", toy_folder / "b"],
        ref_model=toy_folder / "ref",
        reward_funcs=[count_c, count_b],
        args=make_args(tmp_path, **options),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=toy_tokenizer(),
    )
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        trainer.train()
        trainer.save_model()
    shown = err.getvalue()
    assert f"Drawing completions:   0%|          | 0/{LENGTH}" in shown and "3/3" in shown
    assert "Writing model shards" not in shown + out.getvalue()
    assert [line.split(" · ")[0] for line in out.getvalue().splitlines() if line.startswith("step")] == [
        f"step {step}/3" for step in (1, 2, 3)
    ]


def test_callbacks_of_the_user_and_of_notebooks_stay(mixture, tmp_path, monkeypatch):
    class Own(ProgressCallback):
        pass

    display = ModuleType("IPython.display")
    display.shown = []
    display.display = lambda content, **kwargs: display.shown.append(content) or display
    display.HTML, display.update = str, display.shown.append
    package = ModuleType("IPython")
    package.display = display
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    from transformers.utils.notebook import NotebookProgressCallback

    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "disable_tqdm": True, "proposal": "mixture"}
    trainer = make_trainer(
        mixture, tmp_path, eval_dataset=EVALUATED, callbacks=[Own(), NotebookProgressCallback()], **options
    )
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert Own in kinds and NotebookProgressCallback in kinds and FitPrinter in kinds and FitProgress not in kinds
    trainer.train()
    assert "Rewards/a" in display.shown[-1]  # a column of the table that a notebook shows
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook")
