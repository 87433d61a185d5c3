"""A fit that uses every completion so far: what is known of each, which proposal comes next, how good the result is."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from accelerate.utils import gather_object

from ..estimation import Certificate, DualTable, balance_heuristic, certify
from ..rollout_store import COLUMNS, RolloutStore
from ..rollouts import Completions, completion_logps, completion_texts, mixture_logps, pad_completions


# share of uniform weights in a proposal, so that every policy has a say in what is sampled
DEFENSIVE_SHARE = 0.1
# The weights are fitted anew once the table has grown by this share: a fit takes a pass over the whole table
GROWTH = 1 / 64

Proposal = tuple[float, ...]  # mixture weights; () is the reference policy


@dataclass
class Numbers:
    """What the estimate needs to know of N completions: the rows of the store without their texts."""

    ids: list[int] = field(default_factory=list)
    prompt_keys: list[str] = field(default_factory=list)
    proposals: list[Proposal] = field(default_factory=list)
    proposal_logps: list[float] = field(default_factory=list)
    reference_logps: list[float | None] = field(default_factory=list)
    policy_logps: list[list[float] | None] = field(default_factory=list)
    rewards: list[list[float] | None] = field(default_factory=list)
    # log-probabilities of a row under proposals that it was not drawn from
    densities: dict[tuple[int, Proposal], float] = field(default_factory=dict)
    known_ids: set[int] = field(default_factory=set, compare=False, repr=False)

    def extend(self, rows: dict[str, Sequence]) -> None:
        """Adds rows of the store, each once: several processes fill up their last batch with the first rows again."""
        new = [row for row, i in enumerate(rows["id"]) if i not in self.known_ids]
        self.known_ids.update(rows["id"])
        self.ids += [rows["id"][row] for row in new]
        self.prompt_keys += [rows["prompt_key"][row] for row in new]
        self.proposals += [tuple(rows["proposal"][row]) for row in new]
        for name in ("proposal_logps", "reference_logps", "policy_logps", "rewards"):
            getattr(self, name).extend(rows[name][row] for row in new)

    def first(self, rows: int | None) -> "Numbers":
        """The same without the rows after the first so many."""
        if rows is None or rows >= len(self.ids):
            return self
        kept = {f.name: getattr(self, f.name)[:rows] for f in fields(self) if isinstance(getattr(self, f.name), list)}
        return Numbers(**kept, densities=self.densities)

    def extend_densities(self, rows: dict[str, Sequence]) -> None:
        """Adds rows of the store's densities."""
        for i, weights, logps in zip(rows["id"], rows["proposal"], rows["logps"]):
            self.densities[i, tuple(weights)] = logps


class RolloutFit:
    """
    Keeps all completions of a fit, on disk and in memory, and turns them into the table that the weights minimise.

    Args:
        trainer ([`MPOTrainer`]): the trainer that samples and scores.
        store ([`RolloutStore`]): where completions are kept.
        densities (`dict[str, list]`, *optional*): densities of completions that come from another store.
    """

    COLUMNS = ("id", "prompt_key", "proposal", "proposal_logps", "reference_logps", "policy_logps", "rewards")

    def __init__(self, trainer: Any, store: RolloutStore, densities: dict[str, list] | None = None):
        self.trainer, self.store, self._given_densities = trainer, store, densities
        self.numbers = Numbers()
        self.table: DualTable | None = None
        self.certificate: Certificate | None = None
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
        for path in self.store.shards():
            self.numbers.extend(self.store.read(self.COLUMNS, paths=[path]))
        self.numbers.extend_densities(self.store.read(("id", "proposal", "logps"), "densities"))
        if self._given_densities is not None:
            self.numbers.extend_densities(self._given_densities)
        if self.numbers.ids and state is not None:
            self.proposal, self._fitted_rows = tuple(state["proposal"]), state["fitted_rows"]
            self.table = self.make_table(self._fitted_rows)

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
        first = step << 40 | part << 24
        rows = {
            "id": known["id"] if known else list(range(first, first + len(completions))),
            "step": [step] * len(completions),
            "prompt_key": [prompt_key(example) for example in examples],
            "rewards": [None] * len(completions) if rewards is None else rewards.tolist(),
        }
        densities = _density_rows([], [], torch.empty(0, 0))
        if not known:
            mixtures = self._mixtures_of(rows["prompt_key"])
            scores, pooled = self._score(completions, mixtures)
            rows |= scores | {
                "proposal": [list(self.proposal)] * len(completions),
                "proposal_logps": completions.proposal_logps.tolist(),
            }
            for found in (_density_rows(rows["id"], mixtures, pooled), self._densities_of_earlier(rows["prompt_key"])):
                densities = {name: densities[name] + found[name] for name in densities}
        else:
            rows = self._complete(completions, known) | rows  # rewards that were measured anew count
        self._write(step, part, examples, completions, rows, densities)
        self._share(rows, densities)

    def _next_part(self) -> tuple[int, int]:
        """The step, and the number of this process's batch among those of the step."""
        accelerator, step = self.trainer.accelerator, self.trainer.state.global_step + 1
        self._micro_batch = self._micro_batch + 1 if step == self._step else 0
        self._step = step
        return step, self._micro_batch * accelerator.num_processes + accelerator.process_index

    def _score(self, completions: Completions, mixtures: Sequence[Proposal]) -> tuple[dict[str, list], torch.Tensor]:
        """Log-probabilities under every policy, the reference, and mixtures of the policies."""
        trainer, args = self.trainer, self.trainer.args
        policy_logps, pooled = mixture_logps(
            trainer.policies, completions, mixtures, args.temperature, args.logps_batch_size
        )
        objectives = trainer.goal.num_objectives
        scores = {"policy_logps": policy_logps[:, :objectives].tolist(), "reference_logps": [None] * len(completions)}
        if policy_logps.shape[-1] > objectives:  # the reference is the mixture's last component
            scores["reference_logps"] = policy_logps[:, -1].tolist()
        elif trainer.reference_policy is not None:
            logps = completion_logps([trainer.reference_policy], completions, args.logps_batch_size)
            scores["reference_logps"] = logps[:, 0].tolist()
        return scores, pooled

    def _complete(self, completions: Completions, known: dict[str, list]) -> dict[str, list]:
        """Columns of completions that were drawn elsewhere: what is known, and what is computed."""
        rows = {name: values for name, values in known.items() if name in COLUMNS}
        missing = [name for name in ("policy_logps", "reference_logps") if None in rows.get(name, [None])]
        if missing:
            scores, _ = self._score(completions, [])
            rows |= {name: scores[name] for name in missing}
        if None in rows.get("proposal_logps", [None]):  # they are said to be from the reference
            rows["proposal_logps"] = rows["reference_logps"]
        rows["proposal"] = [weights or [] for weights in rows.get("proposal", [None] * len(completions))]
        return rows

    def _mixtures_of(self, keys: Sequence[str]) -> list[Proposal]:
        """The mixtures, other than the current proposal, that drew earlier completions of these prompts."""
        wanted = set(keys)
        earlier = {p for key, p in zip(self.numbers.prompt_keys, self.numbers.proposals) if key in wanted}
        return sorted(earlier - {self.proposal, ()})

    def _densities_of_earlier(self, keys: Sequence[str]) -> dict[str, list]:
        """Earlier completions of these prompts, under the current proposal where they are not known under it."""
        numbers, wanted = self.numbers, set(keys)
        ids = [
            i
            for i, key, proposal in zip(numbers.ids, numbers.prompt_keys, numbers.proposals)
            if key in wanted and proposal != self.proposal and (i, self.proposal) not in numbers.densities
        ]
        if not ids or not self.proposal:
            return _density_rows([], [], torch.empty(0, 0))
        _, pooled = self._score(self._completions_of(ids), [self.proposal])
        return _density_rows(ids, [self.proposal], pooled)

    def _completions_of(self, ids: Sequence[int]) -> Completions:
        """Reads completions back from the shards that hold them."""
        parts = sorted({(i >> 40, i >> 24 & 0xFFFF) for i in ids})
        found = self.store.read(
            ("id", "prompt_ids", "completion_ids"), paths=[self.store.path("rollouts", *part) for part in parts]
        )
        at = {i: row for row, i in enumerate(found["id"])}
        rows = [at[i] for i in ids]
        return pad_completions(
            [found["prompt_ids"][row] for row in rows],
            [found["completion_ids"][row] for row in rows],
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
        prompt_ids = [ids[mask].tolist() for ids, mask in zip(completions.prompt_ids, completions.prompt_mask.bool())]
        texts = {
            **{name: [example[name] for example in examples] for name in examples[0] if name not in COLUMNS},
            "completion": completion_texts(
                completions, [example["prompt"] for example in examples], self.trainer.processing_class
            ),
            "prompt_ids": prompt_ids,
            "completion_ids": completions.id_lists(),
        }
        if densities["id"]:
            self.store.write("densities", step, part, densities)
        self.store.write("rollouts", step, part, {**texts, **rows})

    def _share(self, rows: dict[str, list], densities: dict[str, list]) -> None:
        """Every process gets to know the numbers of all, in the order of the shards."""
        for row, density in gather_object([(rows, densities)]):
            self.numbers.extend(row)
            self.numbers.extend_densities(density)

    # ---- the estimate ----

    def make_table(self, rows: int | None = None) -> DualTable:
        """The table of the dual objective of all completions so far, or of the first `rows` of them."""
        numbers = self.numbers.first(rows)
        prompt = _numbered(numbers.prompt_keys)
        density = self._density(numbers, prompt)
        if self.trainer.args.objective == "implicit":
            return self.trainer.goal.table(prompt, density, torch.tensor(numbers.policy_logps, dtype=torch.float64))
        return self.trainer.goal.table(
            prompt,
            density,
            reference_logps=torch.tensor(numbers.reference_logps, dtype=torch.float64),
            rewards=torch.tensor(numbers.rewards, dtype=torch.float64),
        )

    @property
    def rewards(self) -> torch.Tensor | None:
        """Rewards of all completions, shape `(N, K)`."""
        known = self.numbers.rewards and self.numbers.rewards[0] is not None
        return torch.tensor(self.numbers.rewards, dtype=torch.float64) if known else None

    def _density(self, numbers: Numbers, prompt: torch.Tensor) -> torch.Tensor:
        own = torch.tensor(numbers.proposal_logps, dtype=torch.float64)
        proposals = {proposal: s for s, proposal in enumerate(dict.fromkeys(numbers.proposals))}
        if len(proposals) == 1:
            return own
        drew = torch.tensor([proposals[proposal] for proposal in numbers.proposals])
        logps = own.new_full((len(own), len(proposals)), torch.nan)
        logps[torch.arange(len(own)), drew] = own
        if () in proposals and self.trainer.args.temperature == 1:
            logps[:, proposals[()]] = torch.tensor(numbers.reference_logps, dtype=torch.float64)
        row_of = {i: row for row, i in enumerate(numbers.ids)}
        for (i, proposal), value in numbers.densities.items():
            if i in row_of and proposal in proposals:
                logps[row_of[i], proposals[proposal]] = value
        density = balance_heuristic(prompt, drew, logps)
        # completions from elsewhere are known under their own proposal only, which is a valid density as well
        return torch.where(density.isnan(), own, density)

    def prepare_table(self) -> None:
        """Makes the table anew when there are enough new rows."""
        rows = len(self.numbers.ids)
        if rows >= self._fitted_rows * (1 + GROWTH):
            self._fitted_rows, self.table, self._is_new = rows, self.make_table(), True

    def take_table(self) -> DualTable | None:
        """The table, when the weights have not been fitted to it."""
        return self.table if self._is_new else None

    def certify(self, weights: torch.Tensor) -> bool:
        """
        After the weights have been fitted: how good they are, and whether completions should come from another proposal
        from now on. `False` when there was no new table to fit them to.
        """
        if not self._is_new:
            return False
        args, table, self._is_new = self.trainer.args, self.table, False
        if table.num_prompts > 1:
            self.certificate = certify(
                table,
                weights,
                self.rewards,
                confidence=args.confidence,
                num_resamples=args.num_resamples,
                welfare=self.trainer.goal.welfare,
            )
        self._renew_proposal(weights)
        return True

    def _renew_proposal(self, weights: torch.Tensor) -> None:
        usable = self.table.effective_sample_sizes(weights).mean().item()
        if self.proposal and usable < self.trainer.args.refresh_below:
            defensive = (1 - DEFENSIVE_SHARE) * weights + DEFENSIVE_SHARE / len(weights)
            self.proposal = tuple(self.trainer.goal.mixture_weights(defensive).tolist())


def prompt_key(example: dict[str, Any]) -> str:
    """Equal for equal prompts with equal further columns, in every process and run."""
    content = {name: value for name, value in example.items() if name not in COLUMNS}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _density_rows(ids: Sequence[int], proposals: Sequence[Proposal], logps: torch.Tensor) -> dict[str, list]:
    pairs = [(i, list(p), value) for i, row in zip(ids, logps.tolist()) for p, value in zip(proposals, row)]
    return {name: [pair[k] for pair in pairs] for k, name in enumerate(("id", "proposal", "logps"))}


def _numbered(keys: Sequence[str]) -> torch.Tensor:
    numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return torch.tensor([numbers[key] for key in keys])
