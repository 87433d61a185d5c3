"""Mixing Preference Optimization for Hugging Face Transformers: mix aligned policies, fit the weights, share the mixture."""

from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModelForCausalLM

from .decoding.logits_process import MixtureLogitsProcessor
from .decoding.sequence_level import sequence_level_beam_search, sequential_monte_carlo
from .estimation.optim import MirrorDescent
from .lazy import lazy_names
from .mixture.configuration_mixture import MixtureComponent, MixturePolicyConfig
from .mixture.modeling_mixture import MixturePolicyModel
from .mixture.product_layouts import get_product_layouts, set_product_layouts


if TYPE_CHECKING:
    from .decoding import select_completions
    from .rewards import RewardEnsemble, RewardModelSpec
    from .trainer import MPOConfig, MPOTrainer

__version__ = "0.2.0.dev0"
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
    "get_product_layouts",
    "select_completions",
    "sequence_level_beam_search",
    "sequential_monte_carlo",
    "set_product_layouts",
]

AutoConfig.register(MixturePolicyConfig.model_type, MixturePolicyConfig, exist_ok=True)
AutoModelForCausalLM.register(MixturePolicyConfig, MixturePolicyModel, exist_ok=True)


__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "MPOConfig": "trainer",
        "MPOTrainer": "trainer",
        "RewardEnsemble": "rewards",
        "RewardModelSpec": "rewards",
        "select_completions": "decoding",
    },
)
