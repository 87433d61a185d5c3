"""The one place that touches names of Transformers which are not part of its public interface."""

from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs


def layer_types_of(config: PreTrainedConfig) -> list[str]:
    """Which kind of cache layer every layer of a decoder needs, as `DynamicCache` and `StaticCache` see it."""
    return get_layer_types_and_kwargs(config)[0]
