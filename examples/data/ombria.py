"""OMBRIA: radar and optics of the same places before and after floods, in patches with a class.

Drakonakis et al., "OmbriaNet", IEEE JSTARS 2022. Every scene is cut into 4 x 4 patches; a patch's
class is the flooded share of its mask. Rich are radar and optics before and after (8 channels),
poor is the radar after the flood (1).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from data.decode import AlikeFiles, Pixels, Rows, Stacked, read_bands
from data.layouts import hint
from data.options import Options
from data.sources import Part, Source, partners, refuse_lonely

CLASSES = ["dry", "traces", "partly", "flooded"]
BOUNDS = (0.01, 0.1, 0.4)  # of the flooded share: a class begins at its bound
PATCHES = 4  # along a side of a scene
_FOLDERS = ("s1_before", "s1_after", "s2_before", "s2_after", "mask")


@dataclass(frozen=True)
class Patches:
    """Reads rows of patches, scene by scene in rows of four."""

    scenes: Stacked
    bands: int

    def __call__(self, rows: Rows) -> Pixels:
        scenes, which = np.unique(rows // PATCHES**2, return_inverse=True)
        whole = self.scenes(scenes)
        if whole.shape[1] != self.bands:
            raise ValueError(
                f"images of {self.scenes.sides[0].files[0].parents[1]} have {whole.shape[1]} "
                f"band(s), expected {self.bands}; fix: unpack it again"
            )
        return patches(whole)[which, rows % PATCHES**2]


def open_ombria(root: Path, options: Options) -> Source:
    """``{train,test}/{s1_before,s1_after,s2_before,s2_after,mask}/NNNN.png``; groups are scenes."""
    root = root / "ombria" if (root / "ombria").is_dir() else root
    return Source(list(CLASSES), *(_half(root, root / half) for half in ("train", "test")))


def patches(images: NDArray[np.generic]) -> NDArray[np.generic]:
    """(..., C, H, W) to (..., 16, C, H/4, W/4), rows of patches from the top left."""
    height, width = images.shape[-2:]
    if height % PATCHES or width % PATCHES:
        raise ValueError(f"a scene of {height}x{width} has no {PATCHES}x{PATCHES} patches")
    cut = "... c (down h) (across w) -> ... (down across) c h w"
    return rearrange(images, cut, down=PATCHES, across=PATCHES)


def _half(root: Path, folder: Path) -> Part:
    for name in _FOLDERS:
        if not (folder / name).is_dir():
            raise ValueError(
                f"{folder / name} does not exist{hint(root, 'ombria')}; fix: --data must name the "
                f"folder that holds {folder.name}/{name}"
            )
    (*sides, masks), lonely = partners([folder / name for name in _FOLDERS])
    refuse_lonely(lonely)
    shares = [patches(read_bands(mask) > 127).mean((1, 2, 3)) for mask in masks]
    labels = np.searchsorted(BOUNDS, np.concatenate(shares), side="right").astype(np.int64)
    groups = np.repeat(np.arange(len(masks)), PATCHES**2)
    read = [AlikeFiles(files) for files in sides]
    rich, poor = Patches(Stacked(read), 8), Patches(Stacked([read[1]]), 1)
    return Part(labels, rich, poor, groups)
