"""What makes the poor modality poor: ``structkd.views``, drawn by each sample's place.

A poverty takes raw images (n, C, H, W) and every sample's place in the whole data set (n,). What it
draws depends on the place alone, so that the poor set is a fixed second set: neither a limit nor
the order of the images changes it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from data.draws import stream
from structkd import views

_DRAWS = 11
EXAMPLES = "noise:0.5, noise:0.3-0.9, lowres:8, grey, blur:2, bands:3,2,1, bands:3,2,1@2750"


@dataclass(frozen=True)
class Poverty:
    """A view of ``structkd.views`` by its text, as ``noise:0.7``."""

    text: str
    view: Callable[..., Tensor]
    drawn: bool = False  # whether it draws anything, for each sample from its own numbers
    as_photo: bool = False  # whether it makes 8 bits of whatever the images hold

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
            raise ValueError(f"--view {self.text} does not fit these images: {error}") from error
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
    known = ("noise", "lowres", "grey", "blur", "bands")
    if kind not in known:
        near = difflib.get_close_matches(kind, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{option} {text}: unknown view {kind!r}; {hint}as in {EXAMPLES}")
    if bool(argument) == (kind == "grey"):
        raise ValueError(
            f"{option} {text}: {kind} {'takes no number' if argument else 'needs a number'}; as in "
            f"{EXAMPLES}"
        )
    try:
        if kind == "grey":
            return Poverty(text, views.luma)
        if kind == "bands":
            places, _, white = argument.partition("@")
            chosen = [int(place) for place in places.split(",")]
            if min(chosen) < 0 or (white and not 0 < float(white) < float("inf")):
                raise ValueError("channels are counted from 0, and WHITE is a value above 0")
            if not white:
                return Poverty(text, partial(views.bands, places=chosen))
            return Poverty(text, partial(_photo, places=chosen, white=float(white)), as_photo=True)
        if kind == "noise":
            least, to, most = argument.partition("-")
            amount = (float(least), float(most)) if to else float(least)
            view, drawn = partial(views.salt_and_pepper, amount=amount), True
        else:
            own = {"lowres": (views.resolution, "factor"), "blur": (views.blur, "sigma")}[kind]
            view, drawn = partial(own[0], **{own[1]: float(argument)}), False
        made = Poverty(text, view, drawn)
        made(torch.zeros(1, 1, 8, 8), torch.zeros(1))  # a number out of range is told now
    except ValueError as error:
        raise ValueError(f"{option} {text}: {error}; as in {EXAMPLES}") from error
    return made


def _photo(images: Tensor, places: list[int], white: float) -> Tensor:
    return views.bands(images, places) * (255 / white)
