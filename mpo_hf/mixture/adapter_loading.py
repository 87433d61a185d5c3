"""
Adapters over a base that several policies share: which can be mixed, how one is put on its base, and whether all of it
was loaded.
"""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers.utils import is_peft_available

from .component_checks import check_all_loaded
from .component_errors import errors_named
from .configuration_mixture import MixtureComponent


def check_adapter_kind(config: Mapping[str, Any], name: str) -> None:
    """
    Refuses adapters that do more than replace layers of their base. PEFT does the rest in its own `generate`, which is
    not the one that runs here, or to the base, and so to all policies over it.

    Args:
        config (`Mapping[str, Any]`): the fields of the adapter's config.
        name (`str`): how an error calls the adapter.
    """
    if is_peft_available():
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PromptLearningConfig

    kind = config.get("peft_type")
    kind = getattr(kind, "value", kind)
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(
            f"The adapter {name} is of type {kind!r} (`peft_type`), which the installed version of PEFT does not know."
        )
    if issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[kind], PromptLearningConfig) or kind == "ADAPTION_PROMPT":
        reason = f"learns a prompt ({kind}), and cannot be mixed token by token"
    elif hasattr(PEFT_TYPE_TO_TUNER_MAPPING[kind], "generate"):
        reason = f"chooses its weights for a call as a whole ({kind}), and cannot be mixed token by token"
    elif kind == "LILY":
        reason = "weighs its factors by the mean of all tokens in a call, so that a text depends on those beside it"
    elif config.get("alora_invocation_tokens"):
        reason = (
            "starts at its `alora_invocation_tokens`, which it does not see any more when tokens follow one by one"
        )
    elif config.get("arrow_config"):
        reason = "routes tokens to other adapters of its base (`arrow_config`), and no policy has several"
    elif config.get("layer_replication"):
        reason = "repeats layers of its base (`layer_replication`), which other policies over it would run through too"
    else:
        return
    raise ValueError(
        f"The adapter {name} {reason}. Adapters that change weights can be mixed: LoRA, IA3 and similar methods; or a "
        "model that the adapter was merged into (`merge_and_unload`), where PEFT can merge it."
    )


def active_adapter_of(model: nn.Module) -> str:
    """The adapter that a `PeftModel` in memory runs with. One whose state would be lost by switching is refused."""
    active = list(model.active_adapters)
    for adapter in active:
        check_adapter_kind(model.peft_config[adapter].to_dict(), f"{adapter!r} in memory")
    layers = [module for module in model.modules() if is_from_peft(module, "merged_adapters")]
    if len(active) != 1:
        state = (
            f"has {len(active)} active adapters, {active}, and a policy has one. Combine them (`add_weighted_adapter`)"
        )
    elif any(layer.disable_adapters for layer in layers):
        state = "has its adapters switched off. Switch them on, or give the base without them (`unload`)"
    elif any(layer.merged for layer in layers):
        state = "has adapters merged into its base. Undo that (`unmerge_adapter`), or give the result of `merge_and_unload`"
    else:
        return active[0]
    raise ValueError(f"The {type(model).__name__} in memory {state}.")


def put_adapter(
    model: nn.Module, folder: str, name: str, component: MixtureComponent, allow_unmatched: bool
) -> nn.Module:
    """
    Puts an adapter on a base, beside those that it has.

    Args:
        model (`nn.Module`): the base, or the `PeftModel` that it is in already.
        folder (`str`): the folder of the adapter.
        name (`str`): the name that it gets in the model.
        component ([`MixtureComponent`]): how errors call the adapter and its base.
        allow_unmatched (`bool`): whether to accept weights that are missing or not used.

    Returns:
        `PeftModel`: the base with the adapter.

    Raises:
        `ValueError`: for an adapter that does not fit, is not loaded as a whole, or changes the base.
    """
    subject = f"The adapter {component.adapter!r}"
    wrapped = hasattr(model, "get_base_model")
    if not wrapped and getattr(model, "peft_config", None):
        raise ValueError(
            f"{subject} cannot lie over {component.name_or_path!r}, which has one already: both would act."
        )
    _check_same_kind(model, folder, component)
    base = model.get_base_model() if wrapped else model
    structure, weights = list(_structure(base)), [(weight, _fingerprint(weight)) for weight in model.parameters()]
    model, result = _load(model, folder, name, f"{subject} does not fit the base {component.name_or_path!r}")
    loaded = unmatched_keys(model, name, result)
    way_out = (
        "Give it the base that it was trained over, or merge it (`merge_and_unload`), save the result, and mix that."
    )
    check_all_loaded(f"{subject} over {component.name_or_path!r}", loaded, allow_unmatched, way_out)
    if any(_fingerprint(weight) != fingerprint for weight, fingerprint in weights):
        raise ValueError(
            f"{subject} changes weights of its base when it is loaded, as adapters with biases or with an initialization "
            "such as PiSSA do, so that it cannot share the base with other policies. Merge it (`merge_and_unload`), save "
            "the result, and mix that."
        )
    if list(_structure(base)) != structure:
        raise ValueError(
            f"{subject} does more to its base than replace layers, and cannot share it with other policies."
        )
    return model


def _load(model: nn.Module, folder: str, name: str, does_not_fit: str) -> tuple[nn.Module, Any]:
    """The `PeftModel` with the adapter, and which keys PEFT found missing or unexpected in its file."""
    # inside a condition, or Transformers would require PEFT of everyone who opens a mixture that carries this code
    if is_peft_available():
        from peft import PeftModel

    with errors_named(f"{does_not_fit}:"):
        try:
            if not hasattr(model, "get_base_model"):
                model = PeftModel.from_pretrained(model, folder, name)
            return model, model.load_adapter(folder, name)  # one that is there already has its weights read again
        except KeyError as err:
            raise ValueError(
                f"PEFT looks in it for {err}, of a module that it, or an adapter before it, trains as a whole or in single "
                "tokens. List an adapter with `trainable_token_indices` behind the others."
            ) from err


def unmatched_keys(model: nn.Module, name: str, result: Any) -> dict[str, Collection[str]]:
    """What `load_adapter` of a `PeftModel` found missing in the file of an adapter, and what it found too much."""
    return {"missing_keys": _unfilled(model, name, result.missing_keys), "unexpected_keys": result.unexpected_keys}


def _unfilled(model: nn.Module, name: str, missing: Sequence[str]) -> set[str]:
    """Those of the missing keys that are of the adapter itself, and no other names of weights that were loaded."""
    keys = {key for key in missing if name in key.split(".")}
    tensors = dict(chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)))
    filled = {id(tensor) for key, tensor in tensors.items() if key not in keys}
    return {key for key in keys if id(tensors.get(key)) not in filled}


def _check_same_kind(model: nn.Module, folder: str, component: MixtureComponent) -> None:
    """Refuses an adapter of another kind than those on its base, which PEFT cannot hold beside them."""
    if is_peft_available():
        from peft import PeftConfig

    with errors_named(f"The config of the adapter {component.adapter!r} cannot be read."):
        kind = PeftConfig.from_pretrained(folder).peft_type
    others = {config.peft_type for config in getattr(model, "peft_config", {}).values()} - {kind}
    if others:
        raise ValueError(
            f"The adapter {component.adapter!r} is of type {kind.value}, beside one of type {others.pop().value} over "
            f"{component.name_or_path!r}: PEFT holds one type on a base. Merge one of the two into a model of its own "
            "(`merge_and_unload`), save it, and mix that."
        )


def share_weights(model: nn.Module) -> nn.Module:
    """
    A copy of a model with the same parameters, buffers and configs in modules of its own, which an adapter may replace
    while others go on with the model as it is.
    """
    shared = chain(model.parameters(), model.buffers(), (m.config for m in model.modules() if hasattr(m, "config")))
    return copy.deepcopy(model, {id(part): part for part in shared})


def is_from_peft(module: nn.Module, part: str) -> bool:
    """Whether PEFT put a module in place of its part of that name."""
    return hasattr(module, "adapter_layer_names") and hasattr(module, part)


def _structure(module: nn.Module, name: str = "") -> Iterator[tuple]:
    """The modules of a base and the number of their hooks, seen through PEFT's layers."""
    while part := next((part for part in ("base_layer", "original_module") if is_from_peft(module, part)), None):
        module = getattr(module, part)
    yield name, module, len(module._forward_pre_hooks), len(module._forward_hooks), "forward" in vars(module)
    for child, inner in module.named_children():
        yield from _structure(inner, f"{name}.{child}")


def _fingerprint(parameter: torch.Tensor) -> float:
    """
    A number that changes when the values of a parameter do. It is computed from a sample of them, as models are large.
    """
    if hasattr(parameter, "__tensor_flatten__"):  # quantized: the tensors that it consists of
        return sum(_fingerprint(getattr(parameter, name)) for name in parameter.__tensor_flatten__()[0])
    if parameter.is_meta:
        return 0.0
    step = max(1, parameter.numel() // 1024)
    return parameter.detach().reshape(-1)[::step].sum(dtype=torch.float64).item()
