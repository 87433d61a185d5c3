"""The derivatives of log Z in the mixture weights, from the logits that decoding or scoring computes anyway."""

from collections.abc import Mapping, Sequence

import torch

from ..estimation.decoded import LogNormalizer, num_terms
from ..mixture.pooling import row_parts


class NormalizerSums:
    r"""
    Sums the derivatives of \\(\log Z_t\\) over the tokens of completions, while these are decoded.

    Args:
        weights (`torch.Tensor` of shape `(K,)` or `(N, K)`): the mixture weights that decode, of all rows or of each.
        temperature (`float`): the sampling temperature.
        count (`int`): N.
    """

    def __init__(self, weights: torch.Tensor, temperature: float, count: int):
        anchor = weights.detach().double().cpu() / temperature
        self._anchor = anchor.expand(count, -1)
        self._steps: list[torch.Tensor | None] = []

    def add(self, logits: Mapping[int, torch.Tensor], scores: torch.Tensor) -> None:
        """
        Adds a step.

        Args:
            logits (`Mapping[int, torch.Tensor]`): logits of the components that ran, shape `(N, vocab_size)` each.
            scores (`torch.Tensor` of shape `(N, vocab_size)`): logits of the distribution that the token is drawn from.
        """
        whole = len(logits) == self._anchor.shape[-1]
        self._steps.append(normalizer_moments([logits[k] for k in sorted(logits)], scores) if whole else None)

    def sums(self, mask: torch.Tensor, pooled_logps: torch.Tensor, proposal_logps: torch.Tensor) -> torch.Tensor:
        r"""
        Sums over the tokens of every completion.

        Args:
            mask (`torch.LongTensor` of shape `(N, completion_length)`): 0 for padding.
            pooled_logps (`torch.Tensor` of shape `(N,)`): \\(\sum_k \mu_k \log \pi_k(y)\\) at the weights that decoded.
            proposal_logps (`torch.Tensor` of shape `(N,)`): \\(\log q(y)\\).

        Returns:
            `torch.Tensor` of shape `(N, E)`, float64, on the CPU; NaN where some component has not run.
        """
        count = self._anchor.shape[-1]
        if any(step is None for step in self._steps):
            return torch.full((len(mask), num_terms(count)), torch.nan, dtype=torch.float64)
        moments = torch.stack([step.to(mask.device) for step in self._steps], dim=1)  # type: ignore[union-attr]
        return pack_normalizers(self._anchor, pooled_logps - proposal_logps, moments, mask)


def pack_normalizers(
    anchor: torch.Tensor, values: torch.Tensor, moments: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Anchors, values and the moments of every token, shape `(N, completion_length, ...)`, summed and packed."""
    count = anchor.shape[-1]
    summed = torch.where(mask.to(moments.device).bool().unsqueeze(-1), moments.double(), 0).sum(1).cpu()
    mean, covariance = summed[:, :count], summed[:, count:]
    return LogNormalizer(anchor, values.double(), mean, covariance).pack()


def normalizer_moments(logits: Sequence[torch.Tensor], scores: torch.Tensor) -> torch.Tensor:
    r"""
    Mean and covariance of the components' log-probabilities of the next token, which are the gradient and the Hessian
    of \\(\log Z\\) in the weights.

    Args:
        logits (`Sequence[torch.Tensor]`): K tensors of shape `(..., vocab_size)`, normalized or not.
        scores (`torch.Tensor` of shape `(..., vocab_size)`): logits of the distribution that the token is drawn from.

    Returns:
        `torch.Tensor` of shape `(..., K + K * (K + 1) / 2)`, float32: the means and the upper triangle of the covariance.
    """
    count = len(logits)
    upper = torch.triu_indices(count, count, device=scores.device)
    moments = scores.new_empty((*scores.shape[:-1], count + upper.shape[1]), dtype=torch.float32)
    for part in row_parts(scores):
        probabilities = scores[part].float().softmax(-1).unsqueeze(-2)
        logps = torch.stack(
            [component[part].to(scores.device).float().log_softmax(-1) for component in logits], dim=-2
        )
        logps.masked_fill_(probabilities == 0, 0)  # a token that is ruled out counts nothing, where 0 * -inf is NaN
        mean = (probabilities * logps).sum(-1)
        logps -= mean.unsqueeze(-1)
        covariance = (probabilities * logps) @ logps.transpose(-1, -2)
        moments[part] = torch.cat([mean, covariance[..., upper[0], upper[1]]], dim=-1)
    return moments
