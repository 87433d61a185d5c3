"""Weights of a mixture: the check that they lie on the simplex, and the pruning of small ones."""

from collections.abc import Sequence
from typing import Any

import torch

from .config_schema import shown


# How far the sum of weights on the simplex may be from 1: rounding, as of numbers written with four digits.
WEIGHT_SUM_TOLERANCE = 1e-4


def check_mixture_weights(
    weights: Sequence[float] | torch.Tensor, num_components: int, allow_off_simplex: bool = False
) -> torch.Tensor:
    """
    Checks mixture weights, and divides them by their sum, which may differ from 1 by rounding.

    Args:
        weights (`Sequence[float]` or `torch.Tensor`):
            Weights of shape `(K,)`, or `(batch_size, K)` for weights by row.
        num_components (`int`):
            The number K of components.
        allow_off_simplex (`bool`, *optional*, defaults to `False`):
            Whether weights may be negative and have any sum, as decoding-time realignment and contrastive decoding
            need. They are then returned as they are.

    Returns:
        `torch.Tensor`: the weights in float64, on the CPU.

    Raises:
        `ValueError`: when there are not K of them, one is not finite, all are zero, or they are off the simplex by more
        than 1e-4.
    """
    try:
        if _has_truth_values(weights):
            raise TypeError("True and False are no weights")
        checked = torch.as_tensor(weights, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as err:
        raise ValueError(f"Mixture weights must be numbers, one a component, got {shown(weights)}.") from err
    if checked.ndim not in (1, 2) or checked.shape[-1] != num_components:
        raise ValueError(
            f"Expected {num_components} mixture weights, one a component: shape ({num_components},), or (batch_size, "
            f"{num_components}) for weights by row. Got shape {tuple(checked.shape)}: {shown(weights)}."
        )
    if not torch.isfinite(checked).all():
        raise ValueError(f"Mixture weights must be finite, got {shown(checked.tolist())}.")
    if (checked == 0).all(-1).any():
        raise ValueError(f"Mixture weights must not all be zero, got {shown(checked.tolist())}.")
    if allow_off_simplex:
        return checked
    sums = checked.sum(-1, keepdim=True)
    if not _is_on_simplex(checked):
        raise ValueError(
            f"Mixture weights must be >= 0 and sum to 1 (within {WEIGHT_SUM_TOLERANCE}), got {shown(checked.tolist())} with "
            f"sum {shown(sums.squeeze(-1).tolist())}. Divide them by their sum, or pass `allow_off_simplex=True` if you mean "
            "to extrapolate."
        )
    return checked / sums


def prune_mixture_weights(weights: Sequence[float] | torch.Tensor, below: float) -> torch.Tensor:
    r"""
    Sets small mixture weights to zero, and divides the others by what is left of their sum.

    A component of weight zero does not run, so that the cost of a mixture is that of its remaining components. The
    pruned mixture \(\pi'\) is close to the mixture π of all components: at every token
    \(\mathrm{KL}(\pi' \| \pi) \le \sum_k \lambda_k \mathrm{KL}(\pi' \| \pi_k)\), summed over the pruned components.

    Args:
        weights (`Sequence[float]` or `torch.Tensor`):
            Weights on the simplex, of shape `(K,)`, or `(batch_size, K)`, where each row is pruned separately.
        below (`float`):
            Weights below this are pruned. From 0 to 1/K, so that the largest always remains.

    Returns:
        `torch.Tensor`: the weights in float64, on the CPU.

    Raises:
        `ValueError`: for weights off the simplex, and when `below` is negative or more than 1/K.

    Example:

    ```python
    >>> from mpo_hf.mixture.mixture_weights import prune_mixture_weights

    >>> prune_mixture_weights([0.6, 0.39, 0.01], below=0.02)
    tensor([0.6061, 0.3939, 0.0000], dtype=torch.float64)
    ```
    """
    count = torch.as_tensor(weights).shape[-1]
    checked = check_mixture_weights(weights, count, allow_off_simplex=True)
    if not _is_on_simplex(checked):
        raise ValueError(f"Weights are pruned on the simplex (>= 0, with sum 1) only, got {shown(checked.tolist())}.")
    if not isinstance(below, int | float) or not 0 <= below <= 1 / count:
        raise ValueError(f"`prune_below` must be from 0 to 1/{count} for {count} components, got {below!r}.")
    kept = checked.masked_fill(checked < checked.amax(-1, keepdim=True).clamp(max=below), 0)
    return kept / kept.sum(-1, keepdim=True)


def _has_truth_values(weights: Any) -> bool:
    if isinstance(weights, torch.Tensor):
        return weights.dtype == torch.bool
    rows = weights if isinstance(weights, list | tuple) else []
    return any(isinstance(row, bool) or (isinstance(row, list | tuple) and _has_truth_values(row)) for row in rows)


def _is_on_simplex(weights: torch.Tensor) -> bool:
    off = (weights < 0).any() or ((weights.sum(-1) - 1).abs() > WEIGHT_SUM_TOLERANCE).any()
    return not off
