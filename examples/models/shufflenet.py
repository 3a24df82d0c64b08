"""torchvision's ShuffleNetV2 with what timm's tools look for."""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from torch import Tensor, nn
from torchvision.models import ShuffleNetV2

from models.head import Head, own_options

__all__ = ["TimmShuffleNetV2", "shufflenet_v2_x0_5"]


class TimmShuffleNetV2(Head, ShuffleNetV2):
    """torchvision's ShuffleNetV2, whose stages begin at a quarter of the image.

    Args:
        widths: channels of the stem, the three stages and the last convolution.
        num_classes: outputs of ``fc``; 0 leaves the pooled embedding.
        in_chans: channels of the images.
    """

    def __init__(self, widths: list[int], num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__([4, 8, 4], widths)
        if in_chans != 3:
            self.conv1[0] = nn.Conv2d(in_chans, widths[0], 3, 2, 1, bias=False)
        self.num_features = self.head_hidden_size = widths[-1]
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": widths[stage - 1], "reduction": 2 ** (stage + 1), "module": f"stage{stage}"}
            for stage in (2, 3, 4)
        ]
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the last convolution's map (B, num_features, H/32, W/32)."""
        x = self.maxpool(self.conv1(x))
        features: Tensor = self.conv5(self.stage4(self.stage3(self.stage2(x))))
        return features


@register_model
def shufflenet_v2_x0_5(pretrained: bool = False, **options: Any) -> TimmShuffleNetV2:
    """ShuffleNetV2 of half width: the smallest of SemBridge's backbones."""
    return TimmShuffleNetV2([24, 48, 96, 192, 1024], **own_options(pretrained, options))
