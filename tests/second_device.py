"""
A second device, for machines that have none: `place(model)` puts a model there.

It is one of PyTorch's backends in Python. Its tensors are of the type `second`, compute on the CPU, and like those of a GPU
refuse to meet tensors of the CPU in an operation. Whoever imports this has the device for the rest of the process.
"""

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


class Backend:
    """What PyTorch asks a device's module for."""

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def manual_seed_all(self, seed: int) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False


_setup_privateuseone_for_python_backend("second", backend_module=Backend())


class SecondTensor(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "SecondTensor":
        tensor = torch._C._acc.create_empty_tensor(tuple(values.shape), values.dtype)
        tensor.__class__ = cls
        return tensor

    def __init__(self, values: torch.Tensor):
        self.values_on_cpu = values

    def tolist(self) -> list:
        return self.values_on_cpu.tolist()


def run(operator: Any, *args, **kwargs) -> Any:
    """Any operator: on the CPU, with tensors of the second device back."""
    name = operator._schema.name
    flat, structure = pytree.tree_flatten((args, kwargs))
    _refuse_cpu(name, [value for value in flat if isinstance(value, torch.Tensor)])
    args_on_cpu, kwargs_on_cpu = pytree.tree_unflatten([_on_cpu(value) for value in flat], structure)
    if name == "aten::_copy_from":
        args_on_cpu[1].copy_(args_on_cpu[0])
        return args[1]
    if name == "aten::view":  # a tensor of this device says it is contiguous, also where its values are not
        result = args_on_cpu[0].reshape(args_on_cpu[1])
    else:
        result = operator(*args_on_cpu, **kwargs_on_cpu)
    if operator._schema.is_mutable:
        return next((value for value in flat if _on_cpu(value) is result), result)
    if torch.device(kwargs.get("device") or "second").type == "cpu":
        return result
    return pytree.tree_map_only(torch.Tensor, SecondTensor, result)


def _refuse_cpu(name: str, tensors: list[torch.Tensor]) -> None:
    takes_both = ("aten::_copy_from", "aten::copy_", "aten::index", "aten::index_put_", "aten::_index_put_impl_")
    on_cpu = [tuple(tensor.shape) for tensor in tensors if tensor.device.type == "cpu" and tensor.ndim > 0]
    here = any(tensor.device.type == "second" for tensor in tensors)
    if here and on_cpu and name not in takes_both:
        raise RuntimeError(f"{name}: tensors of shape {on_cpu} are on the CPU, others are on the second device")


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if not isinstance(value, torch.Tensor) or value.device.type == "cpu":
        return value
    if not isinstance(value, SecondTensor):
        raise NotImplementedError("an operator made a tensor without values: add it to those in OWN")
    return value.values_on_cpu


# operators that PyTorch would make of others by ways that a tensor without memory of its own does not go
OWN = """
_to_copy _unsafe_view alias as_strided cat clamp clone detach embedding expand gather isfinite isin.Tensor_Tensor lift_fresh
logsumexp masked_fill.Scalar
multinomial new_empty new_ones nonzero ones_like repeat_interleave.self_int select.int slice.Tensor squeeze.dim stack
sum.dim_IntList t transpose.int unbind.int unsqueeze view where.self zeros_like
"""
_any, _aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_any.fallback(run, "PrivateUse1")


def _register(name: str) -> None:
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    _aten.impl(name, lambda *args, **kwargs: run(operator, *args, **kwargs), "PrivateUse1")


for _name in OWN.split():
    _register(_name)
for _name in ("arange", "arange.start", "arange.start_step"):
    _aten.impl(
        _name,
        lambda *args, dtype=None, layout=None, device=None, pin_memory=None: SecondTensor(
            torch.arange(*args, dtype=dtype)
        ),
        "PrivateUse1",
    )


def place(model: nn.Module) -> None:
    """Puts a model on the second device."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = SecondTensor(tensor.detach().clone())
