"""The CRD benchmark's ShuffleNetV2 (Ma et al., ECCV 2018, with a stem for small images)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.head import Head, register


class SplitUnit(nn.Module):
    """Half of the channels pass, half go through 1x1, depthwise 3x3 and 1x1; then a shuffle.

    With stride 2 all channels go through both: the first branch is depthwise 3x3 and 1x1.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        half = out_chs // 2
        self.stride = stride
        self.passing: nn.Module = nn.Identity()
        if stride == 2:
            self.passing = nn.Sequential(
                *_depthwise(in_chs, stride), nn.Conv2d(in_chs, half, 1, bias=False),
                nn.BatchNorm2d(half), nn.ReLU(),
            )  # fmt: skip
        self.worked = nn.Sequential(
            nn.Conv2d(in_chs if stride == 2 else half, half, 1, bias=False),
            nn.BatchNorm2d(half), nn.ReLU(),
            *_depthwise(half, stride), nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, H/stride, W/stride), halves rounded up."""
        first, second = (x, x) if self.stride == 2 else x.chunk(2, 1)
        out = torch.cat([self.passing(first), self.worked(second)], 1)
        return rearrange(out, "b (g c) h w -> b (c g) h w", g=2)


class CifarShuffleNetV2(Head):
    """A ShuffleNetV2 for images of 32x32 and more; its map is an eighth.

    ``widths`` are the channels of the three stages and of the last convolution, ``depths`` units.
    """

    def __init__(
        self,
        widths: tuple[int, int, int, int],
        depths: tuple[int, int, int],
        num_classes: int = 10,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        in_chs = 24
        *stages, last = widths
        self.num_features = self.head_hidden_size = last
        self.conv1 = nn.Conv2d(in_chans, in_chs, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(in_chs)
        for number, (chs, depth) in enumerate(zip(stages, depths, strict=True), start=1):
            units = [SplitUnit(in_chs, chs, 2), *(SplitUnit(chs, chs, 1) for _ in range(depth - 1))]
            self.add_stage(f"layer{number}", chs, 2**number, nn.Sequential(*units))
            in_chs = chs
        self.conv2 = nn.Conv2d(in_chs, last, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(super().forward_features(x))))


def _depthwise(chs: int, stride: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(chs, chs, 3, stride, 1, groups=chs, bias=False), nn.BatchNorm2d(chs)


# Full width: the paper's student.
register("crd_shufflenet_v2", CifarShuffleNetV2, (116, 232, 464, 1024), (4, 8, 4))
