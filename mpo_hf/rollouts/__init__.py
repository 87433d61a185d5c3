"""Completions: sampled, scored under every policy, and kept."""

from .sampling import (
    Completions,
    completion_logps,
    completion_texts,
    eos_token_ids,
    mixture_logps,
    pad_completions,
    pad_ids,
    sample_completions,
    tokenize_prompts,
)
from .store import RolloutStore


__all__ = [
    "Completions",
    "RolloutStore",
    "completion_logps",
    "completion_texts",
    "eos_token_ids",
    "mixture_logps",
    "pad_completions",
    "pad_ids",
    "sample_completions",
    "tokenize_prompts",
]
