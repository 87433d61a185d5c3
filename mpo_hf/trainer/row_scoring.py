"""Numbers of the rows of a fit: log-probabilities and normalizers, those that are known and those that a fit has to compute."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ..estimation.decoded import num_terms
from ..mixture.modeling_mixture import MixturePolicyModel
from ..rollouts import Completions
from ..rollouts.columns import Proposal
from ..rollouts.store import COLUMNS
from .fit_problem import FitProblem
from .mpo_config import MPOConfig


# Weight of the uniform mixture in a new proposal, so that no policy is left out of the sampling.
DEFENSIVE_SHARE = 0.1


@dataclass(frozen=True)
class FitContext:
    """
    What [`RolloutFit`] needs to score completions and to make estimates.

    Args:
        args ([`MPOConfig`]): the options.
        problem ([`FitProblem`]): the optimization problem of the fit.
        model ([`MixturePolicyModel`]): the mixture. Its weights are the first proposal.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): the tokenizer.
        accelerator ([`~accelerate.Accelerator`]): the processes of the fit.
        policy_logps (`Callable`):
            Log-probabilities of N completions under all policies, shape `(N, K)`, and under the reference where that is the
            last component of the mixture.
        mixture_logps (`Callable`):
            The same for policies, and the log-probabilities under S mixtures, of shape `(N, S)`.
        normalizers (`Callable`):
            The same for policies, and the normalizers around given weights, of shape `(N, E)`.
        reference_logps (`Callable`, *optional*):
            Log-probabilities of N completions under the reference policy, shape `(N,)`; `None` without a reference.
        reference_proposal_logps (`Callable`, *optional*):
            The same for completions that are drawn from the reference policy at the temperature of the fit.
        temperature (`float`): the temperature that completions are drawn at, or that given ones were drawn at.
        is_given (`bool`): whether the fit is to given completions, and draws none.
    """

    args: MPOConfig
    problem: FitProblem
    model: MixturePolicyModel
    processing_class: PreTrainedTokenizerBase
    accelerator: Accelerator
    policy_logps: Callable[[Completions], torch.Tensor]
    mixture_logps: Callable[[Completions, Sequence[Proposal]], tuple[torch.Tensor, torch.Tensor]]
    normalizers: Callable[[Completions, Proposal], tuple[torch.Tensor, torch.Tensor]]
    reference_logps: Callable[[Completions], torch.Tensor] | None
    reference_proposal_logps: Callable[[Completions], torch.Tensor] | None
    temperature: float
    is_given: bool


class RowScoring:
    """
    Scores the completions of a fit.

    Args:
        context ([`FitContext`]): the options, the models and the functions that score completions.
    """

    def __init__(self, context: FitContext):
        self.context = context

    def defensive(self, weights: torch.Tensor) -> Proposal:
        """A mixture near given weights of the objectives that every component takes part in."""
        problem = self.context.problem
        uniform = torch.full_like(weights, 1 / problem.num_components)
        return tuple(problem.mixture_weights((1 - DEFENSIVE_SHARE) * weights + DEFENSIVE_SHARE * uniform).tolist())

    def decoded_columns(
        self, completions: Completions, keys: Sequence[str], proposals: Sequence[Proposal], current: Proposal
    ) -> dict[str, list]:
        """
        Log-probabilities and normalizers of completions for a fit to what is decoded. Those of the mixture were recorded while
        it decoded; the reference's own ones need none, unless it is the proposal.
        """
        if completions.normalizers is None and current:
            unknown: list = [None] * len(completions)
            known = {"policy_logps": unknown, "reference_logps": completions.proposal_logps.tolist()}
            if self.context.args.temperature != 1:
                known["reference_logps"] = self.context.reference_logps(completions).tolist()
            return known | {"normalizers": unknown}
        if completions.normalizers is None or completions.normalizers.isnan().any():
            anchor = self._anchor(proposals[0])
            completions.policy_logps, completions.normalizers = self.context.normalizers(completions, anchor)
        return self._single_logps(completions, keys, {}) | {"normalizers": completions.normalizers.tolist()}

    def _anchor(self, proposal: Proposal) -> Proposal:
        """The weights around which the normalizers of completions of a proposal are expanded."""
        if len(proposal) == self.context.problem.num_components:
            return proposal
        return self.defensive(self.context.problem.objective_weights(self.context.model.config.mixture_weights))

    def score(
        self, completions: Completions, keys: Sequence[str], mixtures: Sequence[Proposal]
    ) -> tuple[dict[str, list], torch.Tensor]:
        """Log-probabilities under the policies and the reference, and under mixtures."""
        pooled = torch.empty(len(completions), 0)
        if mixtures:
            policy_logps, pooled = self.context.mixture_logps(completions, mixtures)
            if completions.policy_logps is None:
                completions.policy_logps = policy_logps
        return self._single_logps(completions, keys, {}), pooled

    def _single_logps(self, completions: Completions, keys: Sequence[str], known: dict[str, list]) -> dict[str, list]:
        """
        Log-probabilities under the policies and the reference: stored values first, then values recorded while sampling, then
        those that the objective or `score_policies` requires; `None` otherwise.
        """
        args, count = self.context.args, len(completions)
        policy_logps = list(known.get("policy_logps", [None] * count))
        reference_logps = list(known.get("reference_logps", [None] * count))
        share = args.score_policies
        if completions.policy_logps is not None or args.objective != "reward":
            share = 1.0
        rows = [i for i, value in enumerate(policy_logps) if value is None and in_share(keys[i], share)]
        _fill(policy_logps, rows, completions, self._objective_logps)
        if self.context.reference_logps is not None:
            rows = [i for i, value in enumerate(reference_logps) if value is None]
            _fill(reference_logps, rows, completions, self.context.reference_logps)
        return {"policy_logps": policy_logps, "reference_logps": reference_logps}

    def _objective_logps(self, completions: Completions) -> torch.Tensor:
        """Log-probabilities under the policies, without the reference that the mixture may have as its last component."""
        problem = self.context.problem
        logps = self.context.policy_logps(completions)[:, : problem.num_objectives]
        if logps.isnan().any():  # which would count as unknown
            name = problem.objectives[int(logps.isnan().any(0).nonzero()[0])]
            raise ValueError(
                f"The policy of {name!r} gives NaN as the log-probability of a completion. Check its weights and its dtype, "
                "as float16 overflows."
            )
        return logps

    def complete(self, completions: Completions, keys: Sequence[str], known: dict[str, list]) -> dict[str, list]:
        """All columns of given completions: those that they come with, and those that are computed."""
        rows = {name: values for name, values in known.items() if name in COLUMNS}
        if self.context.problem.is_decoded:
            rows["normalizers"] = self._complete_normalizers(completions, known)
        rows |= self._single_logps(completions, keys, known)
        return rows | self._complete_proposals(completions, known, rows["reference_logps"])

    def _complete_proposals(
        self, completions: Completions, known: dict[str, list], reference_logps: list[float | None]
    ) -> dict[str, list]:
        """What given completions were drawn from: the reference policy, where they come without `proposal_logps`."""
        logps = list(known.get("proposal_logps", [None] * len(completions)))
        proposals = list(known.get("proposal", [None] * len(completions)))
        missing = [row for row, value in enumerate(logps) if value is None]
        for row in missing:
            if proposals[row]:
                raise ValueError(
                    f"A completion has the `proposal` {list(proposals[row])}, weights of a mixture, but no `proposal_logps`. "
                    "Add its log-probability under that mixture, or leave out `proposal` if the reference drew it."
                )
            proposals[row] = []
            logps[row] = reference_logps[row] if self.context.temperature == 1 else None
        unknown = [row for row in missing if logps[row] is None]
        if unknown and self.context.reference_proposal_logps is None:
            raise ValueError(
                f"{len(unknown)} of {len(logps)} completions have no `proposal_logps`, and there is no reference policy that "
                "could have drawn them. Add that column, or pass `ref_model`."
            )
        _fill(logps, unknown, completions, self.context.reference_proposal_logps)
        return {"proposal_logps": logps, "proposal": proposals}

    def _complete_normalizers(self, completions: Completions, known: dict[str, list]) -> list[list[float]]:
        """
        The normalizers of given completions: those that they come with, and those that are computed, by their proposals. Where
        none has any, the passes tell the log-probabilities under the policies, too, which are kept.
        """
        size = num_terms(self.context.problem.num_components)
        found = [
            values if values is not None and len(values) == size else None
            for values in known.get("normalizers", [None] * len(completions))
        ]
        anchors = [self._anchor(tuple(weights or ())) for weights in known.get("proposal", [None] * len(completions))]
        policy_logps = torch.empty(len(completions), self.context.problem.num_components, dtype=torch.float64)
        keeps = found.count(None) == len(found)
        for anchor in dict.fromkeys(anchors):
            missing = [i for i, value in enumerate(found) if value is None and anchors[i] == anchor]
            if missing:
                policy_logps[missing], packed = self.context.normalizers(completions.select(missing), anchor)
                for row, values in zip(missing, packed.tolist()):
                    found[row] = values
        if keeps:
            completions.policy_logps = policy_logps
        return found


def in_share(key: str, share: float) -> bool:
    """Whether a prompt belongs to a share of all prompts. Its key alone decides, so every process and run agrees."""
    key = content_of(key)
    return int(key, 16) < share * 16 ** len(key)


def content_of(key: str) -> str:
    """The part of a key that depends on the content of a prompt alone."""
    return key.partition("#")[0]


def _fill(
    values: list, rows: list[int], completions: Completions, score: Callable[[Completions], torch.Tensor]
) -> None:
    """Scores some rows of completions, and puts the results into `values`."""
    if rows:
        part = completions if len(rows) == len(completions) else completions.select(rows)
        for row, value in zip(rows, score(part).tolist()):
            values[row] = value
