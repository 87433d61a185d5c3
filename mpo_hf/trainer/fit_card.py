"""The measurements of a fit, for its model card."""

import importlib.util
import math
import os
import statistics
from collections.abc import Sequence
from typing import Any

from ..estimation import Certificate
from .plots import plot_fit


PLOT_NAME = "weights.png"

# Means and standard errors, by policy and by objective.
Rewards = dict[str, dict[str, float | tuple[float, float]]]


def measured_rewards(
    log_history: Sequence[dict[str, Any]],
    proposal: str,
    certificate: Certificate | None = None,
    objectives: Sequence[str] = (),
) -> tuple[Rewards, str]:
    """
    Mean rewards of the completions that a fit drew, estimated rewards of the mixture, and sentences that explain them.

    Args:
        log_history (`Sequence[dict]`): `trainer.state.log_history`.
        proposal (`str`):
            `"reference"`: one row, as all steps measured the same policy. `"mixture"`: the first and the last tenth of the
            steps have a row each, as the mixture changes.
        certificate ([`~mpo_hf.estimation.Certificate`], *optional*): the certificate of the weights.
        objectives (`Sequence[str]`, *optional*): names of the objectives, for the certificate.

    Returns:
        `tuple[dict, str]`: for every row of a table, the mean reward of each objective, with its standard error if there are
        several steps; and the sentences.
    """
    rewards, note = _sampled_rewards(log_history, proposal)
    if certificate is None:
        return rewards, note
    if certificate.mixture_rewards is not None:
        means, errors = certificate.mixture_rewards.tolist(), certificate.mixture_reward_errors.tolist()
        rewards["the mixture, estimated"] = dict(zip(objectives, zip(means, errors)))
        note = note.replace(" What the mixture\nitself reaches was not measured here.", "")
        note += (
            "\nWhat the mixture itself reaches is estimated from the completions that were scored under its policies, by their\n"
            "importance weights, for whole completions drawn from it; ± is the standard error over the prompts."
        )
    note = note.replace("the mixture as it was at each step", "the mixture at weights of earlier steps")
    if math.isfinite(certificate.duality_gap_bound):
        bound = f"{certificate.duality_gap_bound:.4f} nats"
        note += f"\nWith {certificate.confidence:.0%} confidence " + (
            f"no policy at all has a welfare of more than {bound} above that of this\nmixture."
            if certificate.of_mixture
            else f"the weights are within {bound} of the best ones in the dual\nobjective."
        )
    errors = ", ".join(f"{name} {error:.4f}" for name, error in zip(objectives, certificate.standard_errors.tolist()))
    return rewards, f"{note} Standard errors of the weights: {errors}.".strip()


def _sampled_rewards(log_history: Sequence[dict[str, Any]], proposal: str) -> tuple[Rewards, str]:
    steps = [entry for entry in log_history if "loss" in entry and any(key.startswith("rewards/") for key in entry)]
    if not steps:
        return {}, ""
    if proposal == "reference":
        note = (
            "The fit drew its completions from the reference policy, and these are their mean rewards. What the mixture\n"
            "itself reaches was not measured here."
        )
        return {f"the reference, {_range(steps)}": _means(steps)}, f"{note} {_error(steps)}".strip()
    tenth = max(1, len(steps) // 10)
    parts = [steps[:tenth], steps[-tenth:]] if len(steps) > 1 else [steps]
    note = (
        "The fit drew its completions from the mixture as it was at each step, and these are their mean rewards, on\n"
        "prompts of the fit."
    )
    return {f"the mixture, {_range(part)}": _means(part) for part in parts}, f"{note} {_error(parts[0])}".strip()


def save_plot(log_history: Sequence[dict[str, Any]], folder: str | os.PathLike) -> str | None:
    """Saves a plot of a fit into a folder, if there was a fit and matplotlib is installed; returns the name of the file."""
    steps = [entry for entry in log_history if "loss" in entry and any(key.startswith("weights/") for key in entry)]
    if not steps or importlib.util.find_spec("matplotlib") is None:
        return None
    plot_fit(log_history, os.path.join(folder, PLOT_NAME))
    return PLOT_NAME


def _range(steps: Sequence[dict[str, Any]]) -> str:
    first, last = steps[0]["step"], steps[-1]["step"]
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _error(steps: Sequence[dict[str, Any]]) -> str:
    return "± is the standard error over the steps." if len(steps) > 1 else ""


def _means(steps: Sequence[dict[str, Any]]) -> dict[str, float | tuple[float, float]]:
    means: dict[str, float | tuple[float, float]] = {}
    for key in [key for key in steps[0] if key.startswith("rewards/")]:
        values = [entry[key] for entry in steps]
        mean = statistics.fmean(values)
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        means[key.removeprefix("rewards/")] = mean if error is None else (mean, error)
    return means
