"""The CRD benchmark's adapter to the teacher's channels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from structkd import ConvAdapter


class Normalised(ConvAdapter):
    """A convolution, batch norm, ReLU.

    The benchmark's weights need the norm: with a bare convolution, FitNets at weight 100 and FSP at
    50 diverge within a few steps of learning rate 0.1.
    """

    def __init__(self, *, kernel_size: int = 1, skip_equal: bool = False) -> None:
        super().__init__(kernel_size=kernel_size, skip_equal=skip_equal)
        self.norm: nn.Module | None = nn.LazyBatchNorm2d()

    def initialize_parameters(self, features: Tensor, out_channels: int | None = None) -> None:
        super().initialize_parameters(features, out_channels)
        if self.conv is None:
            self.norm = None

    def forward(self, features: Tensor, out_channels: int | None = None) -> Tensor:
        adapted = super().forward(features, out_channels)
        return adapted if self.norm is None else F.relu(self.norm(adapted))
