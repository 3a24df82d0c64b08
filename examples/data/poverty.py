"""What makes the poor modality poor; a further kind is one function and its entry in ``KINDS``.

A poverty takes raw images (n, C, H, W) and every sample's place in the whole data set (n,), and
gives the poor images. What it draws depends on the sample's place alone, so that the poor set is a
fixed second set: neither a limit nor the order of the images changes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data.draws import uniform
from crossmodal.near import did_you_mean

_FIXED, _FRESH, _AMOUNT = 11, 12, 13
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class Noise:
    """Salt and pepper: each pixel with probability ``amount`` black or white, in all channels.

    ``epoch`` draws it anew for every pass, apart for every ``seed``. With ``most``, every image has
    an amount of its own between the two.
    """

    amount: float
    seed: int = 0
    epoch: int | None = None
    most: float | None = None

    def __post_init__(self) -> None:
        for amount in (self.amount, self.most):
            if amount is not None and not 0.0 <= amount <= 1.0:
                raise ValueError(
                    f"amount is the fraction of pixels replaced and lies in [0, 1], got {amount!r}"
                )
        if self.most is not None and not self.amount < self.most:
            raise ValueError(
                f"noise:A-B goes from the least amount to the most, got {self.amount:g}-"
                f"{self.most:g}"
            )

    def __call__(self, images: Tensor, index: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            raise TypeError(
                f"noise is black or white: images must be uint8 (values 0 to 255), got "
                f"{images.dtype}; fix: another --poor"
            )
        if images.ndim != 4 or index.shape != images.shape[:1]:
            raise ValueError(
                "images must be (N, C, H, W) and index (N,), "
                f"got {tuple(images.shape)} and {tuple(index.shape)}"
            )
        height, width = images.shape[-2:]
        key = (_FIXED, self.seed) if self.epoch is None else (_FRESH, self.seed, self.epoch)
        index = index.to(images.device)
        draw = uniform(key, index, height * width).view(-1, 1, height, width)
        amount: Tensor | float = self.amount
        if self.most is not None:
            own = uniform((_AMOUNT, *key), index, 1).view(-1, 1, 1, 1)
            amount = self.amount + own * (self.most - self.amount)
        poor = images.masked_fill(draw < amount / 2, 0)
        return poor.masked_fill((draw >= amount / 2) & (draw < amount), 255)

    def __str__(self) -> str:
        return f"noisy {self.amount:g}" + ("" if self.most is None else f" to {self.most:g}")


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
        return _as_kind((images * weights).sum(1, keepdim=True), images)

    def __str__(self) -> str:
        return "grey"


@dataclass(frozen=True)
class Bands:
    """Some of the channels, by place from 0; with ``white``, as 8 bits of which that value is 255.

    The last is how multispectral images are shown as photographs: what is brighter is cut off.
    """

    places: tuple[int, ...]
    white: float | None = None

    def __post_init__(self) -> None:
        if not self.places or min(self.places) < 0:
            raise ValueError(f"--poor bands needs places from 0, got {self.places}")
        if self.white is not None and not 0 < self.white < math.inf:
            raise ValueError(f"--poor bands:...@WHITE needs a value above 0, got {self.white!r}")

    def __call__(self, images: Tensor, index: Tensor) -> Tensor:
        if max(self.places) >= images.shape[1]:
            raise ValueError(
                f"--poor {self} needs {max(self.places) + 1} channels, the images have "
                f"{images.shape[1]}, counted from 0"
            )
        chosen = images[:, list(self.places)]
        if self.white is None:
            return chosen
        return (chosen.float() * (255 / self.white)).round().clamp(0, 255).to(torch.uint8)

    def __str__(self) -> str:
        white = "" if self.white is None else f"@{self.white:g}"
        return f"bands:{','.join(map(str, self.places))}{white}"


@dataclass(frozen=True)
class Lowres:
    """A coarser sensor: means over about ``factor`` x ``factor`` pixels, brought back to size.

    Means are taken over areas and brought back by bilinear interpolation. A side that is no
    multiple of the factor is cut into as many near-equal parts as are nearest.
    """

    factor: float

    def __post_init__(self) -> None:
        if not 1 <= self.factor < math.inf:
            raise ValueError(
                f"--poor lowres:F needs a factor of at least 1 (8 makes one pixel of 8x8), got "
                f"{self.factor!r}"
            )

    def __call__(self, images: Tensor, index: Tensor) -> Tensor:
        size = images.shape[-2:]
        coarse = [max(1, round(side / self.factor)) for side in size]
        means = F.interpolate(images.float(), coarse, mode="area")
        back = F.interpolate(means, size, mode="bilinear", align_corners=False)
        return _as_kind(back, images)

    def __str__(self) -> str:
        return f"lowres:{self.factor:g}"


@dataclass(frozen=True)
class Blur:
    """A sensor out of focus: a Gaussian of so many pixels' standard deviation, edges continued."""

    sigma: float

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise ValueError(
                f"--poor blur:S needs a standard deviation above 0 pixels, got {self.sigma!r}"
            )

    def __call__(self, images: Tensor, index: Tensor) -> Tensor:
        reach = math.ceil(3 * self.sigma)
        taps = [math.exp(-((step / self.sigma) ** 2) / 2) for step in range(-reach, reach + 1)]
        blurred = images.float()
        for axis in (2, 3):
            places = torch.arange(images.shape[axis], device=images.device)
            # Summed tap by tap: a convolution's bits can depend on how many images it is given.
            total = torch.zeros_like(blurred)
            for step, tap in zip(range(-reach, reach + 1), taps, strict=True):
                shifted = (places + step).clamp(0, len(places) - 1)
                total += blurred.index_select(axis, shifted) * (tap / sum(taps))
            blurred = total
        return _as_kind(blurred, images)

    def __str__(self) -> str:
        return f"blur:{self.sigma:g}"


Poverty = Noise | Grey | Bands | Lowres | Blur
KINDS: dict[str, Callable[[str], Poverty]] = {
    "noise": lambda text: _noise(text),
    "lowres": lambda text: Lowres(float(text)),
    "grey": lambda text: Grey(),
    "blur": lambda text: Blur(float(text)),
    "bands": lambda text: _bands(text),
}
EXAMPLES = "noise:0.5, lowres:8, grey, blur:2, bands:3,2,1"


def poverty(text: str, amount: float, option: str = "--poor") -> Poverty:
    """``noise:0.5``, ``noise:0.3-0.9`` with an amount for each image, ``noise`` with the recipe's
    amount, ``lowres:8``, ``grey``, ``blur:2``, ``bands:3,2,1`` or ``bands:3,2,1@2750``.

    ``option`` is where the text was given.

    Raises:
        ValueError: no such kind, an argument that is no number or missing, or one out of range.
    """
    kind, _, argument = text.partition(":")
    kind = {"noisy": "noise"}.get(kind, kind)
    if kind not in KINDS:
        raise ValueError(
            f"{option} {text}: unknown poverty {kind!r}; {did_you_mean(kind, KINDS)}known: "
            f"{EXAMPLES}"
        )
    if kind == "grey" and argument:
        raise ValueError(f"{option} {text}: grey takes no number")
    if not argument and kind not in ("noise", "grey"):
        raise ValueError(f"{option} {text} needs a number; as in {EXAMPLES}")
    try:
        return KINDS[kind](argument or str(amount))
    except ValueError as error:
        if "could not convert" not in str(error) and "invalid literal" not in str(error):
            raise
        raise ValueError(f"{option} {text}: {argument!r} is no number; as in {EXAMPLES}") from error


def _noise(text: str) -> Noise:
    least, to, most = text.partition("-")
    return Noise(float(least), most=float(most)) if to else Noise(float(text))


def _bands(text: str) -> Bands:
    places, _, white = text.partition("@")
    chosen = tuple(int(place) for place in places.split(","))
    return Bands(chosen, float(white) if white else None)


def _as_kind(made: Tensor, images: Tensor) -> Tensor:
    """Whole numbers of 8 bits again where the images were."""
    return made.round().clamp(0, 255).to(torch.uint8) if images.dtype == torch.uint8 else made
