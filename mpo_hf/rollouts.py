"""Sampling completions from a policy, and their log-probabilities under every policy of a mixture."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from trl import is_conversational

from .modeling_mixture import MixturePolicyModel
from .pooling import log_linear_pool


@dataclass
class Completions:
    """
    Completions of a batch of prompts, m for each, those of one prompt adjacent. N = P * m rows.

    Args:
        prompt_ids (`torch.LongTensor` of shape `(N, prompt_length)`): prompts, padded on the left.
        prompt_mask (`torch.LongTensor` of shape `(N, prompt_length)`): 0 for padding.
        completion_ids (`torch.LongTensor` of shape `(N, completion_length)`): completions, padded on the right.
        completion_mask (`torch.LongTensor` of shape `(N, completion_length)`): 1 up to and including the end token.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor

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
    longest = max(len(ids) for ids in prompt_ids)
    padded = torch.full((len(prompt_ids), longest), pad_token_id)
    mask = torch.zeros_like(padded)
    for row, ids in enumerate(prompt_ids):
        padded[row, longest - len(ids) :] = torch.as_tensor(ids)
        mask[row, longest - len(ids) :] = 1
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
    with _generation_config(policy, config):
        sequences = policy.generate(padded, attention_mask=mask, **kwargs)
    completion_ids = sequences[:, longest:]
    return Completions(
        padded.repeat_interleave(num_generations, 0),
        mask.repeat_interleave(num_generations, 0),
        completion_ids,
        _mask_after_end(completion_ids, eos_token_id),
    )


def _mask_after_end(completion_ids: torch.Tensor, eos_token_id: int | Sequence[int] | None) -> torch.Tensor:
    if eos_token_id is None:
        return torch.ones_like(completion_ids)
    ends = torch.isin(completion_ids, torch.as_tensor(eos_token_id, device=completion_ids.device)).long()
    return (ends.cumsum(-1) - ends == 0).long()


@torch.no_grad()
def completion_logps(
    policies: Sequence[MixturePolicyModel],
    completions: Completions,
    mixture_weights: torch.Tensor | None = None,
    temperature: float = 1.0,
    batch_size: int = 8,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""
    Log-probabilities of whole completions under K policies, and under the token-level mixture of them.

    Args:
        policies (`Sequence[MixturePolicyModel]`): the policies, such as [`MixturePolicyModel.policy`] returns.
        completions ([`Completions`]): N completions.
        mixture_weights (`torch.Tensor` of shape `(K,)`, *optional*):
            Weights of the token-level mixture to score the completions under.
        temperature (`float`, *optional*, defaults to 1.0):
            Temperature of that mixture. The log-probabilities under the policies are at temperature 1.
        batch_size (`int`, *optional*, defaults to 8):
            Completions a forward pass.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: \\(\log \pi_k(y)\\) of shape `(N, K)`, and the log-probability under the
        mixture of shape `(N,)` where weights are given. Both float64, on the CPU.
    """
    logps, mixture_logps = [], []
    for chunk in completions.chunks(batch_size):
        mask = chunk.completion_mask.double().cpu()
        chunk_logps: list[torch.Tensor] = []

        def policy_logits(chunk=chunk, chunk_logps=chunk_logps, mask=mask):
            for policy in policies:
                logits = _completion_logits(policy, chunk)
                chunk_logps.append((_token_logps(logits, chunk.completion_ids) * mask).sum(-1))
                yield logits

        if mixture_weights is None:
            for _ in policy_logits():
                pass
        else:
            pooled = log_linear_pool(policy_logits(), mixture_weights.cpu()) / temperature
            mixture_logps.append((_token_logps(pooled, chunk.completion_ids) * mask).sum(-1))
        logps.append(torch.stack(chunk_logps, dim=-1))
    return torch.cat(logps), torch.cat(mixture_logps) if mixture_logps else None


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
