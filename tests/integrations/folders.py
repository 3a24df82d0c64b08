"""A tiny data set of real image files, told apart by colour, in image folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("blue", "green", "red", "white")
COLOURS = np.array([[40, 40, 220], [40, 220, 40], [220, 40, 40], [220, 220, 220]])


def write(root: Path, *, train: int = 8, test: int = 4, size: int = 32) -> Path:
    """Writes ``train/<class>/N.png`` and ``test/<class>/N.png`` and returns the folder."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for name, colour in zip(CLASSES, COLOURS, strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = random.integers(-35, 36, (size, size, 3))
                pixels = (colour + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root
