"""The remote-sensing benchmark's folders: multispectral MS/<class>/*, unrelated RGB/<class>/*."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from crossmodal.data import VAL_FRACTION, ImagePairs
from crossmodal.sources import Rows, stratified
from crossmodal.unpaired.views import Unpaired, single

TEST_FRACTION = 0.2
# Fixed draws, apart from those of data.py and views.py.
_TEST_DRAW, _VAL_DRAW, _LIMIT_DRAW = 6, 7, 8
_BAR_FROM = 500
_MS, _RGB = (".tif", ".tiff", ".mat"), (".jpg", ".jpeg", ".png", ".tif", ".tiff")

Pixels = NDArray[np.float32] | NDArray[np.uint8]


@dataclass(frozen=True)
class _Side:
    """One modality's files and labels, and a reader of one file into (C, H, W)."""

    files: list[Path]
    labels: Rows
    read: Callable[[Path], Pixels]

    def load(self, rows: Rows, offset: int, classes: list[str], name: str) -> ImagePairs:
        """These rows in memory."""
        bar = f"Reading {len(rows)} {name} images"
        images = [
            self.read(self.files[row]) for row in track(rows, bar, disable=len(rows) < _BAR_FROM)
        ]
        for row, image in zip(rows, images, strict=True):
            if image.shape != images[0].shape:
                raise ValueError(
                    f"image {self.files[row]} is {image.shape[1]}x{image.shape[2]}, others are "
                    f"{images[0].shape[1]}x{images[0].shape[2]}; fix: resize it"
                )
        pixels = torch.from_numpy(np.stack(images))
        index = torch.from_numpy(rows + offset)
        return ImagePairs(pixels, pixels, torch.from_numpy(self.labels[rows]), index, classes, name)


def open_scenes(
    name: str,
    data_dir: Path | None,
    *,
    bands: int,
    rgb: tuple[int, int, int],
    limit: int | None = None,
    evaluate: str = "test",
) -> Unpaired:
    """Both modalities in memory; classes are the folders' names.

    The benchmark's own split is not published with its description. Here a fixed stratified fifth
    of each modality is for testing; ``val`` takes a tenth of the rest instead.

    Args:
        name: of the job.
        data_dir: holds the folders ``MS`` and ``RGB``, with the same class folders in both.
        bands: channels of an MS image, ``.tif`` or ``.mat`` with the key ``msi``, either axis
            order. A ``label`` in a ``.mat`` is not read.
        rgb: positions of red, green and blue among the bands, counted from 0: the pseudo-RGB.
        limit: training images a modality, all classes in proportion.
        evaluate: ``test`` or ``val``.

    Raises:
        ValueError: folders, classes or files are missing, damaged or of another shape.
    """
    if data_dir is None:
        raise ValueError(f"job {name!r} needs a data directory; fix: add --data DIR")
    if not all(0 <= band < bands for band in rgb):
        raise ValueError(f"--rgb-bands must lie in 0..{bands - 1}, got {' '.join(map(str, rgb))}")
    folders = {kind: data_dir.expanduser() / kind for kind in ("MS", "RGB")}
    for folder in folders.values():
        if not folder.is_dir():
            raise ValueError(
                f"folder {folder} does not exist; fix: --data must name the folder that holds MS "
                "and RGB"
            )
    classes = _classes(folders["MS"], folders["RGB"])
    ms = _side(folders["MS"], classes, _MS, lambda file: read_multispectral(file, bands))
    height, width = ms.read(ms.files[0]).shape[1:]
    rgb_side = _side(folders["RGB"], classes, _RGB, lambda file: read_rgb(file, (height, width)))
    sets = []
    for side, offset, kind in ((ms, 0, "MS"), (rgb_side, len(ms.files), "RGB")):
        train, held_out = _split(side.labels, evaluate)
        if limit is not None:
            if not len(classes) <= limit <= len(train):
                raise ValueError(
                    f"limit must lie between {len(classes)} (one image a class) and {len(train)} "
                    f"(the training images of {kind}), got {limit}"
                )
            train = train[stratified(side.labels[train], limit, draw=_LIMIT_DRAW)]
        for rows in (train, held_out):
            sets.append(side.load(rows, offset, classes, f"{name} {kind}"))
    rich, held_out_rich, poor, held_out_poor = sets
    return Unpaired(
        rich=rich,
        pseudo=single(rich.clean[:, list(rgb)], rich),
        poor=poor,
        held_out_rich=held_out_rich,
        held_out_poor=held_out_poor,
        originals=None,
        poverty="RGB",
    )


def read_multispectral(file: Path, bands: int) -> NDArray[np.float32]:
    """One image of ``bands`` channels as float32 (bands, H, W), in the file's own units."""
    image = _mat(file) if file.suffix.lower() == ".mat" else _tif(file)
    first, last = (image.ndim == 3 and image.shape[axis] == bands for axis in (0, -1))
    if not (first or last):
        raise ValueError(
            f"image {file} has the shape {image.shape}, expected {bands} bands as its first or "
            "last axis; fix: replace the file, or choose the job that these images belong to"
        )
    pixels = np.ascontiguousarray(image if first else image.transpose(2, 0, 1), dtype=np.float32)
    if not np.isfinite(pixels).all():
        raise ValueError(f"image {file} holds NaN or infinity; fix: replace or delete that file")
    return pixels


def read_rgb(file: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """One photograph as uint8 (3, H, W), resized to ``size`` (height, width) where it has another.

    The two sensors need not have one resolution; the networks' inputs do, for the matcher's sake.
    """
    try:
        with Image.open(file) as image:
            colour = image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise _unreadable(file, error) from error
    height, width = size
    if colour.size != (width, height):
        colour = colour.resize((width, height), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(colour).transpose(2, 0, 1))


def _tif(file: Path) -> NDArray[np.generic]:
    try:
        import tifffile
    except ImportError as error:
        raise ValueError(
            "multispectral .tif files are read by tifffile, which is not installed; "
            "fix: pip install tifffile"
        ) from error
    try:
        image = np.asarray(tifffile.imread(file))
    except Exception as error:  # damaged files raise whatever their bytes lead to
        raise _unreadable(file, error) from error
    if not image.size:  # what tifffile makes of a header without a page
        raise _unreadable(file, ValueError("it holds no page"))
    return image


def _mat(file: Path) -> NDArray[np.generic]:
    from scipy.io import loadmat

    try:
        content = loadmat(file)
    except NotImplementedError as error:
        raise ValueError(
            f"image {file} is of MATLAB 7.3, which scipy does not read; fix: save it with -v7"
        ) from error
    except Exception as error:  # as above
        raise _unreadable(file, error) from error
    if "msi" not in content:
        keys = ", ".join(key for key in content if not key.startswith("__"))
        raise ValueError(f"image {file} has no key 'msi', only: {keys or 'nothing'}")
    return np.asarray(content["msi"])


def _unreadable(file: Path, error: Exception) -> ValueError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(f"image {file} cannot be read ({reason}); fix: replace or delete that file")


def _classes(ms: Path, rgb: Path) -> list[str]:
    found = [{child.name for child in folder.iterdir() if child.is_dir()} for folder in (ms, rgb)]
    if found[0] != found[1]:
        raise ValueError(
            f"class folders of {ms} and {rgb} differ: {', '.join(sorted(found[0] ^ found[1]))} in "
            "one alone; fix: give both the same class folders"
        )
    if len(found[0]) < 2:
        raise ValueError(f"{ms} has {len(found[0])} class folders, at least 2 are needed")
    return sorted(found[0])


def _side(
    folder: Path, classes: list[str], suffixes: tuple[str, ...], read: Callable[[Path], Pixels]
) -> _Side:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(f for f in (folder / name).iterdir() if f.suffix.lower() in suffixes)
        if len(found) < 2:
            raise ValueError(
                f"class folder {folder / name} holds {len(found)} image(s) ({', '.join(suffixes)}),"
                " at least 2 are needed: one to train on, one to test on; fix: add some"
            )
        files += found
        labels += [label] * len(found)
    return _Side(files, np.asarray(labels, dtype=np.int64), read)


def _split(labels: Rows, evaluate: str) -> tuple[Rows, Rows]:
    """Training rows and held-out rows; at least one image a class in either."""
    train, test = _held_out(np.arange(len(labels)), labels, TEST_FRACTION, _TEST_DRAW)
    return _held_out(train, labels, VAL_FRACTION, _VAL_DRAW) if evaluate == "val" else (train, test)


def _held_out(rows: Rows, labels: Rows, fraction: float, draw: int) -> tuple[Rows, Rows]:
    count = max(round(fraction * len(rows)), len(np.unique(labels[rows])))
    held_out = rows[stratified(labels[rows], count, draw=draw)]
    return np.setdiff1d(rows, held_out), held_out
