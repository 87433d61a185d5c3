"""Estimators of the objective of a fit, from all of its completions: the dual objective, or the primal one."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from ..estimation import (
    Certificate,
    DualTable,
    MixtureTable,
    Welfare,
    certify,
    certify_primal,
    maximize_primal,
    minimize_debiased,
    minimize_dual,
    primal_objective,
)
from ..estimation.tables import effective_sample_fractions


# Share of uniform weights in the starting points near the corners of the simplex.
UNIFORM_SHARE = 0.3


@dataclass
class Estimator(ABC):
    """
    An objective as a function of the weights, estimated from completions.

    Args:
        table ([`~mpo_hf.estimation.DualTable`]): the completions, for the dual objective.
        mixture ([`~mpo_hf.estimation.MixtureTable`], *optional*): the same completions, for mixtures of the given
        policies. welfare ([`~mpo_hf.estimation.Welfare`]): the welfare function.
    """

    table: DualTable
    mixture: MixtureTable | None
    welfare: Welfare

    @abstractmethod
    def loss(self, weights: torch.Tensor) -> torch.Tensor:
        """The objective to minimize, a scalar, differentiable in weights of shape `(K,)`."""

    @abstractmethod
    def best(self, weights: torch.Tensor) -> torch.Tensor:
        """The weights that minimize the loss, shape `(K,)`, given the current ones."""

    @abstractmethod
    def certify(
        self, weights: torch.Tensor, mixture_weights: torch.Tensor, rewards: torch.Tensor | None, **options: Any
    ) -> Certificate:
        """
        A certificate of weights.

        Args:
            weights (`torch.Tensor` of shape `(K,)`): weights of the objectives.
            mixture_weights (`torch.Tensor` of shape `(M,)`): weights of the components of the mixture.
            rewards (`torch.Tensor` of shape `(N, K)`, *optional*): rewards of the completions, on their own scale.
            options: further arguments of [`~mpo_hf.estimation.certify`].
        """

    @abstractmethod
    def effective_sample_fraction(self, weights: torch.Tensor) -> float:
        """Effective sample size at some weights, as a fraction of a prompt's completions."""

    def effective_completions(self, weights: torch.Tensor) -> float:
        """Effective number of completions of a prompt at some weights, the mean over the prompts."""
        counts = torch.bincount(self.table.prompt)
        return (self.table.effective_sample_fractions(weights) * counts).mean().item()


class DualEstimator(Estimator):
    """The dual objective F."""

    def loss(self, weights: torch.Tensor) -> torch.Tensor:
        return self.table.by_prompt(weights.unsqueeze(0))[0].mean()

    def best(self, weights: torch.Tensor) -> torch.Tensor:
        return minimize_debiased(self.table, self.welfare)[0][0]

    def certify(
        self, weights: torch.Tensor, mixture_weights: torch.Tensor, rewards: torch.Tensor | None, **options: Any
    ) -> Certificate:
        options |= {"mixture": self.mixture, "mixture_weights": mixture_weights}
        return certify(self.table, weights, rewards, welfare=self.welfare, **options)

    def effective_sample_fraction(self, weights: torch.Tensor) -> float:
        return self.table.effective_sample_fractions(weights).mean().item()


class PrimalEstimator(Estimator):
    """The negative primal objective of the mixture, -G."""

    def loss(self, weights: torch.Tensor) -> torch.Tensor:
        return -primal_objective(self.mixture, weights, self.welfare)

    def best(self, weights: torch.Tensor) -> torch.Tensor:
        corners = (1 - UNIFORM_SHARE) * torch.eye(len(weights)).to(weights) + UNIFORM_SHARE / len(weights)
        (dual,), _ = minimize_dual(self.table, welfare=self.welfare)
        starts = [weights, torch.full_like(weights, 1 / len(weights)), dual / dual.sum(), *corners]
        return maximize_primal(self.mixture, self.welfare, starts)[0]

    def certify(
        self, weights: torch.Tensor, mixture_weights: torch.Tensor, rewards: torch.Tensor | None, **options: Any
    ) -> Certificate:
        return certify_primal(self.table, self.mixture, weights, self.welfare, rewards, **options)

    def effective_sample_fraction(self, weights: torch.Tensor) -> float:
        return self.mixture.effective_sample_fraction(weights).item()

    def effective_completions(self, weights: torch.Tensor) -> float:
        prompt, (shares, _) = self.mixture.prompt, self.mixture.shares(weights)
        return (effective_sample_fractions(prompt, shares) * torch.bincount(prompt)).mean().item()
