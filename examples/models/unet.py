"""A small U-Net (Ronneberger et al., MICCAI 2015) for scenes, and smp's networks by their names.

Two 3x3 convolutions with batch norm a level, halved by max pooling, doubled by interpolation.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.head import register


class UNet(nn.Module):
    """Logits of every pixel; height and width are a multiple of 2 to the number of halvings.

    Args:
        widths: channels of each level, from the images' own size down.
        num_classes: of a pixel.
        in_chans: channels of the images.
    """

    def __init__(self, widths: tuple[int, ...], num_classes: int = 2, in_chans: int = 3) -> None:
        super().__init__()
        ins = (in_chans, *widths)
        self.encoder = nn.ModuleList(_block(*pair) for pair in pairwise(ins))
        up = widths[::-1]
        self.decoder = nn.ModuleList(_block(a + b, b) for a, b in pairwise(up))
        self.head = nn.Conv2d(widths[0], num_classes, 1)
        # The first level is not far from the image, and no stage to distil.
        levels = [(f"encoder.{n}", w, 2**n) for n, w in enumerate(widths) if n]
        levels += [(f"decoder.{n}", w, 2 ** (len(up) - 2 - n)) for n, w in enumerate(up[1:])]
        self.feature_info = [
            {"module": name, "num_chs": width, "reduction": step} for name, width, step in levels
        ]

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to logits (B, num_classes, H, W)."""
        seen = []
        for number, block in enumerate(self.encoder):
            x = block(F.max_pool2d(x, 2) if number else x)
            seen.append(x)
        for block, skipped in zip(self.decoder, reversed(seen[:-1]), strict=True):
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skipped], 1))
        logits: Tensor = self.head(x)
        return logits


def _block(ins: int, outs: int) -> nn.Sequential:
    def half(ins: int) -> list[nn.Module]:
        convolution = nn.Conv2d(ins, outs, 3, 1, 1, bias=False)
        return [convolution, nn.BatchNorm2d(outs), nn.ReLU(inplace=True)]

    return nn.Sequential(*half(ins), *half(outs))


for _width in (8, 12, 16, 32, 64):
    register(f"unet{_width}", UNet, (_width, 2 * _width, 4 * _width, 8 * _width))
