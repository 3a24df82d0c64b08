"""The CRD benchmark's MobileNetV2 (Sandler et al., CVPR 2018): half width, fewer strides."""

from __future__ import annotations

from torch import Tensor, nn

from models.head import Head, register

# Expansion, channels at full width, blocks, stride of the first. Fewer strides than ImageNet's.
_GROUPS = (
    (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
    (6, 320, 1, 1),
)  # fmt: skip
_STAGES = (1, 2, 4, 6)  # the last group at each size


class InvertedResidual(nn.Module):
    """1x1 up, depthwise 3x3, 1x1 down without a ReLU; the input is added where it fits."""

    def __init__(self, in_chs: int, out_chs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = in_chs * expansion
        self.added = stride == 1 and in_chs == out_chs
        self.conv = nn.Sequential(
            *_convolved(in_chs, wide, 1),
            *_convolved(wide, wide, 3, stride, groups=wide),
            nn.Conv2d(wide, out_chs, 1, bias=False),
            nn.BatchNorm2d(out_chs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, H/stride, W/stride), halves rounded up."""
        out: Tensor = self.conv(x)
        return x + out if self.added else out


class CifarMobileNetV2(Head):
    """A MobileNetV2 for images of 32x32 and more; its map is a sixteenth.

    The last convolution never has fewer than 1,280 channels, whatever the width.
    """

    def __init__(self, width: float, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        in_chs, reduction = int(32 * width), 2
        self.num_features = self.head_hidden_size = int(1280 * max(width, 1))
        self.conv1 = nn.Sequential(*_convolved(in_chans, in_chs, 3, 2))
        self.blocks = nn.Sequential()
        for number, (expansion, full, count, stride) in enumerate(_GROUPS):
            chs = int(full * width)
            blocks = [InvertedResidual(in_chs, chs, stride, expansion)]
            blocks += [InvertedResidual(chs, chs, 1, expansion) for _ in range(count - 1)]
            self.blocks.append(nn.Sequential(*blocks))
            in_chs, reduction = chs, reduction * stride
            if number in _STAGES:
                self.add_stage(f"blocks.{number}", chs, reduction, None)
        self.conv2 = nn.Sequential(*_convolved(in_chs, self.num_features, 1))
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # As the benchmark has it, for depthwise ones too: by all channels that come out.
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)

    def forward_features(self, x: Tensor) -> Tensor:
        features: Tensor = self.conv2(self.blocks(self.conv1(x)))
        return features


def _convolved(
    in_chs: int, out_chs: int, kernel: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(in_chs, out_chs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return convolution, nn.BatchNorm2d(out_chs), nn.ReLU()


# The paper's student; timm's mobilenetv2_050 is ImageNet's.
register("crd_mobilenet_v2", CifarMobileNetV2, 0.5)
