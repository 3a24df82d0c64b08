"""The CRD benchmark's VGG (Tian et al., ICLR 2020): no hidden linear layers, an average pool.

Five blocks of 3x3 convolutions with batch normalisation; between the first four the image is halved
by a maximum. The benchmark halves 64-pixel images, and only these, once more; here every size is
halved three times, as the benchmark halves all others, so that a stage's reduction is one number.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

from models.head import Head, own_options

__all__ = ["CifarVGG", "crd_vgg8", "crd_vgg13"]

_WIDTHS = (64, 128, 256, 512, 512)
_HALVED = (False, True, True, True, False)  # before the block


class CifarVGG(Head, nn.Module):
    """A VGG for images of 32x32 and more, with the parts timm's tools look for.

    Args:
        convolutions: in each of the five blocks.
        num_classes: outputs of ``fc``; 0 leaves the pooled embedding.
        in_chans: channels of the images.
    """

    def __init__(
        self, convolutions: tuple[int, ...], num_classes: int = 10, in_chans: int = 3
    ) -> None:
        super().__init__()
        self.num_features = self.head_hidden_size = _WIDTHS[-1]
        self.feature_info: list[dict[str, Any]] = []
        in_chs, reduction = in_chans, 1
        for number, (count, chs) in enumerate(zip(convolutions, _WIDTHS, strict=True)):
            layers: list[nn.Module] = []
            for _ in range(count):
                # Its bias is lost in the normalisation, but the benchmark has it and counts it.
                layers += [nn.Conv2d(in_chs, chs, 3, 1, 1), nn.BatchNorm2d(chs), nn.ReLU()]
                in_chs = chs
            self.add_module(f"block{number}", nn.Sequential(*layers))
            reduction *= 2 if _HALVED[number] else 1
            if number:  # the first is the stem
                self.feature_info.append(
                    {"num_chs": chs, "reduction": reduction, "module": f"block{number}"}
                )
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the last block's map (B, 512, H/8, W/8)."""
        for number, halved in enumerate(_HALVED):
            x = self.get_submodule(f"block{number}")(F.max_pool2d(x, 2) if halved else x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


@register_model
def crd_vgg8(pretrained: bool = False, **options: Any) -> CifarVGG:
    """One convolution a block: the paper's student."""
    return CifarVGG((1, 1, 1, 1, 1), **own_options(pretrained, options))


@register_model
def crd_vgg13(pretrained: bool = False, **options: Any) -> CifarVGG:
    """Two convolutions a block: the paper's second teacher. timm's ``vgg13`` is ImageNet's."""
    return CifarVGG((2, 2, 2, 2, 2), **own_options(pretrained, options))
