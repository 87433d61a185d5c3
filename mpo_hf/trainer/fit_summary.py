"""What a person needs to know at the end of a fit, in a few lines."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..estimation import Certificate
from ..estimation.comparison import Comparison
from .fit_problem import SEPARATED
from .mpo_config import MPOConfig


# In nats: importance weights are then off by a fifth.
LARGE_EXPANSION_ERROR = 0.2
# What the weights are about: of mirror descent on completions of the mixture, and of the objectives and kinds of mixing.
EQUALIZED = (
    "The weights are those at which the objectives are equally well off in what this mixture reaches when whole completions are "
    "drawn from it, by the paper's mirror descent; `generate()` mixes token by token."
)
ABOUT = {
    (
        "achieved",
        "token",
    ): "The weights are best for what this mixture of these policies reaches when it is decoded token by "
    "token, as `generate()` does, at temperature {temperature:g} without truncation.",
    (
        "achieved",
        "sequence",
    ): "The weights are best for what this mixture of these policies reaches when whole completions are "
    "drawn from it; `generate()` mixes token by token, which is another distribution.",
    (
        "reward",
        "sequence",
    ): "The weights are those of the paper's theorem: best if every policy is optimal for its reward, and if "
    "whole completions are drawn from the mixture; `generate()` mixes token by token.",
    (
        "implicit",
        "sequence",
    ): "The weights are those of the paper's theorem for the rewards that the policies imply: no reward "
    "was measured, and the most aggressively trained policy gains weight.",
}


@dataclass
class FitSummary:
    """
    The end of a fit.

    Args:
        args ([`MPOConfig`]): its options.
        objectives (`Sequence[str]`): names of the objectives.
        weights (`torch.Tensor` of shape `(K,)`): the fitted weights of the objectives.
        step, max_steps (`int`): the last step, and the largest number of steps.
        has_converged (`bool`): whether the fit ended because its bound is below `args.tolerance`.
        is_given (`bool`): whether all completions were given.
        num_prompts, num_completions (`int`): how many there are.
        effective_completions (`float`, *optional*): how many completions of a prompt count.
        certificate ([`~mpo_hf.estimation.Certificate`], *optional*): the certificate of the weights.
        comparisons (`Mapping[str, Comparison]`, *optional*): what other weights and policies reach.
        expansion_error (`float`, *optional*):
            The error, in nats, of the log-probabilities of completions at the fitted weights that were not computed exactly.
    """

    args: MPOConfig
    objectives: Sequence[str]
    weights: torch.Tensor
    step: int
    max_steps: int
    has_converged: bool
    is_given: bool
    num_prompts: int
    num_completions: int
    effective_completions: float | None = None
    certificate: Certificate | None = None
    comparisons: Mapping[str, Comparison] | None = None
    expansion_error: float | None = None

    def lines(self) -> list[str]:
        """The lines, without an end."""
        parts = (self._why, self._completions, self._weights, self._worst_off, self._divergence, self._premise)
        return [line for part in parts for line in part()]

    @property
    def about(self) -> str:
        """What the weights are best for, in a sentence."""
        args = self.args
        if (args.objective, args.estimator, args.proposal) == ("reward", "bsmd", "mixture"):
            return EQUALIZED
        return ABOUT[str(args.objective), str(args.mixing)].format(temperature=args.temperature)

    def _why(self) -> Iterator[str]:
        if self.is_given:
            yield f"Ended with the given completions. {self.about}"
        elif self.has_converged:
            yield (
                f"Stopped at step {self.step} of {self.max_steps}: {self._bound_in_words()}, below the tolerance of "
                f"{self.args.tolerance:g}. {self.about}"
            )
        elif self.step >= self.max_steps:
            yield f"Ended after all {self.max_steps} steps. {self.about}"
        else:
            yield f"Was stopped at step {self.step} of {self.max_steps}. {self.about}"

    def _bound_in_words(self) -> str:
        certificate = self.certificate
        if certificate is None:
            return "no bound"
        confidence = f"with {certificate.confidence:.0%} confidence"
        if certificate.optimality_gap_bound is not None:
            return (
                f"the best weights within reach have at most {certificate.optimality_gap_bound:.3g} nats more welfare, "
                f"{confidence}"
            )
        what = "any policy is better by" if certificate.of_mixture else "the duality gap is"
        return f"{what} at most {certificate.duality_gap_bound:.3g} nats, {confidence}"

    def _completions(self) -> Iterator[str]:
        if not self.num_completions:  # mirror descent keeps none
            return
        effective = ""
        if self.effective_completions is not None:
            effective = f", of which {self.effective_completions:.1f} of each prompt count at these weights"
        yield f"From {self.num_prompts} prompts and {self.num_completions} completions{effective}."

    def _weights(self) -> Iterator[str]:
        errors = (
            self.certificate.standard_errors.tolist() if self.certificate is not None else [None] * len(self.weights)
        )
        yield "Weights: " + ", ".join(
            f"{name} {weight:.3f}" + (f" ± {error:.3f}" if error is not None else "")
            for name, weight, error in zip(self.objectives, self.weights.tolist(), errors)
        )

    # ---- what is reached ----

    def _worst_off(self) -> Iterator[str]:
        if self.comparisons is not None:
            yield from self._compared(self.comparisons)
        elif self.certificate is not None and self.certificate.mixture_rewards is not None:
            known = (self.certificate.mixture_rewards.tolist(), self.certificate.mixture_reward_errors.tolist())
            yield "Rewards of the mixture of whole completions: " + ", ".join(
                f"{name} {mean:.3g} ± {error:.2g}" for name, mean, error in zip(self.objectives, *known)
            )

    def _compared(self, comparisons: Mapping[str, Comparison]) -> Iterator[str]:
        fitted = comparisons["fitted"]
        singles = {name: found for name, found in comparisons.items() if name.startswith("policy ")}
        best = max(singles, key=lambda name: singles[name].welfare)
        others = {
            "uniform weights": comparisons["uniform"],
            best: singles[best],
            "the reference": comparisons["reference"],
        }
        k = int(fitted.gains.argmin())
        scale = self.args.normalize_rewards
        yield (
            f"Worst off: {self.objectives[k]}, {_value(fitted.gains[k], fitted.gain_errors[k])} on the scale {scale!r} "
            f"(reward {_value(fitted.rewards[k], fitted.reward_errors[k])}). Worst off elsewhere: "
            + ", ".join(f"{name} {self._minimum(found)}" for name, found in others.items())
            + "."
        )
        yield (
            f"Welfare, less β = {self.args.beta:g} times the divergence: {_value(fitted.welfare, fitted.welfare_error)}; less: "
            + ", ".join(
                f"{name} by {_value(found.less_than_first, found.less_than_first_error)}"
                for name, found in others.items()
            )
            + "."
        )

    def _minimum(self, found: Comparison) -> str:
        k = int(found.gains.argmin())
        return f"{_value(found.gains[k], found.gain_errors[k])} ({self.objectives[k]})"

    def _divergence(self) -> Iterator[str]:
        certificate = self.certificate
        if certificate is not None and certificate.divergence is not None:
            error = certificate.divergence_error if certificate.divergence_error is not None else math.nan
            yield f"KL to the reference: {_value(certificate.divergence, error)} nats a completion."

    # ---- whether to believe it, and what to do next ----

    def _premise(self) -> Iterator[str]:
        certificate = self.certificate
        if certificate is None:
            return
        if certificate.of_mixture and certificate.optimality_gap_bound is not None:
            yield from self._next_of_decoded(certificate)
        elif self.args.objective == "reward" and certificate.mixture_duality_gap is not None:
            yield from self._next_of_theorem(certificate)
        elif math.isfinite(certificate.duality_gap_bound):
            yield f"Certificate: {self._bound_in_words()}."

    def _next_of_decoded(self, certificate: Certificate) -> Iterator[str]:
        bound = certificate.optimality_gap_bound
        assert bound is not None
        if self.expansion_error is not None:
            is_large = self.expansion_error > LARGE_EXPANSION_ERROR
            yield (
                "Log-probabilities at these weights, checked by a pass of the policies, are off by "
                f"{self.expansion_error:.2g} nats a completion"
                + (
                    ", which is too much: raise `refresh_below`, so that completions are drawn from mixtures nearer to these."
                    if is_large
                    else "."
                )
            )
        in_units = f"{bound * self.args.beta:.3g} in units of the gains"
        if not math.isfinite(bound):
            yield "There is no bound of how far these weights are from the best ones: too few prompts, or gains too close to 0. "
            yield "Next: " + self._more_prompts()
        elif not self.has_converged and bound > self.args.tolerance:
            yield f"Certificate: {self._bound_in_words()} ({in_units}). For less, " + self._more_prompts()
        else:
            yield f"Certificate: {self._bound_in_words()} ({in_units})."

    def _more_prompts(self) -> str:
        if self.is_given:
            return "give completions of more prompts."
        return f"resume with more steps: `--max_steps {2 * self.max_steps} --resume_from_checkpoint true`."

    def _next_of_theorem(self, certificate: Certificate) -> Iterator[str]:
        gap, error = certificate.mixture_duality_gap, certificate.mixture_duality_gap_error
        assert gap is not None
        holds = gap <= max(self.args.tolerance or 0.0, SEPARATED * (error or 0.0))
        yield (
            f"The premise, policies that are optimal for their rewards, {'holds' if holds else 'fails'}: what this mixture "
            f"reaches is {gap:.3g} ± {error or math.nan:.2g} nats ({gap * self.args.beta:.3g} in units of the rewards) below the "
            "theorem's."
        )
        if not holds:
            folder = self.args.output_dir
            yield (
                "Next: fit what these policies reach, with the same completions: `mpo-hf fit ... --objective achieved "
                f"--rollouts {folder}/_rollouts --output_dir {folder}-achieved`."
            )


def _value(mean: float | torch.Tensor, error: float | torch.Tensor) -> str:
    mean, error = float(mean), float(error)
    return f"{mean:.3g} ± {error:.2g}" if math.isfinite(error) else f"{mean:.3g}"


def comparison_rows(comparisons: Mapping[str, Comparison], objectives: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The rewards of a comparison as rows of a table: means and standard errors, by objective."""
    names = {"fitted": "this mixture", "uniform": "uniform weights", "reference": "the reference"}
    return {
        names.get(name, f"{name} alone"): {
            objective: (found.rewards[k].item(), found.reward_errors[k].item())
            for k, objective in enumerate(objectives)
        }
        for name, found in comparisons.items()
    }
