"""What of a teacher a student's modality can show."""

from __future__ import annotations

import torch
from torch import Tensor

from structkd._checks import describe, number
from structkd.criteria._closed_form import cut_at, predicted_share
from structkd.criteria._maps import common_positions
from structkd.criteria._moments import Columns, by_channel, moments


def predictable_share(
    features_s: Tensor, features_t: Tensor, *, ridge: float = 1e-3, split: bool | None = None
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
        features_s: Maps ``(B, C_s, H, W)``, tokens ``(B, N, C_s)`` or rows ``(B, C_s)``.
        features_t: The teacher's for the same samples, ``C_t`` channels, of any of these kinds;
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
        >>> maps = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> noise = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        >>> shown = predictable_share(maps, torch.cat([maps[:, :1] - maps[:, 1:2], noise], dim=1))
        >>> [round(float(share), 1) for share in shown]
        [1.0, 0.0]
    """
    for name, features in (("features_s", features_s), ("features_t", features_t)):
        if not isinstance(features, Tensor) or not features.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {describe(features)}")
        if features.dim() not in (2, 3, 4):
            raise ValueError(
                f"{name} must be (B, C, H, W), (B, N, C) or (B, C), got {describe(features)}"
            )
    if len(features_s) != len(features_t):
        raise ValueError(
            "features_s and features_t must hold the same samples, got "
            f"{describe(features_s)} and {describe(features_t)}"
        )
    dtype = torch.promote_types(
        torch.promote_types(features_s.dtype, features_t.dtype), torch.float32
    )
    wide = (features_s.detach().to(dtype), features_t.detach().to(dtype))
    x, y = map(by_channel, common_positions(*wide, "features_s and features_t"))
    if (positions := x[0].numel()) < 2:
        raise ValueError(f"the features must have at least 2 positions, got {positions}")
    pair = Columns(x, y, whole=True, cut=cut_at(positions, len(x), split))
    with torch.autocast(x.device.type, enabled=False):
        return predicted_share(*moments([pair]), ridge=number("ridge", ridge, above=0), floor=0.0)
