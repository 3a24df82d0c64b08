"""One image file of any kind and any number of bands, and lists of such files that are alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import functional as vision

from data.sources import Pixels, Rows, unreadable

TIFF, ARRAY = frozenset({".tif", ".tiff"}), frozenset({".npy"})
PHOTOS = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})
SUFFIXES = TIFF | ARRAY | PHOTOS
_PLAIN = ("L", "RGB", "RGBA", "LA", "I;16", "I;16B", "I", "F")  # modes whose bands are the image's
# Where it is not one of these, what the bands mean is not what the numbers say.
_AS = {"1": "L", "P": "RGB", "PA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB"}


@dataclass(frozen=True)
class AlikeFiles:
    """Reads rows of a list of files into (n, C, H, W); all must be alike.

    Attributes:
        files: one a sample.
        size: brings every image to that many pixels each way (see :func:`fitted`); None leaves
            them, and they must be of one size.
        colours: reads them as red, green and blue, whatever they are stored as.
        like: the file that all must be like, where it is not the first of them.
        margin: see :func:`fitted`.
    """

    files: Sequence[Path]
    size: int | None = None
    colours: bool = False
    like: Path | None = None
    margin: float = 1.0

    def __call__(self, rows: Rows) -> Pixels:
        return np.stack([self.image(int(row)) for row in rows])

    def image(self, row: int) -> Pixels:
        """One of them, (C, H, W)."""
        file, (first, kind, shape) = self.files[row], self._first
        image = self.decode(file)
        if image.shape[0] != shape[0]:
            raise ValueError(
                f"image {file} has {image.shape[0]} band(s), {first} has {shape[0]}; fix: give "
                "all images of a side the same bands"
            )
        if image.dtype != kind:
            raise ValueError(
                f"image {file} holds {image.dtype}, {first} holds {kind}; fix: store all images "
                "of a side in one kind of number"
            )
        if image.shape != shape:
            raise ValueError(
                f"image {file} is {image.shape[1]}x{image.shape[2]}, {first} is "
                f"{shape[1]}x{shape[2]}; fix: --size N, or resize it"
            )
        return image

    def decode(self, file: Path) -> Pixels:
        """An image whatever the others are."""
        image = read_colours(file) if self.colours else read_bands(file)
        return image if self.size is None else fitted(image, self.size, margin=self.margin)

    @cached_property
    def _first(self) -> tuple[Path, np.dtype, tuple[int, ...]]:
        first = self.like or self.files[0]
        image = self.decode(first)
        return first, image.dtype, image.shape


def refuse_sizes(read: object) -> None:
    """Refuses photographs of several sizes by their headers, before anything is trained.

    Raises:
        ValueError: they differ; the sizes are counted.
    """
    if not isinstance(read, AlikeFiles) or read.size is not None:
        return
    sizes: Counter[tuple[int, int]] = Counter()
    for file in read.files:
        if file.suffix.lower() in PHOTOS:
            try:
                with Image.open(file) as image:
                    sizes[image.size] += 1
            except (OSError, SyntaxError, ValueError):
                continue  # a damaged file is named by whoever reads it
    if len(sizes) > 1:
        told = ", ".join(f"{n} of {h}x{w}" for (w, h), n in sizes.most_common(3))
        raise ValueError(
            f"images in {read.files[0].parent.parent} have {len(sizes)} sizes: {told}; fix: --size "
            "N brings all to NxN"
        )


def read_bands(file: Path) -> Pixels:
    """One image (C, H, W), all of its bands: uint8 where the file has 8 bits, else float32.

    PNG, JPEG and their like, TIFF of any number of bands or pages, and ``.npy``, either axis order:
    the shortest of the outer axes are the bands. A palette is turned to its colours.

    Raises:
        ValueError: the file is damaged, of a kind that cannot be read, or holds NaN or infinity.
    """
    suffix = file.suffix.lower()
    if suffix in TIFF:
        image = _tiff(file)
    elif suffix in ARRAY:
        image = _array(file)
    else:
        image = _photo(file)
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    if image.dtype.kind not in "uifb":
        raise ValueError(
            f"image {file} holds {image.dtype}; fix: store it as whole numbers or floats"
        )
    values = np.ascontiguousarray(image, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"image {file} holds NaN or infinity; fix: replace or delete that file")
    return values


def read_colours(file: Path) -> NDArray[np.uint8]:
    """One photograph as uint8 (3, H, W), whatever it is stored as.

    Raises:
        ValueError: the file is damaged or no image.
    """
    try:
        with Image.open(file) as image:
            colour = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # what PIL raises, by format
        raise unreadable(file, error) from error
    return np.ascontiguousarray(colour.transpose(2, 0, 1))


def fitted(image: Pixels, size: int, *, margin: float = 1.0) -> Pixels:
    """An image (C, H, W) of ``size`` each way: its shorter side resized, its middle cut out.

    Args:
        image: uint8 or float32.
        size: pixels each way.
        margin: how much larger the shorter side is made; ImageNet's 256 / 224.
    """
    if image.shape[1:] == (size, size) and margin == 1.0:
        return image
    resized = vision.resize(torch.tensor(image), [round(size * margin)], antialias=True)
    middle: NDArray[np.float32] = vision.center_crop(resized, [size, size]).numpy()
    return middle


def _photo(file: Path) -> NDArray[np.generic]:
    try:
        with Image.open(file) as image:
            deep = image.mode in ("RGB", "RGBA", "LA") and "16" in str(image.tile[0][3:])
            if not deep:
                mode = image.mode
                image.load()
                values = np.asarray(image if mode in _PLAIN else image.convert(_AS.get(mode, mode)))
    except (OSError, SyntaxError, ValueError, IndexError) as error:
        raise unreadable(file, error) from error
    if deep:
        raise ValueError(
            f"image {file} has colours of 16 bits, of which Pillow reads 8; fix: store it as TIFF "
            "or .npy"
        )
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def _array(file: Path) -> NDArray[np.generic]:
    try:
        values = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise unreadable(file, error) from error
    return _bands_first(file, np.asarray(values))


def _tiff(file: Path) -> NDArray[np.generic]:
    try:
        import tifffile
    except ImportError as error:
        raise ValueError(
            "TIFF images are read by tifffile, which is not installed; fix: pip install tifffile"
        ) from error
    try:
        with tifffile.TiffFile(file) as content:
            page, series = content.pages[0], content.series[0]
            compression, palette = page.compression.name, page.photometric.name == "PALETTE"
            axes, values = series.axes, None if palette else series.asarray()
    except Exception as error:  # damaged files raise whatever their bytes lead to
        if "imagecodecs" in str(error):
            raise ValueError(
                f"image {file} is a TIFF compressed by {compression}, which tifffile alone does "
                "not read; fix: store it uncompressed, or pip install imagecodecs"
            ) from error
        raise unreadable(file, error) from error
    if values is None:
        raise ValueError(
            f"image {file} is a TIFF whose numbers are places in a palette; fix: store its colours"
        )
    # Samples (S), channels (C) and pages (I) are told apart; Q is a writer's array of any meaning.
    if values.ndim == 3 and axes in ("SYX", "CYX", "IYX"):
        return values
    if values.ndim == 3 and axes in ("YXS", "YXC"):
        return values.transpose(2, 0, 1)
    return _bands_first(file, values)


def _bands_first(file: Path, values: NDArray[np.generic]) -> NDArray[np.generic]:
    if values.ndim == 2:
        return values[None]
    if values.ndim != 3 or 0 in values.shape:
        raise ValueError(
            f"image {file} has the shape {values.shape}, expected (H, W), (H, W, bands) or "
            "(bands, H, W); fix: one image a file"
        )
    first, last = values.shape[0], values.shape[-1]
    if first == last:
        raise ValueError(
            f"image {file} has the shape {values.shape}, of which the bands could be the first "
            "axis or the last; fix: store it as TIFF"
        )
    return values if first < last else values.transpose(2, 0, 1)
