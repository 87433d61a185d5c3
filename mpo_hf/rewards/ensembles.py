"""Several rewards for the same objective, combined into one."""

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, Literal

import torch

from .building import make_reward_functions
from .functions import RewardFunction
from .loading import Text
from .values import validate_rewards


AGGREGATIONS = ("mean", "worst_case", "uncertainty")


class RewardEnsemble(RewardFunction):
    r"""
    Several reward models of one objective as one reward function: the ensembles of
    [Reward Model Ensembles Help Mitigate Overoptimization](https://huggingface.co/papers/2310.02743) (Coste et al., 2024).
    Of the rewards \\(r_1, \dots, r_M\\) that M members give to one completion, it returns

    - `"mean"`: \\(\bar r = \frac1M \sum_i r_i\\);
    - `"worst_case"` (WCO in the paper): \\(\min_i r_i\\);
    - `"uncertainty"` (UWO): \\(\bar r - c \cdot \frac1M \sum_i (r_i - \bar r)^2\\), with c = `coefficient`.

    The rewards are combined for each completion, within one objective. The fit then finds the worst-off *objective* over all
    completions.

    All three take the members' rewards as estimates of the same quantity on the same scale. A member whose rewards are
    always lower is always the worst case, and a constant offset between members counts as disagreement. Rewards are not
    rescaled here: give members on different scales as [`RewardModelSpec`] with `scale=1 / std, offset=-mean / std`, measured
    on your own completions. The authors normalize every member to mean 0 and variance 1 on held-out data after training.

    Args:
        reward_funcs (`Sequence`):
            The members, two or more: callables, repo ids, models or [`RewardModelSpec`], as for [`MPOTrainer`].
        aggregation (`str`, *optional*, defaults to `"mean"`): `"mean"`, `"worst_case"` or `"uncertainty"`.
        coefficient (`float`, *optional*):
            Weight c of the variance, 0 or more; required for `"uncertainty"`, and only allowed there. Its unit is the inverse of
            a reward, so there is no default: the authors use 0.5 for best-of-n sampling and 0.1 for PPO, with members of
            variance 1.
        label (`str`, *optional*): name of the objective. Defaults to `"ensemble"`.
        processing_classes (`Sequence`, *optional*):
            Tokenizers of the members, one each, as for [`~mpo_hf.rewards.make_reward_functions`].

    Attributes:
        members (`list[RewardFunction]`): the members. Their errors name them.
        metrics (`dict[str, torch.Tensor]`):
            From the last call: the rewards of every member, by its name, and `disagreement`, the standard deviation over
            the members, each of shape `(N,)`. [`MPOTrainer`] logs their means as `ensembles/<objective>/<name>`.

    Raises:
        `ValueError`: for fewer than two members, an unknown aggregation, and a coefficient that is missing, negative or
            without effect.

    Example:

    ```python
    >>> from mpo_hf import RewardEnsemble

    >>> def words(completions, **kwargs):
    ...     return [len(completion.split()) for completion in completions]

    >>> def letters(completions, **kwargs):
    ...     return [len(completion) / 5 for completion in completions]

    >>> reward = RewardEnsemble([words, letters], aggregation="uncertainty", coefficient=0.5, label="length")
    >>> reward(prompts=["Hi"] * 2, completions=["It is a cloud.", "Cloud formations, mostly."])
    tensor([3.2200, 3.5000], dtype=torch.float64)
    >>> reward.metrics["disagreement"]
    tensor([0.6000, 1.0000], dtype=torch.float64)
    ```
    """

    def __init__(
        self,
        reward_funcs: Sequence[Any],
        aggregation: Literal["mean", "worst_case", "uncertainty"] = "mean",
        coefficient: float | None = None,
        label: str | None = None,
        processing_classes: Sequence[Any] | None = None,
    ):
        count = len(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else 1
        if count < 2:
            raise ValueError(
                f"An ensemble needs a list of two or more reward functions, got {count}. Pass a single reward without an ensemble."
            )
        _check_aggregation(aggregation, coefficient)
        self.name = label or "ensemble"
        self.aggregation, self.coefficient = aggregation, coefficient
        self.members = make_reward_functions(reward_funcs, processing_classes=processing_classes)
        self.metrics = {}

    def __call__(self, prompts: list[Text], completions: list[Text], **columns) -> torch.Tensor:
        rewards = torch.stack([member(prompts, completions, **columns) for member in self.members], dim=-1)
        self.metrics = {member.name: values for member, values in zip(self.members, rewards.unbind(-1))}
        self.metrics["disagreement"] = rewards.std(-1, correction=0)
        return validate_rewards(self.name, aggregate_rewards(rewards, self.aggregation, self.coefficient), completions)

    def check(self, prompts: Sequence[Text], columns: Iterable[str]) -> None:
        columns = list(columns)
        for member in self.members:
            member.check(prompts, columns)

    def to(self, device: torch.device | str) -> "RewardEnsemble":
        """Moves the members' models."""
        for member in self.members:
            member.to(device)
        return self


def aggregate_rewards(rewards: torch.Tensor, aggregation: str, coefficient: float | None = None) -> torch.Tensor:
    """
    One reward per completion from those of M members; see [`RewardEnsemble`].

    Args:
        rewards (`torch.Tensor` of shape `(..., M)`): rewards of every member.
        aggregation (`str`): `"mean"`, `"worst_case"` or `"uncertainty"`.
        coefficient (`float`, *optional*): weight of the variance, for `"uncertainty"`.

    Returns:
        `torch.Tensor` of shape `(...)`.
    """
    _check_aggregation(aggregation, coefficient)
    if aggregation == "worst_case":
        return rewards.amin(-1)
    mean = rewards.mean(-1)
    return mean if aggregation == "mean" else mean - coefficient * rewards.var(-1, correction=0)


def _check_aggregation(aggregation: str, coefficient: float | None) -> None:
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"`aggregation` must be one of {list(AGGREGATIONS)}, got {aggregation!r}.")
    if aggregation != "uncertainty":
        if coefficient is not None:
            raise ValueError(
                f"`coefficient` weighs the variance of `aggregation='uncertainty'`, and {coefficient!r} would have no effect "
                f"with {aggregation!r}. Leave it out."
            )
    elif coefficient is None:
        raise ValueError(
            "`aggregation='uncertainty'` needs a `coefficient`, the weight of the members' variance. The paper's are 0.1 and "
            "0.5, for members of variance 1; where rewards are s times as large, divide them by s."
        )
    elif not isinstance(coefficient, Real) or not 0 <= coefficient < math.inf:
        raise ValueError(f"`coefficient` must be a number of 0 or more, got {coefficient!r}.")
