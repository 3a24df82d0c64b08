"""The options that say which images there are, what makes them poor, and how they are cropped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


@dataclass(frozen=True)
class ImageOptions:
    """Options of any images, with a class each or a class for every pixel."""

    # Which recipe this is.
    recipe: Annotated[str, tyro.conf.Suppress] = "own"
    # Folder where the images lie, or the folders of them that other options name.
    data: Path | None = None
    # Share of the images for testing, where a folder has no test/.
    test_fraction: float = 0.2
    # Which draw of these images, to see how much a result depends on it.
    test_draw: int = 0
    # val holds a tenth of the training images out, for choosing settings.
    evaluate: Literal["test", "val"] = "test"
    # So many training images have labels; all pairs are distilled.
    labels: int | None = None
    # Images in a batch, over all processes.
    batch_size: int = 64
    # Gigabytes of images that may be held; more are read during the training.
    memory: float = 4.0
    # Processes that read such images.
    workers: int = 2

    def check(self) -> None:
        """Raise for values that no training can have."""
        at_least(self, batch_size=1, memory=0, workers=0, test_draw=0)
        if not 0 < self.test_fraction < 1:
            raise ValueError(f"--test-fraction must lie in (0, 1), got {self.test_fraction}")


def each_once(options: Any, *names: str) -> None:
    """Refuse options of several values that have none, or one twice: it would count as two."""
    for name in names:
        if not (given := getattr(options, name)):
            raise ValueError(f"--{name} names nothing; fix: leave it out, or name one")
        if twice := [value for value in given if given.count(value) > 1]:
            raise ValueError(f"--{name} has {twice[0]} more than once; fix: name it once")


def at_least(options: Any, **least: float) -> None:
    """Refuse options that are smaller than they may be."""
    for name, value in least.items():
        if not getattr(options, name) >= value:
            told = f"--{name.replace('_', '-')} must be at least {value}"
            raise ValueError(f"{told}, got {getattr(options, name)}")


@dataclass(frozen=True)
class Options(ImageOptions):
    """Options of images with a class each; every data set's reader takes some of them."""

    # Who reads the images: a name of data/readers.py.
    reader: Annotated[str, tyro.conf.Suppress] = "folder"
    # Fetch the data set into --data.
    download: bool = False
    # Folder of the rich side's images, where the two sides have a folder each.
    rich: Path | None = None
    # Folder of the poor side's images.
    poor: Path | None = None
    # What makes images poor where there is one modality: noise:0.5, noise:0.3-0.9, lowres:8, grey,
    # blur:2, bands:3,2,1 or bands:3,2,1@2750 (2750 shown as white).
    view: str = "noise:0.5"
    # Pairs by name: leave out what has no partner.
    only_pairs: bool = False
    # Bring images to so many pixels each way, their middle kept; 0 leaves them.
    size: int = 0
    # File with the classes of imagenet100, a WordNet id a line.
    classes: Path | None = None
    # Which bands are read of many, counted from 0; all by default.
    bands: tuple[int, ...] = ()
    # Where red, green and blue stand among the bands.
    rgb: tuple[int, ...] = ()
    # So many training images only, all classes in proportion.
    limit: int | None = None
    # Crops: from a padded border, or a part of the image resized.
    crop: Literal["pad", "resized"] = "pad"
    # Border in pixels that crops may reach into.
    pad: int = 4
    # Mirror half of the training images.
    flip: bool = True

    def check(self) -> None:
        super().check()
        at_least(self, size=0, pad=0)
