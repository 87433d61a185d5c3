r"""
What rewards of different objectives are compared on: their scale, and what a gain is counted from.

All take a table of N completions of P prompts whose self-normalised importance weights
\\(\rho_j \propto \pi_{ref}(y_j)/q(y_j)\\) say how much of the reference each completion stands for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .dual import log_shares, segment_logsumexp, sums_by_prompt


# what each counts is said in `RewardScale`
SCALES = ("optimal", "regret", "reference", "z_score", "win_rate", "none")
# these change the unit of the rewards; the others only what they are counted from
UNITS = ("z_score", "win_rate")


@dataclass
class RewardScale:
    r"""
    Turns rewards into what a welfare function compares.

    - `"optimal"`: the paper's P, \\(r - \beta \log E_{y \sim \pi_{ref}} \exp(r/\beta)\\), by prompt: how far below the best
      that the policy of this objective alone could reach, its divergence from the reference counted.
    - `"regret"`: \\(r - E_{y \sim \pi_k}[r]\\), by prompt, with \\(\pi_k \propto \pi_{ref} \exp(r_k/\beta)\\): how far
      below the reward of the objective's own policy, whatever it cost.
    - `"reference"`: \\(r - E_{y \sim \pi_{ref}}[r]\\), by prompt: what is gained over the reference.
    - `"z_score"`: less the mean and divided by the standard deviation of the reference's completions, over all prompts. β is then
      in units of standard deviations.
    - `"win_rate"`: the probability that the reference's own completion of the prompt has a lower reward, ties
      counted half: between 0 and 1, and the same for rewards on any scale that order completions alike.
    - `"none"`: as they are.

    Args:
        scale (`str`): one of the above.
        beta (`float`): KL coefficient β.
        thresholds (`Mapping[int, float]`, *optional*):
            For objectives with a constraint, the least expected reward, in the unit of the scale: gains count from there.
        from_reference (`bool`, *optional*, defaults to `False`):
            Whether all other gains count from what the reference reaches, which welfare functions of gains above 0 need.
        moments (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
            For `"z_score"`, the means and standard deviations of another table, of shape `(K,)`, instead of its own.
    """

    scale: str
    beta: float
    thresholds: Mapping[int, float] = field(default_factory=dict)
    from_reference: bool = False
    moments: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, rewards: torch.Tensor, prompt: torch.Tensor, log_ratios: torch.Tensor) -> torch.Tensor:
        r"""
        Args:
            rewards (`torch.Tensor` of shape `(N, K)`): rewards of the completions, float64.
            prompt (`torch.LongTensor` of shape `(N,)`): which prompt, 0 to P - 1, every row belongs to.
            log_ratios (`torch.Tensor` of shape `(N,)`): \\(\log \pi_{ref}(y_j) - \log q(y_j)\\), up to a constant by prompt.

        Returns:
            `torch.Tensor` of shape `(N, K)`: gains, in the unit of the rewards or of the scale.
        """
        num_prompts = int(prompt.max()) + 1
        of_reference = log_shares(prompt, log_ratios).unsqueeze(-1)
        shares = of_reference.exp()
        in_unit = rewards
        if self.scale == "z_score":
            mean, deviation = (
                self.moments if self.moments is not None else reference_moments(rewards, prompt, log_ratios)
            )
            in_unit = (rewards - mean) / deviation
        elif self.scale == "win_rate":
            in_unit = win_rates(rewards, prompt, shares.squeeze(-1))

        def mean_by_prompt(weights: torch.Tensor) -> torch.Tensor:
            return sums_by_prompt(prompt, weights * in_unit, num_prompts)[prompt]

        if self.from_reference or self.scale == "reference":
            gains = in_unit - mean_by_prompt(shares)
        elif self.scale in ("optimal", "regret"):
            tilted = of_reference + rewards / self.beta
            values = segment_logsumexp(tilted, prompt, num_prompts)[prompt]
            gains = rewards - (
                self.beta * values if self.scale == "optimal" else mean_by_prompt((tilted - values).exp())
            )
        else:
            gains = in_unit
        if self.thresholds:
            gains = gains.clone()
        for objective, threshold in self.thresholds.items():
            gains[:, objective] = in_unit[:, objective] - threshold
        return gains


def win_rates(rewards: torch.Tensor, prompt: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    r"""
    For every completion, the share of the reference's completions of its prompt that have a lower reward; of those with
    an equal one, itself among them, a half.

    Args:
        rewards (`torch.Tensor` of shape `(N, K)`): rewards of the completions.
        prompt (`torch.LongTensor` of shape `(N,)`): which prompt every row belongs to.
        shares (`torch.Tensor` of shape `(N,)`): how much of the reference each stands for, with sum 1 over each prompt.

    Returns:
        `torch.Tensor` of shape `(N, K)`, between 0 and 1.

    Example:

    ```python
    >>> import torch
    >>> from mpo_hf.estimation.reward_scales import win_rates

    >>> rewards = torch.tensor([[1.0], [3.0], [3.0], [9.0]])
    >>> win_rates(rewards, torch.tensor([0, 0, 0, 0]), torch.full((4,), 0.25)).T
    tensor([[0.1250, 0.5000, 0.5000, 0.8750]])
    ```
    """
    rates = torch.empty_like(rewards)
    for k, reward in enumerate(rewards.unbind(-1)):
        order = reward.argsort(stable=True)
        order = order[prompt[order].argsort(stable=True)]  # by prompt, then by reward
        keys = torch.stack([prompt[order].to(reward), reward[order]])
        is_new = (keys.diff(dim=1, prepend=keys.new_full((2, 1), torch.nan)) != 0).any(0)
        group = is_new.cumsum(0) - 1
        of_group = shares.new_zeros(int(group[-1]) + 1).index_add_(0, group, shares[order])
        # the shares of all earlier prompts sum to their number
        below = of_group.cumsum(0) - of_group / 2 - keys[0, is_new]
        rates[order, k] = below[group].clamp(0, 1).to(rates)
    return rates


def reference_moments(
    rewards: torch.Tensor, prompt: torch.Tensor, log_ratios: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Means and standard deviations of the reference's rewards over all prompts, `(K,)` each; arguments as of [`RewardScale`].

    Raises:
        `ValueError`: for an objective whose rewards are all equal.
    """
    constant = (rewards == rewards[0]).all(0)
    if constant.any():
        k = int(constant.nonzero()[0])
        raise ValueError(
            f"The rewards of objective {k} are all {rewards[0, k].item()}: they have no standard deviation to be divided "
            'by. Use another `normalize_rewards` than "z_score".'
        )
    shares = (log_shares(prompt, log_ratios).exp() / (int(prompt.max()) + 1)).unsqueeze(-1)
    mean = (shares * rewards).sum(0)
    return mean, (shares * (rewards - mean) ** 2).sum(0).sqrt()
