"""The best low-rank approximation of a matrix, as the two factors of a LoRA adapter."""

import torch


# A randomized SVD is used for up to this share of all singular values, where it is faster than a full one.
SKETCHED_PART = 0.25
FIRST_SKETCH = 32
OVERSAMPLING = 8


def low_rank_factors(
    matrix: torch.Tensor, rank: int | None = None, energy: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The best low-rank approximation of a matrix, as the two factors of LoRA.

    Args:
        matrix (`torch.Tensor` of shape `(out, in)`): the matrix, not zero.
        rank (`int`, *optional*): the rank; with `energy`, the highest rank.
        energy (`float`, *optional*): share of the squared Frobenius norm to keep, by the lowest rank that does so.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: factors of shapes `(r, in)` and `(out, r)`, of equal norm.
    """
    highest = min(*matrix.shape, rank or matrix.numel())
    left, values, right = _singular_values(matrix, highest, energy)
    count = highest
    if energy is not None:
        # singular values of the size of rounding errors do not belong to the matrix
        significant = (values > values[0] * max(matrix.shape) * torch.finfo(values.dtype).eps).sum().item()
        squares = values.double().square().cumsum(0)
        # from the same cumulative sum, so that rounding does not cut off the last singular value
        total = squares[-1] if len(squares) == min(matrix.shape) else squared_norm(matrix)
        enough = torch.searchsorted(squares, energy * total).item() + 1
        count = min(highest, significant, enough)
    root = values[:count].sqrt()
    return root[:, None] * right[:, :count].T, left[:, :count] * root


def _singular_values(
    matrix: torch.Tensor, highest: int, energy: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular values, at least as many as needed, with their vectors as columns."""
    count = highest if energy in (None, 1) else min(highest, FIRST_SKETCH)
    while count + OVERSAMPLING <= SKETCHED_PART * min(matrix.shape):
        # reproducible, and without effect on the caller's random state
        with torch.random.fork_rng([matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix, q=count + OVERSAMPLING, niter=4)
        if energy is None or count == highest or squared_norm(values[:count]) >= energy * squared_norm(matrix):
            return left, values, right
        count = min(highest, 2 * count)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right.T


def squared_norm(tensor: torch.Tensor) -> float:
    """Squared Frobenius norm, summed in float64."""
    return tensor.square().sum(dtype=torch.float64).item()
