"""Residual networks for small images, those of the CRD benchmark (Tian et al., ICLR 2020) among them.

A 3x3 stem, three stages of (depth - 2) / 6 basic blocks, strides 1, 2, 2, average pool, ``fc``.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

from crossmodal.models.head import Head, own_options

__all__ = [
    "CifarResNet",
    "resnet8",
    "resnet8x0_5",
    "resnet8x4",
    "resnet14",
    "resnet20",
    "resnet32x4",
]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; its output is never written in place."""

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chs)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_chs != out_chs:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_chs, out_chs, 1, stride, bias=False), nn.BatchNorm2d(out_chs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, H/stride, W/stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


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
            stage = [BasicBlock(in_chs, chs, stride)]
            stage += [BasicBlock(chs, chs, 1) for _ in range(blocks - 1)]
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


@register_model
def resnet8x4(pretrained: bool = False, **options: Any) -> CifarResNet:
    """8 layers, stem 32, stages 64-128-256: the paper's student."""
    return CifarResNet(8, (32, 64, 128, 256), **own_options(pretrained, options))


@register_model
def resnet32x4(pretrained: bool = False, **options: Any) -> CifarResNet:
    """32 layers, stem 32, stages 64-128-256: the paper's teacher."""
    return CifarResNet(32, (32, 64, 128, 256), **own_options(pretrained, options))


@register_model
def resnet8(pretrained: bool = False, **options: Any) -> CifarResNet:
    """8 layers, stem 16, stages 16-32-64."""
    return CifarResNet(8, (16, 16, 32, 64), **own_options(pretrained, options))


@register_model
def resnet14(pretrained: bool = False, **options: Any) -> CifarResNet:
    """14 layers, stem 16, stages 16-32-64."""
    return CifarResNet(14, (16, 16, 32, 64), **own_options(pretrained, options))


@register_model
def resnet20(pretrained: bool = False, **options: Any) -> CifarResNet:
    """20 layers, stem 16, stages 16-32-64."""
    return CifarResNet(20, (16, 16, 32, 64), **own_options(pretrained, options))


@register_model
def resnet8x0_5(pretrained: bool = False, **options: Any) -> CifarResNet:
    """8 layers, stem 8, stages 8-16-32: small enough for a laptop's demo."""
    return CifarResNet(8, (8, 8, 16, 32), **own_options(pretrained, options))
