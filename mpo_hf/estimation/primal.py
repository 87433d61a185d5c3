r"""
The primal objective of mixtures of the given policies, whether or not these are optimal for their rewards.

The theorem behind MPO assumes that every policy is optimal for its reward. Trained policies are not, and the welfare
of their mixture is then another function of the weights than F,

$$ G(\lambda) = U\big(E_{\pi_\lambda}[r_1] - d_1, \dots\big)/\beta - E_x \mathrm{KL}(\pi_\lambda \| \pi_{ref})
   \le \min_{\lambda'} F(\lambda') $$

with \\(\pi_\lambda \propto \prod_k \pi_k^{\lambda_k}\\) over whole completions. It is estimated from the same
completions as F, for any λ. The inequality is weak duality: its right-hand side is an upper bound for every policy.
"""

from collections.abc import Sequence

import torch

from .decoded import DecodedTable
from .tables import MixtureTable
from .welfare import Polyhedral, Welfare


# In nats: kinks of the welfare are smoothed by less and less. The last value changes a max-min by at most 5e-5.
SMOOTHING = (1.0, 0.1, 0.01, 1e-3, 1e-4)
# Share of uniform weights in a starting point: a weight of 0 has no gradient in its logarithm.
INTERIOR_SHARE = 0.01
# L-BFGS in each round of smoothing: at most so many iterations, as the next round continues from their result, and
# tolerances well below the error of the smoothing.
MAX_ITERATIONS = 60
GRADIENT_TOLERANCE = 1e-8
CHANGE_TOLERANCE = 1e-12


def primal_objective(
    table: MixtureTable | DecodedTable,
    weights: torch.Tensor,
    welfare: Welfare,
    prompt_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    \\(\hat G(\lambda)\\), in nats; differentiable in the weights.

    Args:
        table ([`MixtureTable`] or [`DecodedTable`]):
            The completions: G is that of whole completions of the mixture, or that of the mixture as it is decoded.
        weights (`torch.Tensor` of shape `(M,)`): mixture weights of the components.
        welfare ([`~mpo_hf.estimation.welfare.Welfare`]): the welfare function U.
        prompt_weights (`torch.Tensor` of shape `(B, P)`, *optional*):
            Weights of the prompts, rows with sum 1, for B values at a time. Defaults to equal weights and one value.

    Returns:
        `torch.Tensor` of shape `(B,)`, or a scalar; -inf for a mixture whose divergence from the reference is infinite.
    """
    gains, divergence = table.measure(weights)
    if prompt_weights is None:
        prompt_weights = divergence.new_full((len(divergence),), 1 / len(divergence))
    infinite = divergence == torch.inf
    if not infinite.any():
        return welfare.value(prompt_weights @ gains) - prompt_weights @ divergence
    value = welfare.value(prompt_weights @ gains.masked_fill(infinite.unsqueeze(-1), 0))  # where they may be NaN
    value = value - prompt_weights @ divergence.masked_fill(infinite, 0)
    return value.masked_fill(prompt_weights @ infinite.to(prompt_weights) > 0, -torch.inf)


def maximize_primal(
    table: MixtureTable,
    welfare: Polyhedral,
    starts: Sequence[torch.Tensor],
    prompt_weights: torch.Tensor | None = None,
    smoothing: Sequence[float] = SMOOTHING,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The weights on the simplex that maximize \\(\hat G\\). \\(\hat G\\) is not concave, and has kinks where the welfare
    has: L-BFGS ascends from several starts, on a welfare whose kinks are smoothed (Nesterov, 2005) by less and less. It
    jumps where the weight of a policy that excludes completions becomes 0: mixtures without such policies are tried, too.

    Args:
        table ([`MixtureTable`]): the completions.
        welfare ([`~mpo_hf.estimation.welfare.Welfare`]): a max-min, weighted sum or CVaR, with constraints or without.
        starts (`Sequence[torch.Tensor]`): starting points, `(M,)` each.
        prompt_weights (`torch.Tensor` of shape `(P,)`, *optional*): weights of the prompts. Defaults to equal ones.
        smoothing (`Sequence[float]`, *optional*): by how much kinks are smoothed, in nats, one value a round.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the maximizer, shape `(M,)`, and the maximum, the largest over the starts.

    Raises:
        `ValueError`: every mixture diverges infinitely from the reference on these completions.
    """
    num_prompts = int(table.prompt.max()) + 1
    if prompt_weights is None:
        prompt_weights = table.gains.new_full((num_prompts,), 1 / num_prompts)
    found, values = [], []
    for members in table.faces():
        part = table.of_components(members)
        for start in starts:
            weights = torch.zeros(len(start), dtype=torch.float64)
            weights[members] = _ascend(part, welfare, _interior(start.double()[members]), prompt_weights, smoothing)
            value = primal_objective(table, weights, welfare, prompt_weights.unsqueeze(0))[0]
            if value > -torch.inf:
                found.append(weights)
                values.append(value)
    if not found:
        raise ValueError(_why_infinite(table))
    best = torch.stack(values).argmax()
    return found[best], values[best]


def _interior(start: torch.Tensor) -> torch.Tensor:
    """A point near `start` with the sum 1 and no weight of 0."""
    start = start / start.sum() if start.sum() > 0 else torch.full_like(start, 1 / len(start))
    return (1 - INTERIOR_SHARE) * start + INTERIOR_SHARE / len(start)


def _why_infinite(table: MixtureTable) -> str:
    rows = (table.reference_log_ratios == -torch.inf).nonzero().squeeze(-1).tolist()
    advice = (
        f"The reference gives {len(rows)} of the completions the probability 0, the first of them in row {rows[0]}. Use the "
        "reference that the policies were aligned from, or draw the completions from it"
        if rows
        else "Each set of policies excludes all completions of some prompt. Draw more of them, or draw them from the mixture"
    )
    return (
        f"On these completions, every mixture of the policies has an infinite divergence from the reference. {advice} "
        '(`proposal`), or use `objective="reward"`, which depends on the rewards only.'
    )


def _ascend(
    table: MixtureTable,
    welfare: Polyhedral,
    start: torch.Tensor,
    prompt_weights: torch.Tensor,
    smoothing: Sequence[float],
) -> torch.Tensor:
    if not primal_objective(table, start, welfare, prompt_weights.unsqueeze(0)) > -torch.inf:
        return start  # and so it is for all others: they exclude the same completions
    logits = start.log().requires_grad_()
    center = welfare.start(table.gains.shape[-1])

    def negative(scale: float) -> torch.Tensor:
        gains, divergence = table.measure(logits.softmax(-1))
        gains = prompt_weights @ gains
        prices = welfare.project(center - gains.detach() / scale)  # the minimizer in the smoothed welfare
        return prompt_weights @ divergence - prices @ gains - scale / 2 * ((prices - center) ** 2).sum()

    for scale in smoothing:
        optimizer = torch.optim.LBFGS(
            [logits],
            max_iter=MAX_ITERATIONS,
            tolerance_grad=GRADIENT_TOLERANCE,
            tolerance_change=CHANGE_TOLERANCE,
            line_search_fn="strong_wolfe",
        )

        def closure(scale: float = scale, optimizer: torch.optim.Optimizer = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = negative(scale)
                loss.backward()
            return loss

        optimizer.step(closure)
    return logits.detach().softmax(-1)
