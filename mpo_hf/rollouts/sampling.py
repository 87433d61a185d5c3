"""Sampling completions from a policy, and their log-probabilities under every policy of a mixture."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase
from trl import is_conversational

from ..mixture.compat import CACHE_NAME
from ..mixture.modeling_mixture import MixturePolicyModel
from .scoring import CompletionScorer, read_prompts, sum_over_tokens, token_logps


@dataclass
class Completions:
    r"""
    Completions of a batch of prompts, m for each, those of one prompt adjacent. N = P * m rows.

    Args:
        prompt_ids (`torch.LongTensor` of shape `(N, prompt_length)`): prompts, padded on the left.
        prompt_mask (`torch.LongTensor` of shape `(N, prompt_length)`): 0 for padding.
        completion_ids (`torch.LongTensor` of shape `(N, completion_length)`): completions, padded on the right.
        completion_mask (`torch.LongTensor` of shape `(N, completion_length)`): 1 up to and including the end token.
        pooled_logps (`torch.Tensor` of shape `(N,)`):
            \\(\sum_k \lambda_k \log \pi_k(y)\\) of whole completions, at temperature 1. For a single policy its log-probability.
        proposal_logps (`torch.Tensor` of shape `(N,)`):
            Log-probability of whole completions under the distribution that they were drawn from. The difference of the
            two is the exact log importance weight from token-level sampling to the sequence-level mixture.
        policy_logps (`torch.Tensor` of shape `(N, K)`, *optional*):
            \\(\log \pi_k(y)\\) of whole completions under every component of the mixture that drew them, where decoding
            has run them all.
        reference_logps (`torch.Tensor` of shape `(N,)`, *optional*):
            Log-probability of whole completions under the reference policy, where it is known.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    pooled_logps: torch.Tensor
    proposal_logps: torch.Tensor
    policy_logps: torch.Tensor | None = None
    reference_logps: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.completion_ids)

    def select(self, rows: Sequence[int]) -> "Completions":
        """Some of the completions."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return Completions(**{name: column if column is None else column[rows] for name, column in columns.items()})

    def id_lists(self) -> list[list[int]]:
        """Token ids of every completion, without padding."""
        return [ids[mask].tolist() for ids, mask in zip(self.completion_ids, self.completion_mask.bool())]


def tokenize_prompts(
    prompts: Sequence[str | list[dict[str, str]]],
    processing_class: PreTrainedTokenizerBase,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[list[int]]:
    """
    Token ids of prompts, in TRL's plain (a string) or conversational (a list of messages) format.

    Args:
        prompts (`Sequence`): the prompts.
        processing_class (`PreTrainedTokenizerBase`): the tokenizer. Conversations go through its chat template.
        chat_template_kwargs (`dict`, *optional*): further arguments for the chat template.

    Returns:
        `list[list[int]]`: token ids, without padding.
    """
    if is_conversational({"prompt": prompts[0]}):
        encoded = processing_class.apply_chat_template(
            list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
        )
    else:
        encoded = processing_class(text=list(prompts))
    return encoded["input_ids"]


def eos_token_ids(model: MixturePolicyModel, processing_class: PreTrainedTokenizerBase) -> list[int] | None:
    """All tokens that end a completion: the tokenizer's, and those of the model's generation config."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    ids = {i for i in [*ids, processing_class.eos_token_id] if i is not None}
    return sorted(ids) or None


def completion_texts(
    completions: Completions,
    prompts: Sequence[str | list[dict[str, str]]],
    processing_class: PreTrainedTokenizerBase,
) -> list[str] | list[list[dict[str, str]]]:
    """
    Completions as reward functions take them: texts, or conversations of one message where the prompts are conversations.

    Args:
        completions ([`Completions`]): N completions.
        prompts (`Sequence`): the prompts, of which the first one tells the format.
        processing_class (`PreTrainedTokenizerBase`): the tokenizer.
    """
    texts = processing_class.batch_decode(completions.id_lists(), skip_special_tokens=True)
    if is_conversational({"prompt": prompts[0]}):
        return [[{"role": "assistant", "content": text}] for text in texts]
    return texts


def pad_ids(rows: Sequence[Sequence[int]], pad_token_id: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids as one tensor, padded on the left or on the right, and its mask: both of shape `(N, longest)`."""
    longest = max(1, *map(len, rows))
    ids = torch.full((len(rows), longest), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, values in enumerate(rows):
        at = slice(longest - len(values), None) if left else slice(0, len(values))
        ids[row, at], mask[row, at] = torch.as_tensor(values, dtype=torch.long), 1
    return ids, mask


def pad_completions(
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    pad_token_id: int,
    device: torch.device | str,
) -> Completions:
    """Completions that were sampled before, as [`~mpo_hf.rollouts.completion_logps`] takes them."""
    padded = [*pad_ids(prompt_ids, pad_token_id, left=True), *pad_ids(completion_ids, pad_token_id, left=False)]
    unknown = torch.full((len(prompt_ids),), torch.nan, dtype=torch.float64)
    return Completions(*(tensor.to(device) for tensor in padded), pooled_logps=unknown, proposal_logps=unknown)


class _LogpsRecorder(LogitsProcessor):
    """
    Log-probabilities of the tokens that are drawn, from the logits that decoding computes anyway.

    A processor of the user's sees the scores before temperature acts on them, and each step's token only in the next
    step; the last one comes with [`~_LogpsRecorder.finish`].
    """

    def __init__(self, temperature: float):
        self.temperature = temperature
        self._scores: torch.Tensor | None = None
        # logits of components: those of the step that comes, and those that the next token is drawn from
        self._seen: dict[int, torch.Tensor] = {}
        self._components: dict[int, torch.Tensor] = {}
        self._pooled: list[torch.Tensor] = []
        self._proposal: list[torch.Tensor] = []
        self._by_component: list[dict[int, torch.Tensor]] = []

    def watch(self, active: Sequence[int], logits: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Passes on the logits of components, as the hook of a mixture."""
        for k, component_logits in zip(active, logits):
            self._seen[k] = component_logits[:, -1]
            yield component_logits

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._take(input_ids[:, -1])
        self._scores = scores
        self._components, self._seen = self._seen, {}
        return scores

    def _take(self, tokens: torch.LongTensor) -> None:
        if self._scores is None:
            return
        # rows that have ended go on with padding, which may be an id that no policy knows
        tokens = tokens.clamp(max=self._scores.shape[-1] - 1)
        self._pooled.append(self._scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1))
        self._proposal.append(token_logps([self._scores / self.temperature], tokens))
        self._by_component.append({k: token_logps([logits], tokens) for k, logits in self._components.items()})

    def finish(self, sequences: torch.LongTensor, mask: torch.Tensor, count: int) -> dict[str, torch.Tensor]:
        """Sums over the tokens of every completion of a mixture of `count`; `mask` of shape `(N, completion_length)`."""
        self._take(sequences[:, -1])
        sums = {"pooled_logps": _sum(self._pooled, mask), "proposal_logps": _sum(self._proposal, mask)}
        if all(len(step) == count for step in self._by_component):
            by_component = [_sum([step[k] for step in self._by_component], mask) for k in range(count)]
            sums["policy_logps"] = torch.stack(by_component, dim=-1)
        return sums


def _sum(steps: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    return sum_over_tokens(torch.stack([logps.to(mask.device) for logps in steps], dim=-1), mask)


@contextmanager
def _generation_config(model: MixturePolicyModel, config: GenerationConfig) -> Iterator[None]:
    """Replaces the model's own generation config: what it holds would otherwise fill in what ours leaves open."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _component_hook(model: MixturePolicyModel, hook: Callable) -> Iterator[None]:
    """Lets a hook see the logits of a mixture's components."""
    model.component_hook = hook if len(model.policies) > 1 else None
    try:
        yield
    finally:
        model.component_hook = None


@torch.no_grad()
def sample_completions(
    policy: MixturePolicyModel,
    prompt_ids: Sequence[Sequence[int]],
    num_generations: int,
    max_completion_length: int,
    pad_token_id: int,
    eos_token_id: int | Sequence[int] | None = None,
    temperature: float = 1.0,
    mixture_weights: torch.Tensor | None = None,
) -> Completions:
    """
    Draws completions by plain multinomial sampling: no top-k, no top-p, no penalties, whatever the model's own
    generation config says, so that the log-probability of each is known exactly.

    Args:
        policy ([`MixturePolicyModel`]): the policy to draw from.
        prompt_ids (`Sequence[Sequence[int]]`): token ids of P prompts.
        num_generations (`int`): completions a prompt, m.
        max_completion_length (`int`): longest completion, in tokens.
        pad_token_id (`int`): token id to pad with.
        eos_token_id (`int` or `Sequence[int]`, *optional*): token ids that end a completion.
        temperature (`float`, *optional*, defaults to 1.0): sampling temperature.
        mixture_weights (`torch.Tensor` of shape `(K,)` or `(P, K)`, *optional*):
            Weights instead of the policy's own, for all prompts or for each.

    Returns:
        [`Completions`] of N = P * m rows.
    """
    padded, mask = (tensor.to(policy.device) for tensor in pad_ids(prompt_ids, pad_token_id, left=True))
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        max_new_tokens=max_completion_length,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
    )
    kwargs = {} if mixture_weights is None else {"mixture_weights": mixture_weights}
    if num_generations > 1:
        cache = read_prompts(policy, padded, mask, **kwargs)
        if cache is not None:
            cache.batch_repeat_interleave(num_generations)
            kwargs[CACHE_NAME] = cache
        padded, mask = (tensor.repeat_interleave(num_generations, 0) for tensor in (padded, mask))
        if mixture_weights is not None and mixture_weights.ndim == 2:
            kwargs["mixture_weights"] = mixture_weights.repeat_interleave(num_generations, 0)
    recorder = _LogpsRecorder(temperature)
    with _generation_config(policy, config), _component_hook(policy, recorder.watch):
        sequences = policy.generate(padded, attention_mask=mask, logits_processor=[recorder], **kwargs)
    completion_ids = sequences[:, padded.shape[1] :]
    completion_mask = _mask_after_end(completion_ids, eos_token_id)
    logps = recorder.finish(sequences, completion_mask, len(policy.policies))
    return Completions(padded, mask, completion_ids, completion_mask, **logps)


def _mask_after_end(completion_ids: torch.Tensor, eos_token_id: int | Sequence[int] | None) -> torch.Tensor:
    if eos_token_id is None:
        return torch.ones_like(completion_ids)
    ends = torch.isin(completion_ids, torch.as_tensor(eos_token_id, device=completion_ids.device)).long()
    return (ends.cumsum(-1) - ends == 0).long()


def completion_logps(
    policies: Sequence[MixturePolicyModel], completions: Completions, batch_size: int = 8
) -> torch.Tensor:
    r"""
    Log-probabilities of whole completions under K policies.

    Args:
        policies (`Sequence[MixturePolicyModel]`): the policies, such as [`MixturePolicyModel.policy`] returns.
        completions ([`Completions`]): N completions.
        batch_size (`int`, *optional*, defaults to 8): completions a forward pass.

    Returns:
        `torch.Tensor`: \\(\log \pi_k(y)\\) of shape `(N, K)`, float64, on the CPU.
    """
    return CompletionScorer(policies).logps(completions, batch_size)


def mixture_logps(
    policies: Sequence[MixturePolicyModel],
    completions: Completions,
    mixtures: Sequence[Sequence[float]],
    temperature: float = 1.0,
    batch_size: int = 8,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Log-probabilities of whole completions under K policies, and under S token-level mixtures of them, in one pass of
    each policy.

    Args:
        policies (`Sequence[MixturePolicyModel]`): the policies, such as [`MixturePolicyModel.policy`] returns.
        completions ([`Completions`]): N completions.
        mixtures (`Sequence[Sequence[float]]`): the mixture weights of each mixture, S of K.
        temperature (`float`, *optional*, defaults to 1.0): temperature that the mixtures are sampled at.
        batch_size (`int`, *optional*, defaults to 8): completions a forward pass.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: \\(\log \pi_k(y)\\) of shape `(N, K)`, and the log-probability of y when
        it is drawn from each mixture, of shape `(N, S)`; float64, on the CPU.
    """
    return CompletionScorer(policies).mixture_logps(completions, mixtures, temperature, batch_size)
