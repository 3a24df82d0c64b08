"""Look at images before training on them: ``python examples/data check RECIPE --data DIR``.

It reads every image and says what is there and what is wrong, in one report. ``python examples/data
show RECIPE --out FILE.png`` writes the first poor test image to a file, and says its class:
something for ``predict.py`` where the images come from a package.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from PIL import Image

from data import open_views
from data.decode import PHOTOS
from data.readers import open_source, reader_of
from job import reported
from recipe import parsed
from store import write_atomically
from unpaired import Options as UnpairedOptions

# Kinds of what is wrong, the gravest first, and how an error of a reader is told to be of one.
_KINDS = {
    "damaged": r"cannot be read|NaN or infinity",
    "without a partner": "no partner",
    "of other bands": r"band|has the shape",
    "of another kind of number": r"holds u?(int|float)",
    "of another size": r"is \d+x\d+",
    "otherwise wrong": "",
}
_NAMED = 3


@dataclass(frozen=True)
class Options(UnpairedOptions):
    """Of any recipe, with pairs or without."""

    @classmethod
    def adapted(cls, values: dict[str, Any]) -> dict[str, Any]:
        return values


@dataclass(frozen=True)
class _Looks:
    """What an image is, but for its content."""

    bands: int
    kind: str
    size: str

    def told(self, common: _Looks) -> str:
        """What is odd beside most others of its side; empty where nothing is."""
        if self.bands != common.bands:
            return f"has {self.bands} band(s), most have {common.bands}"
        if self.kind != common.kind:
            return f"holds {self.kind}, most hold {common.kind}"
        return "" if self.size == common.size else f"is {self.size}, not {common.size}"


def check(options: Options) -> tuple[list[str], int]:
    """The report's lines, and how many images cannot be used.

    With nothing wrong the last lines are those that a training prints at its start.
    """
    reader = reader_of(options)
    # All that has a partner is read, whatever else has none.
    source = open_source(replace(options, only_pairs="only_pairs" in reader.takes))
    more = f", ... {len(source.classes) - 10} more" if len(source.classes) > 10 else ""
    lines = [f"classes: {len(source.classes)} ({', '.join(source.classes[:10])}{more})"]
    sides: dict[str, dict[str, _Looks]] = {}
    wrong: dict[str, str] = {}  # kinds by what is said
    for half, part in zip(("train", "test"), (source.train, source.test), strict=True):
        half = {"train": "rich", "test": "poor"}[half] if reader.apart else half
        counted = np.bincount(part.labels, minlength=len(source.classes))
        lines.append(
            f"{half}: {len(part.labels)} images, {counted.min()} to {counted.max()} a class"
        )
        reads = {"images" if not reader.apart else half: part.read}
        if part.read_poor is not None:
            reads = {"rich": part.read, "poor": part.read_poor}
        for side, read in reads.items():
            found = dict(_each(read, len(part.labels)))
            wrong |= {one: _kind(name, one) for name, one in found.items() if isinstance(one, str)}
            looks = {name: one for name, one in found.items() if isinstance(one, _Looks)}
            lines += [
                f"{half if side == half else f'{half}, {side}'}: {count} images of {one.bands} "
                f"band(s), {one.size}, {one.kind}"
                for one, count in Counter(looks.values()).most_common()
            ]
            sides.setdefault(side, {}).update(looks)
    if source.lonely and options.only_pairs:
        lines.append(f"left out, without a partner: {len(source.lonely)}")
    elif source.lonely:
        wrong |= {f"{file} has no partner": "without a partner" for file in source.lonely}
    for looks in sides.values():
        common = Counter(looks.values()).most_common(1)
        for name, one in looks.items():
            if told := one.told(common[0][0]):
                wrong[f"image {name} {told}"] = _kind("", told)
    for kind in _KINDS:
        own = [text for text, found in wrong.items() if found == kind]
        if own:
            lines += [f"{kind}: {len(own)}", *(f"  {text}" for text in own[:_NAMED])]
            lines += [f"  and {len(own) - _NAMED} more"] if len(own) > _NAMED else []
    lines.append(f"images that cannot be used: {len(wrong)}")
    if not wrong:
        lines += open_views(options).summary()
    return lines, len(wrong)


def _kind(name: str, told: str) -> str:
    told = told.replace(name, "") if name else told  # a folder's name may say anything
    return next(kind for kind, pattern in _KINDS.items() if re.search(pattern, told))


def _each(read: Any, count: int) -> Iterator[tuple[str, _Looks | str]]:
    """Every image by itself, each file once: what it is, or what is wrong."""
    decode = getattr(read, "decode", lambda row: read(np.array([row]))[0])
    for one in dict.fromkeys(getattr(read, "files", range(count))):
        try:
            image = decode(one)
        except ValueError as error:
            yield str(one), str(error)
        else:
            bands, height, width = image.shape
            yield str(one), _Looks(bands, str(image.dtype), f"{height}x{width}")


def show(options: Options) -> str:
    """Writes the first poor test image to ``--out``, and says its class."""
    images = open_views(options).held_out_poor
    pixels = images.take(torch.zeros(1, dtype=torch.int64))[0]
    fits = pixels.dtype == torch.uint8 and len(pixels) in (1, 3)
    if options.out is None or options.out.suffix.lower() not in PHOTOS or not fits:
        raise ValueError("show writes images of 8 bits in one or three channels to --out FILE.png")
    write_atomically(options.out, Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy()).save)
    return f"{options.out}: {images.classes[int(images.labels[0])]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """0, 1 where an image cannot be used, 2 after one line on stderr."""
    command, *given = list(sys.argv[1:] if arguments is None else arguments) or [""]

    def run() -> int:
        if command not in ("check", "show"):
            raise ValueError(
                "usage: python examples/data check RECIPE --data DIR, or show ... --out"
            )
        options = parsed(given, Options)
        options.check()
        lines, bad = check(options) if command == "check" else ([show(options)], 0)
        print("\n".join(lines))
        return int(bad > 0)

    return reported(run, trains=False)


if __name__ == "__main__":
    sys.exit(main())
