"""Optimizers of mixture weights: entropic mirror descent on the simplex, and an exact minimizer."""

from collections.abc import Callable, Iterable

import torch
from torch.optim import Optimizer


# Largest deviation of a sum of weights from 1: what remains of weights that were rounded to four digits.
SUM_TOLERANCE = 1e-4


def entropic_mirror_step(log_weights: torch.Tensor, grad: torch.Tensor, lr: float) -> torch.Tensor:
    r"""
    One step of mirror descent with the negative entropy as mirror map (exponentiated gradient). Solves

    $$ \min_{w \in \Delta} \; \eta \langle g, w \rangle + \mathrm{KL}(w \| w_t) $$

    whose solution is \\(w \propto w_t \exp(-\eta g)\\).

    Args:
        log_weights (`torch.Tensor`): log of the current point, shape `(K,)`.
        grad (`torch.Tensor`): gradient at the current point, shape `(K,)`.
        lr (`float`): step size η.

    Returns:
        `torch.Tensor`: log of the next point, normalized, shape `(K,)`.
    """
    return torch.log_softmax(log_weights - lr * grad, dim=-1)


class MirrorDescent(Optimizer):
    r"""
    Entropic mirror descent for parameters on the probability simplex: the update rule of Algorithm 2 in
    [Mixing Preference Optimization](https://huggingface.co/papers/2502.18699).

    Each parameter is one point of a simplex. The state of a parameter holds its logarithm (so that a weight that has
    underflowed can grow again), the number of steps and the average of all iterates.
    [`~MirrorDescent.load_state_dict`] restores the parameter itself as well, so a checkpoint of the optimizer is a
    checkpoint of the whole fit.

    Args:
        params (`Iterable[torch.nn.Parameter]`):
            1D parameters with entries that are positive and sum to 1. float64 is recommended.
        lr (`float`):
            Step size η.

    Raises:
        `ValueError`: the step size is negative, or a parameter is not inside the simplex.

    Example:

    ```python
    >>> import torch
    >>> from mpo_hf import MirrorDescent

    >>> weights = torch.nn.Parameter(torch.full((3,), 1 / 3, dtype=torch.float64))
    >>> optimizer = MirrorDescent([weights], lr=1.0)
    >>> loss = weights @ torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    >>> loss.backward()
    >>> optimizer.step()
    >>> weights.data
    tensor([0.1554, 0.4223, 0.4223], dtype=torch.float64)
    ```
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float = 1.0):
        if not lr >= 0:
            raise ValueError(f"The step size `lr` must be a number >= 0, got {lr}.")
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for param in group["params"]:
                _check_interior_point(param)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:  # type: ignore[override]
        """
        Takes one step for every parameter that has a gradient.

        Args:
            closure (`Callable`, *optional*): re-evaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_param(param, group["lr"])
        return loss

    def _step_param(self, param: torch.nn.Parameter, lr: float) -> None:
        grad = param.grad
        assert grad is not None  # `step` leaves out parameters without a gradient
        if not torch.isfinite(grad).all():
            raise FloatingPointError(
                f"The gradient of the mixture weights is not finite: {grad.tolist()}. The weights are unchanged. "
                "Check the log-probabilities and rewards for values that are not finite."
            )
        state = self.state[param]
        if not state:
            # a tensor, as in torch's own optimizers: Trainer and accelerate move states between devices
            state["step"] = torch.zeros((), dtype=torch.float64)
            state["log_weights"] = param.log()
            state["average"] = torch.zeros_like(param)
        state["step"] += 1
        state["log_weights"] = entropic_mirror_step(state["log_weights"], grad, lr)
        param.copy_(state["log_weights"].exp())
        state["average"] += (param - state["average"]) / state["step"].item()

    def average(self, param: torch.nn.Parameter) -> torch.Tensor:
        """The average of all iterates of `param` so far; `param` itself before the first step. Shape `(K,)`."""
        state = self.state.get(param)
        return state["average"].clone() if state else param.detach().clone()

    def load_state_dict(self, state_dict: dict) -> None:
        """
        Restores the state and, unlike torch's own optimizers, the values of the parameters themselves.

        Args:
            state_dict (`dict`): what [`~MirrorDescent.state_dict`] returned.
        """
        super().load_state_dict(state_dict)
        with torch.no_grad():
            for param, state in self.state.items():
                param.copy_(state["log_weights"].exp())


def _check_interior_point(param: torch.Tensor) -> None:
    values = param.detach()
    if (
        values.ndim != 1
        or not (values > 0).all()
        or not torch.isclose(values.sum(), values.new_tensor(1.0), atol=SUM_TOLERANCE)
    ):
        raise ValueError(
            "MirrorDescent optimizes points inside the simplex: 1D, every entry positive, sum 1. "
            f"Got shape {tuple(values.shape)} with values {values.tolist()}. A weight of zero would stay zero: "
            "start from a small positive one."
        )


class ExactMinimizer(Optimizer):
    r"""
    Sets mixture weights to the minimizer of an objective, which a function returns, where mirror descent would take a
    step towards it.

    Args:
        params (`Iterable[torch.nn.Parameter]`): the mixture weights, shape `(K,)`.
        best (`Callable`): returns the minimizer, given the current weights, or `None` to leave these unchanged.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], best: Callable[[torch.Tensor], torch.Tensor | None]):
        super().__init__(params, {"lr": 1.0})
        self.best = best

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> None:  # type: ignore[override]
        """Sets every parameter to its minimizer; `closure` is not called."""
        for group in self.param_groups:
            for param in group["params"]:
                if (weights := self.best(param.detach())) is not None:
                    param.copy_(weights)
