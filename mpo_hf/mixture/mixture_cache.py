"""
Keys and values of all components, and the states of recurrent ones, in one cache of Transformers.

To `generate()` a mixture is one decoder with the layers of all its components, so that the cache which `generate()`
builds, reorders, crops or resets is an ordinary one. Each component gets a view of its own layers.
"""

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache, LinearAttentionCacheLayerMixin, StaticLayer
from transformers.utils import is_torchdynamo_compiling

from .compat import CACHE_NAME, is_recurrent


class ComponentCacheView(Cache):
    """
    The layers `start` to `stop` of a cache as a cache of their own.

    Args:
        parent (`Cache`): the cache that owns the layers.
        start (`int`): index of the first layer.
        stop (`int`): index after the last layer.
    """

    def __init__(self, parent: Cache, start: int, stop: int):
        super().__init__(layers=parent.layers[start:stop])
        self.parent = parent
        self.start = start
        # whether some layers hold a state of fixed size, and whether all of them hold nothing else
        self.has_states = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers)
        self.is_recurrent = self.has_states and is_recurrent(self)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # through the parent, which may move layers between devices
        return self.parent.update(key_states, value_states, layer_idx + self.start, *args, **kwargs)


class StepCache(Cache):
    """
    The cache of a mixture for one call, with views made outside of compiled code. Views made inside would add a guard
    for every layer, to be evaluated at every step.

    Args:
        cache (`Cache`): the cache of the mixture.
        views (`dict[int, ComponentCacheView]`): the views of its components.
    """

    def __init__(self, cache: Cache, views: dict[int, ComponentCacheView]):
        super().__init__(layers=cache.layers)
        self.cache = cache
        self.views = views
        self.mixture_components = cache.mixture_components


def check_cache(cache: Cache) -> None:
    """
    Refuses a cache that cannot hold the keys and values of a mixture.

    Raises:
        `ValueError`: when it is not the cache of a decoder, or was filled by a model that is not a mixture.
    """
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise ValueError(
            f"`{CACHE_NAME}` of a mixture must be a cache of a decoder, such as `DynamicCache(config=model.config)`, "
            f"got {type(cache).__name__}."
        )
    held = "the state" if is_recurrent(cache) else f"{cache.get_seq_length()} tokens"
    if not hasattr(cache, "mixture_components") and is_filled(cache):
        raise ValueError(
            f"This cache holds {held} of a model that is not this mixture. Start from a new one: "
            "`DynamicCache(config=model.config)`."
        )


def is_filled(cache: Cache) -> bool:
    """Whether a cache holds anything."""
    return cache.has_previous_state() if is_recurrent(cache) else cache.get_seq_length() > 0


def check_room(cache: Cache, rows: int, input_length: int | None, total_length: int) -> None:
    """
    Refuses a cache that does not fit the sequences to be generated.

    Args:
        cache (`Cache`): the cache that was passed to `generate()`.
        rows (`int`): the number of sequences to generate.
        input_length (`int`, *optional*): the number of tokens of the input, including those in the cache.
        total_length (`int`): the number of tokens that the cache must hold in the end.

    Raises:
        `ValueError`: when the cache is too short, too full, or of another batch.
    """
    if is_recurrent(cache):
        if is_filled(cache):
            raise ValueError(
                "All components of this mixture are recurrent, and their states do not record how many tokens of the input "
                "they have seen, so that `generate` cannot continue from them. Start from a new cache."
            )
        return
    filled = cache.get_seq_length()
    if filled and input_length is not None and filled >= input_length:
        raise ValueError(
            f"This cache holds {filled} tokens already, but the input has {input_length}. Continue with an input that begins "
            "with the tokens in the cache, followed by new ones, or start from a new cache."
        )
    keys = (getattr(layer, "keys", None) for layer in cache.layers)
    held = next((len(states) for states in keys if states is not None and states.numel()), rows) if filled else rows
    if held != rows:
        raise ValueError(f"This cache holds {held} sequences, but {rows} are to be generated.")
    shortest = min(
        (layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer) and not layer.is_sliding),
        default=total_length,
    )
    if shortest < total_length:
        raise ValueError(
            f"This static cache has room for {shortest} tokens, but {total_length} are needed. Make it larger "
            "(`max_cache_len`), or generate fewer."
        )


def bind_cache(cache: Cache, active: Sequence[int], layer_counts: Sequence[int]) -> tuple[int, ...]:
    """
    Binds a cache to the components that run: it keeps the layers of these only.

    Components of weight zero do not run, so their layers would stay empty and the cache would misreport its length. A
    cache stays bound to the components that it was first used with. Later calls may give weight to fewer of them, but
    not to others, which have no keys and values in it.

    Args:
        cache (`Cache`):
            A cache with a layer for each layer of all components, or one that adds layers as it is filled.
        active (`Sequence[int]`): the components with nonzero weight.
        layer_counts (`Sequence[int]`): the number of layers of every component.

    Returns:
        `tuple[int, ...]`: the components to run.

    Raises:
        `ValueError`: when the cache belongs to another model, or lacks a component that now has weight.
    """
    bound = getattr(cache, "mixture_components", None)
    if bound is None:
        if not is_torchdynamo_compiling():
            check_cache(cache)
        bound, cache.mixture_layer_counts = tuple(active), tuple(layer_counts)
        if len(cache.layers) == sum(layer_counts):
            starts = [sum(layer_counts[:k]) for k in bound]
            cache.layers = [
                layer for k, start in zip(bound, starts) for layer in cache.layers[start : start + layer_counts[k]]
            ]
        elif cache.layer_class_to_replicate is not None and not cache.layers:
            cache.layers = [cache.layer_class_to_replicate() for k in bound for _ in range(layer_counts[k])]
    elif missing := sorted(set(active) - set(bound)):
        raise ValueError(
            f"This cache holds keys and values of the components {list(bound)} only, but the weights of this call also "
            f"run {missing}. Start from a new cache, or give these components a weight from the first call."
        )
    if len(cache.layers) != sum(count for k, count in enumerate(layer_counts) if k in bound):
        raise ValueError(
            f"The cache has {len(cache.layers)} layers, but the components of this mixture have {list(layer_counts)}. "
            "Build it from the mixture's own config, such as `DynamicCache(config=model.config)`."
        )
    cache.mixture_components = bound
    return bound


def component_views(
    cache: Cache, components: Sequence[int], layer_counts: Sequence[int]
) -> dict[int, ComponentCacheView]:
    """A view for each component, in a cache that holds the layers of `components` one after another."""
    if isinstance(cache, StepCache):
        return cache.views
    views, start = {}, 0
    for k in components:
        views[k] = ComponentCacheView(cache, start, start + layer_counts[k])
        start += layer_counts[k]
    return views
