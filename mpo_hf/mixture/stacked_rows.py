"""Common parts of passes over the rows of several components: which inputs they accept, and copies of modules."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .mixture_inputs import ROW_INPUTS, trial_inputs


# The largest number of tokens in one pass, over all blocks. Below it, one pass saves much of the time of several;
# above it, a tenth at best, which is not worth the memory of the logits of all components at once.
MAX_STACKED_TOKENS = 1024


class StackingError(Exception):
    """Components cannot run side by side. The message is the reason, as the end of a sentence."""


def reason_of(error: Exception) -> str:
    """Why components cannot run side by side, as the end of a sentence: whatever their layers raise is a reason."""
    return str(error) if isinstance(error, StackingError) else f"of an error: {type(error).__name__}: {error}"


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


def can_run_stacked(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """
    Whether one call with the rows of several components gives the results of one call each.

    Not during training, when attentions or hidden states are asked for, or with an input that may not be by row.

    Args:
        model (`nn.Module`): the model of the components.
        inputs (`dict`): arguments of its `forward`, for one component.
    """
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


def saves_time(inputs: dict[str, Any], count: int) -> bool:
    """Whether one call with the rows of several components takes less time than one call each."""
    return count * inputs["input_ids"].numel() <= MAX_STACKED_TOKENS


def with_children(module: nn.Module, children: dict[str, nn.Module | None]) -> nn.Module:
    """A copy of a module with other children, which shares its parameters, buffers and hooks."""
    if "forward" in module.__dict__:
        raise StackingError(f"the forward of a {type(module).__name__} is replaced, as by offloading")
    twin = object.__new__(type(module))
    twin.__dict__.update({**module.__dict__, "_modules": children})
    return twin


def attributes_of(module: nn.Module) -> tuple[Any, ...]:
    """
    What tells whether a module that may be copied is still as it was, such as by a `forward` of its own or the dtype of its
    weight. Other modules are shared with copies, and may change as they run.
    """
    if not (module._modules or isinstance(module, nn.Linear)):
        return ()
    return *map(id, vars(module).values()), getattr(getattr(module, "weight", None), "dtype", None)


@torch.no_grad()
def check_rows(stack: nn.Module, stacked: Sequence[nn.Module], count: int) -> list[list[nn.Module]]:
    """
    Runs a stack once to check that blocks of rows reach its layers as blocks, which routed experts would mix.

    Args:
        stack (`nn.Module`): the model of several components.
        stacked (`Sequence[nn.Module]`): those of its layers that take blocks of rows.
        count (`int`): the number of blocks.

    Returns:
        `list[list[nn.Module]]`: the layers that read the same input, which did not change in between, in the order in which
        they ran.

    Raises:
        `StackingError`: with the first layer that got other shapes.
    """
    shape = (count, count + 1)
    seen: dict[nn.Module, tuple[int, ...]] = {}
    # inputs are held, or others could be made in their place; values, as they can be changed in place
    readers: dict[int, tuple[torch.Tensor, torch.Tensor, list[nn.Module]]] = {}

    def look(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if len(args) != 1 or kwargs:
            raise StackingError(f"a {type(layer).__name__} would get {len(args)} inputs and {list(kwargs)}")
        seen[layer] = tuple(args[0].shape[:-1] if args[0].is_floating_point() else args[0].shape)
        source, values, layers = readers.get(id(args[0]), (args[0], args[0].clone(), []))
        if torch.equal(source, values):
            readers[id(source)] = source, values, [*layers, layer]

    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in stacked]
    try:
        stack(**trial_inputs(stack, torch.zeros(shape, dtype=torch.long, device=stack.device)))
    finally:
        for hook in hooks:
            hook.remove()
    for layer in stacked:
        found = seen.get(layer, ())
        # activations that are split into heads have a dimension for these, before or after the tokens
        if found != shape and not (len(found) == 3 and found[0] == count and count + 1 in found[1:]):
            raise StackingError(f"of {shape} tokens, a layer of theirs saw {found}")
    return [layers for _, _, layers in readers.values()]
