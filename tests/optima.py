"""Toy policies that are the exact optima of bounded rewards, π_k ∝ π_ref exp(r_k/β), with all completions enumerated."""

import itertools
from collections.abc import Sequence

import torch
from toy import PROMPTS, Enumeration, enumerate_completions, toy_policy


ALL_PROMPTS = [f"{a} {b}" for a, b in itertools.product("abcdef", repeat=2)]
UNIFORM = torch.full((3,), 1 / 3, dtype=torch.float64)


def exact_optima(seed: int, beta: float, prompts: Sequence[str] = PROMPTS) -> tuple[Enumeration, torch.Tensor]:
    """An enumeration whose policies are the exact optima of rewards in [0, 1], and these rewards."""
    reference = toy_policy(1000 + seed, 0.5)
    policies = [toy_policy(10 * seed + k, 0.3, reference) for k in (1, 2, 3)]
    enumeration = enumerate_completions(policies, reference, prompts)
    ratios = enumeration.policies - enumeration.reference.unsqueeze(-1)
    rewards = torch.sigmoid(ratios / ratios.std())
    tilted = enumeration.reference.unsqueeze(-1) + rewards / beta
    enumeration.policies = tilted - tilted.logsumexp(1, keepdim=True)
    return enumeration, rewards


def population(seed: int, beta: float) -> tuple[Enumeration, torch.Tensor]:
    """The same for all thirty-six prompts of two tokens."""
    return exact_optima(seed, beta, ALL_PROMPTS)
