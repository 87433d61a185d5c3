"""A fit that uses every completion so far: what is known of each, which proposal comes next, how good the result is."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import torch
from accelerate.utils import gather_object

from ..estimation import Certificate
from ..rollouts import Completions, completion_texts, pad_completions
from ..rollouts.columns import GROWTH, Numbers, Proposal
from ..rollouts.store import COLUMNS, RolloutStore, first_id
from .estimates import Estimate


# share of uniform weights in a proposal, so that every policy has a say in what is sampled
DEFENSIVE_SHARE = 0.1


class RolloutFit:
    """
    Keeps all completions of a fit, on disk and in memory, and turns them into the estimate that the weights minimise.

    Args:
        trainer ([`MPOTrainer`]): the trainer that samples and scores.
        store ([`RolloutStore`]): where completions are kept.
        given ([`RolloutStore`], *optional*): where completions that are fitted anew come from, with their densities.
    """

    def __init__(self, trainer: Any, store: RolloutStore, given: RolloutStore | None = None):
        self.trainer, self.store, self._given = trainer, store, given
        self.numbers = Numbers()
        self.estimate: Estimate | None = None
        self._value: tuple[Estimate, torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.certificate: Certificate | None = None
        self.effective_sample_size: float | None = None
        self.proposal: Proposal = self._first_proposal()
        self._fitted_rows, self._is_new = 0, False
        self._step, self._micro_batch = -1, 0

    def _first_proposal(self) -> Proposal:
        return tuple(self.trainer.model.config.mixture_weights) if self.trainer.args.proposal == "mixture" else ()

    # ---- beginning, and going on from a checkpoint ----

    def begin(self, step: int, state: dict[str, Any] | None) -> None:
        """
        Reads what earlier steps wrote, and removes what was written after the step that the run goes on from.

        Args:
            step (`int`): the step of the checkpoint, 0 for none.
            state (`dict`, *optional*): what [`~RolloutFit.state`] was then.
        """
        accelerator = self.trainer.accelerator
        if step == 0 and self.store.shards():
            raise ValueError(
                f"The folder {str(self.store.folder)!r} holds completions already. Go on with "
                "`train(resume_from_checkpoint=True)`, fit them anew with `rollouts=`, or choose another `output_dir`."
            )
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self.store.discard_after(step)
        accelerator.wait_for_everyone()
        self.numbers = Numbers()
        # up to this step only: a process that is ahead may have written the next one already
        for rows in self.store.tables(Numbers.COLUMNS, last_step=step):
            self.numbers.extend(rows)
        for rows in self.store.tables(Numbers.DENSITIES, "densities", last_step=step):
            self.numbers.extend_densities(rows)
        if self._given is not None:
            for rows in self._given.tables(Numbers.DENSITIES, "densities"):
                self.numbers.extend_densities(rows)
        if len(self.numbers) and state is not None:
            self.proposal, self._fitted_rows = tuple(state["proposal"]), state["fitted_rows"]
            self.estimate = self.make_estimate(self._fitted_rows)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside the store."""
        return {"proposal": list(self.proposal), "fitted_rows": self._fitted_rows}

    # ---- one step ----

    def collect(
        self,
        examples: list[dict[str, Any]],
        completions: Completions,
        rewards: torch.Tensor | None,
        known: dict[str, list] | None = None,
    ) -> None:
        """
        Scores completions and keeps them; earlier ones of the same prompts are scored under the current proposal.

        Args:
            examples (`list[dict]`): the row of the dataset that each completion belongs to.
            completions ([`Completions`]): N completions.
            rewards (`torch.Tensor` of shape `(N, K)`, *optional*): their rewards.
            known (`dict[str, list]`, *optional*): columns of the store that are known already, of completions that were
                not drawn here.
        """
        step, part = self._next_part()
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
            rows = self._complete(completions, keys, known) | rows  # rewards that were measured anew count
        self._write(step, part, examples, completions, rows, densities)
        self._share(rows, densities)

    def _next_part(self) -> tuple[int, int]:
        """The step, and the number of this process's batch among those of the step."""
        accelerator, step = self.trainer.accelerator, self.trainer.state.global_step + 1
        self._micro_batch = self._micro_batch + 1 if step == self._step else 0
        self._step = step
        return step, self._micro_batch * accelerator.num_processes + accelerator.process_index

    def _score(
        self, completions: Completions, keys: Sequence[str], mixtures: Sequence[Proposal]
    ) -> tuple[dict[str, list], torch.Tensor]:
        """Log-probabilities under the policies and the reference, and under mixtures."""
        pooled = torch.empty(len(completions), 0)
        if mixtures:
            policy_logps, pooled = self._mixture_logps(completions, mixtures)
            if completions.policy_logps is None:
                completions.policy_logps = policy_logps
        return self._single_logps(completions, keys, {}), pooled

    def _single_logps(self, completions: Completions, keys: Sequence[str], known: dict[str, list]) -> dict[str, list]:
        """
        Log-probabilities under the policies and the reference: what is known, what sampling has told, what somebody wants,
        and `None` for the rest.
        """
        trainer, count = self.trainer, len(completions)
        policy_logps = list(known.get("policy_logps", [None] * count))
        reference_logps = list(known.get("reference_logps", [None] * count))
        share = trainer.args.score_policies
        if completions.policy_logps is not None or trainer.args.objective != "reward":
            share = 1.0
        rows = [i for i, value in enumerate(policy_logps) if value is None and in_share(keys[i], share)]
        _fill(
            policy_logps, rows, completions, lambda part: trainer.policy_logps(part)[:, : trainer.goal.num_objectives]
        )
        if trainer.reference_policy is not None:
            rows = [i for i, value in enumerate(reference_logps) if value is None]
            _fill(reference_logps, rows, completions, trainer.reference_logps)
        return {"policy_logps": policy_logps, "reference_logps": reference_logps}

    def _mixture_logps(
        self, completions: Completions, mixtures: Sequence[Proposal]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        args = self.trainer.args
        return self.trainer.policy_scorer.mixture_logps(completions, mixtures, args.temperature, args.logps_batch_size)

    def _complete(self, completions: Completions, keys: Sequence[str], known: dict[str, list]) -> dict[str, list]:
        """Columns of completions that were drawn elsewhere: what is known, and what is computed."""
        rows = {name: values for name, values in known.items() if name in COLUMNS}
        rows |= self._single_logps(completions, keys, known)
        if None in rows.get("proposal_logps", [None]):  # they are said to be from the reference
            rows["proposal_logps"] = rows["reference_logps"]
        rows["proposal"] = [weights or [] for weights in rows.get("proposal", [None] * len(completions))]
        return rows

    def _mixtures_of(self, keys: Sequence[str]) -> list[Proposal]:
        """The mixtures, other than the current proposal, that drew earlier completions of these prompts."""
        return [weights for weights in self.numbers.proposals_of(keys) if weights not in (self.proposal, ())]

    def _densities_of_earlier(self, keys: Sequence[str]) -> dict[str, list]:
        """Earlier completions of these prompts, under the current proposal where they are not known under it."""
        ids = self.numbers.unknown_under(self.proposal, keys) if self.proposal else []
        if not ids:
            return _density_rows([], [], torch.empty(0, 0))
        _, pooled = self._mixture_logps(self._completions_of(ids), [self.proposal])
        return _density_rows(ids, [self.proposal], pooled)

    def _completions_of(self, ids: Sequence[int]) -> Completions:
        """Reads completions back from the shards that hold them."""
        found = self.store.find(ids, ("prompt_ids", "completion_ids"))
        return pad_completions(
            found["prompt_ids"],
            found["completion_ids"],
            self.trainer.processing_class.pad_token_id,
            self.trainer.model.device,
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
            texts["completion"] = completion_texts(completions, texts["prompt"], self.trainer.processing_class)
        if densities["id"]:
            self.store.write("densities", step, part, densities)
        self.store.write("rollouts", step, part, {**texts, **rows})

    def _share(self, rows: dict[str, list], densities: dict[str, list]) -> None:
        """Every process gets to know the numbers of all, in the order of the shards."""
        new = (pa.table({name: rows[name] for name in Numbers.COLUMNS}), pa.table(densities))
        for found, found_densities in gather_object([new]):
            self.numbers.extend(found)
            self.numbers.extend_densities(found_densities)

    # ---- the estimate ----

    def make_estimate(self, rows: int | None = None) -> Estimate:
        """The estimate from all completions so far, or from the first `rows` of them."""
        rows = len(self.numbers) if rows is None else rows
        names = ("policy_logps", "reference_logps", "rewards")
        known = {name: torch.from_numpy(self.numbers[name][:rows]) for name in names}
        # of policies those of some prompts will do
        known = {
            name: values
            for name, values in known.items()
            if values.numel() and (name == "policy_logps" or not values.isnan().any())
        }
        prompt = torch.from_numpy(self.numbers["prompt"][:rows]).long()
        densities = torch.from_numpy(self.numbers.log_densities(rows, self.trainer.args.temperature == 1))
        return self.trainer.goal.estimate(prompt, densities, **known)

    def loss(self, weights: torch.Tensor) -> torch.Tensor:
        """
        The loss of the estimate at weights of shape `(K,)`, differentiable. It takes a pass over all completions, and is kept
        until the estimate or the weights are others.
        """
        if self._value is None or self._value[0] is not self.estimate or not torch.equal(self._value[1], weights):
            with torch.enable_grad():
                point = weights.detach().clone().requires_grad_()
                value = self.estimate.loss(point)
                (gradient,) = torch.autograd.grad(value, point)
            self._value = (self.estimate, point.detach(), value.detach(), gradient)
        _, point, value, gradient = self._value
        return value + (weights - point) @ gradient

    @property
    def rewards(self) -> torch.Tensor | None:
        """Rewards of the completions in the table, shape `(N, K)`."""
        rewards = torch.from_numpy(self.numbers["rewards"][: self._fitted_rows])
        return rewards if rewards.numel() and not rewards.isnan().any() else None

    def prepare_estimate(self) -> None:
        """Makes the estimate anew when there are enough new rows, and at the end."""
        trainer, rows = self.trainer, len(self.numbers)
        # completions that are there already count together: on the way to them the weights only show where they go
        growth = 1 if trainer._fits_given else GROWTH
        is_last = trainer.state.global_step + 1 == trainer.state.max_steps and trainer.accelerator.sync_gradients
        if rows >= self._fitted_rows * (1 + growth) or (is_last and rows > self._fitted_rows):
            self.estimate = self._value = None  # the old one and the new one need not fit into memory together
            self._fitted_rows, self.estimate, self._is_new = rows, self.make_estimate(), True

    def best(self, weights: torch.Tensor) -> torch.Tensor | None:
        """The weights that are best by the estimate, given the present ones, when they have not been fitted to it."""
        return self.estimate.best(weights) if self._is_new else None

    def certify(self, weights: torch.Tensor) -> bool:
        """
        After the weights have been fitted: how good they are, and whether completions should come from another proposal
        from now on. `False` when there was no new estimate to fit them to.
        """
        if not self._is_new:
            return False
        args, self._is_new = self.trainer.args, False
        self.effective_sample_size = self.estimate.effective_sample_size(weights)
        if self.estimate.table.num_prompts > 1:
            self.certificate = self.estimate.certify(
                weights,
                self.trainer.goal.mixture_weights(weights),
                self.rewards,
                confidence=args.confidence,
                num_resamples=args.num_resamples,
            )
        self._renew_proposal(weights)
        return True

    def _renew_proposal(self, weights: torch.Tensor) -> None:
        if self.proposal and self.effective_sample_size < self.trainer.args.refresh_below:
            defensive = (1 - DEFENSIVE_SHARE) * weights + DEFENSIVE_SHARE / len(weights)
            self.proposal = tuple(self.trainer.goal.mixture_weights(defensive).tolist())


def prompt_key(example: dict[str, Any]) -> str:
    """Equal for equal prompts with equal further columns, in every process and run."""
    content = {name: value for name, value in example.items() if name not in COLUMNS}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def in_share(key: str, share: float) -> bool:
    """Whether a prompt is among a share of all, by its key: the same in every process and run."""
    return int(key, 16) < share * 16 ** len(key)


def _fill(
    values: list, rows: list[int], completions: Completions, score: Callable[[Completions], torch.Tensor]
) -> None:
    """Scores some rows of completions, and puts in what comes out."""
    if rows:
        part = completions if len(rows) == len(completions) else completions.select(rows)
        for row, value in zip(rows, score(part).tolist()):
            values[row] = value


def _density_rows(ids: Sequence[int], proposals: Sequence[Proposal], logps: torch.Tensor) -> dict[str, list]:
    pairs = [(i, list(p), value) for i, row in zip(ids, logps.tolist()) for p, value in zip(proposals, row)]
    return {name: [pair[k] for pair in pairs] for k, name in enumerate(("id", "proposal", "logps"))}
