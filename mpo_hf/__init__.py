"""Mixing Preference Optimization for Hugging Face Transformers: mix aligned policies, fit the weights, share the mixture."""

from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_mixture import MixtureComponent, MixturePolicyConfig
from .logits_process import MixtureLogitsProcessor
from .modeling_mixture import MixturePolicyModel
from .optim import MirrorDescent
from .sequence_level import sequence_level_beam_search, sequential_monte_carlo


if TYPE_CHECKING:
    from .preference_selection import select_completions
    from .reward_ensembles import RewardEnsemble
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
    "RewardEnsemble",
    "RewardModelSpec",
    "select_completions",
    "sequence_level_beam_search",
    "sequential_monte_carlo",
]

AutoConfig.register(MixturePolicyConfig.model_type, MixturePolicyConfig, exist_ok=True)
AutoModelForCausalLM.register(MixturePolicyConfig, MixturePolicyModel, exist_ok=True)


def __getattr__(name: str):
    # fitting needs TRL, which takes seconds to import; mixing does not
    if name in ("MPOConfig", "MPOTrainer"):
        from . import trainer

        return getattr(trainer, name)
    if name == "RewardEnsemble":
        from .reward_ensembles import RewardEnsemble

        return RewardEnsemble
    if name == "RewardModelSpec":
        from .rewards import RewardModelSpec

        return RewardModelSpec
    if name == "select_completions":
        from .preference_selection import select_completions

        return select_completions
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
