"""Robust Preference Selection: the best, by rewards, of completions that are drawn at neighboring mixture weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..mixture.mixture_weights import check_mixture_weights
from ..mixture.modeling_mixture import MixturePolicyModel
from ..rewards import make_reward_functions
from ..rollouts import completion_texts, eos_token_ids, sample_completions, tokenize_prompts


@dataclass
class SelectedCompletions:
    """
    What [`select_completions`] returns, for P prompts, k candidates each, and K objectives.

    Args:
        completions (`list`): the chosen completion of every prompt, in the format of the prompts.
        candidates (`list[list]`): all completions of every prompt.
        candidate_weights (`torch.Tensor` of shape `(P, k, K)`): the mixture weights of each candidate.
        rewards (`torch.Tensor` of shape `(P, k, K)`): their rewards.
        chosen (`torch.Tensor` of shape `(P,)`): index of the chosen candidate of every prompt.
    """

    completions: list[str] | list[list[dict[str, str]]]
    candidates: list[list]
    candidate_weights: torch.Tensor
    rewards: torch.Tensor
    chosen: torch.Tensor


def neighboring_weights(
    target_weights: Sequence[float] | torch.Tensor, num_neighbors: int, max_angle: float = 30.0
) -> torch.Tensor:
    """
    Draws mixture weights whose direction is within an angle of the target's.

    Directions are uniform over the part of the sphere that is within `max_angle` of the target and has no negative
    weights. They are then scaled to sum to 1.

    Args:
        target_weights (`Sequence[float]` or `torch.Tensor` of shape `(K,)`): mixture weights, on the simplex.
        num_neighbors (`int`): number of weights to draw.
        max_angle (`float`, *optional*, defaults to 30.0): largest angle to the target, in degrees.

    Returns:
        `torch.Tensor` of shape `(num_neighbors, K)`, float64, on the simplex.

    Raises:
        `ValueError`: for weights off the simplex or fewer than two, for no neighbors, and for angles of 0 or less
            or above 90.

    Example:

    ```python
    >>> from mpo_hf.decoding.preference_selection import neighboring_weights

    >>> weights = neighboring_weights([0.7, 0.2, 0.1], num_neighbors=5)
    >>> weights.shape
    torch.Size([5, 3])
    ```
    """
    target = torch.as_tensor(target_weights, dtype=torch.float64, device="cpu")
    if target.ndim != 1 or len(target) < 2:
        raise ValueError(f"`target_weights` must be two weights or more, for all prompts, got {target.tolist()}.")
    target = check_mixture_weights(target, len(target))
    if num_neighbors < 1:
        raise ValueError(f"`num_neighbors` must be 1 or more, got {num_neighbors}.")
    if not 0 < max_angle <= 90:
        raise ValueError(f"`max_angle` must be above 0 and at most 90 degrees, got {max_angle}.")
    axis = target / target.norm()
    directions = torch.empty(0, len(target), dtype=torch.float64)
    while len(directions) < num_neighbors:
        drawn = _draw_around(axis, math.radians(max_angle), 64 * num_neighbors)
        directions = torch.cat([directions, drawn[(drawn >= 0).all(-1)]])
    directions = directions[:num_neighbors]
    return directions / directions.sum(-1, keepdim=True)


def _draw_around(axis: torch.Tensor, radius: float, count: int) -> torch.Tensor:
    """At most `count` directions, uniform over the part of the sphere within `radius` of `axis`."""
    # Rejection sampling: the angle has density sin(angle)^(K - 2), the proposal angle^(K - 2).
    angles = radius * torch.rand(count, 1, dtype=torch.float64) ** (1 / (len(axis) - 1))
    kept = torch.rand_like(angles) < torch.sinc(angles / math.pi) ** (len(axis) - 2)
    sideways = torch.randn(count, len(axis), dtype=torch.float64)
    sideways = sideways - (sideways @ axis)[:, None] * axis
    sideways = sideways / sideways.norm(dim=-1, keepdim=True)
    return (angles.cos() * axis + angles.sin() * sideways)[kept.squeeze(1)]


def select_completions(
    model: MixturePolicyModel,
    prompts: Sequence[str | list[dict[str, str]]],
    processing_class: PreTrainedTokenizerBase,
    reward_funcs: Any,
    target_weights: Sequence[float] | torch.Tensor | None = None,
    num_neighbors: int = 5,
    max_angle: float = 30.0,
    max_completion_length: int = 256,
    temperature: float = 1.0,
    **columns: list,
) -> SelectedCompletions:
    r"""
    [Robust Preference Selection](https://huggingface.co/papers/2510.20498) (Mao et al., 2025): draws a completion at each
    of k mixture weights around the target, and returns the one with the highest weighted reward,
    \\(\arg\max_j \sum_k \lambda_k r_k(y_j)\\).

    The neighbors are drawn by [`neighboring_weights`], for each prompt separately. The paper has two objectives; its
    authors' code takes the k directions next to the target from a grid of 5 degrees.

    Args:
        model ([`MixturePolicyModel`]): the mixture, of K policies.
        prompts (`Sequence`): P prompts, in TRL's plain (a string) or conversational (a list of messages) format.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): the tokenizer.
        reward_funcs: K reward functions in the order of the policies, as [`MPOTrainer`] takes them.
        target_weights (`Sequence[float]`, *optional*): weights of the objectives. Defaults to the model's own.
        num_neighbors (`int`, *optional*, defaults to 5): candidates per prompt, k.
        max_angle (`float`, *optional*, defaults to 30.0): largest angle to the target, in degrees.
        max_completion_length (`int`, *optional*, defaults to 256): longest completion, in tokens.
        temperature (`float`, *optional*, defaults to 1.0): sampling temperature.
        columns (`list`): further columns for the reward functions, a value for each prompt.

    Returns:
        [`SelectedCompletions`]

    Raises:
        `ValueError`: when there are not as many reward functions as policies, and as [`neighboring_weights`].
    """
    target = check_mixture_weights(
        model.mixture_weights if target_weights is None else target_weights, len(model.policies)
    )
    weights = torch.stack([neighboring_weights(target, num_neighbors, max_angle) for _ in prompts])
    rewards = make_reward_functions(reward_funcs, device=model.device)
    if len(rewards) != len(target):
        raise ValueError(
            f"Got {len(rewards)} reward functions for {len(target)} policies: give one for each, in order."
        )
    repeated = [prompt for prompt in prompts for _ in range(num_neighbors)]
    completions = sample_completions(
        model,
        tokenize_prompts(repeated, processing_class),
        num_generations=1,
        max_completion_length=max_completion_length,
        pad_token_id=processing_class.pad_token_id,
        eos_token_id=eos_token_ids(model, processing_class),
        temperature=temperature,
        mixture_weights=weights.flatten(0, 1),
    )
    ids = completions.id_lists()
    texts = completion_texts(completions, prompts, processing_class)
    columns = {name: [v for v in values for _ in range(num_neighbors)] for name, values in columns.items()}
    table = torch.stack([reward(repeated, texts, completion_ids=ids, **columns) for reward in rewards], dim=-1)
    table = table.view(weights.shape)
    chosen = (table @ target).argmax(-1)
    candidates = [texts[start : start + num_neighbors] for start in range(0, len(texts), num_neighbors)]
    return SelectedCompletions(
        completions=[texts[chosen_] for texts, chosen_ in zip(candidates, chosen.tolist())],
        candidates=candidates,
        candidate_weights=weights,
        rewards=table,
        chosen=chosen,
    )
