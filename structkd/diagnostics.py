"""Dimensional structure in numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from structkd._checks import describe, number

# Far more than a few thousand rows need; POT's default of 1e5 stops there.
SIMPLEX_PIVOTS = 10_000_000


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
    columns = F.normalize(_rows(embedding), dim=0)
    return (columns.T @ columns).clamp(-1, 1)


def effective_rank(embedding: Tensor) -> Tensor:
    """Number of dimensions that an embedding really uses.

    ``exp(H(p))`` with ``p`` the singular values of the matrix divided by their sum and ``H`` the
    entropy: D for equal singular values, 1 for a matrix of rank 1.

    Args:
        embedding: ``(N, D)``, floating point.

    Returns:
        A scalar in [1, min(N, D)] (1 for a matrix of zeros), float32 at least.

    Raises:
        TypeError, ValueError: If ``embedding`` is no 2-D floating-point tensor.

    References:
        Roy & Vetterli, *The Effective Rank: A Measure of Effective Dimensionality*, 2007.

    Example:
        >>> round(float(effective_rank(torch.eye(4))), 4)
        4.0
    """
    values = torch.linalg.svdvals(_rows(embedding))
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
    rows = F.normalize(_rows(features), dim=1)
    if rows.shape[0] < 2:
        raise ValueError(f"features must have at least 2 rows, got {rows.shape[0]}")
    squared = torch.pdist(rows).square()
    spread = torch.logsumexp(-number("t", t, above=0) * squared, dim=0)
    return spread - torch.log(torch.tensor(float(squared.numel()), device=rows.device))


def transport_cost(features_s: Tensor, features_t: Tensor, *, p: float = 2.0) -> Tensor:
    """Exact Wasserstein distance between two sets of features.

    ``W_p = (min_P sum_ij P_ij |s_i - t_j|^p)^(1/p)`` over plans ``P`` whose rows sum to 1/N and
    columns to 1/M: every sample counts the same, the order and the pairing of the two sets do not.
    ``p=2`` gives W_2, not its square. It is solved exactly by POT's network simplex on the CPU in
    float64; time grows about as N^3, so take a sample of a few thousand rows.

    Args:
        features_s: ``(N, D)``, floating point.
        features_t: ``(M, D)``, floating point.
        p: Order >= 1, the power of the Euclidean distance.

    Returns:
        A scalar >= 0 in the unit of the features, float32 at least, without gradient; NaN where a
        feature is not finite.

    Raises:
        TypeError, ValueError: If a set is no 2-D floating-point tensor or empty, widths differ, or
            ``p`` is below 1.
        ImportError: If POT is not installed.
        RuntimeError: If the solver stops before the optimum.

    References:
        Wei et al., *Asymmetric Cross-Modal Knowledge Distillation*, AAAI 2026, Fig. 2; Peyré &
        Cuturi, *Computational Optimal Transport*, 2019, Sec. 2.4.

    Example:
        >>> points = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> transport_cost(points, points.flip(0) + torch.tensor([3.0, 4.0]))  # a shift by 5
        tensor(5.)
    """
    try:
        import ot  # seconds of work, for it pulls in SciPy and scikit-learn
    except ImportError as error:
        raise ImportError(
            "transport_cost needs POT: pip install POT, the package that has the module ot"
        ) from error
    rows_s, rows_t = _rows(features_s).detach(), _rows(features_t).detach()
    if rows_s.shape[1] != rows_t.shape[1]:
        raise ValueError(
            "features_s and features_t must have one width, got "
            f"{describe(features_s)} and {describe(features_t)}"
        )
    if not (len(rows_s) and len(rows_t)):
        raise ValueError(
            f"both sets need a sample, got {describe(features_s)} and {describe(features_t)}"
        )
    power = number("p", p, at_least=1)
    # By differences: the matrix-product form loses the digits of near points.
    distance = torch.cdist(
        rows_s.double().cpu(),
        rows_t.double().cpu(),
        compute_mode="donot_use_mm_for_euclid_dist",
    )
    # In units of the largest distance no power of it overflows.
    largest = distance.max()
    if not largest.isfinite():
        return rows_s.new_tensor(float("nan"))
    unit = distance / largest.where(largest > 0, 1)
    solved, log = ot.emd2([], [], unit.pow(power).numpy(), numItermax=SIMPLEX_PIVOTS, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"the exact transport solver stopped early: {log['warning']}")
    return rows_s.new_tensor(max(float(solved), 0.0) ** (1 / power) * float(largest))


def _rows(features: Tensor) -> Tensor:
    if not isinstance(features, Tensor) or not features.is_floating_point():
        raise TypeError(f"expected a floating-point tensor, got {describe(features)}")
    if features.dim() != 2:
        raise ValueError(
            f"expected 2-D (N, D), got {describe(features)}; pool or flatten maps first"
        )
    return features if features.dtype == torch.float64 else features.float()
