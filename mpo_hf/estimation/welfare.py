r"""
Welfare functions U of the gains of the objectives, which a fit maximizes.

A fit solves, over all policies π,

$$ \max_\pi \; U(g_1, \dots, g_K) - \beta\, E_x \mathrm{KL}(\pi \| \pi_{ref}),
   \qquad g_k = E_{x, y \sim \pi}[r_k] - d_k $$

Every U here is concave, nondecreasing in every gain, and positively homogeneous. Such a function is the minimum of the
weighted sums of its gains over a convex set of weights, \\(U(g) = \min_{\lambda \in \Lambda} \lambda \cdot g\\), and
this set determines it (Rockafellar, Convex Analysis, 1970, section 13). The optimal policy is
\\(\pi_{ref} \exp(\sum_k \lambda_k r_k/\beta)\\), normalized, with λ the minimizer of the same dual objective over that
set:

$$ \lambda^* = \arg\min_{\lambda \in \Lambda} \;
   E_x \log E_{y \sim \pi_{ref}} \exp\Big(\sum_k \lambda_k (r_k - d_k)/\beta\Big) $$

In terms of policies \\(\pi_k \propto \pi_{ref} \exp(r_k/\beta)\\) it is
\\(\prod_k \pi_k^{\lambda_k} \cdot \pi_{ref}^{1 - \sum_k \lambda_k}\\): where Λ is not within the simplex, the
reference is a component of the mixture, with a weight that may be negative.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch


# Polyhedral.quadratic_minimum: at most so many rounds of so many steps of FISTA. After each round its momentum
# restarts and the linear system is tried, which ends the search once the limits that bind are found.
FISTA_ROUNDS = 20
FISTA_STEPS = 10
# ... a step of projected gradients shorter than this, in weights, is rounding noise in float64.
STATIONARITY_TOLERANCE = 1e-12
# ... a weight this close to a limit is held there.
LIMIT_TOLERANCE = 1e-10
# ... added to the diagonal of the Hessian, whose largest eigenvalue is 1: equal policies make it singular.
RIDGE = 1e-13
# ... the least norm of a Hessian that it is divided by: that of a table without any variation is 0.
MIN_NORM = 1e-12
# AlphaFair.quadratic_minimum: the least multiplier of the boundary, which is positive at the minimum.
MIN_MULTIPLIER = 1e-9
# ... the part of the way to a weight of 0 that a step goes at most.
STEP_TO_BOUNDARY = 0.9
# project_to_simplex: rounding error of a sum of weights in float64.
ROUNDING = 1e-15
# ... instead of a division by zero, where two neighboring bends coincide.
TINY = 1e-300
# Largest deviation of the sum of given weights from 1: what remains of weights that were computed in float32.
SUM_TOLERANCE = 1e-6


class InfeasibleError(ValueError):
    """
    No policy has the gains that a welfare function requires.

    Attributes:
        objectives (`list[int]`): the objectives that cannot all gain at once.
    """

    def __init__(self, message: str, objectives: Sequence[int]):
        super().__init__(message)
        self.objectives = list(objectives)


class Welfare(ABC):
    """
    A welfare function U and its set Λ of weights.

    Attributes:
        on_simplex (`bool`): whether all of Λ lies within the simplex.
        needs_positive_gains (`bool`):
            Whether U is defined for positive gains only. Λ is then unbounded, and F̂ has a minimum if and only if some
            policy has positive gains for all objectives.
    """

    on_simplex = True
    needs_positive_gains = False

    @abstractmethod
    def value(self, gains: torch.Tensor) -> torch.Tensor:
        """U of gains of shape `(..., K)`, shape `(...)`; `-inf` where U is not defined."""

    @abstractmethod
    def start(self, num_objectives: int) -> torch.Tensor:
        """A point of Λ, shape `(K,)`, float64."""

    def can_have_weight(self, num_objectives: int) -> torch.Tensor:
        """Which objectives have a weight above 0 anywhere in Λ, shape `(K,)`, bool."""
        return torch.ones(num_objectives, dtype=torch.bool)

    @abstractmethod
    def quadratic_minimum(self, weights: torch.Tensor, gradient: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
        """
        The target of a step of Newton's method.

        Args:
            weights (`torch.Tensor` of shape `(B, K)`): points of Λ.
            gradient (`torch.Tensor` of shape `(B, K)`): gradients of B functions at these points.
            hessian (`torch.Tensor` of shape `(B, K, K)`): their Hessians.

        Returns:
            `torch.Tensor` of shape `(B, K)`: minimizers of the quadratic models over Λ, or over the tangent of its
                boundary.
        """

    def retract(self, weights: torch.Tensor) -> torch.Tensor:
        """Maps points on the way to the target of a Newton step, shape `(B, K)`, back to Λ."""
        return weights


class Polyhedral(Welfare):
    """A welfare whose Λ is a simplex with upper limits, times an interval for every objective outside of it."""

    @abstractmethod
    def limits(self, num_objectives: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Upper limits of the weights, and which weights have the sum 1: `(K,)` each. All weights are at least 0."""

    def can_have_weight(self, num_objectives: int) -> torch.Tensor:
        return self.limits(num_objectives)[0] > 0

    def project(self, points: torch.Tensor) -> torch.Tensor:
        """The nearest points of Λ, shape `(..., K)`."""
        upper, summed = self.limits(points.shape[-1])
        projected = points.clamp(min=0).minimum(upper)
        projected[..., summed] = project_to_simplex(points[..., summed], upper[summed])
        return projected

    def quadratic_minimum(self, weights: torch.Tensor, gradient: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
        # Projected gradients with momentum (FISTA; Beck and Teboulle, 2009) find which limits bind. Given these, the
        # minimizer is the solution of a linear system.
        scale = torch.linalg.matrix_norm(hessian, ord=2).clamp(min=MIN_NORM)[:, None]
        hessian, linear = hessian / scale.unsqueeze(-1), gradient / scale
        linear = linear - torch.einsum("bkl,bl->bk", hessian, weights)

        def step(points: torch.Tensor) -> torch.Tensor:
            return self.project(points - torch.einsum("bkl,bl->bk", hessian, points) - linear)

        point = weights
        for _ in range(FISTA_ROUNDS):
            momentum, t = point, 1.0
            for _ in range(FISTA_STEPS):
                t_new = (1 + (1 + 4 * t * t) ** 0.5) / 2
                new = step(momentum)
                momentum, point, t = new + (t - 1) / t_new * (new - point), new, t_new
            solved = self.project(self._solve_between_limits(point, hessian, linear))
            error = (step(solved) - solved).abs().amax(-1, keepdim=True)
            point = torch.where(error <= (step(point) - point).abs().amax(-1, keepdim=True), solved, point)
            if (error < STATIONARITY_TOLERANCE).all():
                break
        return point

    def _solve_between_limits(self, points: torch.Tensor, hessian: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
        """Minimizers of the quadratic functions with the weights at their limits fixed and the others free."""
        upper, summed = self.limits(points.shape[-1])
        moves = (points > LIMIT_TOLERANCE) & (points < upper - LIMIT_TOLERANCE)
        in_sum = (moves & summed).to(points)
        system = torch.zeros(len(points), points.shape[-1] + 1, points.shape[-1] + 1, dtype=points.dtype)
        eye = torch.eye(points.shape[-1], dtype=points.dtype)
        system[:, :-1, :-1] = torch.where(moves.unsqueeze(-1), hessian + RIDGE * eye, eye)
        system[:, :-1, -1] = system[:, -1, :-1] = in_sum
        none_moves = in_sum.sum(-1) == 0
        system[none_moves, -1, -1] = 1
        held = torch.where(moves | ~summed, 0, points).sum(-1, keepdim=True)
        right = torch.cat([torch.where(moves, -linear, points), (1 - held) * ~none_moves.unsqueeze(-1)], dim=-1)
        return torch.linalg.solve(system, right)[:, :-1]


class MaxMin(Polyhedral):
    r"""The gain of the worst-off objective: \\(\min_k g_k\\), with the simplex as Λ."""

    def value(self, gains: torch.Tensor) -> torch.Tensor:
        return gains.min(-1).values

    def start(self, num_objectives: int) -> torch.Tensor:
        return torch.full((num_objectives,), 1 / num_objectives, dtype=torch.float64)

    def limits(self, num_objectives: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(num_objectives, dtype=torch.float64), torch.ones(num_objectives, dtype=torch.bool)


class WeightedSum(Polyhedral):
    r"""
    A weighted sum of the gains, \\(\sum_k w_k g_k\\): Λ is one point, so that the mixture is known without any sample
    (the fixed preference of multi-objective decoding), and a fit only estimates its rewards.

    Args:
        weights (`Sequence[float]`): w, at least 0 with sum 1, one per objective.
    """

    def __init__(self, weights: Sequence[float]):
        self.weights = _distribution(weights)

    def value(self, gains: torch.Tensor) -> torch.Tensor:
        return gains @ self.weights

    def start(self, num_objectives: int) -> torch.Tensor:
        return self.weights.clone()

    def limits(self, num_objectives: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weights, torch.ones(num_objectives, dtype=torch.bool)


class CVaR(Polyhedral):
    r"""
    The mean gain of the worst-off share of the objectives (conditional value at risk; Rockafellar and Uryasev, 2000):
    the max-min for a small `level`, the weighted sum at 1. Λ is the part of the simplex where
    \\(\lambda_k \le w_k/\text{level}\\).

    Args:
        level (`float`): the share, in (0, 1].
        weights (`Sequence[float]`): w, at least 0 with sum 1, one per objective: its part of the whole.
    """

    def __init__(self, level: float, weights: Sequence[float]):
        if not 0 < level <= 1:
            raise ValueError(f"The level of CVaR must be in (0, 1], got {level}.")
        self.caps = _distribution(weights) / level

    def value(self, gains: torch.Tensor) -> torch.Tensor:
        ordered, at = gains.sort(dim=-1)
        filled = self.caps[at].cumsum(-1).clamp(max=1)
        return (ordered * filled.diff(dim=-1, prepend=torch.zeros_like(filled[..., :1]))).sum(-1)

    def start(self, num_objectives: int) -> torch.Tensor:
        return self.caps / self.caps.sum()

    def limits(self, num_objectives: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.caps, torch.ones(num_objectives, dtype=torch.bool)


class AlphaFair(Welfare):
    r"""
    α-fairness (Mo and Walrand, 2000) as a mean in the units of the gains,
    \\((\sum_k w_k g_k^{1-\alpha})^{1/(1-\alpha)}\\): the weighted sum for α = 0, Nash's welfare
    \\(\prod_k g_k^{w_k}\\) for α = 1, the max-min as α goes to infinity. It requires positive gains, which are
    therefore relative to the reference's rewards. With \\(q = 1 - 1/\alpha\\),

    $$ \Lambda = \Big\{\lambda > 0 : \Big(\sum_k w_k (\lambda_k/w_k)^q\Big)^{1/q} \ge 1\Big\} $$

    by the reverse of Hölder's inequality.

    Args:
        alpha (`float`): α, above 0.
        weights (`Sequence[float]`): w, above 0 with sum 1, one per objective.
    """

    on_simplex = False
    needs_positive_gains = True

    def __init__(self, alpha: float, weights: Sequence[float]):
        if not 0 < alpha < math.inf:
            raise ValueError(
                f"α must be above 0 and finite, got {alpha}. 0 would be the weighted sum, infinity the max-min."
            )
        self.weights = _distribution(weights)
        if (self.weights == 0).any():
            raise ValueError(f"α-fairness requires weights above 0, got {self.weights.tolist()}.")
        self.power, self.dual_power = 1 - alpha, 1 - 1 / alpha

    def value(self, gains: torch.Tensor) -> torch.Tensor:
        log_mean = _log_power_mean(gains.clamp(min=0).log(), self.weights, self.power)
        return torch.where((gains > 0).all(-1), log_mean.exp(), -torch.inf)

    def start(self, num_objectives: int) -> torch.Tensor:
        return self.weights.clone()

    def quadratic_minimum(self, weights: torch.Tensor, gradient: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
        # Newton's method along the boundary c(λ) = 0 of Λ, where the minimum lies. As ∇c·λ = 1, the multiplier of the
        # boundary is gradient·λ; the Hessian of the Lagrangian includes its curvature.
        shares = _log_power_shares((weights / self.weights).log(), self.weights, self.dual_power)
        normal = shares / weights
        outer = self.dual_power * shares.unsqueeze(-1) * shares.unsqueeze(-2)
        curvature = (torch.diag_embed((1 - self.dual_power) * shares) + outer) / (
            weights.unsqueeze(-1) * weights.unsqueeze(-2)
        )
        multiplier = (gradient * weights).sum(-1).clamp(min=MIN_MULTIPLIER)
        system = torch.zeros(len(weights), weights.shape[-1] + 1, weights.shape[-1] + 1, dtype=weights.dtype)
        system[:, :-1, :-1] = hessian + multiplier[:, None, None] * curvature
        system[:, :-1, -1] = system[:, -1, :-1] = normal
        right = torch.cat([-gradient, torch.zeros_like(gradient[:, :1])], dim=-1)
        step = torch.linalg.solve(system, right)[:, :-1]
        longest = torch.where(step < 0, -STEP_TO_BOUNDARY * weights / step, torch.inf).amin(-1, keepdim=True)
        return weights + step * longest.clamp(max=1)

    def retract(self, weights: torch.Tensor) -> torch.Tensor:
        log_mean = _log_power_mean((weights / self.weights).log(), self.weights, self.dual_power)
        return weights / log_mean.exp().unsqueeze(-1)


class Constrained(Polyhedral):
    r"""
    Thresholds for some objectives, and the welfare of the others. Gains of constrained objectives are relative to
    their thresholds; a violation costs `price` per unit:
    \\(U(g) = U'(g_{free}) + \text{price} \sum_{j} \min(g_j, 0)\\). Above a certain price this exact penalty is
    equivalent to the constraint. The weight of a constrained objective is its Lagrange multiplier: 0 where the
    constraint does not bind, `price` where it cannot be satisfied.

    Args:
        free (`Welfare`): the welfare of the objectives without a constraint: [`MaxMin`], [`WeightedSum`] or [`CVaR`].
        constrained (`Sequence[int]`): indices of the objectives with a constraint.
        price (`float`): upper limit of the weight of a constraint.
    """

    on_simplex = False

    def __init__(self, free: Welfare, constrained: Sequence[int], price: float):
        if not isinstance(free, Polyhedral):
            raise ValueError(
                f"Constraints can be combined with a max-min, a weighted sum or CVaR, not with {type(free).__name__}."
            )
        if not 0 < price < math.inf:
            raise ValueError(f"The price of a constraint must be above 0 and finite, got {price}.")
        self.free, self.constrained, self.price = free, list(constrained), price

    def _is_free(self, num_objectives: int) -> torch.Tensor:
        is_free = torch.ones(num_objectives, dtype=torch.bool)
        is_free[self.constrained] = False
        return is_free

    def value(self, gains: torch.Tensor) -> torch.Tensor:
        free = self._is_free(gains.shape[-1])
        return self.free.value(gains[..., free]) + self.price * gains[..., ~free].clamp(max=0).sum(-1)

    def start(self, num_objectives: int) -> torch.Tensor:
        free = self._is_free(num_objectives)
        start = torch.zeros(num_objectives, dtype=torch.float64)
        start[free] = self.free.start(int(free.sum()))
        return start

    def limits(self, num_objectives: int) -> tuple[torch.Tensor, torch.Tensor]:
        free = self._is_free(num_objectives)
        upper = torch.full((num_objectives,), self.price, dtype=torch.float64)
        upper[free], _ = self.free.limits(int(free.sum()))
        return upper, free


def project_to_simplex(points: torch.Tensor, caps: torch.Tensor | None = None) -> torch.Tensor:
    """
    The nearest points of the simplex, or of its part below `caps`. All entries of a point are lowered by one number
    and clipped so that their sum is 1; the number lies between two neighboring bends, where an entry reaches 0 or its
    cap.

    Args:
        points (`torch.Tensor` of shape `(..., K)`): any points.
        caps (`torch.Tensor` of shape `(K,)`, *optional*): upper limits of the entries, with a sum of at least 1.
    """
    caps = torch.ones_like(points[..., :1]) if caps is None else caps  # no entry of the simplex is above 1
    bends, _ = torch.cat([points, points - caps], dim=-1).sort(dim=-1)
    sums = (points.unsqueeze(-2) - bends.unsqueeze(-1)).clamp(min=0).minimum(caps.unsqueeze(-2)).sum(-1)
    last = (sums >= 1 - ROUNDING).sum(-1, keepdim=True).clamp(1, bends.shape[-1] - 1) - 1  # the sums decrease
    low, high = bends.gather(-1, last), bends.gather(-1, last + 1)
    at_low, at_high = sums.gather(-1, last), sums.gather(-1, last + 1)
    share = ((at_low - 1) / (at_low - at_high).clamp(min=TINY)).clamp(0, 1)
    return (points - (low + share * (high - low))).clamp(min=0).minimum(caps)


def _distribution(weights: Sequence[float]) -> torch.Tensor:
    given = torch.as_tensor(weights, dtype=torch.float64)
    if given.ndim != 1 or not (given >= 0).all() or not abs(given.sum().item() - 1) <= SUM_TOLERANCE:
        raise ValueError(f"Weights of objectives must be at least 0, with sum 1, got {given.tolist()}.")
    return given / given.sum()


def _log_power_mean(logs: torch.Tensor, weights: torch.Tensor, power: float) -> torch.Tensor:
    """The logarithm of the weighted power mean of numbers, from their logarithms."""
    if power == 0:
        return logs @ weights
    return (weights.log() + power * logs).logsumexp(-1) / power


def _log_power_shares(logs: torch.Tensor, weights: torch.Tensor, power: float) -> torch.Tensor:
    """The gradient of [`_log_power_mean`] with respect to the logarithms."""
    return torch.softmax(weights.log() + power * logs, dim=-1)
