"""The options that say which images there are, what makes them poor, and how they are cropped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Options:
    """Options of images; every data set's reader takes some of them."""

    # Which recipe this is.
    recipe: Annotated[str, tyro.conf.Suppress] = "own"
    # Who reads the images: a name of data/readers.py.
    reader: Annotated[str, tyro.conf.Suppress] = "folder"
    # Folder where the images lie; the digits need none.
    data: Path | None = None
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
    # Share of the images for testing, where a folder has no test/.
    test_fraction: float = 0.2
    # Which bands are read of many, counted from 0; all by default.
    bands: tuple[int, ...] = ()
    # Where red, green and blue stand among the bands.
    rgb: tuple[int, ...] = ()
    # So many training images only, all classes in proportion.
    limit: int | None = None
    # So many training images have a label; all pairs are distilled.
    labels: int | None = None
    # val holds a tenth of the training images out, for choosing settings.
    evaluate: Literal["test", "val"] = "test"
    # Images a step, over all processes.
    batch_size: int = 64
    # Crops: from a padded border, or a part of the image resized.
    crop: Literal["pad", "resized"] = "pad"
    # Border in pixels that crops may reach into.
    pad: int = 4
    # Mirror half of the training images.
    flip: bool = True
    # Gigabytes of images that may be held; more are read during the training.
    memory: float = 4.0
    # Processes that read such images.
    workers: int = 2

    def check(self) -> None:
        """Refuse what no training can have."""
        for name in ("size", "pad", "memory", "workers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} must be at least 0, got {getattr(self, name)}")
