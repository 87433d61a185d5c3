"""
Which form a product takes on the CPU, chosen by measurement.

One and the same product costs several times as much in one form as in another, and which is the fastest depends on the
processor, the library that PyTorch was built with, the dtype and the number of rows: in float32, two rows can take longer
than eight. So the forms are timed once for a shape, and the fastest is kept for the rest of the process.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

# What `set_product_layouts` is called with before the first product, if anything.
ENVIRONMENT_VARIABLE = "MPO_HF_PRODUCT_LAYOUTS"

PLAIN = "plain"
# All forms, in the order in which they are preferred.
FORMS = (PLAIN, "onednn", "turned", "padded to 4", "padded to 8", "one by one", "float32")

# A form must take less than this fraction of the time of those before it, so that noise rarely decides.
_GAIN = 0.9
_ROUNDS = 4
# No round begins after this time, which large weights take for one.
_MAX_SECONDS = 0.25


class _Layouts:
    """The choices of this process."""

    def __init__(self):
        self.measures = True
        self.choices: dict[str, str] = {}
        self.tried: set[str] = set()  # those known to work here
        self.by_shape: dict[tuple, str] = {}  # choices by what their names are made of, which is faster to look up
        self.lock = threading.RLock()  # the measurement of one product may ask for the form of another


_LAYOUTS: _Layouts | None = None


def current_layouts() -> _Layouts:
    """The choices of this process, another object after every [`set_product_layouts`]."""
    if _LAYOUTS is None:
        set_product_layouts(os.environ.get(ENVIRONMENT_VARIABLE, "measured"))
    return _LAYOUTS


def are_plain() -> bool:
    """Whether no product takes another form than the plain one."""
    layouts = current_layouts()
    return not layouts.measures and not layouts.choices


def get_product_layouts() -> dict[str, str]:
    """
    The forms that this process has chosen for its products, for [`set_product_layouts`] of another one.

    Returns:
        `dict[str, str]`: the name of the form by shape, such as `"float32, 3 x 576 x 49152, 2 threads"` for three rows and a
        weight of 49152 outputs.

    Example:

    ```python
    >>> from mpo_hf import get_product_layouts, set_product_layouts

    >>> set_product_layouts({"float32, 3 x 576 x 49152, 2 threads": "turned"})
    >>> get_product_layouts()
    {'float32, 3 x 576 x 49152, 2 threads': 'turned'}

    >>> set_product_layouts("measured")
    ```
    """
    return dict(current_layouts().choices)


def set_product_layouts(layouts: str | os.PathLike | Mapping[str, str]) -> None:
    """
    Sets how this process chooses the form of products on the CPU. All forms compute the same up to rounding, which can still
    decide what is sampled or which of two beams wins: a seed gives the same tokens in processes with the same choices.

    Args:
        layouts (`str`, `os.PathLike` or `Mapping[str, str]`):
            `"measured"` (the default) times the forms once for each shape and keeps the fastest; choices made before are
            forgotten. `"plain"` leaves all products to PyTorch. Choices from [`get_product_layouts`], or the path of a JSON
            file of them, pin these; all other shapes are plain. The environment variable `MPO_HF_PRODUCT_LAYOUTS` sets the same
            for a process.

    Raises:
        `ValueError`: for choices that are none.
        `OSError`: for a file that cannot be read.
    """
    global _LAYOUTS
    chosen = _Layouts()
    chosen.measures = isinstance(layouts, str) and layouts == "measured"
    if not isinstance(layouts, str) or layouts not in ("measured", PLAIN):
        chosen.choices = _checked(layouts if isinstance(layouts, Mapping) else _read(layouts))
    _LAYOUTS = chosen


def _read(path: str | os.PathLike) -> Mapping[str, str]:
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except ValueError as err:
            raise ValueError(f"{os.fspath(path)!r} is no JSON file of product layouts: {err}.") from err


def _checked(choices: Mapping[str, str]) -> dict[str, str]:
    is_mapping = isinstance(choices, Mapping)
    wrong = {shape: form for shape, form in choices.items() if form not in FORMS} if is_mapping else choices
    if wrong or not is_mapping:
        raise ValueError(
            "Product layouts must be 'measured', 'plain', or what `get_product_layouts()` returned, which maps shapes to the "
            f"forms {list(FORMS)}; got {wrong!r}."
        )
    return dict(choices)


def name_of(dtype: torch.dtype, shape: str, kind: str = "") -> str:
    """
    What to call a product, by all that its time depends on.

    Args:
        dtype (`torch.dtype`): dtype of its operands.
        shape (`str`): their sizes.
        kind (`str`, *optional*): what kind of product it is, other than one of rows and a weight.
    """
    return f"{str(dtype).removeprefix('torch.')}{kind}, {shape}, {torch.get_num_threads()} threads"


def choose_layout(name: str, terms: int, forms: Mapping[str, Callable[[], torch.Tensor]]) -> str:
    """
    Chooses the form of a product by measurement, unless it is pinned or was chosen before. A form that does not give what the
    plain one gives, up to rounding, is not chosen.

    Args:
        name (`str`): the name of the product, see [`name_of`].
        terms (`int`): the number of terms of its sums, whose rounding errors grow with the root of it.
        forms (`Mapping[str, Callable]`): functions that compute the product, some of [`FORMS`], the plain one first.
    """
    layouts = current_layouts()
    with layouts.lock:  # threads that ask at the same time get one answer
        if name in layouts.tried or not (layouts.measures or name in layouts.choices):
            return layouts.choices.get(name, PLAIN)
        with torch.inference_mode():
            pinned = layouts.choices.get(name)
            wanted = forms if pinned is None else {f: run for f, run in forms.items() if f in (PLAIN, pinned)}
            seconds = _time(wanted, terms, rounds=_ROUNDS if pinned is None else 0)
        chosen = layouts.choices[name] = _fastest(seconds) if pinned is None else pinned
        if chosen not in seconds:
            logger.warning(f"The product layout {chosen!r} does not work here for {name}, which is plain therefore.")
            chosen = layouts.choices[name] = PLAIN
        layouts.tried.add(name)
    logger.info(f"{name}: {chosen} (" + ", ".join(f"{form} {s * 1e3:.3g} ms" for form, s in seconds.items()) + ")")
    return chosen


def _time(forms: Mapping[str, Callable[[], torch.Tensor]], terms: int, rounds: int) -> dict[str, float]:
    """The shortest time of each form that computes the same as the plain one, in seconds."""
    expected = forms[PLAIN]()
    allowed = 8 * terms**0.5 * torch.finfo(expected.dtype).eps * expected.abs().max()
    seconds: dict[str, float] = {}
    begin = time.perf_counter()
    for form, run in forms.items():
        start = time.perf_counter()
        if _is_close(run, expected, allowed) or form == PLAIN:  # also where it gives NaN, which equals nothing
            seconds[form] = time.perf_counter() - start
    for _ in range(rounds):
        for form in seconds:
            start = time.perf_counter()
            forms[form]()
            seconds[form] = min(seconds[form], time.perf_counter() - start)
        if time.perf_counter() - begin > _MAX_SECONDS:
            break
    return seconds


def _fastest(seconds: Mapping[str, float]) -> str:
    chosen = PLAIN
    for form in seconds:
        if seconds[form] < _GAIN * seconds[chosen]:
            chosen = form
    return chosen


def _is_close(run: Callable[[], torch.Tensor], expected: torch.Tensor, allowed: torch.Tensor) -> bool:
    """Whether a form is available, and differs from the plain one by no more than rounding."""
    try:
        found = run()
    except (RuntimeError, AttributeError):  # such as an operator that this build of PyTorch does not have
        return False
    return found.shape == expected.shape and bool((found - expected).abs().max() <= allowed)
