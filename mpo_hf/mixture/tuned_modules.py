"""Copies of modules that share all weights, in which linear layers and attention take the form that is fastest."""

from collections import defaultdict
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from .adapter_loading import is_from_peft
from .adapter_switching import lock_of
from .product_layouts import PLAIN
from .stacked_rows import attributes_of, with_children
from .tuned_attention import tuned_attention
from .tuned_products import MIN_NUMEL, LinearProducts, can_be_tuned


class TunedLinear(nn.Linear):
    """
    A linear layer over the parameters of another one.

    Args:
        linear (`nn.Linear`): the layer.
        products (`LinearProducts`): those of its shape, to which this layer is added.
    """

    def __init__(self, linear: nn.Linear, products: LinearProducts):
        # its own parameters would be new ones
        self.__dict__.update(linear.__dict__)
        products.layers.append(self._parameters)
        self.products = products

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        if torch.compiler.is_compiling():
            return F.linear(hidden_states, weight, bias)
        rows = hidden_states.numel() // self.in_features
        form = self.products.known().get(rows)
        if form != PLAIN:
            if not can_be_tuned(hidden_states, weight):
                return F.linear(hidden_states, weight, bias)
            form = form or self.products.form(rows)
        if form == PLAIN:
            # the last positions of several texts are no block of memory, for which PyTorch would copy the weight for each text
            return F.linear(hidden_states.contiguous(), weight, bias)
        output = self.products.compute(form, hidden_states.reshape(rows, self.in_features), weight, bias)
        return output.view(*hidden_states.shape[:-1], self.out_features)


class Tuner:
    """Makes tuned forms of the modules of one model."""

    def __init__(self):
        self._products: dict[tuple, LinearProducts] = defaultdict(LinearProducts)

    def layer(self, module: nn.Module) -> nn.Module:
        """The tuned form of a plain linear layer that is not small; any other module as it is."""
        if type(module) is not nn.Linear or "forward" in module.__dict__:
            return module
        weight = module.weight
        if (
            type(weight) is not nn.Parameter
            or not weight.is_cpu
            or weight.numel() < MIN_NUMEL
            or not weight.is_contiguous()
        ):
            return module
        return TunedLinear(module, self._products[weight.shape, weight.dtype])

    def with_children(self, module: nn.Module, children: dict[str, nn.Module | None]) -> nn.Module:
        """A copy of a module with other children, which shares all else; the module itself if they are its own."""
        if all(child is module._modules[name] for name, child in children.items()):
            return module
        return tuned_attention(with_children(module, children))


def tuned_copy(module: nn.Module, tuner: Tuner, memo: dict[int, nn.Module]) -> nn.Module:
    """A copy of a module with tuned layers that shares all else; the module itself where it has none to tune."""
    if id(module) not in memo:
        twin = tuner.layer(module)
        # the layers of PEFT keep their state, such as which adapter is active, beside their weights
        if twin is module and "forward" not in module.__dict__ and not is_from_peft(module, "base_layer"):
            children = {name: child and tuned_copy(child, tuner, memo) for name, child in module._modules.items()}
            twin = tuner.with_children(module, children)
        memo[id(module)] = twin
    return memo[id(module)]


class TunedModels:
    """Tuned copies of full models, which mixtures and views of their components share."""

    def __init__(self):
        self._copies: WeakKeyDictionary[nn.Module, tuple[list[Any], nn.Module]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type, tuple]:
        return TunedModels, ()  # a copy makes its own

    def get(self, model: nn.Module, check: bool = True) -> nn.Module:
        """
        The tuned copy of a model.

        Args:
            model (`nn.Module`): the model.
            check (`bool`, *optional*, defaults to `True`): whether to check if its modules are still those of the last call.
        """
        with lock_of(model):
            state, twin = self._copies.get(model, (None, None))
            if state is None or (check and state != _state(model)):
                state, twin = _state(model), tuned_copy(model, Tuner(), {})
                self._copies[model] = state, twin
        return twin


def _state(model: nn.Module) -> list[Any]:
    """
    A list that differs when modules inside of a model, or attributes, have been replaced since a copy was made. Without the
    model itself, which it would keep alive.
    """
    modules = list(model.modules())
    return [*modules[1:], *map(attributes_of, modules)]
