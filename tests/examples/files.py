"""Tiny real image files in the layouts of the data sets, for the readers' tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image


def values(*shape: int, seed: int = 0, kind: str = "uint8") -> np.ndarray:
    top = 256 if kind == "uint8" else 4000
    return np.random.default_rng(seed).integers(0, top, shape).astype(kind)


def write(file: Path, image: np.ndarray) -> Path:
    """An image (H, W) or (H, W, bands) by the file's suffix."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".npy":
        np.save(file, image)
    elif file.suffix in (".tif", ".tiff"):
        tifffile.imwrite(file, image, photometric="minisblack", planarconfig="contig")
    else:
        Image.fromarray(image).save(file)
    return file


def two_sides(
    root: Path,
    *,
    classes: Sequence[str] = ("boat", "buoy"),
    count: int = 5,
    half: str = "",
    poor: str = ".png",
) -> tuple[Path, Path]:
    """``rich/<class>/NN.tif`` of 5 bands and 8x8, ``poor/<class>/NN.png`` of 1 and 8x8.

    The brightness tells the class.
    """
    for label, name in enumerate(classes):
        for number in range(count):
            seed = 100 * label + number
            stem = Path(half) / name / f"{number:02}"
            rich = values(8, 8, 5, seed=seed, kind="uint16") // 4 + 2000 * label
            write(root / "rich" / stem.with_suffix(".tif"), rich)
            image = values(8, 8, seed=seed + 50) // 4 + np.uint8(150 * label // (len(classes) - 1))
            write(root / "poor" / stem.with_suffix(poor), image)
    return root / "rich", root / "poor"
