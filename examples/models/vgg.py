"""The CRD benchmark's VGG (Tian et al., ICLR 2020): no hidden linear layers, an average pool.

Five blocks of 3x3 convolutions with batch normalisation; between the first four the image is halved
by a maximum. The benchmark halves 64-pixel images, and only these, once more; here every size is
halved three times, as the benchmark halves all others, so that a stage's reduction is one number.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.head import Head, register

_WIDTHS = (64, 128, 256, 512, 512)
_HALVED = (False, True, True, True, False)  # before the block


class CifarVGG(Head):
    """A VGG for images of 32x32 and more; its map is an eighth.

    ``convolutions`` are the number in each of the five blocks, ``width`` times the benchmark's
    channels wide.
    """

    def __init__(
        self,
        convolutions: tuple[int, ...],
        width: float = 1.0,
        num_classes: int = 10,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        widths = [int(width * chs) for chs in _WIDTHS]
        self.num_features = self.head_hidden_size = widths[-1]
        in_chs, reduction = in_chans, 1
        for number, (count, chs) in enumerate(zip(convolutions, widths, strict=True)):
            layers: list[nn.Module] = []
            for _ in range(count):
                # Its bias is lost in the normalisation, but the benchmark has it and counts it.
                layers += [nn.Conv2d(in_chs, chs, 3, 1, 1), nn.BatchNorm2d(chs), nn.ReLU()]
                in_chs = chs
            reduction *= 2 if _HALVED[number] else 1
            self.add_stage(f"block{number}", chs, reduction, nn.Sequential(*layers))
        del self.feature_info[0]  # the first is the stem
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        for number, halved in enumerate(_HALVED):
            x = self.get_submodule(f"block{number}")(F.max_pool2d(x, 2) if halved else x)
        return x


# One convolution a block is the paper's student, two its second teacher; timm's are ImageNet's.
register("crd_vgg8", CifarVGG, (1, 1, 1, 1, 1))
register("crd_vgg8x0_25", CifarVGG, (1, 1, 1, 1, 1), 0.25)  # for a laptop
register("crd_vgg13", CifarVGG, (2, 2, 2, 2, 2))
