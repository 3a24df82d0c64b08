"""timm's DenseNet (Huang et al., CVPR 2017), small, with a stem for small images."""

from __future__ import annotations

from typing import Any

from timm.models import DenseNet
from torch import nn

from models.head import register


def _densenet(growth: int, layers: tuple[int, ...], **options: Any) -> DenseNet:
    model = DenseNet(growth, layers, **options)
    first = model.features.conv0  # ImageNet's: 7x7
    model.features.conv0 = nn.Conv2d(
        first.in_channels, first.out_channels, 3, stride=2, padding=1, bias=False
    )
    nn.init.kaiming_normal_(model.features.conv0.weight)
    model.features.pool0 = nn.Identity()  # which halves a second time
    for stage in model.feature_info[1:]:
        stage["reduction"] //= 2
    return model


# Three blocks of three layers that grow by 12. timm's ``densenet121`` is ImageNet's.
register("densenet22", _densenet, 12, (3, 3, 3))
