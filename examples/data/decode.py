"""One image file of any kind and any number of bands, and lists of such files that are alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as vision

TIFF, ARRAY = frozenset({".tif", ".tiff"}), frozenset({".npy"})
PHOTOS = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})
SUFFIXES = TIFF | ARRAY | PHOTOS
_PLAIN = ("L", "RGB", "RGBA", "LA", "I;16", "I;16B", "I", "F")  # modes whose bands are the image's
# Where it is not one of these, what the bands mean is not what the numbers say.
_AS = {"1": "L", "P": "RGB", "PA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB"}

_ORIENTATION = 0x0112  # of EXIF: how a camera was held; above 4 on its side

Rows = NDArray[np.int64]
Pixels = NDArray[np.uint8] | NDArray[np.float32]


def read_bands(file: Path, *, indices: bool = False) -> Pixels:
    """One image (C, H, W), all of its bands: uint8 where the file has 8 bits, else float32.

    PNG, JPEG and their like, TIFF of any number of bands or pages, and ``.npy``, either axis order:
    the shortest of the outer axes are the bands. A photograph is turned upright, as its EXIF says,
    and a palette to its colours; ``indices`` gives the numbers that point into it, as masks mean.
    """
    suffix = file.suffix.lower()
    if suffix in TIFF:
        values, axes = read_tiff(file, indices=indices)
        # Samples (S), channels (C) and pages (I) are told apart; Q is an array of any meaning.
        if axes in ("YXS", "YXC"):
            image = values.transpose(2, 0, 1)
        else:
            image = values if axes in ("SYX", "CYX", "IYX") else _bands_first(file, values)
    elif suffix in ARRAY:
        try:
            values = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise unreadable(file, error) from error
        image = _bands_first(file, np.asarray(values))
    else:
        image = _photo(file, indices)
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    if image.dtype.kind not in "uifb":
        raise ValueError(
            f"image {file} holds {image.dtype}; fix: store it as whole numbers or floats"
        )
    return finite(file, image)


def finite(file: Path, image: NDArray[np.generic]) -> NDArray[np.float32]:
    """An image as float32, refused where a number is none."""
    values = np.ascontiguousarray(image, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"image {file} holds NaN or infinity; fix: replace or delete that file")
    return values


def read_colours(
    file: Path, size: tuple[int, int] | None = None, *, resize: bool = False
) -> NDArray[np.uint8]:
    """One photograph as uint8 (3, H, W), whatever it is stored as.

    Where a ``size`` (height, width) is given it is brought to that, or must have it already.
    """
    try:
        with Image.open(file) as image:
            mode, pages = image.mode, getattr(image, "n_frames", 1)
            colour = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # what PIL raises, by format
        _refuse_bands(file)
        raise unreadable(file, error) from error
    if mode == "L" and pages > 1:  # Pillow gives the first
        _refuse_bands(file)
    if mode[0] in "IF":  # Pillow cuts them at 255
        raise ValueError(
            f"image {file} has grey values of more than 8 bits, which are no photograph's; fix: "
            "store it with 8 bits, or take the recipe 'pairs', which reads any"
        )
    if size is not None and colour.size != size[::-1]:
        if not resize:
            raise ValueError(
                f"image {file} is {colour.height}x{colour.width}, expected {size[0]}x{size[1]}; "
                "fix: resize it"
            )
        colour = colour.resize(size[::-1], Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(colour).transpose(2, 0, 1))


def _refuse_bands(file: Path) -> None:
    """Refuse a TIFF whose bands are no photograph's; a damaged one is told by its reader."""
    if file.suffix.lower() in TIFF and len(image := read_bands(file)) > 1:
        raise ValueError(
            f"image {file} is a TIFF of {len(image)} bands in {image.dtype}, which is no "
            "photograph; fix: store it as RGB with 8 bits, or take the recipe 'pairs', which reads "
            "any"
        )


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


def _photo(file: Path, indices: bool) -> NDArray[np.generic]:
    try:
        with Image.open(file) as image:
            deep = image.mode in ("RGB", "RGBA", "LA") and "16B" in str(image.tile)
            if not deep:
                turned, mode = ImageOps.exif_transpose(image), image.mode
                plain = mode in _PLAIN or (indices and mode == "P")
                values = np.asarray(turned if plain else turned.convert(_AS.get(mode, mode)))
    except (OSError, SyntaxError, ValueError, IndexError) as error:
        raise unreadable(file, error) from error
    if deep:
        raise ValueError(
            f"image {file} has colours of 16 bits, of which Pillow reads 8; fix: store it as TIFF "
            "or .npy"
        )
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def read_tiff(file: Path, *, indices: bool = False) -> tuple[NDArray[np.generic], str]:
    """What a TIFF holds, and the names of its axes; a palette's numbers only as ``indices``."""
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
            axes, values = series.axes, None if palette and not indices else series.asarray()
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
    return values, axes


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


def unreadable(file: Path, error: Exception) -> ValueError:
    """What to say of a file that its reader gave up on."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(f"image {file} cannot be read ({reason}); fix: replace or delete that file")


@dataclass(frozen=True)
class AlikeFiles:
    """Reads rows of a list of files into (n, C, H, W); all must be alike.

    Attributes:
        files: one a sample.
        size: brings every image to that many pixels each way (see :func:`fitted`); 0 leaves them,
            and they must be of one size.
        read: what reads one of them.
        like: the file that all must be like, where it is not the first of them.
        margin: see :func:`fitted`.
        bands: those of the images' that are given; all where none are named.
    """

    files: Sequence[Path]
    size: int = 0
    read: Callable[[Path], Pixels] = read_bands
    like: Path | None = None
    margin: float = 1.0
    bands: Sequence[int] = ()

    def __call__(self, rows: Rows) -> Pixels:
        images = np.stack([self._alike(self.files[row]) for row in rows])
        return np.ascontiguousarray(images[:, list(self.bands)]) if self.bands else images

    def decode(self, file: Path) -> Pixels:
        """An image (C, H, W), whatever the others are."""
        image = self.read(file)
        return fitted(image, self.size, margin=self.margin) if self.size else image

    def _alike(self, file: Path) -> Pixels:
        image, (first, kind, shape) = self.decode(file), self._first
        if image.shape[0] != shape[0]:
            told = f"has {image.shape[0]} band(s), {first} has {shape[0]}"
            raise ValueError(f"image {file} {told}; fix: give all images of a side the same bands")
        if image.dtype != kind:
            told = f"holds {image.dtype}, {first} holds {kind}"
            raise ValueError(f"image {file} {told}; fix: store all of a side in one kind of number")
        if image.shape != shape:
            own, other = ("x".join(map(str, one[1:])) for one in (image.shape, shape))
            told = f"is {own}, {first} is {other}"
            raise ValueError(f"image {file} {told}; fix: --size N, or resize it")
        return image

    @cached_property
    def _first(self) -> tuple[Path, np.dtype, tuple[int, ...]]:
        first = self.like or self.files[0]
        image = self.decode(first)
        return first, image.dtype, image.shape


@dataclass(frozen=True)
class Stacked:
    """Reads rows of the bands of several folders."""

    sides: Sequence[AlikeFiles]

    def __call__(self, rows: Rows) -> Pixels:
        read = [side(rows) for side in self.sides]
        for side, images in zip(self.sides, read, strict=True):
            if images.shape[2:] != read[0].shape[2:]:
                sizes = ["x".join(map(str, one.shape[2:])) for one in (images, read[0])]
                raise ValueError(
                    f"images of {side.files[0].parent} are {sizes[0]}, those of "
                    f"{self.sides[0].files[0].parent} {sizes[1]}; fix: bring both to one size"
                )
        return np.concatenate(read, 1)


def refuse_sizes(read: object) -> None:
    """Refuses photographs of several sizes by their headers, before anything is trained."""
    if not isinstance(read, AlikeFiles) or read.size or read.read not in (read_bands, read_colours):
        return
    sizes: Counter[tuple[int, int]] = Counter()
    for file in read.files:
        if file.suffix.lower() in PHOTOS:
            try:
                with Image.open(file) as image:
                    turned = "exif" in image.info and image.getexif().get(_ORIENTATION, 1) > 4
                    sizes[image.size[::-1] if turned else image.size] += 1
            except (OSError, SyntaxError, ValueError):
                continue  # a damaged file is named by whoever reads it
    if len(sizes) > 1:
        told = ", ".join(f"{n} of {h}x{w}" for (w, h), n in sizes.most_common(3))
        raise ValueError(
            f"images in {read.files[0].parent.parent} have {len(sizes)} sizes: {told}; fix: --size "
            "N brings all to NxN"
        )
