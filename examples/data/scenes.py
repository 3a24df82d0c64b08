"""The remote-sensing benchmark's folders: multispectral MS/<class>/*, unrelated RGB/<class>/*."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.sources import (
    Decoded,
    Images,
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
            order. A ``label`` in a ``.mat`` is not read.

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
    read = partial(read_multispectral, bands=bands)
    size = read(files[0]).shape[1:]
    photos, photo_labels = class_files(folders["RGB"], classes, _RGB, least=2)
    # The two sensors need not have one resolution; the networks' inputs do, for the matcher's sake.
    return (
        classes,
        Images(labels, Decoded(files, read)),
        Images(photo_labels, Decoded(photos, partial(read_rgb, size=size, resize=True))),
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
    from scipy.io import loadmat

    try:
        content = loadmat(file)
    except NotImplementedError as error:
        raise ValueError(
            f"image {file} is of MATLAB 7.3, which scipy does not read; fix: save it with -v7"
        ) from error
    except Exception as error:  # as above
        raise unreadable(file, error) from error
    if "msi" not in content:
        keys = ", ".join(key for key in content if not key.startswith("__"))
        raise ValueError(f"image {file} has no key 'msi', only: {keys or 'nothing'}")
    return np.asarray(content["msi"])
