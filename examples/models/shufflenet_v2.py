"""The CRD benchmark's ShuffleNetV2 (Ma et al., ECCV 2018, with a stem for small images)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models import register_model
from torch import Tensor, nn

from models.head import Head, own_options

__all__ = ["CifarShuffleNetV2", "crd_shufflenet_v2"]


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


class CifarShuffleNetV2(Head, nn.Module):
    """A ShuffleNetV2 for images of 32x32 and more, with the parts timm's tools look for.

    Args:
        widths: channels of the three stages and of the last convolution.
        depths: units of the three stages.
        num_classes: outputs of ``fc``; 0 leaves the pooled embedding.
        in_chans: channels of the images.
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
        self.feature_info: list[dict[str, Any]] = []
        for number, (chs, depth) in enumerate(zip(stages, depths, strict=True), start=1):
            units = [SplitUnit(in_chs, chs, 2), *(SplitUnit(chs, chs, 1) for _ in range(depth - 1))]
            name = f"layer{number}"
            self.add_module(name, nn.Sequential(*units))
            self.feature_info.append({"num_chs": chs, "reduction": 2**number, "module": name})
            in_chs = chs
        self.conv2 = nn.Conv2d(in_chs, last, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the last convolution's map (B, num_features, H/8, W/8)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in self.feature_info:
            x = self.get_submodule(stage["module"])(x)
        return F.relu(self.bn2(self.conv2(x)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _depthwise(chs: int, stride: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(chs, chs, 3, stride, 1, groups=chs, bias=False), nn.BatchNorm2d(chs)


@register_model
def crd_shufflenet_v2(pretrained: bool = False, **options: Any) -> CifarShuffleNetV2:
    """Stages of 116-232-464, full width: the paper's student."""
    own = own_options(pretrained, options)
    return CifarShuffleNetV2((116, 232, 464, 1024), (4, 8, 4), **own)
