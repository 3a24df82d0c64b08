"""The check of rows that all diagnostics share."""

from __future__ import annotations

import torch
from torch import Tensor

from structkd._checks import describe


def rows_of(features: Tensor, name: str) -> Tensor:
    """Returns ``(N, D)`` features in float32 at least, after checking that they are that."""
    if not isinstance(features, Tensor) or not features.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {describe(features)}")
    if features.dim() != 2:
        raise ValueError(
            f"{name} must be 2-D (N, D), got {describe(features)}; pool or flatten maps first"
        )
    return features if features.dtype == torch.float64 else features.float()
