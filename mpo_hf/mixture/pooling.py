"""Log-linear pooling of next-token distributions: the tensor operations of a mixture of policies."""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch


# Elements that are processed at a time where no gradients are needed: apart from its result, pooling needs memory for
# a small multiple of them, whatever the batch size and the vocabulary. Larger ones are not faster.
CHUNK_NUMEL = {"cpu": 2**18, "other": 2**24}


def log_linear_pool(
    logits: Iterable[torch.Tensor], weights: torch.Tensor | Sequence[float], plausibility: float = 0.0
) -> torch.Tensor:
    r"""
    Pools next-token distributions log-linearly.

    For components \\(k = 1..K\\) with next-token log-probabilities \\(\log \pi_k\\), computes

    $$ \ell(v) = \sum_k \lambda_k \log \pi_k(v) $$

    which is **not** renormalized: `softmax` of the result is the mixed next-token distribution, and its `logsumexp`
    is \\(\log Z\\), the log of the factor by which token-level mixing differs from the sequence-level mixture
    \\(\prod_k \pi_k(y)^{\lambda_k}\\) of [Mixing Preference Optimization](https://huggingface.co/papers/2502.18699).

    A token that a component of nonzero weight rules out, with a log-probability of `-inf`, is ruled out of the mixture: it gets
    `-inf`, also where the weight is negative, as the ratio of two policies is defined only where both allow the token.

    Args:
        logits (`Iterable[torch.Tensor]`):
            K tensors of one shape `(batch_size, ..., vocab_size)`, normalized or not. They are consumed one by one, so
            that with a generator no more than one is in memory.
        weights (`torch.Tensor` or `Sequence[float]`):
            Mixture weights, of shape `(K,)`, or `(batch_size, K)` for weights by row. A weight of zero removes its
            component entirely, also where that component's log-probability is `-inf`. A tensor is copied to the device
            of the logits, which numbers do not need.
        plausibility (`float`, *optional*, defaults to 0.0):
            The plausibility constraint of [contrastive decoding](https://huggingface.co/papers/2210.15097) (Li et al., 2023):
            tokens whose probability under the first component is less than this fraction of that of its most likely token
            are ruled out. The others keep their sum: the first component is not renormalized. 0 rules out none.

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
        judge = plausibility if pooled is None else 0.0
        if torch.compiler.is_compiling() or _is_differentiated(component_logits, weight, pooled):
            if pooled is None:
                pooled = _weighted_logps(component_logits, weight, judge)
            else:
                term, factor = _term(component_logits, weight, pooled.device)
                pooled = torch.add(pooled, term, alpha=factor)
        else:
            pooled = _add_weighted_logps(pooled, component_logits, weight, judge)
        del component_logits  # before the next one is computed
    return pooled


def _is_differentiated(*tensors: torch.Tensor | float | None) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)


def _weighted_logps(logits: torch.Tensor, weight: torch.Tensor | float, plausibility: float = 0.0) -> torch.Tensor:
    """Weighted log-probabilities: zeros for a weight of zero, else `-inf` for tokens that are ruled out."""
    logps = _log_softmax(logits)
    if plausibility:
        least = logps.amax(-1, keepdim=True) + math.log(plausibility)
        logps = logps.masked_fill(logps < least, -torch.inf)
    if not isinstance(weight, torch.Tensor) and weight >= 0:
        return weight * logps if weight else torch.zeros_like(logps)
    if isinstance(weight, torch.Tensor):
        weight = weight.to(logps.dtype)
    if torch.compiler.is_compiling() or _is_differentiated(logps, weight):
        # filled before the product, as 0 * -inf is NaN, and so is the gradient of the weight
        out = torch.isneginf(logps)
        term = (weight * logps.masked_fill(out, 0)).masked_fill(out, -torch.inf)
    else:
        term = (weight * logps).nan_to_num_(nan=torch.nan, posinf=-torch.inf, neginf=-torch.inf)
    return torch.where(weight == 0, 0, term) if isinstance(weight, torch.Tensor) else term


def _term(
    logits: torch.Tensor, weight: torch.Tensor | float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """What to add to other terms, and the factor to add it with: a product would be one more pass over all of it."""
    if not isinstance(weight, torch.Tensor) and weight > 0:
        return _log_softmax(logits).to(device), weight
    return _weighted_logps(logits, weight).to(device), 1


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities in float32 at least; `-inf` for all tokens of a row in which all are ruled out, which would be NaN."""
    logps = torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    if not torch.compiler.is_compiling() and logits.device.type == "cpu" and not logps[..., 0].isnan().any():
        return logps  # where asking waits for no device, as it is rare
    return logps.masked_fill(torch.isneginf(logits.amax(-1, keepdim=True)), -torch.inf)


def _add_weighted_logps(
    pooled: torch.Tensor | None, logits: torch.Tensor, weight: torch.Tensor | float, plausibility: float
) -> torch.Tensor:
    """Adds weighted log-probabilities to `pooled`, or to a new tensor, in chunks of rows."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    begins = pooled is None
    pooled = logits.new_empty(logits.shape, dtype=dtype) if begins else pooled
    pooled = pooled.to(torch.promote_types(dtype, pooled.dtype))
    if isinstance(weight, torch.Tensor):
        weight = weight.expand(*logits.shape[:-1], 1)
    for part in row_parts(logits):
        own = weight[part] if isinstance(weight, torch.Tensor) else weight
        if begins:
            pooled[part] = _weighted_logps(logits[part], own, plausibility)
        else:
            term, factor = _term(logits[part], own, pooled.device)
            pooled[part].add_(term, alpha=factor)
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
