"""EuroSAT's multispectral images: ``<class>/<class>_<n>.tif``, 13 bands, each with its place.

Images that lie within two kilometres of each other, or are linked by others that do, are of one
group, and a group is on one side of the split. Where a file does not say its place, the image is a
group of its own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.decode import TIFF, AlikeFiles, Rows, read_bands, unreadable
from data.layouts import hint
from data.options import Options
from data.sources import Part, Source, class_files, class_names, split

BANDS = 13  # B01 to B08, B09, B10, B11, B12, B8A: the last out of order
NEAR = 2000.0  # metres; images within are of one neighbourhood
_TIE_POINT, _GEO_KEYS, _PROJECTED = 33922, 34735, 3072
_ZONES = 1e9  # metres between two zones' coordinates, more than any place has


def open_eurosat(root: Path, options: Options) -> Source:
    """EuroSAT (Helber et al. 2019) as published, or a part of it with the same layout."""
    bands = options.bands or tuple(range(BANDS))
    if min(bands) < 0 or max(bands) >= BANDS:
        raise ValueError(f"--bands must lie in 0..{BANDS - 1}, got {bands}")
    root = _root(root)
    classes = class_names(root)
    labels, files = class_files(root, classes, TIFF, least=2)
    found = len(read_bands(files[0]))
    if found != BANDS:
        raise ValueError(
            f"image {files[0]} has {found} band(s), EuroSAT's have {BANDS}; fix: the multispectral "
            "version (EuroSAT_MS), or data set 'folder' for the RGB one"
        )
    groups = neighbourhoods(np.asarray([place(file) for file in files]))
    halves = []
    for rows in split(labels, options.test_fraction, groups, draw=options.test_draw):
        chosen = [files[row] for row in rows]
        read = AlikeFiles(chosen, options.size, like=files[0], bands=bands)
        halves.append(Part(labels[rows], read, groups=groups[rows]))
    return Source(classes, *halves)


def place(file: Path) -> tuple[float, float, float]:
    """Projection and upper left corner in metres, from the GeoTIFF tags; NaN where it has none."""
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


def neighbourhoods(places: NDArray[np.float64]) -> Rows:
    """A group's number for every image by projection and corner (N, 3)."""
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import cKDTree

    known = np.isfinite(places).all(1)
    groups = np.arange(len(places), dtype=np.int64)
    if known.any():
        tree = cKDTree(np.column_stack([places[known, 1:], places[known, 0] * _ZONES]))
        linked = tree.sparse_distance_matrix(tree, NEAR, output_type="coo_matrix")
        # Images of one very place are 0 apart, which a sparse matrix would take for no link.
        linked.data[:] = 1
        groups[known] = len(places) + connected_components(linked, directed=False)[1]
    return np.unique(groups, return_inverse=True)[1].astype(np.int64)


def _root(data_dir: Path) -> Path:
    for folder in (data_dir, *sorted(data_dir.glob("*/"))):
        children = sorted(child for child in folder.glob("*/") if child.is_dir())
        named = (child.glob(f"{child.name}_*.[Tt][Ii][Ff]*") for child in children)
        if len(children) > 1 and all(any(files) for files in named):
            return folder
    raise ValueError(
        f"{data_dir} has no <class>/<class>_<n>.tif{hint(data_dir, 'eurosat')}; fix: --data must "
        "name the unpacked multispectral EuroSAT"
    )
