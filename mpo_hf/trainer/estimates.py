"""What a fit minimises or maximises on all of its completions: the dual objective, or what the mixture itself reaches."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from ..estimation import Certificate, DualTable, certify, minimize_dual
from ..estimation.primal import MixtureTable, achieved_welfare, certify_achieved, maximize_achieved
from ..estimation.welfare import Welfare


@dataclass
class Estimate(ABC):
    """
    An estimate from completions, as a function of the weights.

    Args:
        table ([`~mpo_hf.estimation.DualTable`]): the completions, for the dual objective.
        mixture ([`~mpo_hf.estimation.primal.MixtureTable`], *optional*): the same, for mixtures of the policies at hand.
        welfare ([`~mpo_hf.estimation.welfare.Welfare`]): the welfare function.
    """

    table: DualTable
    mixture: MixtureTable | None
    welfare: Welfare

    @abstractmethod
    def loss(self, weights: torch.Tensor) -> torch.Tensor:
        """What is minimised, a scalar, differentiable in weights of shape `(K,)`."""

    @abstractmethod
    def best(self, weights: torch.Tensor) -> torch.Tensor:
        """The weights that minimise it, given the present ones."""

    @abstractmethod
    def certify(
        self, weights: torch.Tensor, mixture_weights: torch.Tensor, rewards: torch.Tensor | None, **options: Any
    ) -> Certificate:
        """How good weights are, of the objectives and of the components of the mixture."""

    @abstractmethod
    def effective_sample_size(self, weights: torch.Tensor) -> float:
        """The fraction of the completions that count at some weights."""


class DualEstimate(Estimate):
    """The dual objective F."""

    def loss(self, weights: torch.Tensor) -> torch.Tensor:
        return self.table.by_prompt(weights.unsqueeze(0))[0].mean()

    def best(self, weights: torch.Tensor) -> torch.Tensor:
        return minimize_dual(self.table, welfare=self.welfare)[0][0]

    def certify(
        self, weights: torch.Tensor, mixture_weights: torch.Tensor, rewards: torch.Tensor | None, **options: Any
    ) -> Certificate:
        options |= {"mixture": self.mixture, "mixture_weights": mixture_weights}
        return certify(self.table, weights, rewards, welfare=self.welfare, **options)

    def effective_sample_size(self, weights: torch.Tensor) -> float:
        return self.table.effective_sample_sizes(weights).mean().item()


class AchievedEstimate(Estimate):
    """Less what the mixture achieves, -G."""

    def loss(self, weights: torch.Tensor) -> torch.Tensor:
        return -achieved_welfare(self.mixture, weights, self.welfare)

    def best(self, weights: torch.Tensor) -> torch.Tensor:
        corners = 0.7 * torch.eye(len(weights)).to(weights) + 0.3 / len(weights)
        (dual,), _ = minimize_dual(self.table, welfare=self.welfare)
        starts = [weights, torch.full_like(weights, 1 / len(weights)), dual / dual.sum(), *corners]
        return maximize_achieved(self.mixture, self.welfare, starts)[0]

    def certify(
        self, weights: torch.Tensor, mixture_weights: torch.Tensor, rewards: torch.Tensor | None, **options: Any
    ) -> Certificate:
        return certify_achieved(self.table, self.mixture, weights, self.welfare, rewards, **options)

    def effective_sample_size(self, weights: torch.Tensor) -> float:
        return self.mixture.effective_sample_size(weights).item()
