"""A fit to all completions so far: their numbers, the estimate from them, the next proposal, and the certificate."""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch
from accelerate.utils import gather_object
from transformers.utils import logging

from ..estimation import Certificate, InfeasibleError
from ..rollouts import Completions, completion_texts, pad_completions
from ..rollouts.columns import GROWTH, Proposal, RolloutColumns
from ..rollouts.store import COLUMNS, STEP_BITS, RolloutStore, first_id
from .decoded_estimator import DecodedEstimator
from .estimators import Estimator
from .fit_problem import DecodedRows
from .row_scoring import FitContext, RowScoring, content_of


logger = logging.get_logger(__name__)

# Minimum number of prompts for the bootstrap bound of the duality gap, and for warnings about their rewards.
MIN_PROMPTS = 10
# For fits to what is decoded: one in so many completions is drawn from a single policy, from each in turn, to compare the
# mixture with, and in one of so many steps, as large a share on top of it from the reference.
COMPARE_EVERY, REFERENCE_EVERY = 8, 2
# How many completions are scored at the end of a fit, to check the log-probabilities that it has used: one in so many, within
# these limits.
CHECK_EVERY, LEAST_CHECKED, MOST_CHECKED = 16, 4, 32


class RolloutFit:
    """
    Keeps all completions of a fit, on disk and in memory, and makes the estimate that the weights minimize from them.

    Args:
        context ([`FitContext`]): the options, the models and the functions that score completions.
        store ([`RolloutStore`]): the store that completions are written to.
        given ([`RolloutStore`], *optional*): the store that given completions come from, with their densities.
    """

    def __init__(self, context: FitContext, store: RolloutStore, given: RolloutStore | None = None):
        self.context, self.store, self.given = context, store, given
        self.scoring = RowScoring(context)
        self.columns = RolloutColumns()
        self.estimator: Estimator | None = None
        self._value: tuple[Estimator, torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.certificate: Certificate | None = None
        self.effective_sample_fraction: float | None = None
        self.effective_completions: float | None = None
        self.proposal: Proposal = self._first_proposal()
        self._fitted_rows, self._is_new, self._is_last = 0, False, False
        self._has_warned = False
        self._step, self._micro_batch = -1, 0
        # the first step of the epoch, how often each prompt has been visited in it, and whether a run resumes within it
        self._epoch_step, self._visits, self._is_resumed = 0, Counter[str](), False

    def _first_proposal(self) -> Proposal:
        if self.context.args.proposal == "reference":
            return ()
        weights, problem = self.context.model.config.mixture_weights, self.context.problem
        if problem.is_decoded and 0 in weights:
            return self.scoring.defensive(problem.objective_weights(weights))
        return tuple(weights)

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
        self.store.read_index()
        self.columns = RolloutColumns()
        # up to this step only: a process that is ahead may have written the shards of the next step already
        for rows in self.store.tables(RolloutColumns.COLUMNS, last_step=step):
            self.columns.extend(rows)
        for rows in self.store.tables(RolloutColumns.DENSITIES, "densities", last_step=step):
            self.columns.extend_densities(rows)
        if self.given is not None:
            for rows in self.given.tables(RolloutColumns.DENSITIES, "densities"):
                self.columns.extend_densities(rows)
        if len(self.columns) and state is not None:
            self.proposal, self._fitted_rows = tuple(state["proposal"]), state["fitted_rows"]
            self._epoch_step, self._is_resumed = state.get("epoch_step", step), True
            in_epoch = self.columns["id"] >> STEP_BITS >= self._epoch_step
            keys = list(self.columns.prompts)
            self._visits = Counter(content_of(keys[i]) for i in set(self.columns["prompt"][in_epoch].tolist()))
            self.estimator = self.make_estimator(self._fitted_rows)

    def state(self) -> dict[str, Any]:
        """What a checkpoint saves of the fit. Completions are in the store."""
        return {
            "proposal": list(self.proposal),
            "fitted_rows": self._fitted_rows,
            "epoch_step": self._epoch_step,
            "shards": self.store.digest(),
        }

    def begin_epoch(self, step: int, epochs: float) -> None:
        """
        Begins a pass over the prompts. In each, a prompt is visited as often as it stands in the dataset.

        Args:
            step (`int`): the first step of the pass, or the next one, if a run resumes within a pass.
            epochs (`float`): the number of passes so far.
        """
        if not (self._is_resumed and epochs % 1):
            self._epoch_step, self._visits = step, Counter()
        self._is_resumed = False

    # ---- one step ----

    def row_proposals(self, count: int) -> list[Proposal]:
        """
        The proposal of each of the next completions of this process.

        Args:
            count (`int`): how many completions.
        """
        problem = self.context.problem
        if not problem.is_decoded or not self.proposal or count < COMPARE_EVERY:
            return [self.proposal] * count
        first = len(self.columns) + self.context.accelerator.process_index * count
        singles = [
            tuple(problem.mixture_weights(corner).tolist())
            for corner in torch.eye(problem.num_objectives, dtype=torch.float64)
        ]
        places = [divmod(first + i, COMPARE_EVERY) for i in range(count)]
        return [singles[turn % len(singles)] if at == COMPARE_EVERY - 1 else self.proposal for turn, at in places]

    def draws_reference(self, step: int) -> bool:
        """Whether this step also draws completions from the reference, to compare the mixture with."""
        return self.context.problem.is_decoded and bool(self.proposal) and step % REFERENCE_EVERY == 1

    def collect(
        self,
        step: int,
        examples: list[dict[str, Any]],
        completions: Completions,
        rewards: torch.Tensor | None,
        known: dict[str, list] | None = None,
        proposals: Sequence[Proposal] | None = None,
        keys: list[str] | None = None,
    ) -> None:
        """
        Scores completions and keeps them. Earlier completions of the same prompts are scored under the current proposal, unless
        the fit is to what is decoded: their log-probabilities under other mixtures then follow from their normalizers.

        Args:
            step (`int`): the step that they belong to.
            examples (`list[dict]`): the row of the dataset that each completion belongs to.
            completions ([`Completions`]): N completions.
            rewards (`torch.Tensor` of shape `(N, K)`, *optional*): their rewards.
            known (`dict[str, list]`, *optional*): the columns that given completions come with.
            proposals (`Sequence`, *optional*): the proposal of every completion. Defaults to the current one.
            keys (`list[str]`, *optional*): keys of the prompts, of completions that come on top of those of an earlier call.
        """
        part = self._next_part(step)
        first = first_id(step, part)
        self.keys = keys = self._keys(examples, known) if keys is None else keys
        rows = {
            "id": known["id"] if known else list(range(first, first + len(completions))),
            "step": [step] * len(completions),
            "prompt_key": keys,
            "rewards": [None] * len(completions) if rewards is None else rewards.tolist(),
            "normalizers": [None] * len(completions),
        }
        densities = _density_rows([], [], torch.empty(0, 0))
        if not known:
            drawn = [self.proposal] * len(completions) if proposals is None else proposals
            rows |= {"proposal": list(map(list, drawn)), "proposal_logps": completions.proposal_logps.tolist()}
            if self.context.problem.is_decoded:
                rows |= self.scoring.decoded_columns(completions, keys, drawn, self.proposal)
            else:
                mixtures = self._mixtures_of(keys)
                scores, pooled = self.scoring.score(completions, keys, mixtures)
                rows |= scores
                for found in (_density_rows(rows["id"], mixtures, pooled), self._densities_of_earlier(keys)):
                    densities = {name: densities[name] + found[name] for name in densities}
        else:
            found = self.scoring.complete(completions, keys, known)
            # new rewards replace the given ones
            rows = found | {
                name: values for name, values in rows.items() if name != "normalizers" or name not in found
            }
        digests = self._write(step, part, examples, completions, rows, densities)
        self._share(rows, densities, digests)

    def _keys(self, examples: list[dict[str, Any]], known: dict[str, list] | None) -> list[str]:
        """
        The keys of prompts. A prompt that stands several times in the dataset has as many keys, and so weighs as much as its rows;
        in later epochs, it has the same ones again.
        """
        keys = [prompt_key(example) for example in examples]
        if known:
            stored = known.get("prompt_key", [None] * len(keys))
            return [key + _repetition(of_store) for key, of_store in zip(keys, stored)]
        count = self.context.args.num_generations
        own, index = [], self.context.accelerator.process_index
        for process, visited in enumerate(gather_object([keys[::count]])):
            for key in visited:
                repetition = self._visits[key]
                self._visits[key] += 1
                if process == index:
                    own += [f"{key}#{repetition}" if repetition else key] * count
        return own

    def _next_part(self, step: int) -> int:
        """The number of the next batch of this process among all batches of a step."""
        self._micro_batch = self._micro_batch + 1 if step == self._step else 0
        self._step = step
        return self._micro_batch * self.context.accelerator.num_processes + self.context.accelerator.process_index

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
    ) -> dict[str, str]:
        texts = {name: [example[name] for example in examples] for name in examples[0] if name not in COLUMNS}
        if "prompt_ids" not in rows:
            masked = zip(completions.prompt_ids, completions.prompt_mask.bool())
            texts["prompt_ids"] = [ids[mask].tolist() for ids, mask in masked]
        if "completion_ids" not in rows:
            texts["completion_ids"] = completions.id_lists()
        if "completion" not in rows:
            texts["completion"] = completion_texts(completions, texts["prompt"], self.context.processing_class)
        digests = self.store.write("densities", step, part, densities) if densities["id"] else {}
        return digests | self.store.write("rollouts", step, part, {**texts, **rows})

    def _share(self, rows: dict[str, list], densities: dict[str, list], digests: dict[str, str]) -> None:
        """Adds the rows of all processes to the columns of each, in the order of the shards, and lists these."""
        new = (pa.table({name: rows[name] for name in RolloutColumns.COLUMNS}), pa.table(densities), digests)
        batch = gather_object([new])
        for found, found_densities, _ in batch:
            self.columns.extend(found)
            self.columns.extend_densities(found_densities)
        if self.context.accelerator.is_main_process:
            self.store.record(dict(pair for *_, of_process in batch for pair in of_process.items()))

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
        if self.context.problem.is_decoded:
            decoded = self._decoded_rows(rows)
            return self.context.problem.make_estimator(prompt, decoded.own_logps, **known, decoded=decoded)
        densities = torch.from_numpy(self.columns.log_densities(rows, self.context.temperature == 1))
        return self.context.problem.make_estimator(prompt, densities, **known)

    def _decoded_rows(self, rows: int) -> DecodedRows:
        return DecodedRows(
            proposal=torch.from_numpy(self.columns["proposal"][:rows]).long(),
            proposals=list(self.columns.proposals),
            own_logps=torch.from_numpy(self.columns["proposal_logps"][:rows]),
            normalizers=torch.from_numpy(self.columns["normalizers"][:rows]),
            current=self._last_mixture(rows) if self.context.is_given else self.proposal,
        )

    def expansion_error(self, weights: torch.Tensor) -> float | None:
        """
        The root mean square error of the log-probabilities of the last completions under the mixture with given weights of the
        objectives, which follow from their normalizers to second order: a pass of the policies tells the exact ones.
        """
        if not isinstance(self.estimator, DecodedEstimator) or self.context.is_given:
            return None
        target = self.context.problem.mixture_weights(weights)
        expanded = self.estimator.completions.logps(target)
        count = min(max(len(expanded) // CHECK_EVERY, LEAST_CHECKED), MOST_CHECKED)
        rows = (expanded > -torch.inf).nonzero().squeeze(-1)[-count:]
        completions = self._completions_of(self.columns["id"][rows.numpy()].tolist())
        _, exact = self.context.mixture_logps(completions, [target.tolist()])
        return (expanded[rows] - exact[:, 0]).square().mean().sqrt().item()

    def _last_mixture(self, rows: int) -> Proposal:
        """The last mixture that drew any of the first completions; `()` if none did."""
        size, proposals = self.context.problem.num_components, list(self.columns.proposals)
        for index in dict.fromkeys(self.columns["proposal"][:rows][::-1].tolist()):
            weights = proposals[index]
            if weights is not None and len(weights) == size and max(weights) < 1:
                return weights
        return ()

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
    def origin(self) -> str:
        """What drew the completions; see [`~mpo_hf.rollouts.columns.RolloutColumns`]. What will draw them, if there are none."""
        return self.columns.origin if len(self.columns) else self.context.args.proposal

    @property
    def num_prompts(self) -> int:
        """How many different prompts the estimate is made from."""
        count = int(self.columns["prompt"][: self._fitted_rows].max(initial=-1)) + 1
        return len({content_of(key) for key in itertools.islice(self.columns.prompts, count)})

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
            self._is_last = is_last
            if is_last or self.num_prompts >= MIN_PROMPTS:
                self.context.problem.warn_of_flat_objectives()
                if isinstance(self.estimator, DecodedEstimator):
                    self.context.problem.warn_of_exclusions(self.estimator.completions.policy_logps)

    def best(self, weights: torch.Tensor) -> torch.Tensor | None:
        """The weights that minimize a new estimate, given the current ones; `None` if they have been fitted to it already."""
        if not self._is_new:
            return None
        try:
            if isinstance(self.estimator, DecodedEstimator):
                self.context.problem.check_feasible()
            best = self.estimator.best(weights)
        except InfeasibleError as error:
            if self._is_last:
                raise
            # rewards may be rare, and more completions may have them
            self._is_new, self.certificate = False, None
            if isinstance(self.estimator, DecodedEstimator) and self.proposal:
                self.proposal = self.scoring.defensive(self.estimator.closest_to_feasible(weights))
            if not self._has_warned:
                logger.warning(f"{error} The weights stay as they are until completions show such a policy.")
            self._has_warned = True
            return None
        if self._is_last:
            self.context.problem.warn_of_weights(best)
            self.context.problem.warn_of_own_gains()
        return best

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
        self.effective_completions = self.estimator.effective_completions(weights)
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

    def certify_anew(self, weights: torch.Tensor) -> None:
        """Certifies weights of the objectives other than those that were fitted, on all completions."""
        self._is_new = self.estimator is not None
        self.certify(weights)

    def _renew_proposal(self, weights: torch.Tensor) -> None:
        limit = self.context.args.refresh_below
        if isinstance(self.estimator, DecodedEstimator):
            is_stale = self.estimator.needs_new_proposal(weights, limit)
        else:
            is_stale = self.effective_sample_fraction < limit
        if self.proposal and is_stale:
            self.proposal = self.scoring.defensive(weights)


def prompt_key(example: dict[str, Any]) -> str:
    """A key of a prompt with its further columns, the same in every process and run."""
    content = {name: value for name, value in example.items() if name not in COLUMNS}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _repetition(key: str | None) -> str:
    """The part of a stored key that tells the rows of a dataset with one prompt apart: empty for the first of them."""
    found = re.search(r"#\d+$", key or "")
    return found[0] if found else ""


def _density_rows(ids: Sequence[int], proposals: Sequence[Proposal], logps: torch.Tensor) -> dict[str, list]:
    pairs = [(i, list(p), value) for i, row in zip(ids, logps.tolist()) for p, value in zip(proposals, row)]
    return {name: [pair[k] for pair in pairs] for k, name in enumerate(("id", "proposal", "logps"))}
