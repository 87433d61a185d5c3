"""
Names of Transformers, PEFT and torch which are not part of their public interface, or differ between their versions.

Hooks that classes override, and single attributes, stay where they are used: tests/test_private_names.py lists them.
tests/test_public_names.py lists the public arguments and fields that are used, and tells which ones are gone.
"""

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    get_layer_types_and_kwargs,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import is_peft_available, is_torchdynamo_compiling, logging


# What a `forward` may call its cache, the newest name first. Models that are not part of Transformers keep the name of
# the version that they were written for, so the name is a property of a model, not of the installed version.
CACHE_NAMES = ("cache", "past_key_values")
# What `generate()` and the outputs of models call it: `cache` since Transformers 5.24, `past_key_values` before.
CACHE_NAME = next(name for name in CACHE_NAMES if name in {field.name for field in fields(CausalLMOutputWithPast)})


def cache_name_of(parameters: Collection[str]) -> str | None:
    """The name of the cache among the arguments of a model's `forward`; `None` where it takes no such cache."""
    return next((name for name in CACHE_NAMES if name in parameters), None)


def pick_cache(given: dict[str, Any], caller: str) -> Cache | None:
    """
    Takes the cache out of arguments, whichever name it was passed under. As in Transformers, the newest name wins, and
    a name that the installed version has deprecated raises a warning.

    Args:
        given (`dict`): arguments by name; those of [`CACHE_NAMES`] are taken out.
        caller (`str`): the function that they were given to, for the warning.
    """
    found = {name: given.pop(name) for name in CACHE_NAMES if name in given}
    found = {name: cache for name, cache in found.items() if cache is not None}
    if not found:
        return None
    name, *others = found
    if not is_torchdynamo_compiling():
        if others:
            message = f"`{caller}` got a cache as `{name}` and as `{others[0]}`. The former is used."
            warnings.warn(message, FutureWarning, stacklevel=3)
        elif CACHE_NAMES.index(name) > CACHE_NAMES.index(CACHE_NAME):
            message = f"`{name}` is deprecated for `{caller}`. Use `{CACHE_NAME}` instead."
            warnings.warn(message, FutureWarning, stacklevel=3)
    return found[name]


def layer_types_of(config: PreTrainedConfig) -> list[str]:
    """
    The kind of each layer of a decoder that has a place in its cache, in the words of a config. Those of caches include
    others, such as "dummy" for layers without keys of their own, which the checks of configs do not know.
    """
    # before Transformers 5.21 without the layers that share others' keys
    kinds = get_layer_types_and_kwargs(config)[0]
    own = getattr(config, "layer_types", None)
    words = kinds if own is None else list(own)[: len(kinds)]
    # both have no attention, and only one is a config's word
    return ["moe" if word == "mlp" else word for word in words]


def sharing_modes_of(config: PreTrainedConfig) -> list[str | None]:
    """For each layer of [`layer_types_of`] whether it shares keys and values: `"store"`, `"reuse"` or `None`."""
    return getattr(config, "kv_sharing_modes", None) or [None] * len(layer_types_of(config))


def has_recurrent_layers(config: PreTrainedConfig) -> bool:
    """Whether a decoder has layers with a state of fixed size, such as Mamba's, instead of or beside keys and values."""
    kinds = (DYNAMIC_LAYER_TYPE_MAPPING.get(layer_type, object) for layer_type in layer_types_of(config))
    return any(issubclass(kind, LinearAttentionCacheLayerMixin) for kind in kinds)


def kinds_without_config(config: PreTrainedConfig) -> set[str]:
    """The kinds of layers of a decoder that a cache made without its config would not have."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer, type(None))
    return {kind for kind in layer_types_of(config) if DYNAMIC_LAYER_TYPE_MAPPING.get(kind, type(None)) not in plain}


def kinds_not_static(config: PreTrainedConfig) -> set[str]:
    """The kinds of layers of a decoder that no static cache has."""
    return set(get_layer_types_and_kwargs(config)[0]) - STATIC_LAYER_TYPE_MAPPING.keys()


def starts_anew(model: nn.Module) -> bool:
    """
    Whether a recurrent model discards its state when it is given several tokens at once. In Transformers, the layers
    of Mamba 1 do, also inside of other models (Jamba). They are recognized by `x_proj`, which projects the input to
    the parameters of the state space.
    """
    return any(hasattr(module, "A_log") and hasattr(module, "x_proj") for module in model.modules())


def is_recurrent(cache: Cache) -> bool:
    """Whether all layers of a cache hold states of fixed size, which do not record how many tokens they have seen."""
    return any(cache.is_linear) and not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)


def without_peft(model: nn.Module) -> nn.Module:
    """The model inside of PEFT's wrapper, or the model itself where it has none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class AdapterSwitch:
    """
    Makes one adapter of a `PeftModel` the active one, or disables all of them, and undoes that. `requires_grad` stays as it
    is.

    PEFT's `set_adapter` resets `requires_grad`, by calls that cause graph breaks under torch.compile. LoRA layers need
    only two fields to be set, which is done here; all other adapters go through PEFT.

    Args:
        model (`PeftModel`): the model, in the state to go back to.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.layers = _lora_layers(model)
        self.active = (model.active_adapter, model.base_model.active_adapter)
        if self.layers is None:
            # an attribute of PEFT's layers, but a method of its models
            self.disabled = any(getattr(module, "disable_adapters", None) is True for module in model.modules())
        else:
            self.fields = [(layer._active_adapter, layer._disable_adapters) for layer in self.layers]

    def activate(self, adapter: str | None) -> None:
        """Activates an adapter; with `None`, the base alone remains."""
        if self.layers is None:
            _activate_by_peft(self.model, adapter)
            return
        for layer in self.layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]
        if adapter is not None:
            self.model.active_adapter = self.model.base_model.active_adapter = adapter

    def undo(self) -> None:
        """Goes back to the adapters that were active before."""
        if self.layers is None:
            _activate_by_peft(self.model, self.active[0])
            if self.disabled:
                _activate_by_peft(self.model, None)
            return
        for layer, before in zip(self.layers, self.fields):
            layer._active_adapter, layer._disable_adapters = before
        self.model.active_adapter, self.model.base_model.active_adapter = self.active


def _activate_by_peft(model: nn.Module, adapter: str | list[str] | None) -> None:
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    if adapter is None:
        model.base_model.disable_adapter_layers()
    else:
        model.base_model.enable_adapter_layers()
        model.set_adapter(adapter)
    for parameter, flag in trained.items():
        parameter.requires_grad_(flag)


def _lora_layers(model: nn.Module) -> list[nn.Module] | None:
    """The adapted layers of a model whose adapters are all LoRA and not merged; `None` for other models."""
    # inside a condition, or Transformers would require PEFT of everyone who opens a mixture that carries this code
    if is_peft_available():
        from peft.tuners.lora import LoraModel
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

    if type(model.base_model) is not LoraModel:
        return None
    layers = []
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return None
        if isinstance(module, BaseTunerLayer):
            if module.merged:
                return None
            layers.append(module)
    return layers


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Hides progress bars of Transformers, such as "Writing model shards: 0it" where there are no weights to write."""
    previous = logging.set_tqdm_hook(lambda tqdm, args, kwargs: tqdm(*args, **{**kwargs, "disable": True}))
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)


class whole_property(property):
    """
    A property of a module of which an `AttributeError` inside is an error of its own. `nn.Module` would take it for a
    sign that there is no such property, and say so.
    """

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        try:
            return super().__get__(instance, owner)
        except AttributeError as err:
            raise RuntimeError(f"`{self.fget.__name__}` failed: {type(err).__name__}: {err}") from err


def recomputes_layers(model: nn.Module) -> bool:
    """Whether gradient checkpointing is on in any layer, and takes effect there."""
    return any(getattr(module, "gradient_checkpointing", False) and module.training for module in model.modules())


def correct_parallel_plans(model: PreTrainedModel) -> None:
    """
    Corrects the parameter names in the plans by which a model is split over devices.

    Transformers collects the plans from a model's children. PEFT's wrappers pass on the plan of the model inside,
    without the prefix that the wrapper adds to its names.
    """
    prefixes = {}
    for name, child in model.named_children():
        if hasattr(child, "get_base_model"):
            base = child.get_base_model()
            inner = next(inner for inner, module in child.named_modules() if module is base)
            prefixes[name] = f"{name}.{inner}"
    for plan in ("_tp_plan", "_ep_plan", "_pp_plan", "_fsdp_plan"):
        rules = [(*key.partition("."), rule) for key, rule in getattr(model, plan).items()]
        setattr(model, plan, {f"{prefixes.get(name, name)}{dot}{rest}": rule for name, dot, rest, rule in rules})


def correct_tied_weights(model: nn.Module, tied: dict[str, str]) -> dict[str, str]:
    """Tied weights, from target to source, by their actual names: those of adapted layers are in `base_layer`."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def name_of(key: str) -> str:
        layer, _, parameter = key.rpartition(".")
        adapted = f"{layer}.base_layer.{parameter}"
        return adapted if adapted in names else key

    return {name_of(target): name_of(source) for target, source in tied.items()}


def parse_to(*args, **kwargs) -> tuple[torch.device | None, torch.dtype | None]:
    """Device and dtype that the arguments of `nn.Module.to` ask for."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    return device, dtype
