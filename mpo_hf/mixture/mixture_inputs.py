"""
The inputs of a forward pass: which of them a model accepts, positions and masks, rows repeated for several components,
and copies on other devices.
"""

import inspect
from typing import Any

import torch
from torch import nn

from .compat import cache_name_of, without_peft


# Inputs with a row for each row of the batch.
ROW_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")

# Names of the arguments of `forward`, by class of model, and the name of its embedding of positions where that begins with
# positions for padding; dictionaries, as torch.compile ignores `functools.cache`.
_PARAMETERS: dict[type, frozenset[str]] = {}
_POSITION_TABLES: dict[type, str | None] = {}


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """Names of the arguments of a model's `forward`, seen through PEFT's wrapper."""
    kind = type(without_peft(model))
    if kind not in _PARAMETERS:
        _PARAMETERS[kind] = frozenset(inspect.signature(kind.forward).parameters)
    return _PARAMETERS[kind]


def accepted_inputs(backbone: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The part of `inputs` that a model accepts, with the cache under the name that the model has for it."""
    accepted = forward_parameters(backbone)
    inputs = {n: v for n, v in inputs.items() if n in accepted or n not in ("position_ids", "logits_to_keep")}
    if "cache" in inputs:
        inputs[cache_name_of(accepted)] = inputs.pop("cache")
    if inputs.get("position_ids") is not None and (first := first_position(backbone)):
        inputs["position_ids"] = inputs["position_ids"] + first
    return inputs


def first_position(model: nn.Module) -> int:
    """
    The position of a text's first token. Models of the RoBERTa family keep those up to the id of the padding token for
    padding, and count from there where they are given none.
    """
    base = without_peft(model)
    kind = type(base)
    if kind not in _POSITION_TABLES:
        _POSITION_TABLES[kind] = next(
            (
                name
                for name, module in base.named_modules()
                if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
            ),
            None,
        )
    table = _POSITION_TABLES[kind]
    return 0 if table is None else base.get_submodule(table).padding_idx + 1


def positions_from_mask(
    position_ids: torch.LongTensor | None, attention_mask: torch.Tensor | None, length: int
) -> torch.LongTensor | None:
    """Positions from a 2D attention mask. Without them, some architectures are silently wrong on left padding."""
    if position_ids is not None or attention_mask is None or attention_mask.ndim != 2:
        return position_ids
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def repeat_rows(inputs: dict[str, Any], count: int) -> dict[str, Any]:
    """Repeats the rows of `inputs` as `count` blocks. Inputs that are the same for all rows stay as they are."""
    rows = len(inputs["input_ids"])
    return {
        name: torch.cat([value] * count) if name in ROW_INPUTS and value is not None and len(value) == rows else value
        for name, value in inputs.items()
    }


def positions_by_row(input_ids: torch.LongTensor, past: int | torch.Tensor = 0) -> torch.LongTensor:
    """
    Positions after `past` tokens, with a row for each row of the ids; some models would make one row for all of them.
    """
    return (torch.arange(input_ids.shape[1], device=input_ids.device) + past).expand(input_ids.shape)


def trial_inputs(model: nn.Module, input_ids: torch.LongTensor) -> dict[str, Any]:
    """Arguments of `forward` for a pass without a cache."""
    inputs = {"input_ids": input_ids, "use_cache": False}
    if "position_ids" in forward_parameters(model):
        inputs["position_ids"] = positions_by_row(input_ids)
    return inputs


def copy_to(device: torch.device, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs, with their tensors on a device."""
    return {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}


def execution_device(backbone: nn.Module) -> torch.device:
    """The device that a model computes on. Weights that Accelerate offloads are on `meta` until they are needed."""
    device = next((p.device for p in backbone.parameters() if p.device.type != "meta"), None)
    if device is None:
        device = getattr(getattr(without_peft(backbone), "_hf_hook", None), "execution_device", None)
    return torch.device("meta" if device is None else device)
