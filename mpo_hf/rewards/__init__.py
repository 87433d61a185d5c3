"""Rewards of completions: functions, reward models, ensembles of them."""

from .ensembles import RewardEnsemble
from .functions import (
    CallableReward,
    ModelReward,
    RewardError,
    RewardModelSpec,
    make_reward_functions,
    normalize_rewards,
    validate_rewards,
)


__all__ = [
    "CallableReward",
    "ModelReward",
    "RewardEnsemble",
    "RewardError",
    "RewardModelSpec",
    "make_reward_functions",
    "normalize_rewards",
    "validate_rewards",
]
