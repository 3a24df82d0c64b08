"""How far one set of features is from another, without pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from structkd._checks import describe, number
from structkd.diagnostics._rows import rows_of

# Far more than a few thousand rows need; POT's default of 1e5 stops there.
SIMPLEX_PIVOTS = 10_000_000


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
    rows_s = rows_of(features_s, "features_s").detach()
    rows_t = rows_of(features_t, "features_t").detach()
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
