"""The remote-sensing benchmark's folders: multispectral MS/<class>/*, unrelated RGB/<class>/*.

M2S-GL's multispectral images have several labels each, its photographs one. An image stands once
for each of its labels, all of them on one side of the split: over an epoch that is cross-entropy
with the labels sharing an image's mass, and a student's image may be matched to it by any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.sources import (
    Decoded,
    Images,
    Pixels,
    class_files,
    common_classes,
    read_rgb,
    unreadable,
)

_MS, _RGB = (".tif", ".tiff", ".mat"), (".jpg", ".jpeg", ".png", ".tif", ".tiff")


def open_scenes(
    name: str, data_dir: Path | None, *, bands: int
) -> tuple[list[str], Images, Images]:
    """Class names, the multispectral images and the unrelated photographs, not yet split.

    Args:
        name: of the job.
        data_dir: holds the folders ``MS`` and ``RGB``, with the same class folders in both.
        bands: channels of an MS image, ``.tif`` or ``.mat`` with the key ``msi``, either axis
            order. A ``label`` in a ``.mat``, 0 or 1 for each of the class folders in the order of
            their names, counts instead of the folder; it must mark that as well.

    Raises:
        ValueError: folders, classes or files are missing, damaged or of another shape.
    """
    if data_dir is None:
        raise ValueError(f"job {name!r} needs a data directory; fix: add --data DIR")
    folders = {kind: data_dir.expanduser() / kind for kind in ("MS", "RGB")}
    for folder in folders.values():
        if not folder.is_dir():
            raise ValueError(
                f"folder {folder} does not exist; fix: --data must name the folder that holds MS "
                "and RGB"
            )
    classes = common_classes(folders["MS"], folders["RGB"])
    # At least one to train on and one to test on.
    files, labels = class_files(folders["MS"], classes, _MS, least=2)
    marked = [_marked(file, int(k), classes) for file, k in zip(files, labels, strict=True)]
    groups = np.repeat(np.arange(len(files)), [len(some) for some in marked])
    labels = np.concatenate(marked)
    read = partial(read_multispectral, bands=bands)
    size = _size(files, read)
    photos, photo_labels = class_files(folders["RGB"], classes, _RGB, least=2)
    # The two sensors need not have one resolution; the networks' inputs do, for the matcher's sake.
    return (
        classes,
        Images(labels, Decoded([files[row] for row in groups], read), groups=groups),
        Images(photo_labels, Decoded(photos, partial(read_rgb, size=size, resize=True))),
    )


def _marked(file: Path, folder: int, classes: list[str]) -> NDArray[np.int64]:
    """The classes of an image: those that its ``label`` marks, else its folder's."""
    try:
        content = _content(file, "label") if file.suffix.lower() == ".mat" else {}
    except ValueError:
        return np.array([folder])  # damaged: whoever reads the image names it
    label = np.ravel(content.get("label", folder))
    if label.size == 1:
        return np.array([folder])
    if label.shape != (len(classes),) or not np.isin(label, (0, 1)).all():
        raise ValueError(
            f"image {file}: its label has {label.size} values {np.unique(label)[:5].tolist()}, "
            f"expected 0 or 1 for each of the {len(classes)} class folders"
        )
    if not label[folder]:
        told = ", ".join(np.array(classes)[label == 1]) or "none"
        raise ValueError(
            f"image {file}: its label marks {told}, and not its folder {classes[folder]}; fix: a "
            "label's values stand for the class folders in the order of their names"
        )
    return label.nonzero()[0].astype(np.int64)


def _size(files: list[Path], read: Callable[[Path], Pixels]) -> tuple[int, int]:
    """Height and width of the first image that can be read; a damaged one is named by its reader.

    Raises:
        ValueError: None can be read.
    """
    for file in files:
        try:
            return read(file).shape[1:]
        except ValueError:
            if file == files[-1]:
                raise
    raise AssertionError("class_files gives at least one")


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
        raise unreadable(file, error) from error
    if not image.size:  # what tifffile makes of a header without a page
        raise unreadable(file, ValueError("it holds no page"))
    return image


def _mat(file: Path) -> NDArray[np.generic]:
    content = _content(file)
    if "msi" not in content:
        keys = ", ".join(key for key in content if not key.startswith("__"))
        raise ValueError(f"image {file} has no key 'msi', only: {keys or 'nothing'}")
    return np.asarray(content["msi"])


def _content(file: Path, name: str | None = None) -> dict[str, NDArray[np.generic]]:
    from scipy.io import loadmat

    try:
        return dict(loadmat(file, variable_names=name))
    except NotImplementedError as error:
        raise ValueError(
            f"image {file} is of MATLAB 7.3, which scipy does not read; fix: save it with -v7"
        ) from error
    except Exception as error:  # damaged files raise whatever their bytes lead to
        raise unreadable(file, error) from error
