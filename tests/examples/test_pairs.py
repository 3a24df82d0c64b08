"""Two folders of one's own, and the paper's radar and optics: the layouts and all that is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data import Views
from data.decode import read_bands
from data.readers import CML_CLASSES
from tests.examples.entries import class_counts, recipe_views
from tests.examples.files import two_sides, values, write


def opened(rich: Path, poor: Path, name: str = "pairs", evaluate: str = "test", **more) -> Views:
    options = {"rich": str(rich), "poor": str(poor), **more}
    return recipe_views(name, **options, evaluate=evaluate).loaded()


def test_pairs_by_name_with_each_sides_own_bands_and_statistics(tmp_path: Path) -> None:
    rich, poor = two_sides(tmp_path)
    views = opened(rich, poor)
    assert views.paired
    assert views.rich.classes == ["boat", "buoy"]
    assert (views.rich.shape, views.poor.shape) == ((5, 8, 8), (1, 8, 8))
    assert (len(views.rich), len(views.held_out_rich)) == (8, 2)
    assert sorted(views.held_out_poor.labels.tolist()) == [0, 1]
    both = torch.cat([views.rich.index, views.held_out_rich.index])
    assert sorted(both.tolist()) == list(range(10))
    for images in (views.rich, views.poor):
        pixels = images.pixels.double().transpose(0, 1).flatten(1)
        torch.testing.assert_close(
            images.statistics.mean.double(), pixels.mean(1), rtol=1e-5, atol=0
        )
    on_disk = {
        read_bands(file).tobytes(): read_bands(poor / file.parent.name / f"{file.stem}.png")
        for file in rich.glob("*/*.tif")
    }
    for half in ((views.rich, views.poor), (views.held_out_rich, views.held_out_poor)):
        for first, second in zip(half[0].pixels, half[1].pixels, strict=True):
            assert np.array_equal(on_disk[first.numpy().tobytes()], second.numpy())


def test_a_split_by_folder_is_kept(tmp_path: Path) -> None:
    two_sides(tmp_path, half="train", count=4)
    rich, poor = two_sides(tmp_path, half="test", count=3, poor=".npy")
    views = opened(rich, poor)
    assert (len(views.poor), len(views.held_out_poor)) == (8, 6)
    assert "pairs: 8 training, 6 held out" in views.summary()
    val = opened(rich, poor, evaluate="val")
    assert len(val.poor) + len(val.held_out_poor) == 8


def test_the_fraction_and_the_split_of_a_larger_set(tmp_path: Path) -> None:
    rich, poor = two_sides(tmp_path, count=10)
    assert len(opened(rich, poor, test_fraction=0.5).poor) == 10
    with pytest.raises(ValueError, match=r"--test-fraction must lie in \(0, 1\), got 1.0"):
        opened(rich, poor, test_fraction=1.0)
    with pytest.raises(ValueError, match=r"--test-fraction 0.99 leaves 2 class\(es\) without an"):
        opened(rich, poor, test_fraction=0.99)


def test_a_fraction_beside_images_for_testing_is_refused(tmp_path: Path) -> None:
    for half in ("train", "test"):
        rich, poor = two_sides(tmp_path, half=half)
    with pytest.raises(ValueError, match=r"--test-fraction 0.3 has no effect: .*rich has images"):
        opened(rich, poor, test_fraction=0.3)
    with pytest.raises(ValueError, match=r"--test-fraction 0.3 has no effect: .*poor has images"):
        recipe_views("folder", tmp_path / "poor", test_fraction=0.3)


def test_a_size_brings_both_sides_to_it(tmp_path: Path) -> None:
    rich, poor = two_sides(tmp_path)
    for file in poor.glob("*/*"):
        write(file, values(12, 16))
    views = opened(rich, poor)
    assert views.poor.shape == (1, 12, 16)
    assert any("rich images are 8x8, poor ones 12x16" in line for line in views.summary())
    assert opened(rich, poor, size=6).poor.shape == (1, 6, 6)


def test_a_view_of_what_is_poor_already_is_refused(tmp_path: Path) -> None:
    rich, poor = two_sides(tmp_path)
    with pytest.raises(
        ValueError, match=r"--view lowres:2 has no effect on pairs.*; fix: leave it"
    ):
        recipe_views("pairs", rich=rich, poor=poor, view="lowres:2")
    with pytest.raises(ValueError, match=r"--view lowres:2 has no effect .* or --pseudo"):
        recipe_views("folders", rich=rich, poor=poor, view="lowres:2", rgb=(2, 1, 0))


@pytest.mark.parametrize("option", ["view", "pseudo"])
def test_a_wrong_view_is_told_by_the_option_that_was_typed(tmp_path: Path, option: str) -> None:
    rich, poor = two_sides(tmp_path)
    for text, told in (("gray", "gray: unknown view"), ("grey", "grey does not fit")):
        with pytest.raises(ValueError, match=f"^--{option} {told}"):
            recipe_views("folders", rich=rich, poor=poor, **{option: text})


def test_without_pairs_the_student_sees_its_own_sensor(tmp_path: Path) -> None:
    rich, poor = two_sides(tmp_path, count=10)
    views = opened(rich, poor, "unpaired-pairs")
    assert not views.paired
    assert not set(views.rich.index.tolist()) & set(views.poor.index.tolist())
    assert (views.rich.shape[0], views.poor.shape[0], views.pseudo.shape[0]) == (5, 1, 1)
    assert torch.equal(views.pseudo.index, views.rich.index)


def test_cml_is_optics_and_radar_of_eight_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_counts(monkeypatch, cml=CML_CLASSES)
    # As its paper's Fig. 4 writes them; the archive itself may have those of the table.
    written = ("cargo", "Fishing", "Sailing", "Pleasure", "HSC", "LawVessel", "Ocean_Buoy")
    rich, poor = two_sides(tmp_path, classes=[*written, "Helicopter"])
    rich.rename(tmp_path / "optics")
    poor.rename(tmp_path / "radar")
    views = recipe_views("cml", data=tmp_path).loaded()
    assert (views.rich.shape[0], views.poor.shape[0]) == (5, 1)
    assert len(views.poor.classes) == 8
    assert views.poverty == "its own sensor"
    with pytest.raises(ValueError, match="has no effect"):
        recipe_views("cml", data=tmp_path, poor="grey")
    with pytest.raises(ValueError, match=r"optics does not exist; it looks like .*; fix: name"):
        recipe_views("cml", data=tmp_path / "radar")
    with pytest.raises(ValueError, match="drive that asks before it sends"):
        recipe_views("cml", data=tmp_path, download=True)
    for side in ("optics", "radar"):
        (tmp_path / side / "Fishing").rename(tmp_path / side / "Ferry")
    with pytest.raises(ValueError, match=r"8 classes, Cargo, Fishing.* has 8, Ferry, .*fix:"):
        recipe_views("cml", data=tmp_path)
    two_sides(tmp_path / "two")
    (tmp_path / "two" / "rich").rename(tmp_path / "two" / "optics")
    (tmp_path / "two" / "poor").rename(tmp_path / "two" / "radar")
    with pytest.raises(ValueError, match=r"cml has 8 classes, .* has 2, boat, buoy; fix:"):
        recipe_views("cml", data=tmp_path / "two")


def test_names_without_a_partner_are_listed(tmp_path: Path) -> None:
    rich, poor = two_sides(tmp_path, count=9)
    for number in range(6):
        (poor / "buoy" / f"{number:02}.png").unlink()
    write(poor / "boat" / "more.png", values(8, 8))
    with pytest.raises(ValueError, match=r"7 image\(s\) without a partner") as told:
        opened(rich, poor)
    assert "more.png" in str(told.value)
    assert "00.tif" in str(told.value)
    assert "and 2 more" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_class_on_one_side_only(tmp_path: Path) -> None:
    rich, poor = two_sides(tmp_path)
    write(rich / "cargo" / "0.tif", values(8, 8, 5))
    write(poor / "yacht" / "0.png", values(8, 8))
    with pytest.raises(
        ValueError, match=r"class folders differ: cargo in .*rich alone, yacht in .*poor"
    ):
        opened(rich, poor)


def test_an_empty_class(tmp_path: Path) -> None:
    rich, poor = two_sides(tmp_path)
    (rich / "cargo").mkdir()
    (poor / "cargo").mkdir()
    (rich / "cargo" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"folder .*rich/cargo holds no image"):
        opened(rich, poor)


def test_a_class_of_one_pair_is_named(tmp_path: Path) -> None:
    two_sides(tmp_path)
    rich, poor = two_sides(tmp_path, classes=("boat", "rare"), count=1)
    with pytest.raises(ValueError, match=r"class 'rare' has 1 pair\(s\), at least 2 needed; fix: "):
        opened(rich, poor)


def test_two_files_of_one_name(tmp_path: Path) -> None:
    rich, poor = two_sides(tmp_path)
    write(poor / "boat" / "00.npy", values(8, 8))
    with pytest.raises(ValueError, match=r"boat/00\.npy and 00\.png have one name"):
        opened(rich, poor)


def test_other_bands_in_one_file_and_a_truncated_one(tmp_path: Path) -> None:
    rich, poor = two_sides(tmp_path)
    kept = (rich / "boat" / "03.tif").read_bytes()
    write(rich / "boat" / "03.tif", values(8, 8, 4, kind="uint16"))
    with pytest.raises(ValueError, match=r"boat/03\.tif has 4 band\(s\), .* has 5"):
        opened(rich, poor)
    (rich / "boat" / "03.tif").write_bytes(kept[:300])
    with pytest.raises(ValueError, match=r"image .*boat/03\.tif cannot be read"):
        opened(rich, poor)


def test_halves_that_differ(tmp_path: Path) -> None:
    two_sides(tmp_path, half="train")
    rich, poor = two_sides(tmp_path, half="test", classes=("boat", "cargo"))
    with pytest.raises(
        ValueError, match=r"differ: buoy in .*rich/train alone, cargo in .*rich/test alone"
    ):
        opened(rich, poor)
    (poor / "test").rename(poor / "val")
    with pytest.raises(ValueError, match=r"rich has train and test, .*poor has train and val"):
        opened(rich, poor)
    (poor / "val").rename(poor / "other")
    with pytest.raises(ValueError, match=r"poor has train alone.*test/<class>"):
        opened(rich, poor)


def test_folders_that_are_not_there(tmp_path: Path) -> None:
    rich, _ = two_sides(tmp_path)
    with pytest.raises(ValueError, match="two folders are needed; fix: --rich DIR --poor DIR"):
        recipe_views("pairs", rich=str(rich))
    with pytest.raises(ValueError, match="nowhere does not exist"):
        opened(rich, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="both sides are"):
        opened(rich, rich)
    with pytest.raises(ValueError, match="nobody publishes images of your own"):
        recipe_views("pairs", download=True)


def test_a_folder_of_another_layout(tmp_path: Path) -> None:
    _, poor = two_sides(tmp_path / "sides")
    other = tmp_path / "other"
    (other / "cifar-10-batches-py").mkdir(parents=True)
    with pytest.raises(ValueError, match="other is not pairs's: it looks like cifar10; fix:"):
        opened(other, poor)
