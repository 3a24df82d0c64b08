"""Any image folder, Tiny ImageNet as it is published, ImageNet whole and in part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data import Views
from tests.examples.entries import recipe_views
from tests.examples.files import values, write
from tests.examples.layouts import WNIDS, classes_of, write_imagenet, write_tiny_imagenet


def opened(name: str, root: Path | None, **options: object) -> Views:
    return recipe_views(name, data=root, **options).loaded()


def test_hidden_files_and_folders_are_no_images(tmp_path: Path) -> None:
    for name in ("boat", "buoy"):
        for number in range(5):
            write(tmp_path / name / f"{number}.png", values(8, 8, 3))
        (tmp_path / name / "._0.png").write_bytes(b"what macOS leaves")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    views = opened("folder", tmp_path)
    assert views.rich.classes == ["boat", "buoy"]
    assert len(views.rich) + len(views.held_out_rich) == 10


@pytest.fixture
def tiny_imagenet(tmp_path: Path) -> Path:
    return write_tiny_imagenet(tmp_path)


@pytest.mark.parametrize("test", ["test", "val"])
def test_a_folder_with_halves(tmp_path: Path, test: str) -> None:
    classes_of(tmp_path / "train", ["a", "b"], 3)
    classes_of(tmp_path / test, ["a", "b"], 2)
    views = opened("folder", tmp_path)
    assert (len(views.rich), len(views.held_out_rich)) == (6, 4)
    assert views.rich.shape == (3, 8, 8)
    assert np.array_equal(views.rich.pixels[4], values(8, 8, 3, seed=11).transpose(2, 0, 1))
    assert opened("folder", tmp_path, size=6).rich.shape == (3, 6, 6)


def test_a_folder_of_classes_is_split_by_fraction(tmp_path: Path) -> None:
    classes_of(tmp_path, ["a", "b"], 10, suffix=".jpg")
    views = opened("folder", tmp_path, test_fraction=0.3)
    assert np.bincount(views.rich.labels).tolist() == [7, 7]
    assert np.bincount(views.held_out_rich.labels).tolist() == [3, 3]
    assert not set(views.rich.index.tolist()) & set(views.held_out_rich.index.tolist())


def test_what_a_folder_can_lack(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'folder' needs a data directory; fix: add --data DIR"):
        opened("folder", None)
    with pytest.raises(ValueError, match="nowhere does not exist or is a file"):
        opened("folder", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has 0 class folders, at least 2 are needed; fix:"):
        opened("folder", tmp_path)
    classes_of(tmp_path / "train", ["a", "b"], 2)
    with pytest.raises(ValueError, match="has train alone"):
        opened("folder", tmp_path)
    classes_of(tmp_path / "test", ["a", "c"], 2)
    with pytest.raises(ValueError, match=r"differ: b in .*train alone, c in .*test alone"):
        opened("folder", tmp_path)
    (tmp_path / "test" / "c").rename(tmp_path / "test" / "b")
    write(tmp_path / "train" / "a" / "9.png", values(8, 10, 3))
    with pytest.raises(ValueError, match=r"2 sizes: .*fix: --size N"):
        opened("folder", tmp_path)
    (tmp_path / "train" / "a" / "9.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=r"image .*a/9\.png cannot be read"):
        opened("folder", tmp_path)


@pytest.mark.parametrize("inside", [True, False])
def test_tiny_imagenet_as_published(tiny_imagenet: Path, inside: bool) -> None:
    views = opened("tiny_imagenet", tiny_imagenet if inside else tiny_imagenet.parent)
    assert views.rich.classes == WNIDS
    assert views.rich.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert views.held_out_rich.labels.tolist() == [2, 1, 0]  # by the notes, not by the order
    assert views.rich.shape == views.held_out_rich.shape == (3, 64, 64)


def test_tiny_imagenet_with_something_missing(tiny_imagenet: Path) -> None:
    notes = tiny_imagenet / "val" / "val_annotations.txt"
    notes.write_text(notes.read_text() + "val_9.JPEG\tn01443537\t0\t0\t1\t1\n")
    with pytest.raises(ValueError, match=r"line 4 names 'val_9\.JPEG' .* does not exist"):
        opened("tiny_imagenet", tiny_imagenet)
    notes.write_text("val_0.JPEG\tn99999999\t0\t0\t1\t1\n")
    with pytest.raises(ValueError, match=r"line 1 names .*'n99999999', which is no class"):
        opened("tiny_imagenet", tiny_imagenet)
    for file in (tiny_imagenet / "train" / WNIDS[1] / "images").glob("*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"n01629819/images holds no image\(s\) \(\.jpeg\)"):
        opened("tiny_imagenet", tiny_imagenet)
    (tiny_imagenet / "wnids.txt").unlink()
    with pytest.raises(ValueError, match=r"has no wnids\.txt.*fix: .*--download"):
        opened("tiny_imagenet", tiny_imagenet)


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    return write_imagenet(tmp_path)


def test_imagenet_is_cut_to_size(imagenet: Path) -> None:
    views = opened("imagenet", imagenet, size=32)
    assert views.rich.classes == WNIDS
    assert (len(views.rich), len(views.held_out_rich)) == (6, 3)
    assert views.rich.shape == views.held_out_rich.shape == (3, 32, 32)
    with pytest.raises(ValueError, match=r"--download is not for imagenet: .* registration"):
        opened("imagenet", imagenet, download=True)


def test_imagenet_by_a_list_of_classes(imagenet: Path) -> None:
    listed = imagenet / "some.txt"
    listed.write_text(f"# which\n{WNIDS[2]} frog\n\n{WNIDS[0]} goldfish\n")
    views = opened("imagenet100", imagenet, classes=str(listed), size=16)
    assert views.rich.classes == [WNIDS[0], WNIDS[2]]
    assert views.rich.labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="has 3 classes and no list says which"):
        opened("imagenet100", imagenet)
    listed.write_text(f"{WNIDS[0]}\nn00000001\n")
    with pytest.raises(ValueError, match="train lacks 1 of 2 classes: n00000001"):
        opened("imagenet100", imagenet, classes=str(listed))
    with pytest.raises(ValueError, match=r"--classes .*none\.txt cannot be read"):
        opened("imagenet100", imagenet, classes=str(imagenet / "none.txt"))


def test_imagenet_without_a_half_says_what_it_looks_like(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no folder train; fix: ask image-net\.org"):
        opened("imagenet", tmp_path)
    (tmp_path / "cifar-100-python").mkdir()
    with pytest.raises(ValueError, match="has no folder train; it looks like cifar100"):
        opened("imagenet", tmp_path)
    with pytest.raises(ValueError, match=r"has no wnids\.txt.*it looks like cifar100"):
        opened("tiny_imagenet", tmp_path)


def test_another_draw_of_the_test_images(tmp_path: Path) -> None:
    classes_of(tmp_path, ["a", "b"], 12)
    fingerprints = {
        opened("folder", tmp_path, test_draw=draw).held_out_rich.fingerprint for draw in (0, 0, 1)
    }
    assert len(fingerprints) == 2
    with pytest.raises(ValueError, match="--test-draw must be at least 0"):
        opened("folder", tmp_path, test_draw=-1)
    for half in ("train", "test"):
        classes_of(tmp_path / "halves" / half, ["a", "b"], 2)
    with pytest.raises(ValueError, match=r"--test-draw 1 has no effect: .* has images for testing"):
        opened("folder", tmp_path / "halves", test_draw=1)
