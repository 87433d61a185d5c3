"""The completions of a step, drawn or given, with their log-probabilities and rewards."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from ..mixture.modeling_mixture import MixturePolicyModel
from ..rewards.functions import given_rewards
from ..rollouts import Completions, completion_texts, pad_completions, sample_completions, tokenize_prompts
from ..rollouts.scoring import CompletionScorer
from ..rollouts.store import COLUMNS
from .mpo_config import MPOConfig
from .progress import drawing_bar


class CompletionSampling:
    """The part of [`MPOTrainer`] that draws completions, or reads given ones, and scores them."""

    args: MPOConfig
    model: MixturePolicyModel

    # ---- prompts ----

    def _check_prompt_lengths(self, dataset: Dataset | IterableDataset) -> None:
        """Raises an error for prompts that leave no room for a completion, before anything is sampled."""
        if not isinstance(dataset, IterableDataset):
            for start in range(0, len(dataset), 1000):
                self._tokenize(dataset[start : start + 1000]["prompt"])

    def _tokenize(self, prompts: list) -> list[list[int]]:
        prompt_ids = tokenize_prompts(prompts, self.processing_class, self.args.chat_template_kwargs)
        context = self.model.config.max_position_embeddings
        for prompt, ids in zip(prompts, prompt_ids):
            if not ids:
                raise ValueError(f"The prompt {prompt!r} has no tokens.")
            if context is not None and len(ids) + self.args.max_completion_length > context:
                raise ValueError(
                    f"A prompt of {len(ids)} tokens and a completion of {self.args.max_completion_length} do not fit into "
                    f"the context of {context} tokens: {str(prompt)[:200]!r}. Drop such prompts, or lower "
                    "`max_completion_length`."
                )
        return prompt_ids

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
        known = columns_of(inputs)
        prompt_ids = known["prompt_ids"] if "prompt_ids" in known else self._tokenize(known["prompt"])
        if "completion_ids" in known:
            completion_ids = known["completion_ids"]
        else:
            texts = [c if isinstance(c, str) else c[-1]["content"] for c in known["completion"]]
            encoded = self.processing_class(text=texts, add_special_tokens=False)["input_ids"]
            end = [self.processing_class.eos_token_id] if self.processing_class.eos_token_id is not None else []
            completion_ids = [ids + end for ids in encoded]
        return pad_completions(prompt_ids, completion_ids, self.processing_class.pad_token_id, self.model.device)

    def _known_rewards(self, known: dict[str, list] | None) -> torch.Tensor | None:
        if self.args.objective != "implicit" and not self.reward_functions and None in known.get("rewards", [None]):
            raise ValueError(
                f"The rewards of {self.objective_names} are not all known from the rollouts. Pass `reward_funcs`."
            )
        rewards = known.get("rewards", [None]) if known else [None]
        return None if None in rewards else given_rewards(rewards, known["id"], self.objective_names)

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
        columns = {name: [e[name] for e in repeated] for name in repeated[0] if name not in ("prompt", *COLUMNS)}
        columns |= {"completion_ids": completion_ids, "trainer_state": self.state}
        functions = self.reward_functions if objectives is None else [self.reward_functions[k] for k in objectives]
        rewards = [reward(prompts, texts, **columns) for reward in functions]
        return torch.stack(rewards, dim=-1).double().cpu()

    def _repeated(self, inputs: list[dict[str, Any]], completions: Completions) -> list[dict[str, Any]]:
        """The example that every completion belongs to."""
        return [example for example in inputs for _ in range(len(completions) // len(inputs))]


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list]:
    """Rows of a dataset as a dictionary of lists."""
    return {name: [row[name] for row in rows] for name in rows[0]}
