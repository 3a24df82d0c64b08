"""EuroSAT's layout, and a split that leaves no neighbourhood on both sides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data import sources
from data.eurosat import neighbourhoods, place
from tests.examples.entries import recipe_views
from tests.examples.files import values, write
from tests.examples.layouts import EUROSAT_CLASSES, geotiff, write_eurosat


@pytest.fixture
def eurosat(tmp_path: Path) -> Path:
    return write_eurosat(tmp_path)


def test_rich_are_all_bands_and_poor_its_photographs(eurosat: Path) -> None:
    for folder in (eurosat, eurosat.parent):
        views = recipe_views("eurosat", data=folder).loaded()
        assert views.rich.classes == EUROSAT_CLASSES
        assert (views.rich.shape, views.poor.shape) == ((13, 64, 64), (3, 64, 64))
    shown = views.rich.pixels[:, [3, 2, 1]] * 255 / 2750
    assert np.array_equal(views.poor.pixels, shown.round().clamp(0, 255))
    assert views.poor.statistics.mean.shape == (3,)
    small = recipe_views("eurosat", data=eurosat, size=16).loaded()
    assert (small.rich.shape, small.poor.shape) == ((13, 16, 16), (3, 16, 16))


def test_no_neighbourhood_lies_on_both_sides(eurosat: Path) -> None:
    for evaluate in ("test", "val"):
        views = recipe_views("eurosat", data=eurosat, evaluate=evaluate)
        assert np.bincount(views.held_out_rich.labels).min() >= 1
        # With an even number of images a place, all sides have whole places.
        sides = [set(_places(images)) for images in (views.rich, views.held_out_rich)]
        assert not sides[0] & sides[1]
    tests = [recipe_views("eurosat", data=eurosat, test_draw=draw) for draw in range(4)]
    assert np.bincount(tests[0].held_out_rich.labels).tolist() == [4, 4]
    assert len({tuple(_places(test.held_out_rich)) for test in tests}) > 1


def test_suffixes_in_capitals_are_read_too(eurosat: Path) -> None:
    for file in eurosat.glob("*/*.tif"):
        file.rename(file.with_suffix(".TIF"))
    assert len(recipe_views("eurosat", data=eurosat).rich.classes) == len(EUROSAT_CLASSES)
    with pytest.raises(ValueError, match="it looks like eurosat"):
        recipe_views("cifar10", data=eurosat)


def _places(images: object) -> list[tuple[float, ...]]:
    files = images.read.files  # type: ignore[attr-defined]
    found = [place(files[row]) for row in images.rows]  # type: ignore[attr-defined]
    return [(zone, round(east / 30_000), north) for zone, east, north in found]


def test_without_pairs_the_teacher_has_ten_bands(eurosat: Path) -> None:
    views = recipe_views("unpaired-eurosat", data=eurosat).loaded()
    assert not views.paired
    assert (views.rich.shape[0], views.poor.shape[0], views.pseudo.shape[0]) == (10, 3, 3)
    whole = recipe_views("eurosat", data=eurosat).loaded()
    rows = {index: row for row, index in enumerate(whole.rich.index.tolist())}
    for index, image in zip(views.poor.index.tolist(), views.poor.pixels, strict=True):
        assert np.array_equal(image, whole.poor.pixels[rows[index]])
    for index, image in zip(views.rich.index.tolist(), views.rich.pixels, strict=True):
        kept = [1, 2, 3, 4, 5, 6, 7, 10, 11, 12]
        assert np.array_equal(image, whole.rich.pixels[rows[index]][kept])


def test_neighbourhoods_are_linked_and_end_at_a_zone() -> None:
    places = np.array(
        [
            (1, 0, 0), (1, 1900, 0), (1, 3800, 0),  # linked by the one between
            (1, 9000, 0), (2, 9000, 0),  # the same numbers in two zones
            (1, 9000, 0),  # the very place again
            (np.nan, 0, 0), (np.nan, 0, 0),  # unknown: each its own
        ]
    )  # fmt: skip
    found = neighbourhoods(places.astype(float))
    assert found[0] == found[1] == found[2]
    assert found[3] == found[5]
    assert len(set(found.tolist())) == 5


def test_whole_groups_are_held_out_in_proportion() -> None:
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(150), random.integers(1, 12, 150))
    labels = random.integers(0, 4, len(groups))
    chosen = sources.held_out(labels, groups, 0.2, draw=5)
    assert not set(groups[chosen]) & set(np.delete(groups, chosen))
    share = np.bincount(labels[chosen]) / np.bincount(labels)
    assert np.abs(share - 0.2).max() < 0.02
    assert np.array_equal(chosen, sources.held_out(labels, groups, 0.2, draw=5))
    assert not np.array_equal(chosen, sources.held_out(labels, groups, 0.2, draw=6))
    with pytest.raises(ValueError, match="too many for every class to lie on both sides"):
        sources.held_out(labels, np.zeros(len(labels), dtype=np.int64), 0.2, draw=5)


def test_what_is_wrong_with_a_folder(eurosat: Path, tmp_path: Path) -> None:
    entry = "eurosat"
    with pytest.raises(ValueError, match="'eurosat' needs a data directory"):
        recipe_views(entry)
    with pytest.raises(ValueError, match=r"zenodo.*; fix: fetch it"):
        recipe_views(entry, data=eurosat, download=True)
    for folder in ("MS", "RGB"):
        (tmp_path / "scenes" / folder).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"has no <class>/<class>_<n>\.tif; it looks like s2s_eu"):
        recipe_views(entry, data=tmp_path / "scenes")
    bad = eurosat / "River" / "River_7.tif"
    geotiff(bad, 32630, 1e6, 5e6, bands=12)
    with pytest.raises(ValueError, match=r"River_7\.tif has 12 band\(s\), .*Forest_1\.tif has 13"):
        recipe_views(entry, data=eurosat).loaded()
    bad.write_bytes(b"II*\0junk")
    with pytest.raises(ValueError, match=r"image .*River_7\.tif cannot be read"):
        recipe_views(entry, data=eurosat)


def test_the_photographs_alone_are_told_apart(tmp_path: Path) -> None:
    for name in EUROSAT_CLASSES:
        for number in range(3):
            write(tmp_path / name / f"{name}_{number}.tif", values(64, 64, 3))
    with pytest.raises(ValueError, match=r"has 3 band\(s\), EuroSAT's have 13; fix: .*'folder'"):
        recipe_views("eurosat", data=tmp_path)
