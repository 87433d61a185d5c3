"""Sampling completions from a policy, and their log-probabilities under every policy of a mixture."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase
from trl import is_conversational

from .modeling_mixture import MixturePolicyModel
from .pooling import log_linear_pool


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
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    pooled_logps: torch.Tensor
    proposal_logps: torch.Tensor

    def __len__(self) -> int:
        return len(self.completion_ids)

    def id_lists(self) -> list[list[int]]:
        """Token ids of every completion, without padding."""
        return [ids[mask].tolist() for ids, mask in zip(self.completion_ids, self.completion_mask.bool())]

    def chunks(self, size: int) -> "Iterator[Completions]":
        """The same completions, at most `size` rows at a time."""
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            yield Completions(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


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
        self._pooled: list[torch.Tensor] = []
        self._proposal: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._take(input_ids[:, -1])
        self._scores = scores
        return scores

    def _take(self, tokens: torch.LongTensor) -> None:
        if self._scores is None:
            return
        chosen = self._scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        self._pooled.append(chosen)
        self._proposal.append(chosen / self.temperature - torch.logsumexp(self._scores / self.temperature, dim=-1))

    def finish(self, sequences: torch.LongTensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over the tokens of every completion; `mask` of shape `(N, completion_length)`."""
        self._take(sequences[:, -1])
        sums = [(torch.stack(logps, -1).double() * mask).sum(-1) for logps in (self._pooled, self._proposal)]
        return sums[0].cpu(), sums[1].cpu()


@contextmanager
def _generation_config(model: MixturePolicyModel, config: GenerationConfig) -> Iterator[None]:
    """Replaces the model's own generation config: what it holds would otherwise fill in what ours leaves open."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


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
        mixture_weights (`torch.Tensor` of shape `(K,)`, *optional*): weights instead of the policy's own.

    Returns:
        [`Completions`] of N = P * m rows.
    """
    padded, mask = pad_ids(prompt_ids, pad_token_id, left=True)
    longest = padded.shape[1]
    padded, mask = padded.to(policy.device), mask.to(policy.device)
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        max_new_tokens=max_completion_length,
        num_return_sequences=num_generations,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
    )
    kwargs = {} if mixture_weights is None else {"mixture_weights": mixture_weights}
    recorder = _LogpsRecorder(temperature)
    with _generation_config(policy, config):
        sequences = policy.generate(padded, attention_mask=mask, logits_processor=[recorder], **kwargs)
    completion_ids = sequences[:, longest:]
    completion_mask = _mask_after_end(completion_ids, eos_token_id)
    return Completions(
        padded.repeat_interleave(num_generations, 0),
        mask.repeat_interleave(num_generations, 0),
        completion_ids,
        completion_mask,
        *recorder.finish(sequences, completion_mask),
    )


def _mask_after_end(completion_ids: torch.Tensor, eos_token_id: int | Sequence[int] | None) -> torch.Tensor:
    if eos_token_id is None:
        return torch.ones_like(completion_ids)
    ends = torch.isin(completion_ids, torch.as_tensor(eos_token_id, device=completion_ids.device)).long()
    return (ends.cumsum(-1) - ends == 0).long()


@torch.no_grad()
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
    logps = []
    for chunk in completions.chunks(batch_size):
        mask = chunk.completion_mask.double().cpu()
        token_logps = (_token_logps(_completion_logits(policy, chunk), chunk.completion_ids) for policy in policies)
        logps.append(torch.stack([(logps * mask).sum(-1) for logps in token_logps], dim=-1))
    return torch.cat(logps)


@torch.no_grad()
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
    weights = torch.tensor(mixtures, dtype=torch.float64).reshape(-1, len(policies))
    policy_logps, pooled_logps = [], []
    for chunk in completions.chunks(batch_size):
        mask = chunk.completion_mask.double().cpu()
        ids = chunk.completion_ids
        logits = [_completion_logits(policy, chunk) for policy in policies]
        pooled = (log_linear_pool(logits, row) / temperature for row in weights)
        for found, rows in ((policy_logps, logits), (pooled_logps, pooled)):
            sums = [(_token_logps(row, ids) * mask).sum(-1) for row in rows]
            found.append(torch.stack(sums, dim=-1) if sums else mask.new_zeros(len(ids), 0))
    return torch.cat(policy_logps), torch.cat(pooled_logps)


def _completion_logits(policy: MixturePolicyModel, chunk: Completions) -> torch.Tensor:
    """Logits that predict each token of the completions, shape `(rows, completion_length, vocab_size)`."""
    length = chunk.completion_ids.shape[1]
    logits = policy(
        input_ids=torch.cat([chunk.prompt_ids, chunk.completion_ids], dim=1),
        attention_mask=torch.cat([chunk.prompt_mask, chunk.completion_mask], dim=1),
        use_cache=False,
        logits_to_keep=length + 1,
    ).logits
    return logits[:, -length - 1 : -1]


def _token_logps(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    ids = ids.to(logits.device).unsqueeze(-1)
    return (logits.gather(-1, ids).squeeze(-1) - torch.logsumexp(logits, dim=-1)).double().cpu()
