"""Keys and values of several components of equal architecture, for one forward pass of all their rows."""

from collections.abc import Iterable, Iterator, Sequence
from weakref import WeakKeyDictionary

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

from .mixture_cache import ComponentCacheView, StepCache, component_views


# Layers whose whole state is keys, values and a length.
_STACKABLE = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


class StackedCacheView(Cache):
    """
    The layers of several components of equal architecture as one cache, with their rows as blocks.

    The layers of each component remain ordinary layers of its own. Until they are changed elsewhere, their keys are
    views of one tensor, so that a step need not gather them.

    Args:
        views (`Sequence[Cache]`): the cache of each component, with equally many layers.
    """

    def __init__(self, views: Sequence[Cache]):
        super().__init__(layers=views[0].layers)  # length and masks are the same for all components
        self.views = views
        self.blocks = list(_side_by_side(views))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layers = self.blocks[layer_idx]
        count = len(layers)
        is_prompt = key_states.shape[-2] > 1 or not layers[0].is_initialized
        if not all(layer.is_initialized for layer in layers):
            for layer, *states in zip(layers, key_states.chunk(count), value_states.chunk(count)):
                if not layer.is_initialized:
                    layer.lazy_initialization(*states)
        if type(layers[0]) is DynamicLayer:
            return _append(layers, key_states, value_states)
        states = _update_all_by_first(layers, key_states, value_states, *args, **kwargs)
        if is_prompt and layer_idx == len(self.blocks) - 1 and not is_torchdynamo_compiling():
            note_joined(self.views)
        return states


class JoinedStaticLayer(StaticLayer):
    """
    A static layer of several components as one, with their rows as blocks. Keys, values and length of every
    component's own layer are views of the tensors here, so that an update of either is seen by both.

    Args:
        layers (`Sequence[StaticLayer]`): the layer of each component, whose keys are views of one tensor.
    """

    def __init__(self, layers: Sequence[StaticLayer]):
        super(StaticLayer, self).__init__()  # skips the length that StaticLayer would create
        first = layers[0]
        self.keys, self.values = _shared(layers)
        self.lengths = torch.stack([layer.cumulative_length for layer in layers])
        for layer, length in zip(layers, self.lengths):
            layer.cumulative_length = length
        _mark_static(self.lengths, *(layer.cumulative_length for layer in layers))
        self.max_cache_len, self.device = first.max_cache_len, first.device
        self.is_initialized = True

    @property
    def cumulative_length(self) -> torch.Tensor:
        return self.lengths[0]

    def update(self, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        states = StaticLayer.update(self, *args, **kwargs)  # `super()` would add a guard for each layer
        self.lengths[1:].copy_(self.lengths[0])
        return states


class JoinedStaticCache(Cache):
    """
    The layers of several components as one cache. It is valid until the keys of a layer are replaced, as by
    reordering. The layers of a copy are not joined.

    Args:
        starts (`tuple[int, ...]`): index of every component's first layer in the cache of the mixture.
        blocks (`Sequence[Sequence[StaticLayer]]`): for each layer of a component, that of every component.
    """

    def __init__(self, starts: tuple[int, ...], blocks: Sequence[Sequence[StaticLayer]]):
        super().__init__(layers=[JoinedStaticLayer(layers) for layers in blocks])
        self.starts = starts
        self._parts = [
            (start + i, layer, layer.keys, layer.values, layer.cumulative_length)
            for i, layers in enumerate(blocks)
            for start, layer in zip(starts, layers)
        ]

    def is_of(self, cache: Cache) -> bool:
        """Whether a cache still holds the layers that were joined, with the same keys."""
        layers = cache.layers
        for (
            i,
            layer,
            keys,
            values,
            length,
        ) in self._parts:  # a loop, as `all` of a generator is too slow for every step
            if layers[i] is not layer or layer.keys is not keys or layer.values is not values:
                return False
            if layer.cumulative_length is not length:
                return False
        return True


# The joined caches of a cache, by their starts. Not an attribute: exporters treat these as outputs of the model.
_JOINED: WeakKeyDictionary[Cache, dict[tuple[int, ...], JoinedStaticCache]] = WeakKeyDictionary()


class JoinedView(ComponentCacheView):
    """
    The layers of a component, known to be joined with those of others during one call.

    Args:
        parent (`Cache`): the cache that owns the layers.
        start (`int`): index of the first layer.
        stop (`int`): index after the last layer.
        joined (`JoinedStaticCache`): the joined layers.
    """

    def __init__(self, parent: Cache, start: int, stop: int, joined: JoinedStaticCache):
        super().__init__(parent, start, stop)
        self.joined = joined


def can_stack(views: Iterable[Cache]) -> bool:
    """Whether all layers are of types that [`StackedCacheView`] supports, and are not offloaded."""
    return all(
        isinstance(view, JoinedView)
        or (not getattr(view, "parent", view).offloading and all(type(layer) in _STACKABLE for layer in view.layers))
        for view in views
    )


def stack_views(views: Sequence[ComponentCacheView]) -> Cache:
    """The caches of several components as one, for one forward pass of all their rows."""
    first = views[0]
    if len(views) == 1:
        return first
    if isinstance(first, JoinedView) and first.joined.starts == tuple([view.start for view in views]):
        return first.joined
    return StackedCacheView(views)


def join_static_layers(views: Sequence[ComponentCacheView]) -> None:
    """
    Makes the keys of several components views of one tensor before a step of decoding is compiled, which writes to
    them in place. Layers that grow, are empty, or are joined already are left as they are.

    Args:
        views (`Sequence[ComponentCacheView]`): the cache of each component, with equally many layers.
    """
    for layers in _side_by_side(views):
        if isinstance(layers[0], StaticLayer) and layers[0].is_initialized and _shared(layers) is None:
            _join(layers)
    note_joined(views)


def note_joined(views: Sequence[ComponentCacheView]) -> None:
    """
    Records which layers of a cache are joined, for [`prepare_step`]. Layers with a sliding window are not: they also
    keep their length as a Python number, which layers cannot share.

    Args:
        views (`Sequence[ComponentCacheView]`): the cache of each component, with equally many layers.
    """
    blocks = list(_side_by_side(views))
    if not all(type(layer) is StaticLayer for layers in blocks for layer in layers):
        return
    cache = views[0].parent
    noted = _JOINED.setdefault(cache, {})
    starts = tuple(view.start for view in views)
    if (starts not in noted or not noted[starts].is_of(cache)) and all(map(_shared, blocks)):
        noted[starts] = JoinedStaticCache(starts, blocks)


def prepare_step(cache: Cache) -> Cache:
    """
    The cache to pass to compiled code in place of the cache of a mixture: one with joined layers for the components
    that have them, or the cache itself where none has. It is valid for one call only.
    """
    noted = _JOINED.get(cache)
    for starts, joined in list(noted.items()) if noted else ():
        if not joined.is_of(cache):
            del noted[starts]  # its layers have been replaced
    if not noted:
        return cache
    views = component_views(cache, cache.mixture_components, cache.mixture_layer_counts)
    by_start = {start: joined for starts, joined in noted.items() for start in starts}
    for k, view in views.items():
        if view.start in by_start:
            views[k] = JoinedView(cache, view.start, view.start + len(view), by_start[view.start])
    return StepCache(cache, views)


def _side_by_side(views: Sequence[ComponentCacheView]) -> Iterator[tuple[CacheLayerMixin, ...]]:
    """Tuples of the layers of all components at the same index."""
    return zip(*(view.layers for view in views), strict=True)


def _mark_static(*tensors: torch.Tensor) -> None:
    """Marks tensors as layers mark their own: CUDA graphs write only to tensors with a static address."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)


def _append(layers: Sequence[DynamicLayer], *states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Appends to dynamic layers, whose keys and values are the filled part of larger tensors."""
    length, rows, new_length = layers[0].get_seq_length(), states[0].shape[0] // len(layers), states[0].shape[-2]
    end = length + new_length
    shared = _shared(layers)
    if shared is None or shared[0].shape[-2] < end or _is_frozen(shared[0]):
        # layers that were reordered, as by beam search at every step, will be again: room would not be used
        room = 0 if length and shared is None and hasattr(layers[0], "mixture_blocks") else 64 + end // 8
        # zeros, as an exported model returns the whole tensor
        make = torch.zeros if room else torch.empty
        shared = tuple(
            make(*new.shape[:-2], end + room, new.shape[-1], dtype=new.dtype, device=new.device) for new in states
        )
        for tensor, name in zip(shared, ("keys", "values")):
            for i, layer in enumerate(layers if length else ()):
                tensor[i * rows : (i + 1) * rows, :, :length] = getattr(layer, name)
    for tensor, new in zip(shared, states):
        tensor.narrow(-2, length, new_length).copy_(new)
    filled = shared[0].narrow(-2, 0, end), shared[1].narrow(-2, 0, end)
    _share(layers, shared, filled)
    return filled


def _update_all_by_first(
    layers: Sequence[CacheLayerMixin], key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the update of the first layer on the keys and values of all layers."""
    first = layers[0]
    shared = _shared(layers) or _join(layers)
    parts = first.keys, first.values
    first.keys, first.values = shared
    states = first.update(key_states, value_states, *args, **kwargs)
    if first.keys is shared[0]:  # updated in place, and with it the views of all layers
        first.keys, first.values = parts
    else:
        _share(layers, (first.keys, first.values), (first.keys, first.values))
    for layer in layers[1:]:
        _copy_length(first, layer)
    return states


def _join(layers: Sequence[CacheLayerMixin]) -> tuple[torch.Tensor, torch.Tensor]:
    """Concatenates the keys and values of the layers, and gives every layer its view of the result."""
    shared = torch.cat([layer.keys for layer in layers]), torch.cat([layer.values for layer in layers])
    _share(layers, shared, shared)
    if isinstance(layers[0], StaticLayer) and not is_torchdynamo_compiling():
        _mark_static(*shared, *(states for layer in layers for states in (layer.keys, layer.values)))
    return shared


def _share(layers: Sequence[CacheLayerMixin], shared: tuple, filled: tuple) -> None:
    """Gives every layer its view of `filled`, and records the views on the first layer."""
    parts = list(zip(*(states.chunk(len(layers)) for states in filled)))
    for layer, (keys, values) in zip(layers, parts):
        layer.keys, layer.values = keys, values
    layers[0].mixture_blocks = shared, parts


def _shared(layers: Sequence[CacheLayerMixin]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """
    The tensors that the keys and values of all layers are views of; `None` once a layer was updated by itself,
    reordered or cropped.
    """
    shared, parts = getattr(layers[0], "mixture_blocks", (None, []))
    if len(parts) != len(layers):
        return None
    for layer, (keys, values) in zip(layers, parts):  # a loop, as `all` of a generator is too slow for every step
        if layer.keys is not keys or layer.values is not values:
            return None
    return shared


def _is_frozen(tensor: torch.Tensor) -> bool:
    """Whether a tensor was made in inference mode, and can no longer be written to outside of it."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()


def _copy_length(source: CacheLayerMixin, target: CacheLayerMixin) -> None:
    for name in ("cumulative_length", "cumulative_length_int"):
        length = getattr(source, name, None)
        if isinstance(length, torch.Tensor):
            getattr(target, name).copy_(length)  # in place, as compiled code refers to its address
        elif length is not None:
            setattr(target, name, length)
