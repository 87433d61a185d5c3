"""Products of rows with the weights of linear layers, in the form that is fastest for their shape."""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .product_layouts import PLAIN, choose_layout, current_layouts, name_of


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


def onednn(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` by oneDNN, where this build of PyTorch has it."""
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
    "onednn": (onednn, 1, _ROWS[-1]),
    "turned": (_turned, 2, _ROWS[-1]),
    "padded to 4": (_padded_to(4), 2, 3),
    "padded to 8": (_padded_to(8), 2, 7),
    "one by one": (_one_by_one, 2, 4),
}


class LinearProducts:
    """
    Products with the weights of one shape that a pass reads one after another, `(out_features, in_features)` each.

    Attributes:
        layers (`list[dict]`): the parameters of the layers, each with a `"weight"`.
    """

    def __init__(self):
        self.layers: list[dict[str, Any]] = []
        self._forms: dict[int, str] = {}
        self._layouts: object = None
        self._threads = 0

    def known(self) -> dict[int, str]:
        """The names of the forms that have been chosen, by number of rows."""
        layouts, threads = current_layouts(), torch.get_num_threads()
        if layouts is not self._layouts or threads != self._threads:
            self._forms, self._layouts, self._threads = {}, layouts, threads
        return self._forms

    def form(self, rows: int) -> str:
        """The name of the form for a number of rows."""
        forms = self.known()
        form = forms.get(rows)
        if form is None:
            form = forms[rows] = self.choose(_ROWS[min(bisect_left(_ROWS, rows), len(_ROWS) - 1)])
        return form

    def choose(self, rows: int) -> str:
        """Chooses the form for a number of rows by measurement."""
        weights = self._sample(rows)
        (out_features, in_features), dtype = weights[0].shape, weights[0].dtype
        noise = _noise(rows, in_features, dtype=dtype)

        def run(product: Product) -> torch.Tensor:
            for weight in weights:
                output = product(noise, weight, None)
            return output

        forms = {
            form: lambda product=product: run(product)
            for form, (product, least, most) in _PRODUCTS.items()
            if least <= rows <= most
        }
        return choose_layout(name_of(dtype, f"{rows} x {in_features} x {out_features}"), in_features, forms)

    def _sample(self, rows: int) -> list[torch.Tensor]:
        """Weights to time a form with."""
        weights = [layer["weight"].detach() for layer in self.layers]
        return weights[: max(1, (_COLD_BYTES if rows <= _FEW_ROWS else _WARM_BYTES) // weights[0].nbytes)]

    def compute(self, form: str, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """
        A product in one of the forms.

        Args:
            form (`str`): the form, see [`LinearProducts.form`].
            rows (`torch.Tensor` of shape `(rows, in_features)`): the input.
            weight (`torch.Tensor` of shape `(out_features, in_features)`): the weight.
            bias (`torch.Tensor` of shape `(out_features,)`, *optional*): the bias.
        """
        return _PRODUCTS[form][0](rows, weight, bias)


class StackedProducts(LinearProducts):
    """
    Products of blocks of rows with a weight for each, of shape `(K, in_features, out_features)`: batched, or one after
    another, each in its own fastest form.
    """

    def __init__(self):
        super().__init__()
        self._single = LinearProducts()

    def choose(self, rows: int) -> str:
        weights = self._sample(rows)
        (count, in_features, out_features), dtype = weights[0].shape, weights[0].dtype
        self._single.layers = [{"weight": own.t()} for weight in weights for own in weight]
        noise = _noise(count, rows, in_features, dtype=dtype)

        def run(form: str) -> torch.Tensor:
            for weight in weights:
                output = self.compute(form, noise, weight, None)
            return output

        forms = {form: lambda form=form: run(form) for form in (PLAIN, "one by one")}
        name = name_of(dtype, f"{count} of {rows} x {in_features} x {out_features}")
        return choose_layout(name, in_features, forms)

    def compute(self, form: str, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if form == PLAIN:
            return torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias, rows, weight)
        single = self._single.form(rows.shape[1])
        biases = [None] * len(weight) if bias is None else bias.squeeze(1)
        return torch.stack([self._single.compute(single, own, w.t(), b) for own, w, b in zip(rows, weight, biases)])


def can_be_tuned(hidden_states: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a product may take another form: on the CPU, in one dtype, without gradients."""
    is_trained = torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad)
    return (
        hidden_states.is_cpu and hidden_states.dtype == weight.dtype and hidden_states.numel() > 0 and not is_trained
    )


def _noise(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    # a generator of its own: that of the user decides what is sampled
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
