"""What makes the poor modality poor; a further kind is one function and its entry in ``KINDS``.

A poverty takes raw images (n, C, H, W) and every sample's place in the whole data set (n,), and
gives the poor images. What it draws depends on the sample's place alone, so that the poor set is a
fixed second set: neither a limit nor the order of the images changes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from crossmodal.data.draws import uniform
from crossmodal.near import did_you_mean

_FIXED, _FRESH = 11, 12
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class Noise:
    """Salt and pepper: each pixel with probability ``amount`` black or white, in all channels.

    ``epoch`` draws it anew for every pass, apart for every ``seed``.
    """

    amount: float
    seed: int = 0
    epoch: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.amount <= 1.0:
            raise ValueError(
                f"amount is the fraction of pixels replaced and lies in [0, 1], got {self.amount!r}"
            )

    def __call__(self, images: Tensor, index: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            raise TypeError(f"images must be uint8 (values 0 to 255), got {images.dtype}")
        if images.ndim != 4 or index.shape != images.shape[:1]:
            raise ValueError(
                "images must be (N, C, H, W) and index (N,), "
                f"got {tuple(images.shape)} and {tuple(index.shape)}"
            )
        height, width = images.shape[-2:]
        key = (_FIXED, self.seed) if self.epoch is None else (_FRESH, self.seed, self.epoch)
        draw = uniform(key, index.to(images.device), height * width).view(-1, 1, height, width)
        poor = images.masked_fill(draw < self.amount / 2, 0)
        return poor.masked_fill((draw >= self.amount / 2) & (draw < self.amount), 255)

    def __str__(self) -> str:
        return f"noisy {self.amount:g}"


@dataclass(frozen=True)
class Grey:
    """The luma of three colours, in one channel."""

    def __call__(self, images: Tensor, index: Tensor) -> Tensor:
        if images.shape[1] != 3:
            raise ValueError(
                f"--poor grey needs images of three colours, got {images.shape[1]} channel(s); "
                "fix: --poor noise"
            )
        weights = torch.tensor(_LUMA, device=images.device).view(1, 3, 1, 1)
        return (images * weights).sum(1, keepdim=True).round().to(torch.uint8)

    def __str__(self) -> str:
        return "grey"


@dataclass(frozen=True)
class Bands:
    """Some of the channels, by place."""

    places: tuple[int, ...]

    def __call__(self, images: Tensor, index: Tensor) -> Tensor:
        return images[:, list(self.places)]


Poverty = Noise | Grey | Bands
KINDS: dict[str, Callable[[str], Poverty]] = {
    "noise": lambda text: Noise(float(text)),
    "grey": lambda text: Grey(),
}


def poverty(text: str, amount: float) -> Poverty:
    """``noise:0.5``, ``noise`` with the recipe's amount, ``grey``."""
    kind, _, argument = text.partition(":")
    kind = {"noisy": "noise"}.get(kind, kind)
    if kind not in KINDS:
        raise ValueError(
            f"unknown poverty {kind!r}; {did_you_mean(kind, KINDS)}known: {', '.join(KINDS)}"
        )
    try:
        return KINDS[kind](argument or str(amount))
    except ValueError as error:
        if "could not convert" not in str(error):
            raise
        raise ValueError(f"--poor {text}: {argument!r} is no number") from error
