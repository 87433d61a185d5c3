"""What passes over the rows of several components have in common: which inputs they take, and how they are laid out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .component_loading import forward_parameters


# Tokens in one pass, all blocks counted, up to which one pass saves much of the time of several. Beyond it saves a
# tenth at best, and is not worth the memory of everybody's logits at once.
MOST_TOKENS = 1024
# Inputs with a row for each row of the batch.
ROW_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


class CannotStack(Exception):
    """Why components cannot run side by side."""


class StackedModules(nn.Module):
    """
    Modules that each run on their own block of rows.

    Args:
        blocks (`Sequence[nn.Module]`): the modules, one a block. They may be the same.
    """

    def __init__(self, blocks: Sequence[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([block(part) for block, part in zip(self.blocks, rows.chunk(len(self.blocks)))])


def can_run_stacked(model: nn.Module, inputs: dict[str, Any], count: int) -> bool:
    """
    Whether rows of several components would come out of one call as they do of one call each, and sooner.

    Not where something is trained, intermediate results are asked for, or an input is not known to be by row.

    Args:
        model (`nn.Module`): the model of the components.
        inputs (`dict`): arguments of its `forward`, for one component.
        count (`int`): the number of components.
    """
    if count * inputs["input_ids"].numel() > MOST_TOKENS:
        return False
    if model.training or inputs.get("output_attentions") or inputs.get("output_hidden_states"):
        return False
    if torch.is_autocast_enabled(inputs["input_ids"].device.type):
        return False
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters()):
        return False
    rows = (len(inputs["input_ids"]), 1)
    for name, value in inputs.items():
        if name in ROW_INPUTS:
            dims = (2, 4) if name == "attention_mask" else (2,)
            if value is not None and not (
                isinstance(value, torch.Tensor) and value.ndim in dims and len(value) in rows
            ):
                return False
        elif name != "logits_to_keep" and not (value is None or isinstance(value, bool | int | float | str)):
            return False
    return True


def repeat_rows(inputs: dict[str, Any], count: int) -> dict[str, Any]:
    """Inputs for `count` blocks of the rows of `inputs`. What is the same for all rows stays as it is."""
    rows = len(inputs["input_ids"])
    return {
        name: torch.cat([value] * count) if name in ROW_INPUTS and value is not None and len(value) == rows else value
        for name, value in inputs.items()
    }


def positions_by_row(input_ids: torch.LongTensor, past: int | torch.Tensor = 0) -> torch.LongTensor:
    """Positions behind `past` tokens with a row for each row of the ids, where some models would make one row for all."""
    return (torch.arange(input_ids.shape[1], device=input_ids.device) + past).expand(input_ids.shape)


def trial_inputs(model: nn.Module, input_ids: torch.LongTensor) -> dict[str, Any]:
    """Arguments of `forward` for a pass that keeps nothing."""
    inputs = {"input_ids": input_ids, "use_cache": False}
    if "position_ids" in forward_parameters(model):
        inputs["position_ids"] = positions_by_row(input_ids)
    return inputs


def with_children(module: nn.Module, children: dict[str, nn.Module | None]) -> nn.Module:
    """A copy of a module with other children, which shares everything else with it: parameters, buffers and hooks."""
    if "forward" in module.__dict__:
        raise CannotStack(f"the forward of a {type(module).__name__} is replaced, as by offloading")
    twin = object.__new__(type(module))
    twin.__dict__.update({**module.__dict__, "_modules": children})
    return twin


@torch.no_grad()
def check_rows(stack: nn.Module, stacked: Sequence[nn.Module], count: int) -> None:
    """
    Runs a stack once, to see that blocks of rows reach its layers as blocks: routed experts would mix them.

    Args:
        stack (`nn.Module`): the model of several components.
        stacked (`Sequence[nn.Module]`): those of its layers that take blocks of rows.
        count (`int`): the number of blocks.

    Raises:
        `CannotStack`: with the layer that got something else.
    """
    shape = (count, count + 1)
    seen: dict[nn.Module, tuple[int, ...]] = {}

    def look(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if len(args) != 1 or kwargs:
            raise CannotStack(f"a {type(layer).__name__} would get {len(args)} inputs and {list(kwargs)}")
        seen[layer] = tuple(args[0].shape[:-1] if args[0].is_floating_point() else args[0].shape)

    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in stacked]
    try:
        stack(**trial_inputs(stack, torch.zeros(shape, dtype=torch.long, device=stack.device)))
    finally:
        for hook in hooks:
            hook.remove()
    for layer in stacked:
        found = seen.get(layer, ())
        # what is split into heads has these as a dimension of their own, before or behind the tokens
        if found != shape and not (len(found) == 3 and found[0] == count and count + 1 in found[1:]):
            raise CannotStack(f"of {shape} tokens, a layer of theirs saw {found}")
