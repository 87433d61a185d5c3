"""Log-linear pooling of next-token distributions: the pure tensor maths of a mixture of policies."""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch


def log_linear_pool(logits: Iterable[torch.Tensor], weights: torch.Tensor | Sequence[float]) -> torch.Tensor:
    r"""
    Pools next-token distributions log-linearly.

    For components \\(k = 1..K\\) with next-token log-probabilities \\(\log \pi_k\\), computes

    $$ \ell(v) = \sum_k \lambda_k \log \pi_k(v) $$

    which is **not** renormalised: `softmax` of the result is the mixed next-token distribution, and its `logsumexp`
    is \\(\log Z\\), the factor by which token-level mixing departs from the sequence-level mixture
    \\(\prod_k \pi_k(y)^{\lambda_k}\\) of [Mixing Preference Optimization](https://huggingface.co/papers/2502.18699).

    Args:
        logits (`Iterable[torch.Tensor]`):
            K tensors of one shape `(batch_size, ..., vocab_size)`, normalised or not. They are taken one after
            another, so that a generator never holds more than one of them.
        weights (`torch.Tensor` or `Sequence[float]`):
            Mixture weights, of shape `(K,)`, or `(batch_size, K)` for weights of each row's own. A weight of zero
            takes its component out entirely, also where that component's log-probability is `-inf`. Numbers need not be
            brought to the device of the logits, as a tensor is.

    Returns:
        `torch.Tensor`: pooled log-probabilities in float32 (float64 for float64 logits), of the shape of one
        component's logits.

    Example:

    ```python
    >>> import torch
    >>> from mpo_hf.pooling import log_linear_pool

    >>> calm, keen = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.1, 0.1, 0.8]]).log()
    >>> log_linear_pool([calm, keen], torch.tensor([0.5, 0.5])).softmax(-1)
    tensor([[0.2806, 0.2174, 0.5020]])
    ```
    """
    if isinstance(weights, torch.Tensor):
        weights = weights.unbind(-1)
    pooled = None
    for k, component_logits in enumerate(logits):
        dtype = torch.promote_types(component_logits.dtype, torch.float32)
        logps = torch.log_softmax(component_logits, dim=-1, dtype=dtype)
        weight = weights[k]
        if isinstance(weight, torch.Tensor):
            weight = weight.to(device=logps.device, dtype=dtype)
            weight = weight.reshape(weight.shape + (1,) * (logps.ndim - weight.ndim))
            # 0 * -inf is NaN, but a component of weight zero has no say
            term = torch.where(weight == 0, torch.zeros_like(logps), weight * logps)
        else:
            term = weight * logps if weight else torch.zeros_like(logps)
        pooled = term if pooled is None else pooled + term.to(pooled.device)
    return pooled


def rule_out_implausible(logits: Iterable[torch.Tensor], plausibility: float) -> Iterator[torch.Tensor]:
    r"""
    The plausibility constraint of [contrastive decoding](https://huggingface.co/papers/2210.15097) (Li et al., 2023): a
    token to which the first component gives less than `plausibility` times the probability of its most likely token gets
    `-inf` from the first component.

    The other components' logits pass unchanged. The first weight must be positive.

    Args:
        logits (`Iterable[torch.Tensor]`): K tensors of shape `(batch_size, ..., vocab_size)`.
        plausibility (`float`): between 0 and 1.

    Returns:
        `Iterator[torch.Tensor]`: the same K tensors, the first one with `-inf` entries.
    """
    iterator = iter(logits)
    first = next(iterator)
    threshold = first.max(dim=-1, keepdim=True).values + math.log(plausibility)
    yield first.masked_fill(first < threshold, -torch.inf)
    yield from iterator


def log_normalizer(pooled_logps: torch.Tensor) -> torch.Tensor:
    r"""
    \\(\log Z = \log \sum_v \prod_k \pi_k(v)^{\lambda_k}\\) of every position, from the output of
    [`log_linear_pool`].

    It is at most 0 for weights on the simplex, and 0 only where all components agree. Summed over the tokens of a
    completion it is the log of the importance weight that takes token-level mixing to the sequence-level mixture.

    Args:
        pooled_logps (`torch.Tensor`): pooled log-probabilities of shape `(..., vocab_size)`.

    Returns:
        `torch.Tensor` of shape `(...)`.
    """
    return torch.logsumexp(pooled_logps, dim=-1)
