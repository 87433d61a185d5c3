"""A fit to all completions so far: their numbers, the estimate from them, the next proposal, and the certificate."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from ..estimation import Certificate
from ..mixture.modeling_mixture import MixturePolicyModel
from ..rollouts import Completions, completion_texts, pad_completions
from ..rollouts.columns import GROWTH, Proposal, RolloutColumns
from ..rollouts.store import COLUMNS, RolloutStore, first_id
from .estimators import Estimator
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
        reference_logps (`Callable`, *optional*):
            Log-probabilities of N completions under the reference policy, shape `(N,)`; `None` without a reference.
        is_given (`bool`): whether the fit is to given completions, and draws none.
    """

    args: MPOConfig
    problem: FitProblem
    model: MixturePolicyModel
    processing_class: PreTrainedTokenizerBase
    accelerator: Accelerator
    policy_logps: Callable[[Completions], torch.Tensor]
    mixture_logps: Callable[[Completions, Sequence[Proposal]], tuple[torch.Tensor, torch.Tensor]]
    reference_logps: Callable[[Completions], torch.Tensor] | None
    is_given: bool


class RolloutFit:
    """
    Keeps all completions of a fit, on disk and in memory, and makes the estimate that the weights minimize from them.

    Args:
        context ([`FitContext`]): the options, the models and the functions that score completions.
        store ([`RolloutStore`]): the store that completions are written to.
        given ([`RolloutStore`], *optional*): the store that given completions come from, with their densities.
    """

    def __init__(self, context: FitContext, store: RolloutStore, given: RolloutStore | None = None):
        self.context, self.store, self._given = context, store, given
        self.columns = RolloutColumns()
        self.estimator: Estimator | None = None
        self._value: tuple[Estimator, torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.certificate: Certificate | None = None
        self.effective_sample_fraction: float | None = None
        self.proposal: Proposal = self._first_proposal()
        self._fitted_rows, self._is_new = 0, False
        self._step, self._micro_batch = -1, 0

    def _first_proposal(self) -> Proposal:
        return tuple(self.context.model.config.mixture_weights) if self.context.args.proposal == "mixture" else ()

    # ---- starting, and resuming from a checkpoint ----

    def begin(self, step: int, state: dict[str, Any] | None) -> None:
        """
        Reads the completions of earlier steps, and removes those of steps after the one that the run resumes from.

        Args:
            step (`int`): the step of the checkpoint, 0 for none.
            state (`dict`, *optional*): [`~RolloutFit.state`] at that step.
        """
        accelerator = self.context.accelerator
        if step == 0 and self.store.shards():
            raise ValueError(
                f"The folder {str(self.store.folder)!r} holds completions already. Resume with "
                "`train(resume_from_checkpoint=True)`, fit to them with `rollouts=`, or choose another `output_dir`."
            )
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self.store.discard_after(step)
        accelerator.wait_for_everyone()
        self.columns = RolloutColumns()
        # up to this step only: a process that is ahead may have written the shards of the next step already
        for rows in self.store.tables(RolloutColumns.COLUMNS, last_step=step):
            self.columns.extend(rows)
        for rows in self.store.tables(RolloutColumns.DENSITIES, "densities", last_step=step):
            self.columns.extend_densities(rows)
        if self._given is not None:
            for rows in self._given.tables(RolloutColumns.DENSITIES, "densities"):
                self.columns.extend_densities(rows)
        if len(self.columns) and state is not None:
            self.proposal, self._fitted_rows = tuple(state["proposal"]), state["fitted_rows"]
            self.estimator = self.make_estimator(self._fitted_rows)

    def state(self) -> dict[str, Any]:
        """What a checkpoint saves of the fit. Completions are in the store."""
        return {"proposal": list(self.proposal), "fitted_rows": self._fitted_rows}

    # ---- one step ----

    def collect(
        self,
        step: int,
        examples: list[dict[str, Any]],
        completions: Completions,
        rewards: torch.Tensor | None,
        known: dict[str, list] | None = None,
    ) -> None:
        """
        Scores completions and keeps them. Earlier completions of the same prompts are scored under the current proposal.

        Args:
            step (`int`): the step that they belong to.
            examples (`list[dict]`): the row of the dataset that each completion belongs to.
            completions ([`Completions`]): N completions.
            rewards (`torch.Tensor` of shape `(N, K)`, *optional*): their rewards.
            known (`dict[str, list]`, *optional*): the columns that given completions come with.
        """
        part = self._next_part(step)
        first = first_id(step, part)
        rows = {
            "id": known["id"] if known else list(range(first, first + len(completions))),
            "step": [step] * len(completions),
            "prompt_key": [prompt_key(example) for example in examples],
            "rewards": [None] * len(completions) if rewards is None else rewards.tolist(),
        }
        keys, densities = rows["prompt_key"], _density_rows([], [], torch.empty(0, 0))
        if not known:
            mixtures = self._mixtures_of(keys)
            scores, pooled = self._score(completions, keys, mixtures)
            rows |= scores | {
                "proposal": [list(self.proposal)] * len(completions),
                "proposal_logps": completions.proposal_logps.tolist(),
            }
            for found in (_density_rows(rows["id"], mixtures, pooled), self._densities_of_earlier(keys)):
                densities = {name: densities[name] + found[name] for name in densities}
        else:
            rows = self._complete(completions, keys, known) | rows  # new rewards replace the given ones
        self._write(step, part, examples, completions, rows, densities)
        self._share(rows, densities)

    def _next_part(self, step: int) -> int:
        """The number of the next batch of this process among all batches of a step."""
        self._micro_batch = self._micro_batch + 1 if step == self._step else 0
        self._step = step
        return self._micro_batch * self.context.accelerator.num_processes + self.context.accelerator.process_index

    def _score(
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
        return self.context.policy_logps(completions)[:, : self.context.problem.num_objectives]

    def _complete(self, completions: Completions, keys: Sequence[str], known: dict[str, list]) -> dict[str, list]:
        """All columns of given completions: those that they come with, and those that are computed."""
        rows = {name: values for name, values in known.items() if name in COLUMNS}
        rows |= self._single_logps(completions, keys, known)
        if None in rows.get("proposal_logps", [None]):  # the documented default: drawn from the reference
            rows["proposal_logps"] = rows["reference_logps"]
        rows["proposal"] = [weights or [] for weights in rows.get("proposal", [None] * len(completions))]
        return rows

    def _mixtures_of(self, keys: Sequence[str]) -> list[Proposal]:
        """The mixtures, other than the current proposal, that drew earlier completions of these prompts."""
        return [weights for weights in self.columns.proposals_of(keys) if weights not in (self.proposal, ())]

    def _densities_of_earlier(self, keys: Sequence[str]) -> dict[str, list]:
        """Densities under the current proposal of those earlier completions of these prompts that have none yet."""
        ids = self.columns.unknown_under(self.proposal, keys) if self.proposal else []
        if not ids:
            return _density_rows([], [], torch.empty(0, 0))
        _, pooled = self.context.mixture_logps(self._completions_of(ids), [self.proposal])
        return _density_rows(ids, [self.proposal], pooled)

    def _completions_of(self, ids: Sequence[int]) -> Completions:
        """Reads completions back from the shards that hold them."""
        found = self.store.find(ids, ("prompt_ids", "completion_ids"))
        return pad_completions(
            found["prompt_ids"],
            found["completion_ids"],
            self.context.processing_class.pad_token_id,
            self.context.model.device,
        )

    def _write(
        self,
        step: int,
        part: int,
        examples: list[dict[str, Any]],
        completions: Completions,
        rows: dict[str, list],
        densities: dict[str, list],
    ) -> None:
        texts = {name: [example[name] for example in examples] for name in examples[0] if name not in COLUMNS}
        if "prompt_ids" not in rows:
            masked = zip(completions.prompt_ids, completions.prompt_mask.bool())
            texts["prompt_ids"] = [ids[mask].tolist() for ids, mask in masked]
        if "completion_ids" not in rows:
            texts["completion_ids"] = completions.id_lists()
        if "completion" not in rows:
            texts["completion"] = completion_texts(completions, texts["prompt"], self.context.processing_class)
        if densities["id"]:
            self.store.write("densities", step, part, densities)
        self.store.write("rollouts", step, part, {**texts, **rows})

    def _share(self, rows: dict[str, list], densities: dict[str, list]) -> None:
        """Adds the rows of all processes to the columns of each, in the order of the shards."""
        new = (pa.table({name: rows[name] for name in RolloutColumns.COLUMNS}), pa.table(densities))
        for found, found_densities in gather_object([new]):
            self.columns.extend(found)
            self.columns.extend_densities(found_densities)

    # ---- the estimate ----

    def make_estimator(self, rows: int | None = None) -> Estimator:
        """The estimate from all completions so far, or from the first `rows` of them."""
        rows = len(self.columns) if rows is None else rows
        names = ("policy_logps", "reference_logps", "rewards")
        known = {name: torch.from_numpy(self.columns[name][:rows]) for name in names}
        # log-probabilities under policies may be missing for some prompts
        known = {
            name: values
            for name, values in known.items()
            if values.numel() and (name == "policy_logps" or not values.isnan().any())
        }
        prompt = torch.from_numpy(self.columns["prompt"][:rows]).long()
        densities = torch.from_numpy(self.columns.log_densities(rows, self.context.args.temperature == 1))
        return self.context.problem.make_estimator(prompt, densities, **known)

    def loss(self, weights: torch.Tensor) -> torch.Tensor:
        """
        The loss of the estimate at weights of shape `(K,)`, differentiable. It is computed by a pass over all completions, and
        kept until the estimate or the weights change.
        """
        if self._value is None or self._value[0] is not self.estimator or not torch.equal(self._value[1], weights):
            with torch.enable_grad():
                point = weights.detach().clone().requires_grad_()
                value = self.estimator.loss(point)
                (gradient,) = torch.autograd.grad(value, point)
            self._value = (self.estimator, point.detach(), value.detach(), gradient)
        _, point, value, gradient = self._value
        return value + (weights - point) @ gradient

    @property
    def rewards(self) -> torch.Tensor | None:
        """Rewards of the completions of the estimate, shape `(N, K)`; `None` if some are unknown."""
        rewards = torch.from_numpy(self.columns["rewards"][: self._fitted_rows])
        return rewards if rewards.numel() and not rewards.isnan().any() else None

    @property
    def num_prompts(self) -> int:
        """How many prompts the estimate is made from."""
        return self.estimator.table.num_prompts if self.estimator is not None else 0

    def prepare_estimator(self, is_last: bool) -> None:
        """
        Makes a new estimate if there are enough new rows.

        Args:
            is_last (`bool`): whether no rows will follow, so that any new row is enough.
        """
        rows = len(self.columns)
        # only the estimate from all given completions matters; those on the way to it show the progress
        growth = 1 if self.context.is_given else GROWTH
        if rows >= self._fitted_rows * (1 + growth) or (is_last and rows > self._fitted_rows):
            self.estimator = self._value = None  # so that two estimates are never in memory together
            self._fitted_rows, self.estimator, self._is_new = rows, self.make_estimator(), True

    def best(self, weights: torch.Tensor) -> torch.Tensor | None:
        """The weights that minimize a new estimate, given the current ones; `None` if they have been fitted to it already."""
        return self.estimator.best(weights) if self._is_new else None

    def certify(self, weights: torch.Tensor) -> bool:
        """
        Certifies fitted weights, and renews the proposal if too few completions count.

        Args:
            weights (`torch.Tensor` of shape `(K,)`): the fitted weights of the objectives.

        Returns:
            `bool`: whether there was a new estimate.
        """
        if not self._is_new:
            return False
        args, self._is_new = self.context.args, False
        self.effective_sample_fraction = self.estimator.effective_sample_fraction(weights)
        if self.estimator.table.num_prompts > 1:
            self.certificate = self.estimator.certify(
                weights,
                self.context.problem.mixture_weights(weights),
                self.rewards,
                confidence=args.confidence,
                num_resamples=args.num_resamples,
            )
        self._renew_proposal(weights)
        return True

    def _renew_proposal(self, weights: torch.Tensor) -> None:
        if self.proposal and self.effective_sample_fraction < self.context.args.refresh_below:
            defensive = (1 - DEFENSIVE_SHARE) * weights + DEFENSIVE_SHARE / len(weights)
            self.proposal = tuple(self.context.problem.mixture_weights(defensive).tolist())


def prompt_key(example: dict[str, Any]) -> str:
    """A key of a prompt with its further columns, the same in every process and run."""
    content = {name: value for name, value in example.items() if name not in COLUMNS}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def in_share(key: str, share: float) -> bool:
    """Whether a prompt belongs to a share of all prompts. Its key alone decides, so every process and run agrees."""
    return int(key, 16) < share * 16 ** len(key)


def _fill(
    values: list, rows: list[int], completions: Completions, score: Callable[[Completions], torch.Tensor]
) -> None:
    """Scores some rows of completions, and puts the results into `values`."""
    if rows:
        part = completions if len(rows) == len(completions) else completions.select(rows)
        for row, value in zip(rows, score(part).tolist()):
            values[row] = value


def _density_rows(ids: Sequence[int], proposals: Sequence[Proposal], logps: torch.Tensor) -> dict[str, list]:
    pairs = [(i, list(p), value) for i, row in zip(ids, logps.tolist()) for p, value in zip(proposals, row)]
    return {name: [pair[k] for pair in pairs] for k, name in enumerate(("id", "proposal", "logps"))}
