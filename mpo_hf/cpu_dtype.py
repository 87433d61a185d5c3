"""How fast the CPU is in half precision, by measurement."""

import functools
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .mixture.tuned_products import onednn


# Rows of a few policies that decode a few completions, and a weight that does not fit into the caches of a core.
_ROWS, _SHAPE, _ROUNDS = 16, (4096, 1024), 6

# One dtype must be that many times as fast as another to be preferred, so that noise decides nothing.
MARGIN = 1.25


@functools.cache
def cpu_speed(dtype: torch.dtype) -> float:
    """
    How many times as fast as in float32 the CPU multiplies matrices in another dtype. Measured once in a process, in some
    20 ms; the names of processors, and of their instructions, would not tell how PyTorch uses them.

    Args:
        dtype (`torch.dtype`): such as `torch.bfloat16`.

    Example:

    ```python
    >>> import torch
    >>> from mpo_hf.cpu_dtype import cpu_speed

    >>> cpu_speed(torch.float32)
    1.0
    ```
    """
    if dtype == torch.float32:
        return 1.0
    operands = [(torch.ones(_ROWS, _SHAPE[1], dtype=d), torch.ones(_SHAPE, dtype=d)) for d in (torch.float32, dtype)]
    seconds = [math.inf, math.inf]
    for _ in range(_ROUNDS):  # taking turns, so that what else the machine does slows down both
        for i, (rows, weight) in enumerate(operands):
            seconds[i] = min(seconds[i], *(_seconds(product, rows, weight) for product in (F.linear, onednn)))
    return seconds[0] / seconds[1]


def _seconds(product: Callable, rows: torch.Tensor, weight: torch.Tensor) -> float:
    start = time.perf_counter()
    try:
        with torch.inference_mode():
            product(rows, weight, None)
    except (
        RuntimeError,
        AttributeError,
    ):  # an operator that this build of PyTorch does not have, or not for this dtype
        return math.inf
    return time.perf_counter() - start
