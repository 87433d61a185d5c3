"""What rewards must be: one finite number for every completion; and the normalization P that makes their scales comparable."""

import math
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch

from ..estimation.tables import normalize_by_prompt
from .loading import Text


class RewardError(RuntimeError):
    """An exception inside a user's reward function or template; the original is its `__cause__`."""


def validate_rewards(name: str, rewards: Any, completions: list[Text]) -> torch.Tensor:
    """
    Checks that there is one finite number for every completion. In TRL, a reward function may return `None` for "not
    applicable". Here it may not, as the worst-off objective could not be determined.

    Args:
        name (`str`): name of the objective, for the message.
        rewards (`Iterable`): what the reward function returned.
        completions (`list`): the completions that it was called with.

    Returns:
        `torch.Tensor` of shape `(len(completions),)`, float64, on CPU.

    Raises:
        `ValueError`: for anything else, with the name of the reward, the index and the completion.

    Example:

    ```python
    >>> from mpo_hf.rewards import validate_rewards

    >>> validate_rewards("length", [2, 3.5], ["Hi", "Hey"])
    tensor([2.0000, 3.5000], dtype=torch.float64)
    ```
    """
    shape = tuple(getattr(rewards, "shape", (None,)))  # a list has one dimension
    if isinstance(rewards, (str, bytes, Mapping, Set)) or not isinstance(rewards, Iterable) or len(shape) != 1:
        returned = f"shape {shape}" if len(shape) > 1 else shorten(rewards)
    else:
        values = rewards.tolist() if hasattr(rewards, "tolist") else list(rewards)
        returned = None if len(values) == len(completions) else f"{len(values)} rewards"
    if returned is not None:
        raise ValueError(
            f"The reward function {name!r} must return one number per completion, as a list, array or tensor of shape "
            f"({len(completions)},), but returned {returned}."
        )
    for index, value in enumerate(values):
        if getattr(value, "shape", None) == ():
            values[index] = value = value.item()
        values[index] = finite_number(value)
        if values[index] is None:
            raise ValueError(
                f"The reward function {name!r} returned {shorten(value)} for completion {index}, but every objective "
                "needs a finite number for every completion. Return the reward that such a completion deserves, such as "
                f"the lowest one. The completion: {shorten(completions[index])}"
            )
    return torch.tensor(values, dtype=torch.float64)


def finite_number(value: Any) -> float | None:
    """A reward as a `float`; `None` for what is not a finite number, or does not fit into a `float`."""
    try:
        return float(value) if isinstance(value, Real) and math.isfinite(value) else None
    except OverflowError:  # of an int or a fraction
        return None


def normalize_rewards(rewards: torch.Tensor, beta: float, log_weights: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    The normalization P of [Mixing Preference Optimization](https://huggingface.co/papers/2502.18699), by prompt:

    $$ P(r)_{jk} = r_{jk} - \beta \log \sum_j w_j \exp(r_{jk} / \beta) $$

    which estimates \\(r_k(x, y_j) - \beta \log E_{y \sim \pi_{ref}} \exp(r_k(x, y) / \beta)\\) from the given completions.
    It is idempotent, and does not depend on constants added to the rewards of a prompt.

    Args:
        rewards (`torch.Tensor`): shape `(prompts, m, K)`, for m completions per prompt and K objectives.
        beta (`float`): KL coefficient β, above 0.
        log_weights (`torch.Tensor`, *optional*): if the completions are drawn from another proposal q than the reference,
            \\(\log \pi_{ref}(y_j) - \log q(y_j)\\) up to a constant, of shape `(prompts, m)`;
            \\(w = \mathrm{softmax}_j\\) of them. By default \\(w_j = 1/m\\).

    Returns:
        `torch.Tensor`: P(r), of the shape of `rewards`.

    Raises:
        `ValueError`: `beta` is not above 0, or a shape is wrong.

    Example:

    ```python
    >>> import torch
    >>> from mpo_hf.rewards import normalize_rewards

    >>> normalize_rewards(torch.tensor([[[1.0], [3.0]]]), beta=1.0)
    tensor([[[-1.4338],
             [ 0.5662]]])
    ```
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"`beta` must be finite and above 0, but is {beta!r}.")
    if rewards.ndim != 3 or rewards.shape[1] == 0:
        raise ValueError(f"`rewards` must have shape (prompts, m, K) with m above 0, but has {tuple(rewards.shape)}.")
    if log_weights is None:
        log_weights = rewards.new_zeros(rewards.shape[:2])
    if log_weights.shape != rewards.shape[:2]:
        shapes = f"{tuple(rewards.shape[:2])}, but has {tuple(log_weights.shape)}"
        raise ValueError(f"`log_weights` must have shape (prompts, m), here {shapes}.")
    num_prompts, num_completions = rewards.shape[:2]
    prompt = torch.arange(num_prompts, device=rewards.device).repeat_interleave(num_completions)
    flat, log_weights = rewards.flatten(0, 1), torch.log_softmax(log_weights, dim=-1).flatten()
    return normalize_by_prompt(flat, log_weights, prompt, num_prompts, beta).view_as(rewards)


@contextmanager
def user_code(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RewardError(f"The reward function {name!r} raised {type(error).__name__}: {error}") from error


def shorten(value: Any, limit: int = 200) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print an int of more than 4,300 digits
        text = f"a number of type {type(value).__name__} that is too large to be printed"
    return text if len(text) <= limit else text[:limit] + "..."
