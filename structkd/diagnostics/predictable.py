"""How much of a teacher's maps a student's maps predict."""

from __future__ import annotations

from torch import Tensor

from structkd.criteria.dense import DenseStructureLoss


def predictable_share(
    student: Tensor, teacher: Tensor, *, ridge: float = 1e-3, split: bool | None = None
) -> Tensor:
    """Share of every teacher channel's variance that a linear map of the student's predicts.

    For a student trained *without* a teacher it measures how much of the teacher's maps the student
    shows already. What is not predicted, the student's modality may not show, or the student may
    not have learned. The share alone does not foretell what :class:`structkd.DenseStructureLoss`
    gains.

    Positions of maps are samples. The linear map is the ridge regression of that criterion's closed
    form. With fewer than 10 positions for each student channel it is fitted on one half of them and
    measured on the other, and the other way round.

    Args:
        student: Maps ``(B, C_s, H, W)``, tokens ``(B, N, C_s)`` or rows ``(B, C_s)``.
        teacher: The teacher's for the same samples, ``C_t`` channels, of any of these kinds;
            maps of other sizes are average-pooled to a common size.
        ridge: > 0, times the mean variance of the student's channels.
        split: Whether to fit and measure on halves. None: only with fewer than 10 positions for
            each student channel.

    Returns:
        ``(C_t,)``, float32 at least, at most 1: 0 for a constant channel, and below 0 where halves
        predict each other worse than their means do. NaN where features are not finite.

    Raises:
        TypeError, ValueError: If features are no floating-point tensors of these kinds or of
            different samples, or there are fewer than 2 positions.

    Example:
        >>> import torch
        >>> maps = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> noise = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        >>> shown = predictable_share(maps, torch.cat([maps[:, :1] - maps[:, 1:2], noise], dim=1))
        >>> [round(float(share), 1) for share in shown]
        [1.0, 0.0]
    """
    closed = DenseStructureLoss(adapter="closed_form", ridge=ridge, split=split, floor=0.0, layer=0)
    (share,) = closed.shares(student, teacher)
    return share
