"""The remote-sensing benchmark's folders: multispectral MS/<class>/*, unrelated RGB/<class>/*.

M2S-GL's multispectral images have several labels each, its photographs one. An image stands once
for each of its labels, all of them on one side of the split: over an epoch that is cross-entropy
with the labels sharing an image's mass, and a student's image may be matched to it by any of them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.decode import TIFF, AlikeFiles, Rows, finite, read_colours, read_tiff, unreadable
from data.options import Options
from data.sources import Part, Source, class_files, class_names

_RGB = TIFF | {".jpg", ".jpeg", ".png"}


def open_scenes(root: Path, options: Options) -> Source:
    """The multispectral images and the unrelated photographs, not yet split.

    An MS image is a ``.tif``, or a ``.mat`` with the key ``msi``, either axis order. A ``label`` in
    a ``.mat``, 0 or 1 for each of the class folders in the order of their names, counts instead of
    the folder; it must mark that as well.
    """
    bands = len(options.bands) or 10
    if options.rgb and not all(0 <= band < bands for band in options.rgb):
        raise ValueError(f"--rgb must lie in 0..{bands - 1}, got {options.rgb}")
    folders = [root / kind for kind in ("MS", "RGB")]
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(
                f"folder {folder} does not exist; fix: --data must name the folder that holds MS "
                "and RGB"
            )
    classes = class_names(*folders)
    # At least one to train on and one to test on.
    labels, files = class_files(folders[0], classes, TIFF | {".mat"}, least=2)
    marked = [_marked(file, int(k), classes) for file, k in zip(files, labels, strict=True)]
    groups = np.repeat(np.arange(len(files)), [len(some) for some in marked])
    read = partial(read_multispectral, bands=bands)
    # The two sensors need not have one resolution; the networks' inputs do, for the matcher's sake.
    photo = partial(read_colours, size=_size(files, bands), resize=True)
    photo_labels, photos = class_files(folders[1], classes, _RGB, least=2)
    return Source(
        classes,
        Part(
            np.concatenate(marked), AlikeFiles([files[n] for n in groups], read=read), None, groups
        ),
        Part(photo_labels, AlikeFiles(photos, read=photo)),
    )


def _marked(file: Path, folder: int, classes: list[str]) -> Rows:
    """The classes of an image: those that its ``label`` marks, else its folder's."""
    try:
        content = _mat(file, "label") if file.suffix.lower() == ".mat" else {}
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


def _size(files: list[Path], bands: int) -> tuple[int, ...]:
    """Height and width of the first image that can be read; others are named by their reader."""
    for file in files:
        try:
            return read_multispectral(file, bands).shape[1:]
        except ValueError:
            if file == files[-1]:
                raise
    raise AssertionError("class_files gives at least one")


def read_multispectral(file: Path, bands: int) -> NDArray[np.float32]:
    """One image of ``bands`` channels as float32 (bands, H, W), in the file's own units."""
    if file.suffix.lower() != ".mat":
        image, _ = read_tiff(file)
    else:
        content = _mat(file)
        if "msi" not in content:
            keys = ", ".join(key for key in content if not key.startswith("__"))
            raise ValueError(f"image {file} has no key 'msi', only: {keys or 'nothing'}")
        image = np.asarray(content["msi"])
    first, last = (image.ndim == 3 and image.shape[axis] == bands for axis in (0, -1))
    if not (first or last):
        raise ValueError(
            f"image {file} has the shape {image.shape}, expected {bands} bands as its first or "
            "last axis; fix: replace the file, or choose the job that these images belong to"
        )
    return finite(file, image if first else image.transpose(2, 0, 1))


def _mat(file: Path, name: str | None = None) -> dict[str, Any]:
    from scipy.io import loadmat

    try:
        return dict(loadmat(file, variable_names=name))
    except NotImplementedError as error:
        raise ValueError(
            f"image {file} is of MATLAB 7.3, which scipy does not read; fix: save it with -v7"
        ) from error
    except Exception as error:  # damaged files raise whatever their bytes lead to
        raise unreadable(file, error) from error
