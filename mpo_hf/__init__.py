"""Mixing Preference Optimization for Hugging Face Transformers: mix aligned policies, fit the weights, share the mixture."""

from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_mixture import MixtureComponent, MixturePolicyConfig
from .logits_process import MixtureLogitsProcessor
from .modeling_mixture import MixturePolicyModel
from .optim import MirrorDescent


if TYPE_CHECKING:
    from .rewards import RewardModelSpec
    from .trainer import MPOConfig, MPOTrainer

__version__ = "0.1.0"
__all__ = [
    "MPOConfig",
    "MPOTrainer",
    "MirrorDescent",
    "MixtureComponent",
    "MixtureLogitsProcessor",
    "MixturePolicyConfig",
    "MixturePolicyModel",
    "RewardModelSpec",
]

AutoConfig.register(MixturePolicyConfig.model_type, MixturePolicyConfig, exist_ok=True)
AutoModelForCausalLM.register(MixturePolicyConfig, MixturePolicyModel, exist_ok=True)


def __getattr__(name: str):
    # fitting needs TRL, which takes seconds to import; mixing does not
    if name in ("MPOConfig", "MPOTrainer"):
        from . import trainer

        return getattr(trainer, name)
    if name == "RewardModelSpec":
        from .rewards import RewardModelSpec

        return RewardModelSpec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
