"""The progress of a fit: Trainer's own bar with one short line a step, and a bar of the completions that are being drawn."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState

from ..text_table import printable


# Seconds before a bar of completions shows up, so that short steps do not flicker.
DELAY = 0.5
# Seconds between two counts of the finished completions, each of which waits for the device.
COUNT_EVERY = 0.2


# ---- lines ----


def log_line(logs: dict[str, Any], state: TrainerState) -> str:
    """
    What a person reads of a log entry. All of its numbers are in `state.log_history`.

    Args:
        logs (`dict`): the entry: of a step, of an evaluation, of the end of a fit, or of anybody else.
        state ([`~transformers.TrainerState`]): the state of the fit.
    """
    evaluated = next(
        (name.removesuffix("_loss") for name in logs if name.endswith("_loss") and name != "train_loss"), None
    )
    if "loss" in logs:
        parts = [f"step {state.global_step}/{state.max_steps}", _counts(logs), *_measured(logs, "")]
    elif "train_runtime" in logs:
        parts = [f"finished in {logs['train_runtime']:.4g} s", *_measured(logs, "")]
    elif evaluated is not None:
        title = "evaluation" if evaluated == "eval" else evaluated
        parts = [f"{title} at step {state.global_step}", *_measured(logs, f"{evaluated}_")]
    else:
        own = {name: value for name, value in logs.items() if name not in ("epoch", "total_flos")}
        parts = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in own.items()
        ]
    return printable(" · ".join(part for part in parts if part))


def _counts(logs: dict[str, Any]) -> str:
    if "num_prompts" not in logs:
        return ""
    return f"{logs['num_prompts']} prompts, {logs['num_completions']} completions"


def _measured(logs: dict[str, Any], prefix: str) -> Iterator[str]:
    """The weights, the rewards and the quality of the estimate in an entry whose names have a prefix."""
    yield _by_objective(logs, "weights", f"{prefix}weights/", ".2f")
    rewards = _by_objective(logs, "rewards of the mixture", f"{prefix}mixture_rewards/", ".3g")
    yield rewards or _by_objective(logs, "rewards of the samples", f"{prefix}rewards/", ".3g")
    fraction, count = (logs.get(f"{prefix}effective_{name}") for name in ("sample_size", "completions"))
    if fraction and count:
        yield f"effective {fraction:.0%} ({count:.1f} of {count / fraction:.0f})"
    bound = logs.get(f"{prefix}duality_gap_bound")
    if bound is not None and bound < float("inf"):
        yield f"gap below {bound:.2g} nats"


def _by_objective(logs: dict[str, Any], title: str, prefix: str, form: str) -> str:
    found = {name.removeprefix(prefix): value for name, value in logs.items() if name.startswith(prefix)}
    return " ".join([title, *(f"{name} {value:{form}}" for name, value in found.items())]) if found else ""


class FitProgress(ProgressCallback):
    """Trainer's progress bar."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and logs is not None:
            self.training_bar.write(log_line(logs, state))


class FitPrinter(PrinterCallback):
    """Trainer's lines without a bar, for `disable_tqdm=True`."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_local_process_zero and logs is not None:
            print(log_line(logs, state))


def close_bars(trainer: Trainer) -> None:
    """Ends the lines of the bars of a fit that has failed, so that what comes next is on a line of its own."""
    for callback in trainer.callback_handler.callbacks:
        for bar in (getattr(callback, "training_bar", None), getattr(callback, "prediction_bar", None)):
            if bar is not None:
                bar.close()


OURS: dict[type[TrainerCallback], type[TrainerCallback]] = {ProgressCallback: FitProgress, PrinterCallback: FitPrinter}


def show_short_lines(trainer: Trainer) -> None:
    """Replaces Trainer's callbacks by those of this file. Callbacks from the user, and those for notebooks, stay."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) in OURS:
            trainer.remove_callback(callback)
            trainer.add_callback(OURS[type(callback)])


# ---- completions ----


@contextmanager
def drawing_bar(
    num_completions: int, max_length: int, eos_token_ids: Sequence[int] | None, disable: bool
) -> Iterator[Callable[[torch.Tensor], None] | None]:
    """
    A bar of a batch of completions, which moves by a token at a time and counts those that have ended.

    Args:
        num_completions (`int`): how many are drawn.
        max_length (`int`): the length of the longest one, in tokens.
        eos_token_ids (`Sequence[int]`, *optional*): token ids that end a completion.
        disable (`bool`): whether there is no bar.

    Returns:
        A context of the function to call with every token of all completions, shape `(N,)`; of `None` without a bar.
    """
    if disable:
        yield None
        return
    ended, last_count = torch.zeros(num_completions, dtype=torch.bool), time.monotonic()

    def move(tokens: torch.Tensor) -> None:
        nonlocal ended, last_count
        if eos_token_ids:
            ended = ended.to(tokens.device) | torch.isin(tokens, torch.tensor(eos_token_ids, device=tokens.device))
        if eos_token_ids and time.monotonic() - last_count >= COUNT_EVERY:
            bar.set_postfix_str(f"{int(ended.sum())} of {num_completions} ended", refresh=False)
            last_count = time.monotonic()
        bar.update()

    with tqdm(total=max_length, desc="Drawing completions", unit="token", leave=False, delay=DELAY) as bar:
        yield move
