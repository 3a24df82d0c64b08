"""The CRD benchmark's ShuffleNetV1 (Zhang et al., CVPR 2018, with a stem for small images)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.head import Head, register


class ShuffleUnit(nn.Module):
    """Grouped 1x1, shuffled, depthwise 3x3, grouped 1x1; beside it the input, or its average."""

    def __init__(self, in_chs: int, out_chs: int, stride: int, groups: int, first: bool) -> None:
        super().__init__()
        self.stride = stride
        # Where the map is halved the input goes on beside the branch, which makes the rest.
        branch = out_chs - in_chs if stride == 2 else out_chs
        hidden = branch // 4
        self.groups = 1 if first else groups  # the stem's few channels are not split
        self.conv1 = nn.Conv2d(in_chs, hidden, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, branch, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(branch)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, H/stride, W/stride), halves rounded up."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = rearrange(out, "b (g c) h w -> b (c g) h w", g=self.groups)
        # The original has no ReLU after the depthwise convolution; the benchmark has.
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            return F.relu(torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1))
        return F.relu(out + x)


class CifarShuffleNetV1(Head):
    """A ShuffleNetV1 for images of 32x32 and more; its map is an eighth.

    ``widths`` and ``depths`` are of the stages, ``groups`` of the 1x1 convolutions.
    """

    def __init__(
        self,
        widths: tuple[int, int, int],
        depths: tuple[int, int, int],
        groups: int,
        num_classes: int = 10,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        in_chs = 24
        self.num_features = self.head_hidden_size = widths[-1]
        self.conv1 = nn.Conv2d(in_chans, in_chs, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(in_chs)
        for number, (chs, depth) in enumerate(zip(widths, depths, strict=True), start=1):
            units = [ShuffleUnit(in_chs, chs, 2, groups, number == 1)]
            units += [ShuffleUnit(chs, chs, 1, groups, False) for _ in range(depth - 1)]
            self.add_stage(f"layer{number}", chs, 2**number, nn.Sequential(*units))
            in_chs = chs
        self.reset_classifier(num_classes)


# The paper's student.
register("crd_shufflenet_v1", CifarShuffleNetV1, (240, 480, 960), (4, 8, 4), 3)
