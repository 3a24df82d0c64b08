"""EuroSAT's multispectral images: ``<class>/<class>_<n>.tif``, 13 bands, each with its place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.decode import TIFF, AlikeFiles
from data.layouts import hint
from data.sources import Images, Pixels, Rows, Source, class_files, unreadable
from data.splits import TEST_FRACTION, for_test

BANDS = 13  # B01 to B08, B09, B10, B11, B12, B8A: the last out of order
NEAR = 2000.0  # metres; images within are of one neighbourhood
_TIE_POINT, _GEO_KEYS, _PROJECTED = 33922, 34735, 3072
_ZONES = 1e9  # metres between two zones' coordinates, more than any place has


@dataclass(frozen=True)
class _Chosen:
    """Some bands of what a reader gives."""

    read: AlikeFiles
    bands: tuple[int, ...]

    def __call__(self, rows: Rows) -> Pixels:
        return np.ascontiguousarray(self.read(rows)[:, list(self.bands)])


def open_eurosat(
    data_dir: Path | None,
    download: bool,
    *,
    bands: tuple[int, ...] = tuple(range(BANDS)),
    test_fraction: float = TEST_FRACTION,
) -> Source:
    """EuroSAT (Helber et al. 2019) as published, or a part of it with the same layout.

    Images that lie within two kilometres of each other, or are linked by others that do, are of one
    group, and a group is on one side of the split. Where a file does not say its place, the image
    is a group of its own.

    Args:
        data_dir: holds the class folders, or a folder that does.
        download: must be False.
        bands: which of the 13 are read, by place from 0.
        test_fraction: of the images; about, since groups stay whole.

    Raises:
        ValueError: the layout is another one, an image is damaged or has other bands.
    """
    if data_dir is None:
        raise ValueError("data set 'eurosat' needs a data directory; fix: add --data DIR")
    if download:
        raise ValueError(
            "--download is not for eurosat: it is published as one file of two gigabytes "
            "(zenodo.org/records/7711810, EuroSAT_MS.zip); fix: fetch it, and name its folder with "
            "--data"
        )
    if not bands or min(bands) < 0 or max(bands) >= BANDS:
        raise ValueError(f"bands must lie in 0..{BANDS - 1}, got {bands}")
    root = _root(data_dir)
    classes = sorted(child.name for child in root.iterdir() if child.is_dir())
    files, labels = class_files(root, classes, TIFF, least=2)
    whole = AlikeFiles(files)
    found = whole.image(0).shape[0]
    if found != BANDS:
        raise ValueError(
            f"image {files[0]} has {found} band(s), EuroSAT's have {BANDS}; fix: the multispectral "
            "version (EuroSAT_MS), or data set 'folder' for the RGB one"
        )
    groups = neighbourhoods(np.asarray([place(file) for file in files]))
    test = for_test(labels, groups, test_fraction)
    halves = []
    for rows in (np.setdiff1d(np.arange(len(labels)), test), test):
        read = AlikeFiles([files[row] for row in rows], like=files[0])
        halves.append(Images(labels[rows], _Chosen(read, tuple(bands)), groups=groups[rows]))
    return Source(classes, *halves)


def place(file: Path) -> tuple[float, float, float]:
    """Projection and upper left corner in metres, from the GeoTIFF tags; NaN where it has none.

    Raises:
        ValueError: the file is damaged or no TIFF.
    """
    import tifffile

    try:
        with tifffile.TiffFile(file) as content:
            tags = content.pages[0].tags
            if _TIE_POINT not in tags or _GEO_KEYS not in tags:
                return (np.nan,) * 3
            keys = tags[_GEO_KEYS].value
            zones = [keys[k + 3] for k in range(4, len(keys), 4) if keys[k] == _PROJECTED]
            east, north = tags[_TIE_POINT].value[3:5]
    except Exception as error:  # damaged files raise whatever their bytes lead to
        raise unreadable(file, error) from error
    return (float(zones[0]) if zones else np.nan, float(east), float(north))


def neighbourhoods(places: NDArray[np.float64], near: float = NEAR) -> Rows:
    """A group's number for every image: images within ``near`` metres are of one group.

    Args:
        places: (N, 3), projection and corner; a row with NaN is a group of its own.
        near: in metres.
    """
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import cKDTree

    known = np.isfinite(places).all(1)
    groups = np.arange(len(places), dtype=np.int64)
    if known.any():
        flat = np.column_stack([places[known, 1:], places[known, 0] * _ZONES])
        linked = cKDTree(flat).sparse_distance_matrix(cKDTree(flat), near, output_type="coo_matrix")
        # Images of one very place are 0 apart, which a sparse matrix would take for no link.
        linked.data[:] = 1
        groups[known] = len(places) + connected_components(linked, directed=False)[1]
    return np.unique(groups, return_inverse=True)[1].astype(np.int64)


def _root(data_dir: Path) -> Path:
    for folder in (data_dir, *sorted(data_dir.glob("*/"))) if data_dir.is_dir() else ():
        children = sorted(child for child in folder.glob("*/") if child.is_dir())
        if len(children) > 1 and all(any(child.glob(f"{child.name}_*.tif")) for child in children):
            return folder
    raise ValueError(
        f"{data_dir} has no <class>/<class>_<n>.tif{hint(data_dir, 'eurosat')}; fix: --data must "
        "name the unpacked multispectral EuroSAT"
    )
