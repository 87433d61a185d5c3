r"""
The exact minimum of the dual objective on a table of completions.

\\(\hat F\\) is convex (see [`~mpo_hf.estimation.tables`] for its form), so that its minimum over the weights of a
welfare function is found to any precision without drawing another sample.
"""

import torch

from .tables import DualTable, sums_by_prompt
from .welfare import MaxMin, Welfare


# Numbers (float64) in the largest tensors held at a time, 32 MB: more weightings of the prompts are processed in parts.
CHUNK_NUMEL = 4_000_000
# A direction with a slope flatter than this, relative to 1 + |F̂|, is rounding noise in float64 (epsilon 2e-16).
SLOPE_TOLERANCE = 1e-14
# Armijo's rule: the part of the decrease predicted by the slope that a step must attain (the usual value).
SUFFICIENT_DECREASE = 1e-4
# ... less the rounding error of F̂ itself, relative to it.
VALUE_TOLERANCE = 1e-15
# Halvings of a step: 2^-30 of a Newton step is below any change of F̂ that matters.
MAX_HALVINGS = 30


def minimize_dual(
    table: DualTable,
    prompt_weights: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
    tolerance: float = 1e-9,
    max_iterations: int = 100,
    welfare: Welfare | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The exact minimum of \\(\hat F\\) over the simplex, or over the weights of another welfare function, by Newton's
    method: each step minimizes a quadratic model of F̂ over these weights. An iteration takes one pass over the table,
    for any K.

    Args:
        table ([`DualTable`]): the table.
        prompt_weights (`torch.Tensor` of shape `(B, P)`, *optional*):
            Weights of the prompts, rows with sum 1, for B minima at a time. Defaults to equal weights, and B = 1.
        start (`torch.Tensor` of shape `(K,)`, *optional*):
            Initial weights, among those of the welfare function. Defaults to uniform weights.
        tolerance (`float`, *optional*, defaults to 1e-9):
            The iterations end when \\(\nabla \hat F \cdot \lambda - U(\nabla \hat F)\\), which bounds the distance of
            F̂ from its minimum, is below the tolerance.
        max_iterations (`int`, *optional*, defaults to 100): maximum number of iterations.
        welfare ([`~mpo_hf.estimation.welfare.Welfare`], *optional*): the welfare function U. Defaults to the max-min.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: minimizers of shape `(B, K)` and minima of shape `(B,)`.

    Example:

    ```python
    >>> import torch
    >>> from mpo_hf.estimation import implicit_table, minimize_dual

    >>> logps = torch.tensor([[0.8, 0.2], [0.2, 0.8]], dtype=torch.float64).log()  # two policies, two completions
    >>> table = implicit_table(torch.tensor([0, 0]), logps, torch.full((2,), 0.5, dtype=torch.float64).log())
    >>> weights, minimum = minimize_dual(table)
    >>> weights
    tensor([[0.5000, 0.5000]], dtype=torch.float64)
    ```
    """
    if prompt_weights is None:
        prompt_weights = table.offsets.new_full((1, table.num_prompts), 1 / table.num_prompts)
    welfare = welfare if welfare is not None else MaxMin()
    if start is None:
        start = welfare.start(table.num_objectives)
    rows = max(1, CHUNK_NUMEL // len(table.prompt))
    found = [
        _minimize(table, chunk, start, tolerance, max_iterations, welfare) for chunk in prompt_weights.split(rows)
    ]
    return torch.cat([weights for weights, _ in found]), torch.cat([minimum for _, minimum in found])


def _minimize(
    table: DualTable,
    prompt_weights: torch.Tensor,
    start: torch.Tensor,
    tolerance: float,
    max_iterations: int,
    welfare: Welfare,
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = start.to(prompt_weights).expand(len(prompt_weights), -1).clone()
    value, gradient, hessian = _derivatives(table, prompt_weights, weights)
    for _ in range(max_iterations):
        distance = (gradient * weights).sum(-1) - welfare.value(gradient)
        open_ = distance > tolerance
        if not open_.any():
            break
        direction = welfare.quadratic_minimum(weights, gradient, hessian) - weights
        slope = (gradient * direction).sum(-1)
        open_ = open_ & (slope < -SLOPE_TOLERANCE * (1 + value.abs()))
        if not open_.any():
            break
        step = torch.ones_like(value)
        for _ in range(MAX_HALVINGS):  # near the minimum the first step, a full one, is taken
            new = welfare.retract(weights + step.unsqueeze(-1) * direction)
            new_value = _value(table, prompt_weights, new)
            limit = value + SUFFICIENT_DECREASE * step * slope + VALUE_TOLERANCE * value.abs()
            too_long = open_ & (new_value > limit)
            if not too_long.any():
                break
            step = torch.where(too_long, step / 2, step)
        new = welfare.retract(weights + step.unsqueeze(-1) * direction)
        weights = torch.where(open_.unsqueeze(-1), new, weights)
        value, gradient, hessian = _derivatives(table, prompt_weights, weights)
    return weights, value


def _value(table: DualTable, prompt_weights: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    values, _ = table.by_prompt(weights)
    return (prompt_weights.T * values).sum(0)


def _derivatives(
    table: DualTable, prompt_weights: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """F̂ of B weightings of the prompts, shape `(B,)`, its gradients `(B, K)` and Hessians `(B, K, K)`."""
    values, shares = table.by_prompt(weights)
    advantages, prompt = table.advantages, table.prompt
    num_objectives = weights.shape[-1]
    weighted = shares * prompt_weights.T[prompt]
    gradient = weighted.T @ advantages
    second = torch.einsum("nb,nk,nl->bkl", weighted, advantages, advantages)
    for k in range(num_objectives):  # one objective at a time: a tensor of (N, B, K) would not fit into memory
        mean_k = sums_by_prompt(prompt, shares * advantages[:, k : k + 1], len(values))
        second[:, k] -= (weighted * mean_k[prompt]).T @ advantages
    return (prompt_weights.T * values).sum(0), gradient, (second + second.transpose(1, 2)) / 2
