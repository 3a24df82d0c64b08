"""Reads every image of a data set and says what is there and what is wrong, before any training."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data.options import Options
from data.sources import Images, Pixels, Rows
from data.views import open_source, open_views

# Kinds of what is wrong, the gravest first, and how an error of each is known.
KINDS = {
    "damaged": r"cannot be read|NaN or infinity|holds no",
    "of other bands": r"band",
    "of another kind of number": r"holds \w+, ",
    "of another size": r"\d+x\d+",
    "otherwise wrong": "",
}
_NAMED = 3


@dataclass(frozen=True)
class Found:
    """What a check found: a line for all that there is or is wrong, and how many images are."""

    lines: tuple[str, ...]
    bad: int


def check(options: Options) -> Found:
    """Classes, counts, sizes, bands, pairs, and every image that cannot be used, by kind.

    With nothing wrong the last lines are those that a training prints at its start.

    Raises:
        ValueError: The data are missing or of another layout; nothing can be read then.
    """
    if options.reader in ("scenes", "folders"):
        return Found(tuple(open_views(options).loaded().summary()), 0)
    source = open_source(options)
    names = source.classes
    more = f", ... {len(names) - 10} more" if len(names) > 10 else ""
    lines, wrong = [f"classes: {len(names)} ({', '.join(names[:10])}{more})"], []
    for half, images in (("train", source.train), ("test", source.test)):
        counted = np.bincount(images.labels, minlength=len(names))
        lines.append(
            f"{half}: {len(images.labels)} images, {counted.min()} to {counted.max()} a class"
        )
        for side, read in _sides(images):
            shapes, errors = _read_all(read, len(images.labels))
            wrong += errors
            lines += [f"{half}, {side}: {count} images of {kind}" for kind, count in shapes]
    left = wrong
    for kind, pattern in KINDS.items():
        own = [text for text in left if re.search(pattern, text.split(": ")[0])]
        left = [text for text in left if text not in own]
        if own:
            lines.append(f"{kind}: {len(own)}")
            lines += [f"  {text}" for text in own[:_NAMED]]
            lines += [f"  and {len(own) - _NAMED} more"] if len(own) > _NAMED else []
    lines.append(f"images that cannot be used: {len(wrong)}")
    if not wrong:
        lines += open_views(options).summary()
    return Found(tuple(lines), len(wrong))


def _sides(images: Images) -> list[tuple[str, Callable[[Rows], Pixels]]]:
    if images.read_poor is None:
        return [("images", images.read)]
    return [("rich", images.read), ("poor", images.read_poor)]


def _read_all(
    read: Callable[[Rows], Pixels], count: int
) -> tuple[list[tuple[str, int]], list[str]]:
    """Kinds of images with their counts, the most frequent first; errors in the images' order."""
    kinds: Counter[str] = Counter()
    wrong = []
    for row in range(count):
        try:
            image = read(np.array([row]))[0]
        except ValueError as error:
            wrong.append(str(error))
            continue
        bands, height, width = image.shape
        kinds[f"{bands} band(s), {height}x{width}, {image.dtype}"] += 1
    return kinds.most_common(), wrong
