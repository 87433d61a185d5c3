"""Keys and values of several components of one base, for one forward pass of all their rows."""

from collections.abc import Iterable, Sequence

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)


# Layers whose whole state is keys, values and a length.
_STACKABLE = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


class StackedCacheView(Cache):
    """
    The layers of several components of equal architecture, seen as one cache whose rows are theirs, one block after
    another.

    Every component's layers stay its own. While nobody else changes them, their keys are parts of one tensor, so that
    a step copies no more than it would for as many rows of one model.

    Args:
        views (`Sequence[Cache]`): the cache of each component, with equally many layers.
    """

    def __init__(self, views: Sequence[Cache]):
        super().__init__(layers=views[0].layers)  # in length and masks the components do not differ
        self.blocks = list(zip(*(view.layers for view in views), strict=True))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layers = self.blocks[layer_idx]
        count = len(layers)
        for layer, *states in zip(layers, key_states.chunk(count), value_states.chunk(count)):
            if not layer.is_initialized:
                layer.lazy_initialization(*states)
        first = layers[0]
        whole, parts = _whole(layers)
        # the first layer does the work for all
        first.keys, first.values = whole
        states = first.update(key_states, value_states, *args, **kwargs)
        if parts is None or first.keys is not whole[0]:
            whole = first.keys, first.values
            parts = list(zip(*(states.chunk(count) for states in whole)))
        first.mixture_blocks = whole, parts
        for layer, (layer.keys, layer.values) in zip(layers, parts):
            _copy_length(first, layer)
        return states


def can_stack(views: Iterable[Cache]) -> bool:
    """Whether all layers are of the kinds that [`StackedCacheView`] handles, and stay on their device."""
    return all(
        not getattr(view, "parent", view).offloading and all(type(layer) in _STACKABLE for layer in view.layers)
        for view in views
    )


def _whole(layers: Sequence[CacheLayerMixin]) -> tuple[tuple[torch.Tensor, torch.Tensor], list | None]:
    """
    Keys and values of all layers in one tensor each, and the parts of them that the layers have, `None` when they had
    to be copied: because a layer was updated by itself, reordered or cropped.
    """
    whole, parts = getattr(layers[0], "mixture_blocks", (None, []))
    if len(parts) == len(layers) and all(
        layer.keys is keys and layer.values is values for layer, (keys, values) in zip(layers, parts)
    ):
        return whole, parts
    return (torch.cat([layer.keys for layer in layers]), torch.cat([layer.values for layer in layers])), None


def _copy_length(source: CacheLayerMixin, target: CacheLayerMixin) -> None:
    for name in ("cumulative_length", "cumulative_length_int"):
        length = getattr(source, name, None)
        if isinstance(length, torch.Tensor):
            getattr(target, name).copy_(length)  # in place, as compiled code knows it by its address
        elif length is not None:
            setattr(target, name, length)
