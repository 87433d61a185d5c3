"""What decoded mixtures, single policies and the reference reach, side by side, from the same completions."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .certificate import bootstrap_counts
from .decoded import DecodedTable
from .welfare import Welfare


NUM_RESAMPLES = 200


@dataclass
class Comparison:
    r"""
    What a policy reaches, estimated from completions of several; errors are standard errors over the prompts.

    Args:
        rewards, reward_errors (`torch.Tensor` of shape `(K,)`): expected rewards on their own scale.
        gains, gain_errors (`torch.Tensor` of shape `(K,)`): the same on the scale of the fit.
        divergence, divergence_error (`float`): \\(E_x \mathrm{KL}\\) from the reference, in nats a completion.
        welfare, welfare_error (`float`): the welfare of the gains less β times the divergence, in units of the gains.
        less_than_first, less_than_first_error (`float`):
            By how much this welfare is less than that of the first policy of the comparison; the error is that of the
            difference, with the prompts paired.
        effective_completions (`float`): effective sample size, over all completions.
    """

    rewards: torch.Tensor
    reward_errors: torch.Tensor
    gains: torch.Tensor
    gain_errors: torch.Tensor
    divergence: float
    divergence_error: float
    welfare: float
    welfare_error: float
    less_than_first: float
    less_than_first_error: float
    effective_completions: float


def compare(
    completions: DecodedTable,
    targets: Mapping[str, torch.Tensor | None],
    welfare: Welfare,
    rewards: torch.Tensor,
    beta: float = 1.0,
) -> dict[str, Comparison]:
    """
    What policies reach, from the same completions.

    Args:
        completions ([`DecodedTable`]): the completions.
        targets (`Mapping[str, torch.Tensor]`):
            The mixture weights of each policy, `(M,)`; `None` for the reference. The first one is what the others are
            compared with.
        welfare ([`~mpo_hf.estimation.welfare.Welfare`]): the welfare function.
        rewards (`torch.Tensor` of shape `(N, K)`): rewards of the completions, on their own scale.
        beta (`float`, *optional*, defaults to 1.0): KL coefficient: welfare is in nats, times this in units of the gains.

    Returns:
        `dict[str, Comparison]`: by the names of `targets`.
    """
    found: dict[str, Comparison] = {}
    first: torch.Tensor | None = None
    count, num_prompts = completions.gains.shape[-1], completions.num_prompts
    counts = bootstrap_counts(num_prompts, NUM_RESAMPLES, 0)
    for name, weights in targets.items():
        ratios = completions.reference_log_ratios() if weights is None else completions.log_ratios(weights)
        divergence = ratios + completions.proposal_logps - completions.reference_logps
        if weights is None:
            divergence = torch.zeros_like(divergence)
        columns = torch.cat([rewards, completions.gains, divergence.unsqueeze(-1)], dim=-1)
        values = completions.contributions(ratios, columns)
        means, errors = values.mean(0), values.std(0) / num_prompts**0.5
        drawn = torch.cat([counts.new_full((1, num_prompts), 1 / num_prompts), counts]) @ values
        welfares = beta * (welfare.value(drawn[:, count : 2 * count]) - drawn[:, -1])
        first = welfares if first is None else first
        found[name] = Comparison(
            rewards=means[:count],
            reward_errors=errors[:count],
            gains=beta * means[count : 2 * count],
            gain_errors=beta * errors[count : 2 * count],
            divergence=means[-1].item(),
            divergence_error=errors[-1].item(),
            welfare=welfares[0].item(),
            welfare_error=_deviation(welfares[1:]),
            less_than_first=(first - welfares)[0].item(),
            less_than_first_error=_deviation((first - welfares)[1:]),
            effective_completions=completions.effective_sample_size(ratios),
        )
    return found


def _deviation(values: torch.Tensor) -> float:
    """The standard deviation, infinite where some replicate has no welfare."""
    return values.std().item() if values.isfinite().all() else torch.inf
