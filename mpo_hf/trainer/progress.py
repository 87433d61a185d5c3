"""The progress of a fit: Trainer's own bar and lines, with numbers that are not in quotation marks."""

from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback


def log_line(logs: dict[str, Any]) -> str:
    """A log entry as one line, with numbers rounded to four digits."""
    shown = {name: value for name, value in logs.items() if name != "total_flos"}
    return str({name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in shown.items()})


class FitProgress(ProgressCallback):
    """Trainer's progress bar."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(log_line(logs))


class FitPrinter(PrinterCallback):
    """Trainer's lines without a bar, for `disable_tqdm=True`."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_local_process_zero and logs is not None:
            print(log_line(logs))


OURS: dict[type[TrainerCallback], type[TrainerCallback]] = {ProgressCallback: FitProgress, PrinterCallback: FitPrinter}


def show_plain_numbers(trainer: Trainer) -> None:
    """Replaces Trainer's callbacks by those of this file. Callbacks from the user stay."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) in OURS:
            trainer.remove_callback(callback)
            trainer.add_callback(OURS[type(callback)])
