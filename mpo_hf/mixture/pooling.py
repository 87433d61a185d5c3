"""Log-linear pooling of next-token distributions: the tensor operations of a mixture of policies."""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch


# Elements that are processed at a time where no gradients are needed: apart from its result, pooling needs memory for
# a small multiple of them, whatever the batch size and the vocabulary. Larger ones are not faster.
CHUNK_NUMEL = {"cpu": 2**18, "other": 2**24}


def log_linear_pool(logits: Iterable[torch.Tensor], weights: torch.Tensor | Sequence[float]) -> torch.Tensor:
    r"""
    Pools next-token distributions log-linearly.

    For components \\(k = 1..K\\) with next-token log-probabilities \\(\log \pi_k\\), computes

    $$ \ell(v) = \sum_k \lambda_k \log \pi_k(v) $$

    which is **not** renormalized: `softmax` of the result is the mixed next-token distribution, and its `logsumexp`
    is \\(\log Z\\), the log of the factor by which token-level mixing differs from the sequence-level mixture
    \\(\prod_k \pi_k(y)^{\lambda_k}\\) of [Mixing Preference Optimization](https://huggingface.co/papers/2502.18699).

    Args:
        logits (`Iterable[torch.Tensor]`):
            K tensors of one shape `(batch_size, ..., vocab_size)`, normalized or not. They are consumed one by one, so
            that with a generator no more than one is in memory.
        weights (`torch.Tensor` or `Sequence[float]`):
            Mixture weights, of shape `(K,)`, or `(batch_size, K)` for weights by row. A weight of zero removes its
            component entirely, also where that component's log-probability is `-inf`. A tensor is copied to the device
            of the logits, which numbers do not need.

    Returns:
        `torch.Tensor`: pooled log-probabilities in float32 (float64 for float64 logits), of the shape of one
        component's logits.

    Example:

    ```python
    >>> import torch
    >>> from mpo_hf.mixture.pooling import log_linear_pool

    >>> calm, keen = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.1, 0.1, 0.8]]).log()
    >>> log_linear_pool([calm, keen], torch.tensor([0.5, 0.5])).softmax(-1)
    tensor([[0.2806, 0.2174, 0.5020]])
    ```
    """
    remaining = iter(weights.unbind(-1) if isinstance(weights, torch.Tensor) else weights)
    pooled = None
    for component_logits in logits:
        weight = next(remaining)
        if isinstance(weight, torch.Tensor):
            weight = weight.to(component_logits.device).reshape(
                weight.shape + (1,) * (component_logits.ndim - weight.ndim)
            )
        if torch.compiler.is_compiling() or _is_differentiated(component_logits, weight, pooled):
            term = _weighted_logps(component_logits, weight)
            pooled = term if pooled is None else pooled + term.to(pooled.device)
        else:
            pooled = _add_weighted_logps(pooled, component_logits, weight)
        del component_logits  # before the next one is computed
    return pooled


def _is_differentiated(*tensors: torch.Tensor | float | None) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)


def _weighted_logps(logits: torch.Tensor, weight: torch.Tensor | float) -> torch.Tensor:
    """Weighted log-probabilities. A weight of zero gives zeros, where 0 * -inf would be NaN."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logps = torch.log_softmax(logits, dim=-1, dtype=dtype)
    if isinstance(weight, torch.Tensor):
        weight = weight.to(dtype)
        return torch.where(weight == 0, torch.zeros_like(logps), weight * logps)
    return weight * logps if weight else torch.zeros_like(logps)


def _add_weighted_logps(
    pooled: torch.Tensor | None, logits: torch.Tensor, weight: torch.Tensor | float
) -> torch.Tensor:
    """Adds weighted log-probabilities to `pooled`, or to a new tensor, in chunks of rows."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    begins = pooled is None
    pooled = logits.new_empty(logits.shape, dtype=dtype) if begins else pooled
    pooled = pooled.to(torch.promote_types(dtype, pooled.dtype))
    if isinstance(weight, torch.Tensor):
        weight = weight.expand(*logits.shape[:-1], 1)
    for part in row_parts(logits):
        term = _weighted_logps(logits[part], weight[part] if isinstance(weight, torch.Tensor) else weight)
        if begins:
            pooled[part] = term
        else:
            pooled[part] += term.to(pooled.device)
    return pooled


def row_parts(logits: torch.Tensor) -> Iterator[tuple[int | slice, ...]]:
    """Indices that split a tensor into chunks of whole rows of its last dimension."""
    yield from _parts(logits.shape, CHUNK_NUMEL["cpu" if logits.device.type == "cpu" else "other"])


def _parts(shape: torch.Size, size: int) -> Iterator[tuple[int | slice, ...]]:
    count = shape.numel()
    if len(shape) == 1 or count <= size:
        yield ()
        return
    inner = count // shape[0]
    if inner <= size:
        step = size // inner
        yield from ((slice(start, start + step),) for start in range(0, shape[0], step))
    else:
        yield from ((i, *rest) for i in range(shape[0]) for rest in _parts(shape[1:], size))


def rule_out_implausible(logits: Iterable[torch.Tensor], plausibility: float) -> Iterator[torch.Tensor]:
    r"""
    The plausibility constraint of [contrastive decoding](https://huggingface.co/papers/2210.15097) (Li et al., 2023): a
    token to which the first component gives less than `plausibility` times the probability of its most likely token gets
    `-inf` from the first component.

    The logits of the other components are unchanged. The first weight must be positive.

    Args:
        logits (`Iterable[torch.Tensor]`): K tensors of shape `(batch_size, ..., vocab_size)`.
        plausibility (`float`): between 0 and 1.

    Returns:
        `Iterator[torch.Tensor]`: the same K tensors, the first one with `-inf` entries.
    """
    iterator = iter(logits)
    yield _rule_out(next(iterator), plausibility)
    yield from iterator


def _rule_out(logits: torch.Tensor, plausibility: float) -> torch.Tensor:
    threshold = logits.max(dim=-1, keepdim=True).values + math.log(plausibility)
    return logits.masked_fill(logits < threshold, -torch.inf)


def log_normalizer(pooled_logps: torch.Tensor) -> torch.Tensor:
    r"""
    \\(\log Z = \log \sum_v \prod_k \pi_k(v)^{\lambda_k}\\) of every position, from the output of
    [`log_linear_pool`].

    It is at most 0 for weights on the simplex, and 0 only where all components agree. Summed over the tokens of a
    completion, it is the log of the importance weight of the sequence-level mixture relative to token-level mixing.

    Args:
        pooled_logps (`torch.Tensor`): pooled log-probabilities of shape `(..., vocab_size)`.

    Returns:
        `torch.Tensor` of shape `(...)`.
    """
    if torch.compiler.is_compiling() or _is_differentiated(pooled_logps):
        return torch.logsumexp(pooled_logps, dim=-1)
    log_z = pooled_logps.new_empty(pooled_logps.shape[:-1])
    for part in row_parts(pooled_logps):
        log_z[part] = torch.logsumexp(pooled_logps[part], dim=-1)
    return log_z
