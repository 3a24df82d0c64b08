"""The columns' dual variables of an entropic plan: Sinkhorn, or Dykstra under capacities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from structkd.transport._masses import MASS_RTOL

# The project's name on the package index is not the module's.
MISSING_POT = "pip install POT, the package that has the module ot"
# Marginals are compared every so many iterations, as POT does: each look waits for the device.
CHECK_EVERY = 10


def column_dual(
    constraint: str,
    scores: Tensor,
    row_mass: Tensor,
    limit: Tensor,
    max_iterations: int,
    tolerance: float,
) -> tuple[Tensor, int]:
    """Returns ``g / epsilon`` and the iterations it took.

    Args:
        constraint: ``both`` or ``capacity``.
        scores: ``-cost / epsilon``, ``(..., N, M)``.
        row_mass: ``(..., N)``.
        limit: What the columns must (``both``) or may (``capacity``) receive, ``(..., M)``.
        max_iterations: Most iterations.
        tolerance: Share of the mass that may miss its column.
    """
    # Solved on totals of 1; a problem without mass gets a stand-in, its plan is 0 anyway.
    total = row_mass.sum(dim=-1, keepdim=True)
    has_mass, safe = total > 0, total.where(total > 0, 1)
    rows = (row_mass / safe).where(has_mass, 1 / row_mass.shape[-1])
    columns = (limit / safe).where(has_mass, 1 / limit.shape[-1])
    if constraint == "capacity":
        return _capped(scores, rows, columns, max_iterations, tolerance)
    return _sinkhorn(scores, rows, columns, max_iterations, tolerance)


def overflow(received: Tensor, capacity: Tensor, dual: Tensor) -> Tensor:
    """Returns by how much columns miss optimality: one with a price must be full, none over."""
    gap = received - capacity
    return torch.where(dual < 0, gap.abs(), gap.clamp_min(0))


def _sinkhorn(
    scores: Tensor, rows: Tensor, columns: Tensor, max_iterations: int, tolerance: float
) -> tuple[Tensor, int]:
    count, width = scores.shape[-2:]
    # POT waits for every problem, a broken one too: that gets scores of 0, solved at once.
    broken = _broken(scores.detach(), rows, columns)
    found = _load_pot()(
        scores.masked_fill(broken[..., None, None], 0).reshape(-1, count, width),
        rows.reshape(-1, count),
        columns.reshape(-1, width),
        max_iter=max_iterations,
        # POT bounds the root of the squares: sqrt(N) times that bounds the sum.
        tol=tolerance / count**0.5,
        grad="autodiff",  # what is detached comes in detached
    )
    dual: Tensor = found["potentials"][1].reshape(columns.shape)
    return dual.masked_fill(broken[..., None], torch.nan), found["n_iters"] + 1


def _broken(scores: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Returns which problems have no plan, ``(...)``: one step leaves NaN or infinite duals."""
    row_dual = rows.log() - scores.logsumexp(-1)
    dual = columns.log() - (scores + row_dual[..., None]).logsumexp(-2)
    # -inf is the dual of a place without mass.
    lost = [(part.isnan() | part.isposinf()).any(dim=-1) for part in (row_dual, dual)]
    return lost[0] | lost[1]


def _load_pot() -> Callable[..., dict[str, Any]]:
    """Imports POT where it is needed: it pulls in SciPy and scikit-learn, seconds of work."""
    try:
        from ot.batch import bregman_log_projection_batch
    except ImportError as error:
        raise ImportError(f"constraint='both' needs POT: {MISSING_POT}") from error
    solver: Callable[..., dict[str, Any]] = bregman_log_projection_batch
    return solver


def _capped(
    scores: Tensor, rows: Tensor, columns: Tensor, max_iterations: int, tolerance: float
) -> tuple[Tensor, int]:
    log_rows, log_columns = rows.log(), columns.log()
    dual = torch.zeros_like(columns)
    # Where all room is needed the limit is an equality: Sinkhorn's step is the faster one, and
    # duals that differ by a constant give one plan.
    full = columns.sum(dim=-1, keepdim=True) <= 1 + MASS_RTOL
    for iteration in range(1, max_iterations + 1):
        row_dual = log_rows - (scores + dual[..., None, :]).logsumexp(-1)
        offered = (scores + row_dual[..., None]).logsumexp(-2)
        if tolerance and iteration % CHECK_EVERY == 1:
            miss = overflow((offered + dual).exp(), columns, dual).sum(dim=-1)
            # A miss that is NaN stays so: its problem must not keep the others running.
            if bool(((miss < tolerance) | miss.isnan()).all()):
                break
        dual = log_columns - offered
        dual = torch.where(full, dual - dual.amax(-1, keepdim=True), dual.clamp_max(0))
    return dual, iteration
