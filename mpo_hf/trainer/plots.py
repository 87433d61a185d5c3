"""Plots of a fit."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..text_table import printable


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_fit(log_history: Sequence[dict[str, Any]], path: str | os.PathLike, title: str = "Mixture weights") -> None:
    """
    Saves a plot of the mixture weights over the steps of a fit and, below, of the mean rewards of the sampled completions.

    Args:
        log_history (`Sequence[dict]`): `trainer.state.log_history`.
        path (`str` or `os.PathLike`): the file to write. Its extension determines the format.
        title (`str`, *optional*): title of the plot.

    Raises:
        `ValueError`: when the history has no step of a fit.
    """
    make_figure(log_history, title).savefig(path, dpi=150)


def make_figure(log_history: Sequence[dict[str, Any]], title: str) -> "Figure":
    """The plot that [`plot_fit`] saves, as a figure of Matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [entry for entry in log_history if "loss" in entry and any(key.startswith("weights/") for key in entry)]
    if not steps:
        raise ValueError("The log history has no step of a fit; call `trainer.train()` first.")
    panels = {"weights/": "mixture weight λ", "rewards/": "mean reward of samples"}
    panels = {prefix: name for prefix, name in panels.items() if any(key.startswith(prefix) for key in steps[0])}
    figure = Figure(figsize=(7, 3 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (prefix, name) in zip(axes, panels.items()):
        for key in [key for key in steps[0] if key.startswith(prefix)]:
            axis.plot(
                [e["step"] for e in steps],
                [e[key] for e in steps],
                label=_plain(key.removeprefix(prefix)),
                linewidth=2,
            )
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    axes[0].set_title(_plain(title))
    axes[0].legend(loc="best")
    axes[-1].set_xlabel("step")
    return figure


def _plain(text: str) -> str:
    """A name as it is written: Matplotlib reads what is between dollar signs as TeX, and hides labels that begin with `_`."""
    text = printable(text).replace("$", r"\$")
    return f"\u200a{text}" if text.startswith("_") else text
