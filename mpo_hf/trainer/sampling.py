"""The completions of a step, drawn or given, with their log-probabilities and rewards."""

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from ..mixture.modeling_mixture import MixturePolicyModel
from ..rewards.functions import LOGGERS
from ..rewards.values import shorten
from ..rollouts import Completions, completion_texts, pad_completions, sample_completions, tokenize_prompts
from ..rollouts.scoring import CompletionScorer
from ..rollouts.store import COLUMNS, RolloutStore
from .mpo_config import MPOConfig
from .progress import drawing_bar
from .tables import BATCH, IDS, NUMBERS, batches_of, check_numbers, check_text_list, columns_of_rows, texts_of


logger = logging.get_logger(__name__)

# Columns of a dataset of prompts that reward functions do not get, as in TRL.
NOT_PASSED = ("prompt", "completion", "completion_ids")


class CompletionSampling:
    """The part of [`MPOTrainer`] that draws completions, or reads given ones, and scores them."""

    args: MPOConfig
    model: MixturePolicyModel

    # ---- what is given ----

    def _check_data(self, store: RolloutStore | None) -> None:
        """Raises an error for rows that cannot be completed or scored, before anything runs."""
        if self._is_given:
            self._check_given(store)
        else:
            self._check_prompts("`train_dataset`", self.train_dataset)
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        for name, dataset in evaluated.items():
            if dataset is not None:
                self._check_prompts(f"`eval_dataset {name}".strip() + "`", dataset)

    def _check_prompts(self, name: str, dataset: Dataset | IterableDataset) -> None:
        columns = [column for column in columns_of_rows(dataset) if column not in NOT_PASSED]
        self._check_rewards([], columns)  # of a stream, the columns alone are known
        if isinstance(dataset, Dataset):
            for start, prompts in texts_of(dataset, "prompt"):
                self._tokenize(prompts, name, start)
                self._check_rewards(prompts, columns)

    def _check_given(self, store: RolloutStore | None) -> None:
        rows, config, count = self.train_dataset, self.model.config, len(self.objective_names)
        batches = batches_of(rows)
        if store is not None:
            batches, count = store.tables(NUMBERS), len(store.info["objectives"])
        skipped = ("rewards",) if self.reward_functions else ()
        check_numbers(batches, count, config.vocab_size, config.max_position_embeddings, skipped)
        if self.reward_functions:
            columns = [column for column in rows.column_names if column not in ("prompt", *COLUMNS)]
            for prompts in self._given_prompts(store):
                self._check_rewards(prompts, columns)
        if store is None and not set(IDS) <= set(rows.column_names):
            self._check_given_lengths(rows)

    def _given_prompts(self, store: RolloutStore | None) -> Iterator[list]:
        if store is None:
            yield from (prompts for _, prompts in texts_of(self.train_dataset, "prompt"))
        else:
            yield from (table["prompt"].to_pylist() for table in store.tables(("prompt",)))

    def _check_given_lengths(self, rollouts: Dataset) -> None:
        context = self.model.config.max_position_embeddings or math.inf
        texts = rollouts.select_columns(
            [name for name in ("prompt", "completion", *IDS) if name in rollouts.column_names]
        )
        for start in range(0, len(texts), BATCH):
            ids = self._given_ids(texts[start : start + BATCH], start)
            for row, (prompt, completion) in enumerate(zip(*ids), start):
                if not completion or len(prompt) + len(completion) > context:
                    raise ValueError(
                        f"Row {row} of `rollouts` has {len(prompt)} tokens in its prompt and {len(completion)} in its "
                        f"completion, which must be one or more, and fit into the context of {context} tokens. Leave it out."
                    )

    def _check_rewards(self, prompts: Sequence, columns: list[str]) -> None:
        names = ["completion_ids", "trainer_state", *LOGGERS, *columns]
        for reward in self.reward_functions:
            reward.check(prompts, names)

    def _tokenize(
        self, prompts: list, table: str = "the dataset", start: int | None = None, takes_completions: bool = True
    ) -> list[list[int]]:
        """
        The token ids of prompts.

        Args:
            prompts (`list`): the prompts.
            table (`str`, *optional*): where they come from, for messages.
            start (`int`, *optional*): the row of the first of them, if that is known.
            takes_completions (`bool`, *optional*, defaults to `True`): whether completions are drawn for them.
        """

        def place(row: int) -> str:
            return f"A row of {table}" if start is None else f"Row {start + row} of {table}"

        check_text_list(prompts, place, "prompt")
        try:
            prompt_ids = tokenize_prompts(prompts, self.processing_class, self.args.chat_template_kwargs)
        except Exception as error:  # chat templates raise errors of their own, and those of Jinja
            row = self._untokenizable(prompts)
            raise ValueError(
                f"{place(row)} has the prompt {shorten(prompts[row])}, which the tokenizer cannot take: {error}"
            ) from error
        context, room = self.model.config.max_position_embeddings, self.args.max_completion_length
        for row, ids in enumerate(prompt_ids):
            if not ids:
                raise ValueError(
                    f"{place(row)} has the prompt {prompts[row]!r}, which has no tokens. Leave such rows out."
                )
            if takes_completions and context is not None and len(ids) + room > context:
                raise ValueError(
                    f"{place(row)} has a prompt of {len(ids)} tokens, which with a completion of {room} do not fit into the "
                    f"context of {context} tokens: {str(prompts[row])[:200]!r}. Drop such prompts, or lower "
                    "`max_completion_length`."
                )
        return prompt_ids

    def _untokenizable(self, prompts: list) -> int:
        """The first prompt that cannot be tokenized."""
        for row, prompt in enumerate(prompts):
            try:
                tokenize_prompts([prompt], self.processing_class, self.args.chat_template_kwargs)
            except Exception:
                return row
        return 0

    # ---- completions ----

    def sample(self, inputs: list[dict[str, Any]], weights: torch.Tensor) -> Completions:
        """
        Draws `num_generations` completions of every prompt from the proposal, a mixture with weights of shape `(M,)`, or of
        shape `(N, M)` for weights of every completion; or else the reference.
        """
        if self.args.proposal == "mixture":
            return self._sample_from(self.model, inputs, weights)
        return self.sample_reference(inputs, self.args.num_generations)

    def sample_reference(self, inputs: list[dict[str, Any]], num_generations: int) -> Completions:
        """Draws completions of every prompt from the reference."""
        completions = self._sample_from(self.reference_policy, inputs, None, num_generations)
        completions.reference_logps = completions.pooled_logps
        return completions

    def _sample_from(
        self,
        policy: MixturePolicyModel,
        inputs: list[dict[str, Any]],
        weights: torch.Tensor | None,
        num_generations: int | None = None,
    ) -> Completions:
        args, hidden = self.args, self.args.disable_tqdm or not self.is_world_process_zero()
        num_generations = num_generations or args.num_generations
        count = len(inputs) * num_generations
        with drawing_bar(count, args.max_completion_length, self._eos_token_ids, hidden) as on_token:
            return sample_completions(
                policy,
                self._tokenize([example["prompt"] for example in inputs]),
                num_generations=num_generations,
                max_completion_length=args.max_completion_length,
                pad_token_id=self.processing_class.pad_token_id,
                eos_token_id=self._eos_token_ids,
                temperature=args.temperature,
                mixture_weights=weights,
                with_normalizers=self.problem.is_decoded and policy is self.model,
                on_token=on_token,
            )

    def _given_completions(self, inputs: list[dict[str, Any]]) -> Completions:
        """The completions of a dataset. Texts are tokenized, and the end token is added."""
        ids = self._given_ids(columns_of(inputs))
        return pad_completions(*ids, self.processing_class.pad_token_id, self.model.device)

    def _given_ids(self, known: dict[str, list], start: int | None = None) -> tuple[list[list[int]], list[list[int]]]:
        if "prompt_ids" in known:
            prompt_ids = known["prompt_ids"]
        else:
            prompt_ids = self._tokenize(known["prompt"], "`rollouts`", start, takes_completions=False)
        if "completion_ids" in known:
            return prompt_ids, known["completion_ids"]
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in known["completion"]]
        encoded = self.processing_class(text=texts, add_special_tokens=False)["input_ids"]
        end = [self.processing_class.eos_token_id] if self.processing_class.eos_token_id is not None else []
        return prompt_ids, [ids + end for ids in encoded]

    def _known_rewards(self, known: dict[str, list] | None) -> torch.Tensor | None:
        rewards = known.get("rewards", [None]) if known else [None]
        if self.args.objective != "implicit" and not self.reward_functions and None in rewards:
            raise ValueError(
                f"The rewards of {self.objective_names} are not all known from the rollouts. Pass `reward_funcs`."
            )
        return None if self.reward_functions or None in rewards else torch.tensor(rewards, dtype=torch.float64)

    # ---- their scores ----

    @functools.cached_property
    def policy_scorer(self) -> CompletionScorer:
        """Scores completions under every policy."""
        return CompletionScorer(self.policy_models)

    @functools.cached_property
    def reference_scorer(self) -> CompletionScorer:
        """Scores completions under the reference policy."""
        return CompletionScorer([self.reference_policy])

    def policy_logps(self, completions: Completions) -> torch.Tensor:
        """Log-probabilities under every policy, shape `(N, K)`: recorded while sampling, or computed."""
        if completions.policy_logps is None:
            completions.policy_logps = self.policy_scorer.logps(completions, self.args.logps_batch_size)
        return completions.policy_logps

    def mixture_logps(
        self, completions: Completions, mixtures: Sequence[Sequence[float]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities under every policy, shape `(N, K)`, and under S token-level mixtures of them, shape `(N, S)`."""
        return self.policy_scorer.mixture_logps(
            completions, mixtures, self.args.temperature, self.args.logps_batch_size
        )

    def normalizers(self, completions: Completions, weights: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities under every policy, shape `(N, K)`, and the normalizers around given weights, `(N, E)`."""
        return self.policy_scorer.normalizers(completions, weights, self.args.temperature, self.args.logps_batch_size)

    def reference_logps(self, completions: Completions) -> torch.Tensor:
        """Log-probabilities under the reference policy, shape `(N,)`: recorded while sampling, or computed."""
        if completions.reference_logps is None:
            known = completions.policy_logps
            if known is not None and known.shape[-1] > self.problem.num_objectives:  # the mixture's last component
                completions.reference_logps = known[:, -1]
            else:
                scores = self.reference_scorer.logps(completions, self.args.logps_batch_size)
                completions.reference_logps = scores[:, 0]
        return completions.reference_logps

    def reference_proposal_logps(self, completions: Completions) -> torch.Tensor:
        """Log-probabilities of completions when they are drawn from the reference policy at `args.temperature`, `(N,)`."""
        args = self.args
        _, logps = self.reference_scorer.mixture_logps(completions, [[1.0]], args.temperature, args.logps_batch_size)
        return logps[:, 0]

    def score_rewards(
        self, inputs: list[dict[str, Any]], completions: Completions, objectives: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Rewards of every completion, of all objectives or of `objectives`: shape `(N, K)`, float64, on the CPU."""
        repeated = self._repeated(inputs, completions)
        prompts, completion_ids = [example["prompt"] for example in repeated], completions.id_lists()
        texts = completion_texts(completions, prompts, self.processing_class)
        # a column of a prompt dataset may have the name of one of the store, and is still the user's own
        left_out = ("prompt", *COLUMNS) if self._is_given else NOT_PASSED
        columns = {name: [e[name] for e in repeated] for name in repeated[0] if name not in left_out}
        columns |= {"completion_ids": completion_ids, "trainer_state": self.state}
        columns |= {"log_metric": self._log_users_metric, "log_extra": self._log_extra}
        functions = self.reward_functions if objectives is None else [self.reward_functions[k] for k in objectives]
        rewards = [reward(prompts, texts, **columns) for reward in functions]
        return torch.stack(rewards, dim=-1).double().cpu()

    # ---- what reward functions log ----

    @functools.cached_property
    def _users_metrics(self) -> dict[str, list[float]]:
        return defaultdict(list)

    def _log_users_metric(self, name: str, value: float) -> None:
        self._users_metrics[name].append(float(value))

    def _log_extra(self, column: str, values: Sequence) -> None:
        logger.warning_once(
            f"`log_extra` of the column {column!r} has no effect, as no table of completions is logged. Use `log_metric` for "
            "numbers; prompts and completions are in the folder `_rollouts`."
        )

    def _record_users_metrics(self, mode: str) -> None:
        """Records what reward functions have passed to `log_metric` since the last call, in some processes or in all."""
        for name in sorted(set(gather_object(list(self._users_metrics)))):
            values = gather_object(self._users_metrics[name])
            self._metrics[mode][name].append(sum(values) / len(values))
        self._users_metrics.clear()

    def _repeated(self, inputs: list[dict[str, Any]], completions: Completions) -> list[dict[str, Any]]:
        """The example that every completion belongs to."""
        return [example for example in inputs for _ in range(len(completions) // len(inputs))]


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list]:
    """Rows of a dataset as a dictionary of lists."""
    return {name: [row[name] for row in rows] for name in rows[0]}
