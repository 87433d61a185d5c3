"""The estimator of what mixtures reach as they are decoded, token by token."""

from dataclasses import dataclass
from typing import Any

import torch

from ..estimation import Certificate, DecodedTable, MaxMin, Welfare, primal_objective
from ..estimation.comparison import Comparison, compare
from ..estimation.decoded_certificate import certify_decoded
from ..estimation.decoded_weights import WeightSpace, maximize_decoded, starting_points
from .estimators import Estimator


# More completions make the search from many starts slow, and it then begins at the weights so far and at the proposal only.
MAX_ROWS_OF_SEARCH = 100_000


@dataclass
class DecodedEstimator(Estimator):
    """
    The negative welfare of the decoded mixture.

    Args:
        completions ([`~mpo_hf.estimation.DecodedTable`]): the completions, for decoded mixtures.
        space ([`~mpo_hf.estimation.decoded_weights.WeightSpace`]): the weights to choose from.
        rewards (`torch.Tensor` of shape `(N, K)`): rewards of the completions, on their own scale.
        objectives (`list[str]`): names of the objectives.
    """

    completions: DecodedTable
    space: WeightSpace
    rewards: torch.Tensor
    objectives: list[str]

    def loss(self, weights: torch.Tensor) -> torch.Tensor:
        return -primal_objective(self.completions, self.space.components(weights), self.welfare)

    def best(self, weights: torch.Tensor) -> torch.Tensor:
        return self._best(weights, self.welfare)

    def closest_to_feasible(self, weights: torch.Tensor) -> torch.Tensor:
        """The weights whose smallest gain is largest, `(K,)`, for the next proposal where no weights have a welfare."""
        return self._best(weights, MaxMin())

    def _best(self, weights: torch.Tensor, welfare: Welfare) -> torch.Tensor:
        start = self.space.components(weights)
        starts = starting_points(self.space, start)
        if len(self.rewards) > MAX_ROWS_OF_SEARCH:
            starts = starts[: 1 + (self.space.proposal is not None)]
        found, _ = maximize_decoded(self.completions, welfare, self.space, starts, objectives=self.objectives)
        return self.space.chosen(found)

    def certify(
        self, weights: torch.Tensor, mixture_weights: torch.Tensor, rewards: torch.Tensor | None, **options: Any
    ) -> Certificate:
        return certify_decoded(
            self.table, self.completions, mixture_weights, self.welfare, self.space, self.rewards, **options
        )

    def effective_completions(self, weights: torch.Tensor) -> float:
        ratios = self.completions.log_ratios(self.space.components(weights))
        return self.completions.effective_sample_size(ratios) / self.completions.num_prompts

    def effective_sample_fraction(self, weights: torch.Tensor) -> float:
        return self.completions.effective_sample_fraction(self.space.components(weights)).item()

    def needs_new_proposal(self, weights: torch.Tensor, refresh_below: float) -> bool:
        """Whether completions of the proposal so far are inefficient for these weights of the objectives, `(K,)`."""
        if self.space.proposal is None:
            return False
        target = self.space.components(weights)
        return bool(self.completions.efficiency(target, self.space.proposal) < refresh_below)

    def compare(self, weights: torch.Tensor, beta: float) -> dict[str, Comparison]:
        """
        What these weights reach, against uniform weights, each policy and the reference.

        Args:
            weights (`torch.Tensor` of shape `(K,)`): weights of the objectives.
            beta (`float`): KL coefficient.
        """
        count = len(self.objectives)
        corners = dict(zip(self.objectives, torch.eye(count, dtype=torch.float64)))
        chosen = {"fitted": weights, "uniform": torch.full_like(weights, 1 / count)}
        targets: dict[str, torch.Tensor | None] = {n: self.space.components(w) for n, w in chosen.items()}
        targets |= {f"policy {name}": self.space.components(corner) for name, corner in corners.items()}
        targets["reference"] = None
        return compare(self.completions, targets, self.welfare, self.rewards, beta)
