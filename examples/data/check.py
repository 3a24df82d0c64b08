"""Reads every image of a data set and says what is there and what is wrong, before any training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from data.sources import Images, Pixels, Rows
from data.views import Wanted, open_source, open_views
from data.options import Options

_LISTED = 20


@dataclass(frozen=True)
class Found:
    """What a check found.

    Attributes:
        lines: what there is, and what is wrong, one line each.
        bad: images that cannot be read or are unlike the others.
    """

    lines: tuple[str, ...]
    bad: int


def check(entry: DataSet, wanted: Wanted) -> Found:
    """Classes, counts, sizes, bands, pairs, and every image that cannot be used.

    With nothing wrong the last lines are those that a training prints at its start.

    Raises:
        ValueError: the data are missing or of another layout; nothing can be read then.
    """
    if entry.scenes:
        return Found(tuple(open_views(entry, wanted).loaded().summary()), 0)
    source = open_source(entry, wanted)
    lines = [f"classes: {len(source.classes)} ({_some(source.classes)})"]
    wrong: list[str] = []
    for half, images in (("train", source.train), ("test", source.test)):
        counted = np.bincount(images.labels, minlength=len(source.classes))
        lines.append(
            f"{half}: {len(images.labels)} images, {counted.min()} to {counted.max()} a class"
        )
        for side, read in _sides(images):
            shapes, told = _read_all(read, len(images.labels))
            wrong += told
            lines += [f"{half}, {side}: {count} images of {kind}" for kind, count in shapes]
    lines += wrong[:_LISTED]
    if len(wrong) > _LISTED:
        lines.append(f"and {len(wrong) - _LISTED} more that cannot be used")
    lines.append(f"images that cannot be used: {len(wrong)}")
    if not wrong:
        lines += open_views(entry, replace(wanted, download=False)).summary()
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


def _some(names: list[str], most: int = 10) -> str:
    more = f", ... {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
