"""A mixture as a Transformers model. These files are all that travels to the Hub with one, and import no others of mpo_hf."""

from .configuration_mixture import MixtureComponent, MixturePolicyConfig
from .modeling_mixture import MixturePolicyModel


__all__ = ["MixtureComponent", "MixturePolicyConfig", "MixturePolicyModel"]
