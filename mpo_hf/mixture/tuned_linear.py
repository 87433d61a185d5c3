"""Linear layers that take the form which is fastest for their shape, in copies of modules that share all weights."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .adapter_loading import is_from_peft
from .product_layouts import PLAIN, choose_layout, current_layouts
from .stacked_rows import with_children
from .tuned_attention import tuned_attention


# Smaller weights stay as they are: no form would save more than the time to choose it.
MIN_NUMEL = 2**16

# Numbers of rows beyond 8 share the choice of the next of these, and all beyond the last one its.
_ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)

# Bytes of weights that are read to time a form: more than caches hold, as in a pass, where most of the time goes into reading
# them; few for many rows, where it goes into computing.
_COLD_BYTES, _WARM_BYTES, _FEW_ROWS = 2**27, 2**23, 32

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def _turned(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    output = torch.mm(weight, rows.t()).t().contiguous()
    return output if bias is None else output.add_(bias)


def _onednn(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # what torch.compile makes of linear layers; `F.linear` asks another library in float32
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def _padded_to(count: int) -> Product:
    def product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(F.pad(rows, (0, 0, 0, count - rows.shape[0])), weight, bias)[: rows.shape[0]]

    return product


def _one_by_one(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.cat([F.linear(row, weight, bias) for row in rows.split(1)])


# With the smallest and the largest number of rows that each form is tried for.
_PRODUCTS: dict[str, tuple[Product, int, int]] = {
    PLAIN: (F.linear, 1, _ROWS[-1]),
    "onednn": (_onednn, 1, _ROWS[-1]),
    "turned": (_turned, 2, _ROWS[-1]),
    "padded to 4": (_padded_to(4), 2, 3),
    "padded to 8": (_padded_to(8), 2, 7),
    "one by one": (_one_by_one, 2, 4),
}


def _choose(rows: int, weights: Sequence[torch.Tensor]) -> str:
    """The form for a number of rows and one of several weights of one shape, which a pass reads one after another."""
    count = _ROWS[min(bisect_left(_ROWS, rows), len(_ROWS) - 1)]
    (out_features, in_features), dtype, size = weights[0].shape, weights[0].dtype, weights[0].nbytes
    weights = weights[: max(1, (_COLD_BYTES if count <= _FEW_ROWS else _WARM_BYTES) // size)]
    # a generator of its own: that of the user decides what is sampled
    noise = torch.randn(count, in_features, generator=torch.Generator().manual_seed(0)).to(dtype)

    def run(product: Product) -> torch.Tensor:
        for weight in weights:
            output = product(noise, weight, None)
        return output

    forms = {
        form: lambda product=product: run(product)
        for form, (product, least, most) in _PRODUCTS.items()
        if least <= count <= most
    }
    name = f"{str(dtype).removeprefix('torch.')}, {count} x {in_features} x {out_features}, {torch.get_num_threads()} threads"
    return choose_layout(name, in_features, forms)


class _Alike:
    """The linear layers of one shape that a pass runs, and the form of their products by number of rows."""

    def __init__(self):
        self.parameters: list[dict[str, Any]] = []
        self._forms: dict[int, str] = {}
        self._chosen_for: tuple | None = None

    @property
    def forms(self) -> dict[int, str]:
        chosen_for = current_layouts(), torch.get_num_threads()
        if chosen_for != self._chosen_for:
            self._forms, self._chosen_for = {}, chosen_for
        return self._forms

    def choose(self, rows: int) -> str:
        """Chooses the form for a number of rows."""
        weights = [parameters["weight"].detach() for parameters in self.parameters]
        form = self.forms[rows] = _choose(rows, weights)
        return form


class TunedLinear(nn.Linear):
    """
    A linear layer over the parameters of another one.

    Args:
        linear (`nn.Linear`): the layer.
        alike (`_Alike`): the layers of its shape, to which this one is added.
    """

    def __init__(self, linear: nn.Linear, alike: _Alike):
        # its own parameters would be new ones
        self.__dict__.update(linear.__dict__)
        alike.parameters.append(self._parameters)
        self.alike = alike

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        if torch.compiler.is_compiling():
            return F.linear(hidden_states, weight, bias)
        rows = hidden_states.numel() // self.in_features
        form = self.alike.forms.get(rows)
        if form == PLAIN or not self._can_choose(hidden_states, weight):
            return F.linear(hidden_states, weight, bias)
        form = form or self.alike.choose(rows)
        output = _PRODUCTS[form][0](hidden_states.reshape(rows, self.in_features), weight, bias)
        return output.view(*hidden_states.shape[:-1], self.out_features)

    @staticmethod
    def _can_choose(hidden_states: torch.Tensor, weight: torch.Tensor) -> bool:
        is_trained = torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad)
        return (
            hidden_states.is_cpu
            and hidden_states.dtype == weight.dtype
            and hidden_states.numel() > 0
            and not is_trained
        )


class Tuner:
    """Makes tuned forms of the modules of one model."""

    def __init__(self):
        self._alike: dict[tuple, _Alike] = defaultdict(_Alike)

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
        return TunedLinear(module, self._alike[weight.shape, weight.dtype])

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
        self._copies: dict[int, tuple[list[nn.Module], nn.Module]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_copies": {}}  # a copy makes its own

    def get(self, model: nn.Module, check: bool = True) -> nn.Module:
        """
        The tuned copy of a model.

        Args:
            model (`nn.Module`): the model.
            check (`bool`, *optional*, defaults to `True`): whether to check if its modules are still those of the last call.
        """
        modules, twin = self._copies.get(id(model), (None, None))
        if modules is None or modules[0] is not model or (check and modules != list(model.modules())):
            modules, twin = list(model.modules()), tuned_copy(model, Tuner(), {})
            self._copies[id(model)] = modules, twin
        return twin
