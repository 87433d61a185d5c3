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
from transformers.utils import is_torchdynamo_compiling


# Layers whose whole state is keys, values and a length.
_STACKABLE = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


class StackedCacheView(Cache):
    """
    The layers of several components of equal architecture, seen as one cache whose rows are theirs, one block after
    another.

    Every component's layers stay its own, and ordinary ones. While nobody else changes them, their keys are parts of one
    tensor, so that a step need not gather them.

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
        if type(layers[0]) is DynamicLayer:
            return _append(layers, key_states, value_states)
        return _update_all_by_first(layers, key_states, value_states, *args, **kwargs)


def can_stack(views: Iterable[Cache]) -> bool:
    """Whether all layers are of the kinds that [`StackedCacheView`] handles, and stay on their device."""
    return all(
        not getattr(view, "parent", view).offloading and all(type(layer) in _STACKABLE for layer in view.layers)
        for view in views
    )


def join_static_layers(views: Sequence[Cache]) -> None:
    """
    Makes the keys of several components parts of one tensor before a step of decoding is compiled: the step writes to
    them in place, where they stay. Layers that grow, are empty, or are joined already stay as they are.

    Args:
        views (`Sequence[Cache]`): the cache of each component, with equally many layers.
    """
    for layers in zip(*(view.layers for view in views), strict=True):
        if isinstance(layers[0], StaticLayer) and layers[0].is_initialized and _shared(layers) is None:
            _join(layers)


def _append(layers: Sequence[DynamicLayer], *states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds to layers that grow, whose keys and values are the filled part of tensors with room for more."""
    length, rows = layers[0].get_seq_length(), len(states[0]) // len(layers)
    end = length + states[0].shape[-2]
    shared = _shared(layers)
    if shared is None or shared[0].shape[-2] < end or _is_frozen(shared[0]):
        # layers that were reordered, as beams are at every step, will be again, and room would be left behind
        room = 0 if length and shared is None and hasattr(layers[0], "mixture_blocks") else 64 + end // 8
        # zeros, not whatever lay there: an exported model hands the whole out
        make = torch.zeros if room else torch.empty
        shared = tuple(
            make(*new.shape[:-2], end + room, new.shape[-1], dtype=new.dtype, device=new.device) for new in states
        )
        for tensor, name in zip(shared, ("keys", "values")):
            for i, layer in enumerate(layers if length else ()):
                tensor[i * rows : (i + 1) * rows, :, :length] = getattr(layer, name)
    for tensor, new in zip(shared, states):
        tensor[..., length:end, :] = new
    filled = shared[0][..., :end, :], shared[1][..., :end, :]
    _share(layers, shared, filled)
    return filled


def _update_all_by_first(
    layers: Sequence[CacheLayerMixin], key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Has the first layer do what its kind does, with the keys and values of all in place of its own."""
    first = layers[0]
    shared = _shared(layers) or _join(layers)
    parts = first.keys, first.values
    first.keys, first.values = shared
    states = first.update(key_states, value_states, *args, **kwargs)
    if first.keys is shared[0]:  # written to in place: all others have it already
        first.keys, first.values = parts
    else:
        _share(layers, (first.keys, first.values), (first.keys, first.values))
    for layer in layers[1:]:
        _copy_length(first, layer)
    return states


def _join(layers: Sequence[CacheLayerMixin]) -> tuple[torch.Tensor, torch.Tensor]:
    """Gathers what the layers hold, and gives every layer its part of it."""
    shared = torch.cat([layer.keys for layer in layers]), torch.cat([layer.values for layer in layers])
    _share(layers, shared, shared)
    if isinstance(layers[0], StaticLayer) and not is_torchdynamo_compiling():
        # as a layer marks its own: CUDA graphs write only to tensors that are known to stay where they are
        for tensor in (*shared, *(states for layer in layers for states in (layer.keys, layer.values))):
            torch._dynamo.mark_static_address(tensor)
    return shared


def _share(layers: Sequence[CacheLayerMixin], shared: tuple, filled: tuple) -> None:
    """Gives every layer its part of `filled`, and notes which they are, on the first."""
    parts = list(zip(*(states.chunk(len(layers)) for states in filled)))
    for layer, (keys, values) in zip(layers, parts):
        layer.keys, layer.values = keys, values
    layers[0].mixture_blocks = shared, parts


def _shared(layers: Sequence[CacheLayerMixin]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """
    The tensors that keys and values of the layers are parts of, `None` when some are not, because a layer was updated by
    itself, reordered or cropped.
    """
    shared, parts = getattr(layers[0], "mixture_blocks", (None, []))
    if len(parts) == len(layers) and all(
        layer.keys is keys and layer.values is values for layer, (keys, values) in zip(layers, parts)
    ):
        return shared
    return None


def _is_frozen(tensor: torch.Tensor) -> bool:
    """Whether a tensor was made in inference mode, which has ended: it cannot be written to any more."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()


def _copy_length(source: CacheLayerMixin, target: CacheLayerMixin) -> None:
    for name in ("cumulative_length", "cumulative_length_int"):
        length = getattr(source, name, None)
        if isinstance(length, torch.Tensor):
            getattr(target, name).copy_(length)  # in place, as compiled code knows it by its address
        elif length is not None:
            setattr(target, name, length)
