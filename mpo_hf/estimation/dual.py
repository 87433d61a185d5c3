r"""
The exact minimum of the dual objective on a table of completions.

\\(\hat F\\) is convex (see [`~mpo_hf.estimation.tables`] for its form), so that its minimum over the weights of a
welfare function is found to any precision without drawing another sample.
"""

import torch

from .tables import DualTable, sums_by_prompt
from .welfare import InfeasibleError, MaxMin, Polyhedral, Welfare


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
# The distance is linear in the error of the weights where the loss is quadratic: at minima that are exact up to rounding it
# is about the square root of the rounding error, relative to 1 + |F̂|. Above this, a minimum is not attained.
DISTANCE_TOLERANCE = 1e-6
# Weights above this are on their way to infinity: they are limited by 1 over the gain of their objective alone.
DIVERGED = 1e12
# The weight of a policy that excludes completions where the minimum of F̂ is the limit for weights that go to 0: it costs
# at most this part of the range of F̂.
EXCLUDING_WEIGHT = 1e-6
# Gains below this, relative to the largest advantage of a table, are rounding errors of its sums in float64.
GAIN_TOLERANCE = 1e-12
# ... and in the solutions of the linear program, whose constraints hold up to about 1e-7.
PROGRAM_TOLERANCE = 1e-7


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
            Weights of the prompts, rows with sum 1, for B minima at a time. Defaults to equal weights, and B = 1. Only
            then it is an error if no policy has the gains that the welfare function requires.
        start (`torch.Tensor` of shape `(K,)`, *optional*):
            Initial weights, among those of the welfare function. Defaults to uniform weights.
        tolerance (`float`, *optional*, defaults to 1e-9):
            The iterations end when \\(\nabla \hat F \cdot \lambda - U(\nabla \hat F)\\), which bounds the distance of
            F̂ from its minimum, is below the tolerance.
        max_iterations (`int`, *optional*, defaults to 100): maximum number of iterations.
        welfare ([`~mpo_hf.estimation.welfare.Welfare`], *optional*): the welfare function U. Defaults to the max-min.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: minimizers of shape `(B, K)` and minima of shape `(B,)`. A minimum that the
            iterations did not attain is replaced by a lower bound, which may be -inf. Where policies exclude completions,
            it is the infimum, and the minimizer is close to it.

    Raises:
        `ValueError`: the mixture is not known, because no completion of a prompt has a probability above 0 under all
            policies; or, as [`~mpo_hf.estimation.welfare.InfeasibleError`], no policy has positive gains for all
            objectives, and the welfare function requires them.

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
    is_fit = prompt_weights is None
    if prompt_weights is None:
        prompt_weights = table.offsets.new_full((1, table.num_prompts), 1 / table.num_prompts)
    welfare = welfare if welfare is not None else MaxMin()
    if start is None:
        start = welfare.start(table.num_objectives)
    closed = table.closed(welfare.can_have_weight(table.num_objectives))
    rows = max(1, CHUNK_NUMEL // len(table.prompt))
    found = [
        _minimize(closed, chunk, start, tolerance, max_iterations, welfare) for chunk in prompt_weights.split(rows)
    ]
    weights, minimum, gains = (torch.cat(parts) for parts in zip(*found))
    if welfare.needs_positive_gains and is_fit:
        check_feasible(closed, weights[0], gains[0])
    return _with_excluding_weights(closed, weights, welfare), minimum


def _minimize(
    table: DualTable,
    prompt_weights: torch.Tensor,
    start: torch.Tensor,
    tolerance: float,
    max_iterations: int,
    welfare: Welfare,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Minimizers, minima (or lower bounds) and the gradients there."""
    weights = start.to(prompt_weights).expand(len(prompt_weights), -1).clone()
    value, gradient, hessian = _derivatives(table, prompt_weights, weights)
    ended = torch.zeros_like(value, dtype=torch.bool)
    for _ in range(max_iterations):
        distance = (gradient * weights).sum(-1) - welfare.value(gradient)
        ended = ended | (distance <= tolerance) | ~(weights.amax(-1) < DIVERGED)
        if ended.all():
            break
        direction = welfare.quadratic_minimum(weights, gradient, hessian) - weights
        slope = (gradient * direction).sum(-1)
        ended = ended | ~(slope < -SLOPE_TOLERANCE * (1 + value.abs()))
        if ended.all():
            break
        step = torch.ones_like(value)
        for _ in range(MAX_HALVINGS):  # near the minimum the first step, a full one, is taken
            new = welfare.retract(weights + step.unsqueeze(-1) * direction)
            new_value = _value(table, prompt_weights, new)
            limit = value + SUFFICIENT_DECREASE * step * slope + VALUE_TOLERANCE * value.abs()
            too_long = ~ended & ~(new_value <= limit)  # also where it is NaN
            if not too_long.any():
                break
            step = torch.where(too_long, step / 2, step)
        ended = ended | too_long
        weights = torch.where(ended.unsqueeze(-1), weights, new)
        value, gradient, hessian = _derivatives(table, prompt_weights, weights)
    distance = (gradient * weights).sum(-1) - welfare.value(gradient)
    bound = (value - distance).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    attained = distance <= max(tolerance, DISTANCE_TOLERANCE) * (1 + value.abs())
    return weights, torch.where(attained, value, bound), gradient


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


# ---- minima that weights only come close to, and minima that do not exist ----


def _with_excluding_weights(table: DualTable, weights: torch.Tensor, welfare: Welfare) -> torch.Tensor:
    """Minimizers of shape `(B, K)` with small weights instead of 0 for policies that exclude completions."""
    if table.excluding is None or not isinstance(welfare, Polyhedral):  # all other weights are above 0 already
        return weights
    moved = welfare.project(torch.where(table.excluding, weights.clamp(min=EXCLUDING_WEIGHT), weights))
    return torch.where(((weights == 0) & table.excluding).any(-1, keepdim=True), moved, weights)


def check_feasible(table: DualTable, weights: torch.Tensor, gains: torch.Tensor) -> None:
    r"""
    Checks that some policy has positive gains for all objectives.

    Args:
        table ([`DualTable`]): the table, without advantages of -inf.
        weights (`torch.Tensor` of shape `(K,)`): the weights that the iterations ended at.
        gains (`torch.Tensor` of shape `(K,)`): the gains there.

    Raises:
        [`~mpo_hf.estimation.welfare.InfeasibleError`]: there is none. The message names the objectives.
    """
    in_table = table.advantages[table.offsets > -torch.inf]
    largest = in_table.abs().amax(0)
    noise = GAIN_TOLERANCE * largest.max()
    flat = (largest <= noise).nonzero().squeeze(-1).tolist()
    if not flat:
        if (gains > noise).all() and weights.max() < DIVERGED:  # those of the policy for these weights
            return
        prices, best = _largest_common_gain(table, largest.max().item())
        if best > PROGRAM_TOLERANCE:
            return
        flat = (prices > PROGRAM_TOLERANCE).nonzero().squeeze(-1).tolist()
    names = " and ".join(map(table.name, flat))
    which = f"{names} with a positive gain" if len(flat) == 1 else f"positive gains for {names} at once"
    raise InfeasibleError(
        f"No policy over these completions has {which}, which Nash's welfare and α-fairness require: their weights grow "
        f"without limit. Leave {'it' if len(flat) == 1 else 'one of them'} out, choose another welfare, such as a max-min "
        f"with a constraint for {names}, or draw more completions if these are few.",
        flat,
    )


def _largest_common_gain(table: DualTable, unit: float) -> tuple[torch.Tensor, float]:
    r"""
    The largest gain that a policy can have for all objectives, over `unit`, and prices μ of the objectives that prove
    it: \\(\max_\pi \min_k g_k = \min_\mu E_x \max_y \sum_k \mu_k a_k\\) over the simplex, a linear program in μ and the
    maxima.
    """
    from scipy import optimize, sparse  # here, as the import takes up to a second

    rows = table.offsets > -torch.inf
    prompt, advantages = table.prompt[rows].numpy(), (table.advantages[rows] / unit).numpy()
    (count, num_objectives), num_prompts = advantages.shape, table.num_prompts
    maxima = sparse.csr_matrix(([1.0] * count, (range(count), prompt)), shape=(count, num_prompts))
    found = optimize.linprog(
        [0.0] * num_objectives + [1 / num_prompts] * num_prompts,
        A_ub=sparse.hstack([sparse.csr_matrix(advantages), -maxima], format="csr"),
        b_ub=[0.0] * count,
        A_eq=[[1.0] * num_objectives + [0.0] * num_prompts],
        b_eq=[1.0],
        bounds=[(0, None)] * num_objectives + [(None, None)] * num_prompts,
    )
    return torch.from_numpy(found.x[:num_objectives]), float(found.fun)
