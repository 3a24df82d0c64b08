"""What makes the poor modality poor: ``structkd.views``, drawn by each sample's place.

A poverty takes raw images (n, C, H, W) and every sample's place in the whole data set (n,). What it
draws depends on the place alone, so that the poor set is a fixed second set: neither a limit nor
the order of the images changes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from data.draws import stream
from recipe import near
from structkd import views

_DRAWS = 11
_NUMBERS = {
    "noise": (views.salt_and_pepper, "amount"),
    "lowres": (views.resolution, "factor"),
    "blur": (views.blur, "sigma"),
}
EXAMPLES = "noise:0.5, noise:0.3-0.9, lowres:8, grey, blur:2, bands:3,2,1, bands:3,2,1@2750"


@dataclass(frozen=True)
class Poverty:
    """A view of ``structkd.views`` by its text, as ``noise:0.7``."""

    text: str
    view: Callable[..., Tensor]
    drawn: bool = False  # whether it draws anything, for each sample from its own numbers
    as_photo: bool = False  # whether it makes 8 bits of whatever the images hold
    option: str = "--view"  # who asked for it

    def __call__(self, images: Tensor, index: Tensor) -> Tensor:
        eight = images.dtype == torch.uint8
        scale = 255.0 if eight else 1.0
        raw = images.float() / scale
        try:
            if self.drawn:
                made = torch.cat(
                    [self._one(raw[n : n + 1], int(index[n])) for n in range(len(raw))]
                )
            else:
                made = self.view(raw)
        except ValueError as error:
            told = f"{self.option} {self.text} does not fit these images: {error}"
            raise ValueError(told) from error
        whole = eight or self.as_photo
        return (made * scale).round().clamp(0, 255).to(torch.uint8) if whole else made

    def _one(self, image: Tensor, place: int) -> Tensor:
        generator = torch.Generator().manual_seed(stream(_DRAWS, place))
        return self.view(image, generator=generator)

    def __str__(self) -> str:
        return self.text


def poverty(text: str, option: str = "--view") -> Poverty:
    """Reads one of ``EXAMPLES``; ``bands:...@WHITE`` shows WHITE as 255 and cuts what is brighter.

    Raises:
        ValueError: No such kind, or an argument that is no number, missing or out of range.
    """
    kind, _, argument = text.partition(":")
    known = (*_NUMBERS, "grey", "bands")
    if kind not in known:
        hint = near(kind, known)
        raise ValueError(f"{option} {text}: unknown view {kind!r}; {hint}as in {EXAMPLES}")
    if bool(argument) == (kind == "grey"):
        needs = "takes no number" if argument else "needs a number"
        raise ValueError(f"{option} {text}: {kind} {needs}; as in {EXAMPLES}")
    try:
        if kind == "grey":
            return Poverty(text, views.luma, option=option)
        if kind == "bands":
            places, _, white = argument.partition("@")
            chosen, bright = [int(place) for place in places.split(",")], float(white or 255)
            if min(chosen) < 0 or not 0 < bright < float("inf"):
                raise ValueError("channels are counted from 0, and WHITE is a value above 0")
            shown = partial(_bands, places=chosen, scale=255 / bright if white else 1)
            return Poverty(text, shown, as_photo=bool(white), option=option)
        view, name = _NUMBERS[kind]
        ends = argument.split("-") if kind == "noise" else [argument]
        number = float(argument) if len(ends) == 1 else tuple(map(float, ends))
        made = Poverty(text, partial(view, **{name: number}), kind == "noise", option=option)
        made(torch.zeros(1, 1, 8, 8), torch.zeros(1))  # a number out of range is told now
    except ValueError as error:
        raise ValueError(f"{option} {text}: {error}; as in {EXAMPLES}") from error
    return made


def _bands(images: Tensor, places: list[int], scale: float) -> Tensor:
    return views.bands(images, places) * scale
