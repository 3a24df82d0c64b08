"""timm's vision transformer (Dosovitskiy et al., ICLR 2021), for small images of any size."""

from __future__ import annotations

from functools import partial

from timm.models import VisionTransformer

from models.head import register

# Four blocks of width 64 on patches of 4x4. timm's ``vit_small`` is ImageNet's.
_small = partial(
    VisionTransformer, img_size=32, patch_size=4, embed_dim=64, depth=4, num_heads=4,
    dynamic_img_size=True, dynamic_img_pad=True,
)  # fmt: skip
register("vit_small4", _small)
