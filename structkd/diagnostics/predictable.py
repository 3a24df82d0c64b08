"""What of a teacher a student's modality can show."""

from __future__ import annotations

from torch import Tensor

from structkd.criteria.dense import DenseStructureLoss


def predictable_share(
    student: Tensor, teacher: Tensor, *, ridge: float = 1e-3, split: bool | None = None
) -> Tensor:
    """Share of every teacher channel's variance that a linear map of the student's predicts.

    Between a student trained *without* a teacher and the teacher it says how much of the teacher's
    maps the student shows already. What no map predicts, the student's modality may not show, or
    the student may not have learned to see: it does not foretell by itself what
    :class:`structkd.DenseStructureLoss` gains.

    Positions of maps are samples. The map is the ridge regression of the closed form there, and so
    is the rule for few positions: below 10 a student channel it is fitted on one half of them and
    measured on the other, both ways.

    Args:
        student: Maps ``(B, C_s, H, W)``, tokens ``(B, N, C_s)`` or rows ``(B, C_s)``.
        teacher: The teacher's for the same samples, ``C_t`` channels, of any of these kinds;
            maps of other sizes are average-pooled to a common size.
        ridge: > 0, times the mean variance of the student's channels.
        split: Fit and measure on halves or not; none follows the rule.

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
