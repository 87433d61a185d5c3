"""Completions of a batch of prompts: their token ids, padding and texts."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from trl import is_conversational

from ..mixture.modeling_mixture import MixturePolicyModel


@dataclass
class Completions:
    r"""
    Completions of a batch of P prompts: N = P * m rows, the m completions of a prompt next to each other.

    Args:
        prompt_ids (`torch.LongTensor` of shape `(N, prompt_length)`): prompts, padded on the left.
        prompt_mask (`torch.LongTensor` of shape `(N, prompt_length)`): 0 for padding.
        completion_ids (`torch.LongTensor` of shape `(N, completion_length)`): completions, padded on the right.
        completion_mask (`torch.LongTensor` of shape `(N, completion_length)`): 1 up to and including the end token.
        pooled_logps (`torch.Tensor` of shape `(N,)`):
            \\(\sum_k \lambda_k \log \pi_k(y)\\) of whole completions, at temperature 1. For a single policy its log-probability.
        proposal_logps (`torch.Tensor` of shape `(N,)`):
            Log-probability of whole completions under the distribution that they were drawn from.
            `pooled_logps - proposal_logps` is the exact log importance weight from token-level sampling to the sequence-level
            mixture.
        policy_logps (`torch.Tensor` of shape `(N, K)`, *optional*):
            \\(\log \pi_k(y)\\) of whole completions under every component of the mixture that drew them. `None` where decoding
            has not run all components.
        reference_logps (`torch.Tensor` of shape `(N,)`, *optional*):
            Log-probability of whole completions under the reference policy, if known.
        normalizers (`torch.Tensor` of shape `(N, E)`, *optional*):
            \\(\sum_t \log Z_t\\) of whole completions to second order in the mixture weights; see
            [`~mpo_hf.estimation.LogNormalizer`], which unpacks it. NaN where it is unknown.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    pooled_logps: torch.Tensor
    proposal_logps: torch.Tensor
    policy_logps: torch.Tensor | None = None
    reference_logps: torch.Tensor | None = None
    normalizers: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.completion_ids)

    def select(self, rows: Sequence[int]) -> "Completions":
        """Some of the completions."""
        columns: dict[str, Any] = {}
        for field in fields(self):
            column = getattr(self, field.name)
            columns[field.name] = None if column is None else column[rows]
        return Completions(**columns)

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
    encoded: Any  # a dictionary of lists, whatever the annotations of Transformers say
    if is_conversational({"prompt": prompts[0]}):
        conversations: Any = list(prompts)
        encoded = processing_class.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
        )
    else:
        encoded = processing_class(text=list(prompts))
    return encoded["input_ids"]


def eos_token_ids(model: MixturePolicyModel, processing_class: PreTrainedTokenizerBase) -> list[int] | None:
    """All token ids that end a completion: the tokenizer's, and those of the model's generation config."""
    configured = model.generation_config.eos_token_id
    of_model = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*of_model, processing_class.eos_token_id] if i is not None}) or None


def completion_texts(
    completions: Completions,
    prompts: Sequence[str | list[dict[str, str]]],
    processing_class: PreTrainedTokenizerBase,
) -> list[str] | list[list[dict[str, str]]]:
    """
    Completions as reward functions take them: texts, or conversations of one message if the prompts are conversations.

    Args:
        completions ([`Completions`]): N completions.
        prompts (`Sequence`): the prompts. The first one determines the format.
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
    """
    Completions from their token ids, for [`~mpo_hf.rollouts.completion_logps`]. Their `pooled_logps` and `proposal_logps` are
    NaN.
    """
    prompts, prompt_mask = pad_ids(prompt_ids, pad_token_id, left=True)
    padded, mask = pad_ids(completion_ids, pad_token_id, left=False)
    unknown = torch.full((len(prompt_ids),), torch.nan, dtype=torch.float64)
    return Completions(
        prompts.to(device),
        prompt_mask.to(device),
        padded.to(device),
        mask.to(device),
        pooled_logps=unknown,
        proposal_logps=unknown,
    )
