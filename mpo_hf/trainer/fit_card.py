"""The measurements of a fit, for its model card."""

import dataclasses
import importlib.util
import math
import os
import statistics
from collections.abc import Sequence
from typing import Any

from ..estimation import Certificate
from ..mixture.model_card import escaped
from .fit_summary import FitSummary, comparison_rows
from .plots import plot_fit


PLOT_NAME = "weights.png"

# What drew the completions of a fit, in a sentence.
ORIGINS = {
    "reference": "from the reference policy",
    "mixture": "from mixtures of these policies",
    "both": "from the reference policy and from mixtures of these policies",
    "given": "from policies that are not recorded",
}

# Means and standard errors, by policy and by objective.
Rewards = dict[str, dict[str, float | tuple[float, float]]]


def measured_rewards(
    log_history: Sequence[dict[str, Any]],
    origin: str,
    certificate: Certificate | None = None,
    objectives: Sequence[str] = (),
    is_given: bool = False,
) -> tuple[Rewards, str]:
    """
    Mean rewards of the completions that a fit drew, estimated rewards of the mixture, and sentences that explain them.

    Args:
        log_history (`Sequence[dict]`): `trainer.state.log_history`.
        origin (`str`):
            What drew the completions. `"reference"`: one row, as all steps measured the same policy. `"mixture"`: the
            first and the last tenth of the steps have a row each, as the mixture changes. `"both"` or `"given"`, of
            policies that are not known: one row.
        certificate ([`~mpo_hf.estimation.Certificate`], *optional*): the certificate of the weights.
        objectives (`Sequence[str]`, *optional*): names of the objectives, for the certificate.
        is_given (`bool`, *optional*, defaults to `False`):
            Whether the completions were drawn before the fit: one row, whatever drew them.

    Returns:
        `tuple[dict, str]`: for every row of a table, the mean reward of each objective, with its standard error if there are
        several steps; and the sentences.
    """
    rewards, note = _sampled_rewards(log_history, origin, is_given)
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
    errors = ", ".join(
        f"{escaped(name)} {error:.4f}" for name, error in zip(objectives, certificate.standard_errors.tolist())
    )
    return rewards, f"{note} Standard errors of the weights: {errors}.".strip()


def compared_rewards(summary: FitSummary) -> tuple[Rewards, str] | None:
    """
    What a fit to decoded mixtures found of the mixture, uniform weights, each policy and the reference; `None` for others.

    Args:
        summary ([`FitSummary`]): the end of the fit.
    """
    if summary.comparisons is None:
        return None
    note = (
        "Mean rewards, estimated from the completions of the fit by importance weights, on prompts of the fit; ± is the\n"
        "standard error over the prompts. " + "\n".join(_with_escaped_names(summary).lines())
    )
    return comparison_rows(summary.comparisons, summary.objectives), note


def _with_escaped_names(summary: FitSummary) -> FitSummary:
    """The end of a fit with names as a card needs them."""
    compared = {escaped(name): found for name, found in (summary.comparisons or {}).items()}
    return dataclasses.replace(
        summary, objectives=[escaped(name) for name in summary.objectives], comparisons=compared
    )


def _sampled_rewards(log_history: Sequence[dict[str, Any]], origin: str, is_given: bool) -> tuple[Rewards, str]:
    steps = [entry for entry in log_history if "loss" in entry and any(key.startswith("rewards/") for key in entry)]
    if not steps:
        return {}, ""
    if is_given or origin not in ("reference", "mixture"):
        note = (
            f"The fit was made to completions that were drawn before it, {ORIGINS[origin]}, and these\n"
            "are their mean rewards. What the mixture\nitself reaches was not measured here."
        )
        return {f"the completions, {_range(steps)}": _means(steps)}, f"{note} {_error(steps)}".strip()
    if origin == "reference":
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
