"""OMBRIA: patches, their classes by the mask, and validation by scene."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.ombria import CLASSES, patches
from tests.examples.entries import recipe_views
from tests.examples.files import values, write
from tests.examples.layouts import LABELS, write_ombria


@pytest.fixture
def ombria(tmp_path: Path) -> Path:
    return write_ombria(tmp_path)


def test_patches_and_classes(ombria: Path) -> None:
    for folder in (ombria, ombria.parent):
        views = recipe_views("ombria", data=folder).loaded()
        assert views.rich.classes == CLASSES
    assert (views.rich.shape, views.poor.shape) == ((8, 32, 32), (1, 32, 32))
    assert (len(views.rich), len(views.held_out_poor)) == (12 * 16, 3 * 16)
    assert views.rich.labels.tolist() == list(2 * LABELS) * 12
    scene, row, column = 5, 2, 3
    cut = np.s_[32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
    passes = [values(128, 128, seed=50), values(128, 128, seed=51)]
    photos = [values(128, 128, 3, seed=52), values(128, 128, 3, seed=53)]
    expected = [image[cut] for image in passes]
    expected += [image[..., band][cut] for image in photos for band in range(3)]
    patch = scene * 16 + row * 4 + column
    assert np.array_equal(views.rich.pixels[patch], np.stack(expected))
    assert np.array_equal(views.poor.pixels[patch, 0], passes[1][cut])


def test_rows_in_any_order_are_the_same(ombria: Path) -> None:
    views = recipe_views("ombria", data=ombria)
    rows = np.array([170, 3, 40, 3, 41])
    whole = views.rich.read(np.arange(12 * 16))
    assert np.array_equal(views.rich.read(rows), whole[rows])


def test_validation_is_by_scene(ombria: Path) -> None:
    views = recipe_views("ombria", data=ombria, evaluate="val")
    scenes = [set((images.index // 16).tolist()) for images in (views.rich, views.held_out_rich)]
    assert not scenes[0] & scenes[1]
    assert len(scenes[0] | scenes[1]) == 12
    assert len(views.held_out_rich) == 16 * len(scenes[1]) > 0


def test_patches_of_a_scene() -> None:
    scene = np.arange(2 * 8 * 8).reshape(2, 8, 8)
    assert np.array_equal(patches(scene)[6], scene[:, 2:4, 4:6])
    with pytest.raises(ValueError, match="a scene of 6x8 has no 4x4 patches"):
        patches(scene[:, :6])


def test_what_is_wrong_with_a_folder(ombria: Path, tmp_path: Path) -> None:
    entry = "ombria"
    with pytest.raises(ValueError, match="'ombria' needs a data directory"):
        recipe_views(entry)
    with pytest.raises(ValueError, match=r"states no licence; fix: fetch it by hand"):
        recipe_views(entry, data=ombria, download=True)
    (ombria / "train" / "s2_after" / "0003.png").unlink()
    with pytest.raises(
        ValueError,
        match=r"image\(s\) without a partner of the same name in every folder: .*0003\.png",
    ):
        recipe_views(entry, data=ombria)
    write(ombria / "train" / "s2_after" / "0003.png", values(128, 128))
    with pytest.raises(ValueError, match=r"0003\.png has 1 band\(s\), .*0000\.png has 3"):
        recipe_views(entry, data=ombria).loaded()
    (tmp_path / "radar").mkdir()
    (tmp_path / "optics").mkdir()
    ombria.rename(tmp_path / "flood")
    with pytest.raises(ValueError, match="does not exist; it looks like cml; fix:"):
        recipe_views(entry, data=tmp_path)
