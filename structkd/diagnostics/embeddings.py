"""How an embedding uses its dimensions and its sphere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from structkd._checks import number
from structkd.diagnostics._rows import rows_of


def self_similarity(embedding: Tensor) -> Tensor:
    """Cosine similarity of an embedding's channels over the samples.

    ``S_ij = <z_i, z_j> / (|z_i| |z_j|)`` with ``z_i`` a column, the paper's Fig. 2(a-b).
    Off-diagonal values near 0 mean independent channels. A channel that is zero everywhere gives
    zeros.

    Args:
        embedding: ``(N, D)``, floating point.

    Returns:
        ``(D, D)`` in [-1, 1], float32 at least.

    Raises:
        TypeError, ValueError: If ``embedding`` is no 2-D floating-point tensor.

    References:
        Si et al., Sec. 3.1.

    Example:
        >>> self_similarity(torch.eye(3))
        tensor([[1., 0., 0.],
                [0., 1., 0.],
                [0., 0., 1.]])
    """
    columns = F.normalize(rows_of(embedding, "embedding"), dim=0)
    with torch.autocast(columns.device.type, enabled=False):
        return (columns.T @ columns).clamp(-1, 1)


def effective_rank(embedding: Tensor) -> Tensor:
    """Number of dimensions that an embedding really uses.

    ``exp(H(p))`` with ``p`` the singular values of the matrix divided by their sum and ``H`` the
    entropy: D for equal singular values, 1 for a matrix of rank 1.

    Args:
        embedding: ``(N, D)``, floating point.

    Returns:
        A scalar in [1, min(N, D)] (1 for a matrix of zeros), float32 at least; NaN where an entry
        is not finite.

    Raises:
        TypeError, ValueError: If ``embedding`` is no 2-D floating-point tensor.

    References:
        Roy & Vetterli, *The Effective Rank: A Measure of Effective Dimensionality*, 2007.

    Example:
        >>> round(float(effective_rank(torch.eye(4))), 4)
        4.0
    """
    rows = rows_of(embedding, "embedding")
    if not bool(rows.isfinite().all()):  # LAPACK refuses what is not
        return rows.new_tensor(float("nan"))
    values = torch.linalg.svdvals(rows)
    share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    rank: Tensor = torch.special.entr(share).sum().exp()
    return rank


def uniformity(features: Tensor, t: float = 2.0) -> Tensor:
    """How evenly features spread over the unit sphere.

    ``log mean_{i<j} exp(-t |x_i - x_j|^2)`` on rows scaled to unit length; 0 where all fall on one
    point, lower is more uniform.

    Args:
        features: ``(N, D)`` with N >= 2, floating point.
        t: Kernel sharpness > 0.

    Returns:
        A scalar in [-4 t, 0], float32 at least.

    Raises:
        TypeError, ValueError: If ``features`` is no 2-D floating-point tensor of at least two rows,
            or ``t`` is not positive.

    References:
        Wang & Isola, 2020, Sec. 4.1.2.

    Example:
        >>> uniformity(torch.ones(5, 3))
        tensor(0.)
    """
    rows = F.normalize(rows_of(features, "features"), dim=1)
    if rows.shape[0] < 2:
        raise ValueError(f"features must have at least 2 rows, got {rows.shape[0]}")
    squared = torch.pdist(rows).square()
    spread = torch.logsumexp(-number("t", t, above=0) * squared, dim=0)
    return spread - torch.log(torch.tensor(float(squared.numel()), device=rows.device))
