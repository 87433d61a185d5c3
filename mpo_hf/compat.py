"""
Names of Transformers, PEFT and torch which are not part of their public interface.

Hooks that classes override, and single attributes, stay where they are used: tests/test_private_names.py lists them.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.utils import is_peft_available


def layer_types_of(config: PreTrainedConfig) -> list[str]:
    """Which kind of cache layer every layer of a decoder needs, as `DynamicCache` and `StaticCache` see it."""
    return get_layer_types_and_kwargs(config)[0]


def activate_adapter(model: nn.Module, adapter: str | None) -> None:
    """
    Makes one adapter of a `PeftModel` the one that runs, or none of them. Which parameters are trained stays as it is.

    PEFT's own switch decides anew what is trained, by calls that torch.compile breaks the graph at. Layers of LoRA need
    two fields for it, which are set here; everything else goes through PEFT.

    Args:
        model (`nn.Module`): a `PeftModel`; nothing happens to others.
        adapter (`str`, *optional*): name of the adapter; `None` for the base alone.
    """
    if not hasattr(model, "get_base_model"):
        return
    layers = _lora_layers(model)
    if layers is None:
        _activate_by_peft(model, adapter)
        return
    for layer in layers:
        layer._disable_adapters = adapter is None
        if adapter is not None:
            layer._active_adapter = [adapter]
    if adapter is not None:
        model.active_adapter = model.base_model.active_adapter = adapter


def _activate_by_peft(model: nn.Module, adapter: str | None) -> None:
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    if adapter is None:
        model.base_model.disable_adapter_layers()
    else:
        model.base_model.enable_adapter_layers()
        model.set_adapter(adapter)
    for parameter, flag in trained.items():
        parameter.requires_grad_(flag)


def _lora_layers(model: nn.Module) -> list[nn.Module] | None:
    """The layers of a model that is adapted by nothing but LoRA, none of it merged."""
    # under a condition, or Transformers would demand PEFT of everybody who opens a mixture that carries this code
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


def recomputes_layers(model: nn.Module) -> bool:
    """Whether gradient checkpointing is on for any layer that it takes effect in."""
    return any(getattr(module, "gradient_checkpointing", False) and module.training for module in model.modules())


def correct_parallel_plans(model: PreTrainedModel) -> None:
    """
    Makes the plans by which a model is split over devices name its parameters as they are called.

    Transformers collects them from a model's children, of which PEFT's wrappers pass on the plans of what they wrap,
    without their own prefix.
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
    """Tied weights, target to source, by the names they have: a layer that is adapted is the `base_layer` of another."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def name_of(key: str) -> str:
        layer, _, parameter = key.rpartition(".")
        adapted = f"{layer}.base_layer.{parameter}"
        return adapted if adapted in names else key

    return {name_of(target): name_of(source) for target, source in tied.items()}


def parse_to(*args, **kwargs) -> tuple[torch.device | None, torch.dtype | None]:
    """What the arguments of `nn.Module.to` ask for."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    return device, dtype
