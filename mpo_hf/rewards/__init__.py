"""Rewards of completions: functions, reward models, ensembles of them."""

from .building import make_reward_functions
from .ensembles import RewardEnsemble
from .functions import CallableReward
from .loading import RewardModelSpec
from .models import ModelReward
from .values import RewardError, normalize_rewards, validate_rewards


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
