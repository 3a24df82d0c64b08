"""OMBRIA: radar and optics of the same places before and after floods, in patches with a class.

Drakonakis et al., "OmbriaNet", IEEE JSTARS 2022. Every scene is cut into 4 x 4 patches; a patch's
class is the flooded share of its mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.decode import read_bands
from data.layouts import hint
from data.sources import Images, Pixels, Rows, Source

CLASSES = ["dry", "traces", "partly", "flooded"]
BOUNDS = (0.01, 0.1, 0.4)  # of the flooded share: a class begins at its bound
PATCHES = 4  # along a side of a scene
RICH = ("s1_before", "s1_after", "s2_before", "s2_after")
POOR = ("s1_after",)
_BANDS = {"s1_before": 1, "s1_after": 1, "s2_before": 3, "s2_after": 3, "mask": 1}


@dataclass(frozen=True)
class Patches:
    """Reads rows of patches, scene by scene in rows of four, of some passes stacked."""

    folder: Path
    names: tuple[str, ...]
    passes: tuple[str, ...]

    def __call__(self, rows: Rows) -> Pixels:
        per_scene = PATCHES**2
        scenes, which = np.unique(rows // per_scene, return_inverse=True)
        cut = [patches(self._scene(self.names[scene])) for scene in scenes]
        shape = cut[0].shape
        for scene, pieces in zip(scenes, cut, strict=True):
            if pieces.shape != shape:
                raise ValueError(
                    f"scene {self.names[scene]} of {self.folder} is another size than "
                    f"{self.names[scenes[0]]}; fix: resize it"
                )
        return np.stack(cut)[which, rows % per_scene]

    def _scene(self, name: str) -> Pixels:
        return np.concatenate([_read(self.folder / kind / name, kind) for kind in self.passes])


def open_ombria(data_dir: Path | None, download: bool) -> Source:
    """Rich: radar and optics, before and after (8 channels). Poor: the radar after the flood (1).

    ``{train,test}/{s1_before,s1_after,s2_before,s2_after,mask}/NNNN.png``; whatever is held out for
    validation is so by scene.

    Raises:
        ValueError: a folder or a scene is missing, or an image is damaged or of another size.
    """
    if data_dir is None:
        raise ValueError("data set 'ombria' needs a data directory; fix: add --data DIR")
    if download:
        raise ValueError(
            "--download is not for ombria: its repository (github.com/geodrak/OMBRIA) states no "
            "licence; fix: fetch it by hand and name its folder with --data"
        )
    root = data_dir / "ombria" if (data_dir / "ombria").is_dir() else data_dir
    return Source(list(CLASSES), _half(root, "train"), _half(root, "test"))


def patches(image: NDArray[np.generic]) -> NDArray[np.generic]:
    """(C, H, W) to (16, C, H/4, W/4), rows of patches from the top left."""
    channels, height, width = image.shape
    if height % PATCHES or width % PATCHES:
        raise ValueError(f"a scene of {height}x{width} has no {PATCHES}x{PATCHES} patches")
    cut = image.reshape(channels, PATCHES, height // PATCHES, PATCHES, width // PATCHES)
    return cut.transpose(1, 3, 0, 2, 4).reshape(
        PATCHES**2, channels, height // PATCHES, width // PATCHES
    )


def _half(root: Path, half: str) -> Images:
    folder = root / half
    names: dict[str, set[str]] = {}
    for kind in _BANDS:
        if not (folder / kind).is_dir():
            raise ValueError(
                f"{folder / kind} does not exist{hint(root, 'ombria')}; fix: --data must name the "
                f"folder that holds {half}/{kind}"
            )
        names[kind] = {file.name for file in (folder / kind).glob("*.png")}
    everywhere = set.intersection(*names.values())
    lonely = sorted(set.union(*names.values()) - everywhere)
    if lonely or not everywhere:
        raise ValueError(
            f"{len(lonely)} scene(s) of {folder} are not in all of {', '.join(_BANDS)}: "
            f"{', '.join(lonely[:5]) or 'there is none at all'}; fix: unpack it again"
        )
    scenes = tuple(sorted(everywhere))
    shares = [
        patches(_read(folder / "mask" / name, "mask") > 127).mean((1, 2, 3)) for name in scenes
    ]
    labels = np.searchsorted(BOUNDS, np.concatenate(shares), side="right").astype(np.int64)
    groups = np.repeat(np.arange(len(scenes)), PATCHES**2)
    rich, poor = (Patches(folder, scenes, passes) for passes in (RICH, POOR))
    return Images(labels, rich, poor, groups)


def _read(file: Path, kind: str) -> Pixels:
    image = read_bands(file)
    if image.shape[0] != _BANDS[kind]:
        raise ValueError(
            f"image {file} has {image.shape[0]} band(s), expected {_BANDS[kind]}; fix: unpack it "
            "again"
        )
    return image
