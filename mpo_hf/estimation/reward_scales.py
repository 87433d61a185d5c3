r"""
Reward scales: the unit in which rewards of different objectives are compared, and the baseline of their gains.

All functions take a table of N completions of P prompts, whose self-normalized importance weights
\\(\rho_j \propto \pi_{ref}(y_j)/q(y_j)\\) are the shares of the completions in the reference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .tables import log_shares, normalize_by_prompt, sums_by_prompt


# `RewardScale` defines them
SCALES = ("optimal", "regret", "reference", "gain", "z_score", "win_rate", "none")
# these change the unit of the rewards; the others change only the baseline
UNITS = ("gain", "z_score", "win_rate")
# Rewards of a prompt whose differences are no larger than this part of the rewards themselves count as equal: it is the
# rounding error of float32, in which most reward models compute.
EQUAL_TOLERANCE = 1.2e-7


@dataclass
class RewardScale:
    r"""
    Converts rewards into the gains that a welfare function compares.

    - `"optimal"`: the paper's P, \\(r - \beta \log E_{y \sim \pi_{ref}} \exp(r/\beta)\\), by prompt: relative to the
      optimum of this objective alone, reward less β times the divergence from the reference.
    - `"regret"`: \\(r - E_{y \sim \pi_k}[r]\\), by prompt, with \\(\pi_k \propto \pi_{ref} \exp(r_k/\beta)\\):
      relative to the expected reward of the objective's own policy, without its divergence.
    - `"reference"`: \\(r - E_{y \sim \pi_{ref}}[r]\\), by prompt: the gain over the reference.
    - `"gain"`: \((r_k - E_{ref}[r_k]) / (E_{\pi_k}[r_k] - E_{ref}[r_k])\), over all prompts: 0 is the reference, and 1 the
      objective's own policy. β is then in these units. It requires `reference_means` and `policy_means`.
    - `"z_score"`: less the mean and divided by the standard deviation of the reference's rewards, over all prompts. β
      is then in units of standard deviations.
    - `"win_rate"`: the probability that a completion of the prompt by the reference has a lower reward, with ties
      counted as half: between 0 and 1, and unchanged by strictly increasing transformations of the rewards.
    - `"none"`: the rewards, unchanged.

    Rewards of an objective that are equal for all completions of a prompt, up to rounding errors of float32, count as
    exactly equal.

    Args:
        scale (`str`): one of the above.
        beta (`float`): KL coefficient β.
        thresholds (`Mapping[int, float]`, *optional*):
            For objectives with a constraint, the least expected reward, in the unit of the scale: the baseline of its
            gains.
        from_reference (`bool`, *optional*, defaults to `False`):
            Whether all other gains are relative to the expected reward of the reference, as welfare functions of
            positive gains require.
        moments (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
            For `"z_score"`, the means and standard deviations of another table, of shape `(K,)`, instead of its own.
        reference_means (`torch.Tensor` of shape `(K,)`, *optional*):
            Expected rewards of the reference over all prompts, in place of estimates by prompt.
        policy_means (`torch.Tensor` of shape `(K,)`, *optional*):
            The expected reward of each objective's own policy.
        objective_names (`Sequence[str]`, *optional*): names of the objectives, for error messages.
    """

    scale: str
    beta: float
    thresholds: Mapping[int, float] = field(default_factory=dict)
    from_reference: bool = False
    moments: tuple[torch.Tensor, torch.Tensor] | None = None
    reference_means: torch.Tensor | None = None
    policy_means: torch.Tensor | None = None
    objective_names: Sequence[str] | None = None

    def __call__(self, rewards: torch.Tensor, prompt: torch.Tensor, log_ratios: torch.Tensor) -> torch.Tensor:
        r"""
        Args:
            rewards (`torch.Tensor` of shape `(N, K)`): rewards of the completions, float64.
            prompt (`torch.LongTensor` of shape `(N,)`): index of the prompt of every row, 0 to P - 1.
            log_ratios (`torch.Tensor` of shape `(N,)`): \\(\log \pi_{ref}(y_j) - \log q(y_j)\\), up to a constant of
                each prompt.

        Returns:
            `torch.Tensor` of shape `(N, K)`: gains, in the unit of the rewards or of the scale.

        Raises:
            `ValueError`: the z-scores of an objective are not defined; see [`reference_moments`].
        """
        num_prompts = int(prompt.max()) + 1
        of_reference = log_shares(prompt, log_ratios).unsqueeze(-1)
        shares = of_reference.exp()
        flat = _are_equal(rewards, prompt, log_ratios)[prompt]
        if flat.any():  # rounding errors would be differences of ranks, or gains that Nash's welfare raises
            rewards = torch.where(flat, sums_by_prompt(prompt, shares * rewards, num_prompts)[prompt], rewards)
        in_unit = rewards
        if self.scale == "z_score":
            mean, deviation = (
                self.moments
                if self.moments is not None
                else reference_moments(rewards, prompt, log_ratios, self.objective_names)
            )
            in_unit = (rewards - mean) / deviation
        elif self.scale == "win_rate":
            in_unit = win_rates(rewards, prompt, shares.squeeze(-1))

        def mean_by_prompt(weights: torch.Tensor) -> torch.Tensor:
            return sums_by_prompt(prompt, weights * in_unit, num_prompts)[prompt]

        by_prompt = self.from_reference or self.scale in ("reference", "optimal", "regret")
        if self.scale == "gain":
            by_prompt = False
            if self.reference_means is None or self.policy_means is None:
                raise ValueError('The scale "gain" needs the expected rewards of the reference and of each policy.')
            gains = in_unit = (rewards - self.reference_means) / (self.policy_means - self.reference_means)
        elif (
            self.reference_means is not None
            and self.scale not in UNITS
            and (self.from_reference or self.scale == "reference")
        ):
            gains, by_prompt = in_unit - self.reference_means, False
        elif self.from_reference or self.scale == "reference":
            gains = in_unit - mean_by_prompt(shares)
        elif self.scale in ("optimal", "regret"):
            gains = normalize_by_prompt(rewards, of_reference.squeeze(-1), prompt, num_prompts, self.beta)
            if self.scale == "regret":  # the objective's own policy is the reference times exp(P(r)/β)
                gains = rewards - mean_by_prompt((of_reference + gains / self.beta).exp())
        else:
            gains = in_unit
        if by_prompt:
            gains = gains.masked_fill(flat, 0)
        if self.thresholds:
            gains = gains.clone()
        for objective, threshold in self.thresholds.items():
            gains[:, objective] = in_unit[:, objective] - threshold
        return gains


def win_rates(rewards: torch.Tensor, prompt: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    r"""
    For every completion, the share of the reference's completions of its prompt that have a lower reward, plus half of
    the share of those with an equal reward, which include the completion itself.

    Args:
        rewards (`torch.Tensor` of shape `(N, K)`): rewards of the completions.
        prompt (`torch.LongTensor` of shape `(N,)`): index of the prompt of every row.
        shares (`torch.Tensor` of shape `(N,)`): shares of the completions in the reference, with sum 1 over each
            prompt.

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
        # the shares of all earlier prompts sum to the number of these prompts
        below = of_group.cumsum(0) - of_group / 2 - keys[0, is_new]
        rates[order, k] = below[group].clamp(0, 1).to(rates)
    return rates


def distinguishes(rewards: torch.Tensor, prompt: torch.Tensor, log_ratios: torch.Tensor) -> torch.Tensor:
    """
    Which objectives distinguish completions: some prompt has completions with different rewards. No policy changes the
    expected reward of another one.

    Args:
        rewards (`torch.Tensor` of shape `(N, K)`): rewards of the completions.
        prompt (`torch.LongTensor` of shape `(N,)`): index of the prompt of every row.
        log_ratios (`torch.Tensor` of shape `(N,)`): log importance weights of the reference; -inf for completions that
            it excludes, whose rewards are not looked at.

    Returns:
        `torch.BoolTensor` of shape `(K,)`.

    Example:

    ```python
    >>> import torch
    >>> from mpo_hf.estimation.reward_scales import distinguishes

    >>> rewards = torch.tensor([[1.0, 1.0], [2.0, 1.0], [1.0, 5.0], [1.0, 5.0]])  # the second depends on the prompt alone
    >>> distinguishes(rewards, torch.tensor([0, 0, 1, 1]), torch.zeros(4))
    tensor([ True, False])
    ```
    """
    return ~_are_equal(rewards, prompt, log_ratios).all(0)


def _are_equal(rewards: torch.Tensor, prompt: torch.Tensor, log_ratios: torch.Tensor) -> torch.Tensor:
    """Whether the rewards of all completions of a prompt are equal, up to rounding errors: shape `(P, K)`."""
    known = log_ratios > -torch.inf
    rewards, prompt = rewards[known], prompt[known]
    empty = rewards.new_full((int(prompt.max()) + 1, rewards.shape[-1]), -torch.inf)
    index = prompt.unsqueeze(-1).expand_as(rewards)
    highest, lowest = (empty.scatter_reduce(0, index, sign * rewards, "amax") * sign for sign in (1, -1))
    return ~(highest - lowest > EQUAL_TOLERANCE * torch.maximum(highest.abs(), lowest.abs()))


def reference_moments(
    rewards: torch.Tensor,
    prompt: torch.Tensor,
    log_ratios: torch.Tensor,
    objective_names: Sequence[str] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Means and standard deviations of the reference's rewards over all prompts, `(K,)` each. The arguments are those of
    [`RewardScale`].

    Raises:
        `ValueError`: the rewards of an objective are all equal, up to rounding errors.
    """
    shares = (log_shares(prompt, log_ratios).exp() / (int(prompt.max()) + 1)).unsqueeze(-1)
    mean, largest = (shares * rewards).sum(0), rewards.abs().amax(0)
    deviation = (shares * ((rewards - mean) / largest) ** 2).sum(0).sqrt() * largest  # squares might overflow
    constant = ~(deviation > EQUAL_TOLERANCE * largest)
    if constant.any():
        k = int(constant.nonzero()[0])
        name = f"objective {k}" if objective_names is None else repr(objective_names[k])
        raise ValueError(
            f"The rewards of {name} are all {mean[k].item():.6g}, up to rounding errors, and their z-scores are not "
            f"defined. Use another `normalize_rewards` than "
            '"z_score", draw more completions a step if other rewards are rare, or leave the objective out.'
        )
    return mean, deviation
