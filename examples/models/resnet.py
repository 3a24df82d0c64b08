"""Residual networks for small images, as the CRD benchmark has them (Tian et al., ICLR 2020).

A 3x3 stem, three stages of (depth - 2) / 6 basic blocks, strides 1, 2, 2, average pool, ``fc``.
"""

from __future__ import annotations

from torch import nn
from torchvision.models.resnet import BasicBlock

from models.head import Head, register


class CifarResNet(Head):
    """A residual network of 6n + 2 layers for images of about 32x32; its map is a quarter."""

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
        in_chs, *stages = widths
        self.num_features = self.head_hidden_size = stages[-1]
        self.conv1 = nn.Conv2d(in_chans, in_chs, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(in_chs)
        reduction = 1
        for number, (chs, stride) in enumerate(zip(stages, (1, 2, 2), strict=True), start=1):
            shortcut = None
            if stride != 1 or in_chs != chs:
                convolution = nn.Conv2d(in_chs, chs, 1, stride, bias=False)
                shortcut = nn.Sequential(convolution, nn.BatchNorm2d(chs))
            stage = [BasicBlock(in_chs, chs, stride, shortcut)]
            stage += [BasicBlock(chs, chs) for _ in range((depth - 2) // 6 - 1)]
            in_chs, reduction = chs, reduction * stride
            self.add_stage(f"layer{number}", chs, reduction, nn.Sequential(*stage))
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


# The paper's teacher is resnet32x4, its student resnet8x4; resnet8x0_5 suits a laptop's demo.
_WIDTHS = {"x4": (32, 64, 128, 256), "": (16, 16, 32, 64), "x0_5": (8, 8, 16, 32)}
for _depth, _suffix in ((8, "x4"), (32, "x4"), (8, ""), (14, ""), (20, ""), (8, "x0_5")):
    register(f"resnet{_depth}{_suffix}", CifarResNet, _depth, _WIDTHS[_suffix])
