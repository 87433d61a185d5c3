"""Mixing Preference Optimization for Hugging Face Transformers."""

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_mixture import MixtureComponent, MixturePolicyConfig
from .modeling_mixture import MixturePolicyModel
from .optim import MirrorDescent
from .trainer import MPOConfig, MPOTrainer


__version__ = "0.1.0"
__all__ = [
    "MPOConfig",
    "MPOTrainer",
    "MirrorDescent",
    "MixtureComponent",
    "MixturePolicyConfig",
    "MixturePolicyModel",
]

AutoConfig.register(MixturePolicyConfig.model_type, MixturePolicyConfig, exist_ok=True)
AutoModelForCausalLM.register(MixturePolicyConfig, MixturePolicyModel, exist_ok=True)
