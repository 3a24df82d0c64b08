"""torchvision's ShuffleNetV2 with what timm's tools look for."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models import ShuffleNetV2

from models.head import Head, register


class TimmShuffleNetV2(Head, ShuffleNetV2):
    """torchvision's ShuffleNetV2, whose stages begin at a quarter of the image.

    ``widths`` are the channels of the stem, the three stages and the last convolution.
    """

    def __init__(self, widths: list[int], num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__([4, 8, 4], widths)
        if in_chans != 3:
            self.conv1[0] = nn.Conv2d(in_chans, widths[0], 3, 2, 1, bias=False)
        self.num_features = self.head_hidden_size = widths[-1]
        for stage in (2, 3, 4):
            self.add_stage(f"stage{stage}", widths[stage - 1], 2 ** (stage + 1), None)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.conv1(x))
        features: Tensor = self.conv5(self.stage4(self.stage3(self.stage2(x))))
        return features


# Half width: the smallest of SemBridge's backbones.
register("shufflenet_v2_x0_5", TimmShuffleNetV2, [24, 48, 96, 192, 1024])
