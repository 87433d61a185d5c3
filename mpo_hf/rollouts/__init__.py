"""Completions: sampled, scored under every policy, and kept."""

from .completions import (
    Completions,
    completion_texts,
    eos_token_ids,
    pad_completions,
    pad_ids,
    tokenize_prompts,
)
from .sampling import sample_completions
from .scoring import completion_logps, mixture_logps
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
