"""The best linear map from the student's channels to the teacher's, without training one."""

from __future__ import annotations

import torch
from torch import Tensor

from structkd.criteria._moments import Moments

# Positions a student channel below which a regression measured on its own positions flatters.
ENOUGH = 10


def cut_at(positions: int, channels: int, split: bool | None) -> int | None:
    """Returns how many positions the regression is fitted on, None for all, measured on all.

    Args:
        positions: Of the whole batch.
        channels: Of the student.
        split: Whether to cut them in halves; None where there are fewer than 10 a channel.
    """
    few = positions < ENOUGH * channels if split is None else split
    return positions // 2 if few else None


def predicted_share(halves: tuple[Moments, ...], *, ridge: float, floor: float) -> Tensor:
    r"""Returns the share of each teacher channel that a linear map predicts, ``(C_t,)``.

    On all positions it is :math:`[S_{ts} (S_{ss} + \rho I)^{-1} S_{st}]_{ii} / v_i`, within [0, 1],
    with :math:`\rho` the ridge times the student's mean variance and :math:`v_i = S_{tt,ii} + floor
    \cdot mean_j S_{tt,jj}`. From halves, the map and its intercept are fitted on one and measured
    on the other, against the mean of the one, both ways; where they predict worse than that mean
    does, it is below 0.

    Args:
        halves: The moments of all positions, or of each half, with the student's covariance.
        ridge: > 0, so that dead and dependent channels are no obstacle.
        floor: >= 0, which fades teacher channels of little variance.
    """
    weights = [_ridge_regression(half, ridge) for half in halves]
    if len(halves) == 1:
        (whole,) = halves
        explained = (weights[0] * whole.cross).sum(dim=0)
        return explained * _inverse(whole.var_t, floor)
    shares = []
    for weight, fitted, measured in zip(weights, halves, halves[::-1], strict=True):
        step_s, step_t = measured.mean_s - fitted.mean_s, measured.mean_t - fitted.mean_t
        # Second moments of the measured half about the means of the fitted one.
        spread_s = measured.spread_s + torch.outer(step_s, step_s)
        cross = measured.cross + torch.outer(step_s, step_t)
        total = measured.var_t + step_t.square()
        # What the mean leaves over, less what the regression does.
        explained = (weight * (2 * cross - spread_s @ weight)).sum(dim=0)
        shares.append(explained * _inverse(total, floor))
    return torch.stack(shares).mean(dim=0)


def _ridge_regression(found: Moments, ridge: float) -> Tensor:
    """Returns the weights ``(C_s, C_t)``; in float64 where the device has it."""
    spread_s, cross = found.spread_s, found.cross
    dtype = torch.float32 if spread_s.device.type == "mps" else torch.float64
    size = spread_s.diagonal().mean()
    # A student that is constant throughout predicts nothing, whatever it is divided by.
    size = torch.where(size <= 0, 1, size)
    identity = torch.eye(len(spread_s), dtype=dtype, device=spread_s.device)
    # Not cholesky, whose check waits for the device. The ridge keeps the matrix positive; where
    # NaN stops the factorisation, what it leaves is no answer.
    factor, stopped = torch.linalg.cholesky_ex((spread_s / size).to(dtype) + ridge * identity)
    solved = torch.cholesky_solve((cross / size).to(dtype), factor)
    return torch.where(stopped == 0, solved, torch.nan).to(spread_s.dtype)


def _inverse(variance: Tensor, floor: float) -> Tensor:
    variance = variance + floor * variance.mean()
    empty = variance <= 0
    return torch.where(empty, 0, 1 / torch.where(empty, 1, variance))
