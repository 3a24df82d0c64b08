"""Residual networks for small images, as the CRD benchmark has them (Tian et al., ICLR 2020).

A 3x3 stem, three stages of (depth - 2) / 6 basic blocks, strides 1, 2, 2, average pool, ``fc``.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from models.head import Head, own_options

__all__ = ["CifarResNet"]


class CifarResNet(Head, nn.Module):
    """A residual network for images of about 32x32, with the parts timm's tools look for.

    Args:
        depth: 6n + 2 layers, so 8, 14, 20, 32, ...
        widths: channels of the stem and of the three stages.
        num_classes: outputs of ``fc``; 0 leaves the pooled embedding.
        in_chans: channels of the images.
    """

    def __init__(
        self,
        depth: int,
        widths: tuple[int, int, int, int],
        num_classes: int = 10,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, ...), got {depth}")
        blocks = (depth - 2) // 6
        stem, *stages = widths
        self.num_features = self.head_hidden_size = stages[-1]
        self.conv1 = nn.Conv2d(in_chans, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.feature_info: list[dict[str, Any]] = []
        in_chs, reduction = stem, 1
        for number, (chs, stride) in enumerate(zip(stages, (1, 2, 2), strict=True), start=1):
            shortcut = None
            if stride != 1 or in_chs != chs:
                convolution = nn.Conv2d(in_chs, chs, 1, stride, bias=False)
                shortcut = nn.Sequential(convolution, nn.BatchNorm2d(chs))
            stage = [BasicBlock(in_chs, chs, stride, shortcut)]
            stage += [BasicBlock(chs, chs) for _ in range(blocks - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*stage))
            in_chs, reduction = chs, reduction * stride
            self.feature_info.append(
                {"num_chs": chs, "reduction": reduction, "module": f"layer{number}"}
            )
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the last stage's map (B, num_features, H/4, W/4)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in self.feature_info:
            x = self.get_submodule(stage["module"])(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


# The paper's teacher is resnet32x4, its student resnet8x4; resnet8x0_5 suits a laptop's demo.
_WIDTHS = {"x4": (32, 64, 128, 256), "": (16, 16, 32, 64), "x0_5": (8, 8, 16, 32)}


def _registered(depth: int, suffix: str) -> None:
    def build(pretrained: bool = False, **options: Any) -> CifarResNet:
        return CifarResNet(depth, _WIDTHS[suffix], **own_options(pretrained, options))

    build.__name__ = build.__qualname__ = f"resnet{depth}{suffix}"
    register_model(build)


for _depth, _suffix in ((8, "x4"), (32, "x4"), (8, ""), (14, ""), (20, ""), (8, "x0_5")):
    _registered(_depth, _suffix)
