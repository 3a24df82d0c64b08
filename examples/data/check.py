"""Reads every image of a data set and says what is there and what is wrong, before any training."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.options import Options
from data.pairs import open_folders
from data.scenes import open_scenes
from data.sources import Images, Pixels, Rows
from data.views import open_source, open_views

# Kinds of what is wrong, the gravest first, and what is said of each beside the file's name.
KINDS = {
    "damaged": r"cannot be read|NaN or infinity|no page",
    "without a partner": "no partner",
    "of other bands": r"band|has the shape",
    "of another kind of number": r"holds u?(int|float)",
    "of another size": r"is \d+x\d+",
    "otherwise wrong": "",
}
_NAMED = 3


@dataclass(frozen=True)
class Found:
    """What a check found: a line for all that there is or is wrong, and how many images are."""

    lines: tuple[str, ...]
    bad: int


@dataclass(frozen=True)
class _Image:
    """One that could be read, or not: then ``error`` says why."""

    name: str
    bands: int = 0
    kind: str = ""
    size: str = ""
    error: str = ""

    def told(self, common: _Image) -> str:
        """What is wrong with it beside most others of its side; empty where nothing is."""
        if self.error:
            return self.error
        if self.bands != common.bands:
            return f"{self.name} has {self.bands} band(s), most have {common.bands}"
        if self.kind != common.kind:
            return f"{self.name} holds {self.kind}, most hold {common.kind}"
        return "" if self.size == common.size else f"{self.name} is {self.size}, not {common.size}"


def check(options: Options) -> Found:
    """Classes, counts, sizes, bands, pairs, and every image that cannot be used, by kind.

    With nothing wrong the last lines are those that a training prints at its start.

    Raises:
        ValueError: The data are missing or of another layout; nothing can be read then.
    """
    classes, halves, lonely = _opened(options)
    more = f", ... {len(classes) - 10} more" if len(classes) > 10 else ""
    lines = [f"classes: {len(classes)} ({', '.join(classes[:10])}{more})"]
    sides: dict[str, list[_Image]] = {}
    for half, images in halves.items():
        counted = np.bincount(images.labels, minlength=len(classes))
        lines.append(
            f"{half}: {len(images.labels)} images, {counted.min()} to {counted.max()} a class"
        )
        for side, read in _sides(half, images):
            found = list(_each(read, len(images.labels)))
            kinds = Counter((i.bands, i.size, i.kind) for i in found if not i.error)
            lines += [
                f"{half if side == half else f'{half}, {side}'}: {count} images of {bands} "
                f"band(s), {size}, {kind}"
                for (bands, size, kind), count in kinds.most_common()
            ]
            sides.setdefault(side, []).extend(found)
    wrong = [] if options.only_pairs else [f"{file} has no partner" for file in lonely]
    if lonely and options.only_pairs:
        lines.append(f"left out, without a partner: {len(lonely)}")
    for found in sides.values():
        kinds = Counter(replace(i, name="") for i in found if not i.error)
        common = kinds.most_common(1)[0][0] if kinds else _Image("")
        wrong += [told for image in found if (told := image.told(common))]
    left = dict.fromkeys(wrong)
    for kind, pattern in KINDS.items():
        # A folder's name may say anything.
        own = [text for text in left if re.search(pattern, re.sub(r"\S*/\S*", "", text))]
        left = {text: None for text in left if text not in own}
        if own:
            lines.append(f"{kind}: {len(own)}")
            lines += [f"  {text}" for text in own[:_NAMED]]
            lines += [f"  and {len(own) - _NAMED} more"] if len(own) > _NAMED else []
    lines.append(f"images that cannot be used: {len(wrong)}")
    if not wrong:
        lines += open_views(options).summary()
    return Found(tuple(lines), len(wrong))


def _opened(options: Options) -> tuple[list[str], dict[str, Images], tuple[Path, ...]]:
    """Classes, the parts to read, and files that have no partner."""
    if options.reader == "scenes":
        bands = len(options.bands) or 10
        classes, rich, poor = open_scenes(options.recipe, options.data, bands=bands)
    elif options.reader == "folders":
        classes, rich, poor = open_folders(options.rich, options.poor, options.size)
    else:
        # All that has a partner is read, whatever else has none.
        pairs = {"only_pairs": True} if options.reader == "pairs" else {}
        source = open_source(replace(options, **pairs))
        return source.classes, {"train": source.train, "test": source.test}, source.lonely
    return classes, {"rich": rich, "poor": poor}, ()


def _sides(half: str, images: Images) -> list[tuple[str, Callable[[Rows], Pixels]]]:
    if images.read_poor is not None:
        return [("rich", images.read), ("poor", images.read_poor)]
    return [("images" if half in ("train", "test") else half, images.read)]


def _each(read: Callable[[Rows], Pixels], count: int) -> Iterator[_Image]:
    """Every image by itself, each file once."""
    read = getattr(read, "read", read)  # of chosen bands
    decode = getattr(read, "decode", None)
    files = list(dict.fromkeys(getattr(read, "files", range(count))))
    for file in files:
        try:
            image = read(np.array([file]))[0] if decode is None else decode(file)
        except ValueError as error:
            yield _Image(f"image {file}", error=str(error))
            continue
        bands, height, width = image.shape
        yield _Image(f"image {file}", bands, str(image.dtype), f"{height}x{width}")
