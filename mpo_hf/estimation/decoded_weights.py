r"""
The weights whose mixture, decoded token by token, has the largest welfare.

The welfare of a decoded mixture, less its divergence from the reference, is

$$ G(\lambda) = U\big(E_{\pi_\lambda}[r_1] - d_1, \dots\big)/\beta - E_x \mathrm{KL}(\pi_\lambda \| \pi_{ref}) $$

It has kinks where the welfare function has, so that it is maximized in epigraph form, which is smooth: by weak duality of
linear programs a welfare function with weights \\(0 \le p_k \le u_k\\) of which some have the sum 1 is

$$ U(g) = \max_{\nu, s} \; \nu - \sum_k u_k s_k, \qquad s_k \ge 0, \quad s_k \ge \nu \, [k \text{ is in the sum}] - g_k $$
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .decoded import DecodedTable
from .primal import primal_objective
from .welfare import InfeasibleError, Polyhedral, Welfare


# In nats and in weights: far below the error of any estimate.
PRECISION = 1e-9
MAX_ITERATIONS = 100
# From how many of the starts, those with the largest values, the search climbs.
NUM_CLIMBS = 2
# A smaller weight is what the solver leaves of 0.
ZERO_WEIGHT = 1e-6
# Rounding of the solver: weights and sums are off by so much.
ROUNDING = 1e-9
# Gains, in nats, that are at least required where the welfare is a function of positive gains.
LEAST_GAIN = 1e-6
# The least efficiency of the completions' proposal for the weights that a fit may move to: beyond, their estimate rests on
# a few completions with large importance weights.
MIN_EFFICIENCY = 0.3


@dataclass
class WeightSpace:
    """
    The weights among which the best ones are looked for.

    Args:
        num_components (`int`): M.
        free_sum (`bool`, *optional*, defaults to `False`):
            Whether the sum of the weights of all components but the last, the reference, is free; that takes the rest.
        proposal (`torch.Tensor` of shape `(M,)`, *optional*):
            The weights that the last completions were drawn with. Weights are within reach if these completions have an
            efficiency of at least `min_efficiency` for them. Defaults to no limit.
        min_efficiency (`float`, *optional*): the least efficiency.
    """

    num_components: int
    free_sum: bool = False
    proposal: torch.Tensor | None = None
    min_efficiency: float = MIN_EFFICIENCY

    @property
    def size(self) -> int:
        """How many weights there are to choose."""
        return self.num_components - self.free_sum

    def components(self, chosen: torch.Tensor) -> torch.Tensor:
        """Weights of all components from the chosen ones, `(M,)` from `(size,)`."""
        return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], dim=-1) if self.free_sum else chosen

    def chosen(self, weights: torch.Tensor) -> torch.Tensor:
        """The chosen weights from those of all components, `(size,)` from `(M,)`."""
        return weights[..., : self.size]

    def is_within_reach(self, table: DecodedTable, weights: torch.Tensor) -> bool:
        """Whether the completions say enough about these weights, of shape `(M,)`."""
        if self.proposal is None:
            return True
        return bool(table.efficiency(weights, self.proposal) >= self.min_efficiency * (1 - ROUNDING))


def maximize_decoded(
    table: DecodedTable,
    welfare: Welfare,
    space: WeightSpace,
    starts: Sequence[torch.Tensor],
    prompt_weights: torch.Tensor | None = None,
    objectives: Sequence[str] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The weights that maximize \\(\hat G\\) within reach of the completions, by sequential quadratic programming from several
    starts.

    Args:
        table ([`DecodedTable`]): the completions.
        welfare ([`~mpo_hf.estimation.welfare.Welfare`]): the welfare function.
        space ([`WeightSpace`]): the weights to choose from.
        starts (`Sequence[torch.Tensor]`): starting points, `(M,)` each; those out of reach are left out.
        prompt_weights (`torch.Tensor` of shape `(P,)`, *optional*): weights of the prompts. Defaults to equal ones.
        objectives (`Sequence[str]`, *optional*): names of the objectives, for the error.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the maximizer, shape `(M,)`, and the maximum, a scalar.

    Raises:
        [`~mpo_hf.estimation.welfare.InfeasibleError`]: no weights within reach have a welfare, as that is a function of
            positive gains and none has them.
    """
    if prompt_weights is None:
        prompt_weights = table.gains.new_full((table.num_prompts,), 1 / table.num_prompts)
    weighting = prompt_weights.unsqueeze(0)

    def values_of(points: list[torch.Tensor]) -> torch.Tensor:
        values = [primal_objective(table, point, welfare, weighting)[0] for point in points]
        return torch.stack(values).nan_to_num(-torch.inf, -torch.inf, -torch.inf)

    starts = [start.double() for start in starts if space.is_within_reach(table, start)]
    if not starts:
        raise ValueError(
            "The completions say nothing of mixtures: their log-probabilities under the policies are unknown, or minus infinity. "
            "Draw completions from the mixture."
        )
    most_promising = values_of(starts).argsort(descending=True)[:NUM_CLIMBS].tolist()
    solver = _Ascent(table, welfare, space, prompt_weights)
    found = [*starts, *(solver.climb(starts[i]) for i in most_promising)]
    found = [weights for weights in found if space.is_within_reach(table, weights)]
    values = values_of(found)
    best = int(values.argmax())
    if values[best] == -torch.inf:
        gains = torch.stack([prompt_weights @ table.measure(w)[0] for w in found])
        raise _infeasible(gains[int(gains.amin(-1).argmax())], objectives)
    return found[best], values[best]


def _infeasible(gains: torch.Tensor, objectives: Sequence[str] | None) -> InfeasibleError:
    """The error for a welfare of positive gains, with the gains of the weights whose smallest gain is largest."""
    names = objectives if objectives is not None else [f"objective {k}" for k in range(len(gains))]
    lacking = [k for k, gain in enumerate(gains.tolist()) if gain <= 0]
    shown = ", ".join(f"{names[k]} {gains[k].item():.3g}" for k in range(len(gains)))
    return InfeasibleError(
        f"No mixture of these policies within reach of the completions has positive gains for all objectives, which Nash's "
        f"welfare and α-fairness require: at best they are {shown}, in units of β. Leave "
        f"{' and '.join(names[k] for k in lacking)} out, choose another welfare, such as a max-min, or draw more completions.",
        lacking,
    )


class _Ascent:
    """Sequential quadratic programming (scipy's SLSQP) for one table: the functions that it calls, with their derivatives."""

    def __init__(self, table: DecodedTable, welfare: Welfare, space: WeightSpace, prompt_weights: torch.Tensor):
        self.table, self.welfare, self.space, self.prompt_weights = table, welfare, space, prompt_weights
        self.count = table.gains.shape[-1]
        # a policy that rules completions out changes the mixture by any weight
        self._may_be_left_out = not bool(table.policy_logps.isneginf().any())
        self._last: tuple[bytes, np.ndarray, np.ndarray] = (b"", np.empty(0), np.empty(0))

    def climb(self, start: torch.Tensor) -> torch.Tensor:
        """The local maximum that is reached from a start, `(M,)`."""
        from scipy.optimize import minimize  # here, as the import takes up to a second

        chosen = self.space.chosen(start).numpy()
        gains = self._measure(chosen)[0][: self.count]
        is_polyhedral = isinstance(self.welfare, Polyhedral)
        point = np.concatenate([chosen, self._auxiliary(gains)]) if is_polyhedral else chosen
        extra = len(point) - self.space.size
        result = minimize(
            self._loss_polyhedral if is_polyhedral else self._loss_smooth,
            point,
            jac=True,
            method="SLSQP",
            bounds=[(0, None)] * self.space.size + ([(None, None)] + [(0, None)] * (extra - 1) if extra else []),
            constraints=list(self._constraints(is_polyhedral)),
            options={"maxiter": MAX_ITERATIONS, "ftol": PRECISION},
        )
        found = torch.from_numpy(result.x[: self.space.size]).clamp(min=0)
        if not found.isfinite().all():
            return start
        if self._may_be_left_out:
            found[found < ZERO_WEIGHT] = 0  # so that the policy does not run in vain
        if not self.space.free_sum:
            found = found / found.sum()
        return self.space.components(found)

    def _measure(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The gains, the divergence and the log-efficiency at a point, and their Jacobian."""
        if chosen.tobytes() != self._last[0]:
            point = torch.from_numpy(chosen.copy()).requires_grad_()
            with torch.enable_grad():
                weights = self.space.components(point)
                gains, divergence = self.table.measure(weights)
                outputs = [*(self.prompt_weights @ gains), self.prompt_weights @ divergence]
                if self.space.proposal is not None:
                    outputs.append(self.table.efficiency(weights, self.space.proposal).log())
                slopes = [torch.autograd.grad(o, point, retain_graph=True)[0] for o in outputs]
            values = torch.stack(outputs).detach()
            self._last = (chosen.tobytes(), values.numpy(), torch.stack(slopes).numpy())
        return self._last[1], self._last[2]

    def _auxiliary(self, gains: np.ndarray) -> np.ndarray:
        """ν and s at a start."""
        _, summed = self._limits()
        nu = gains[summed].min() if summed.any() else 0.0
        return np.concatenate([[nu], np.maximum(nu * summed - gains, 0)])

    def _limits(self) -> tuple[np.ndarray, np.ndarray]:
        assert isinstance(self.welfare, Polyhedral)
        upper, summed = self.welfare.limits(self.count)
        return upper.numpy(), summed.numpy()

    def _loss_polyhedral(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        size = self.space.size
        values, slopes = self._measure(x[:size])
        upper, summed = self._limits()
        loss = values[self.count] - (x[size] if summed.any() else 0) + upper @ x[size + 1 :]
        return float(loss), np.concatenate([slopes[self.count], [-float(summed.any())], upper])

    def _loss_smooth(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        values, slopes = self._measure(x)
        gains = torch.from_numpy(values[: self.count]).clamp(min=LEAST_GAIN).requires_grad_()
        with torch.enable_grad():
            value = self.welfare.value(gains)
            (slope,) = torch.autograd.grad(value, gains)
        return float(values[self.count]) - value.item(), slopes[self.count] - slope.numpy() @ slopes[: self.count]

    def _constraints(self, is_polyhedral: bool) -> Any:
        size, count = self.space.size, self.count
        if not self.space.free_sum:
            ones = np.concatenate([np.ones(size), np.zeros(1 + count if is_polyhedral else 0)])
            yield {"type": "eq", "fun": lambda x: x[:size].sum() - 1, "jac": lambda x: ones}
        if self.space.proposal is not None:
            least = np.log(self.space.min_efficiency)
            pad = np.zeros(1 + count if is_polyhedral else 0)
            yield {
                "type": "ineq",
                "fun": lambda x: self._measure(x[:size])[0][-1] - least,
                "jac": lambda x: np.concatenate([self._measure(x[:size])[1][-1], pad]),
            }
        if not is_polyhedral:
            yield {
                "type": "ineq",
                "fun": lambda x: self._measure(x)[0][:count] - LEAST_GAIN,
                "jac": lambda x: self._measure(x)[1][:count],
            }
            return
        _, summed = self._limits()
        of_auxiliary = np.concatenate([-summed[:, None].astype(float), np.eye(count)], axis=1)
        yield {
            "type": "ineq",
            "fun": lambda x: x[size + 1 :] - summed * x[size] + self._measure(x[:size])[0][:count],
            "jac": lambda x: np.concatenate([self._measure(x[:size])[1][:count], of_auxiliary], axis=1),
        }


def starting_points(space: WeightSpace, *further: torch.Tensor) -> list[torch.Tensor]:
    """Where to begin: given weights, the proposal, uniform ones, and points on the way from these to every corner."""
    policies = space.size
    uniform = torch.full((policies,), 1 / policies, dtype=torch.float64)
    corners = torch.eye(policies, dtype=torch.float64)
    center = uniform if space.proposal is None else space.chosen(space.proposal)
    points = [uniform, *(0.7 * corners + 0.3 * center), *(0.3 * corners + 0.7 * center)]
    given = [*further, *([] if space.proposal is None else [space.proposal])]
    return [*given, *(space.components(point) for point in points)]
