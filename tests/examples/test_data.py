"""Data sets: the splits, both CIFAR-10 layouts, and everything that can be wrong with a folder."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from data import NO_LABEL, Views
from data.sources import split, stratified
from data.views import halves
from tests.examples.entries import recipe_views

NAMES = ["airplane", "bird", "cat"]


def cifar(root: Path | None, **wanted: object) -> Views:
    """All images of a folder, read."""
    return recipe_views("cifar10", data=root, **wanted).loaded()


@pytest.fixture
def photos() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Six training and three test photos of three classes, in class order."""
    random = np.random.default_rng(0)
    return {
        half: (
            random.integers(0, 256, (3 * count, 32, 32, 3), dtype=np.uint8),
            np.repeat(np.arange(3), count),
        )
        for half, count in (("train", 4), ("test", 1))
    }


@pytest.fixture
def folder(tmp_path: Path, photos: dict) -> Path:
    root = tmp_path / "folder"
    for half, (images, labels) in photos.items():
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            place = root / half / NAMES[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{number:04}.png")
    return root


@pytest.fixture
def batches(tmp_path: Path, photos: dict, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "batches"
    base = root / CIFAR10.base_folder
    base.mkdir(parents=True)
    sums = {}
    for half, (images, labels) in photos.items():
        flat = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        content = pickle.dumps({"data": flat, "labels": labels.tolist()})
        (base / half).write_bytes(content)
        sums[half] = hashlib.md5(content).hexdigest()
    meta = pickle.dumps({"label_names": NAMES})
    (base / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(CIFAR10, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test", sums["test"]]])
    checked = {**CIFAR10.meta, "md5": hashlib.md5(meta).hexdigest()}
    monkeypatch.setattr(CIFAR10, "meta", checked)
    return root


@pytest.mark.usefixtures("digits_are_parsed_once")
def test_splits_of_the_digits_are_disjoint_and_complete() -> None:
    test, val = (recipe_views("mnist", evaluate=e) for e in ("test", "val"))
    places = [set(images.index.tolist()) for images in
              (test.rich, test.held_out_rich, val.rich, val.held_out_rich)]  # fmt: skip
    assert [len(found) for found in places] == [4000, 1000, 3600, 400]
    assert places[2] | places[3] == places[0]
    assert not places[2] & places[3]
    assert not places[0] & places[1]
    train, held_out = (i.loaded().pixels for i in (test.rich, test.held_out_rich))
    known = {image.numpy().tobytes() for image in train}
    assert not any(image.numpy().tobytes() in known for image in held_out)


def test_a_limit_takes_a_stratified_part_of_train_and_keeps_each_samples_noise() -> None:
    whole, part = recipe_views(view="noise:0.5"), recipe_views(view="noise:0.5", limit=20)
    assert part.rich.labels.bincount().tolist() == [5] * 4
    rows = torch.tensor([whole.rich.index.tolist().index(i) for i in part.rich.index.tolist()])
    assert torch.equal(part.poor.pixels, whole.poor.pixels[rows])
    assert len(part.held_out_poor) == 40


def test_a_larger_choice_of_labels_holds_a_smaller_and_the_teacher_knows_no_more() -> None:
    few, many = (recipe_views(labels=count) for count in (8, 40))
    known = [set((v.poor.known() != NO_LABEL).nonzero()[:, 0].tolist()) for v in (few, many)]
    assert [len(found) for found in known] == [8, 40]
    assert known[0] < known[1]
    assert torch.equal(few.rich.known(), few.poor.known())
    assert few.poor.fingerprint != many.poor.fingerprint
    assert "8 of the poor training images have labels" in few.summary()
    with pytest.raises(ValueError, match="--labels must lie between 4"):
        recipe_views(labels=3)


def test_without_pairs_the_labels_are_the_students_own() -> None:
    views = recipe_views("unpaired-tiny", labels=8)
    assert int((views.poor.known() != NO_LABEL).sum()) == 8
    assert torch.equal(views.rich.known(), views.rich.labels)


def test_free_pairs_may_be_made_poor_otherwise_than_the_students_images() -> None:
    views = recipe_views("unpaired-tiny", pseudo="noise:0.9")
    kept = [float((i.pixels % 255 > 0).float().mean()) for i in (views.poor, views.pseudo)]
    assert kept[0] == pytest.approx(0.8, abs=0.05)
    assert kept[1] == pytest.approx(0.1, abs=0.05)
    with pytest.raises(ValueError, match="--pseudo is for poor images that are made"):
        recipe_views(pseudo="noise:0.9")


def test_halves_share_no_image_and_keep_their_classes() -> None:
    labels = torch.tensor(np.random.default_rng(0).integers(0, 5, 501))
    first, second = halves(labels)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(501))
    views, paired = recipe_views("unpaired-tiny"), recipe_views()
    assert not set(views.rich.index.tolist()) & set(views.poor.index.tolist())
    assert torch.equal(views.pseudo.index, views.rich.index)
    assert torch.equal(views.originals.index, views.poor.index)
    rows = {index: row for row, index in enumerate(paired.rich.index.tolist())}
    for images, of in ((views.rich, paired.rich), (views.poor, paired.poor)):
        for index, image in zip(images.index.tolist(), images.pixels, strict=True):
            assert torch.equal(image, of.pixels[rows[index]])


def test_the_summary_counts_and_warns() -> None:
    views = recipe_views()
    assert "rich: 80 training and 40 held-out images, 1x12x12, 4 classes of 20 to 20" in (
        views.summary()
    )
    one = replace(views, held_out_poor=views.held_out_poor.chosen(torch.arange(37)[3:]))
    labels = one.held_out_poor.labels.clone()
    labels[labels == 3] = 0
    labels[0] = 3
    one = replace(one, held_out_poor=replace(one.held_out_poor, labels=labels))
    assert any("class 'west' has 1 held-out poor image(s)" in line for line in one.summary())


def test_a_larger_stratified_choice_holds_a_smaller() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), [50, 30, 20]))
    small, large = (stratified(labels, count, draw=7) for count in (20, 60))
    assert np.bincount(labels[small]).tolist() == [10, 6, 4]
    assert np.bincount(labels[large]).tolist() == [30, 18, 12]
    assert set(small) < set(large)


def test_a_stratified_choice_has_an_image_of_the_rarest_class() -> None:
    labels = np.repeat([0, 1], [1000, 2])
    assert np.bincount(labels[stratified(labels, 2, draw=7)]).tolist() == [1, 1]
    counts = [np.bincount(labels[rows]).tolist() for rows in split(labels, 0.2)]
    assert counts == [[801, 1], [199, 1]]


def test_statistics_are_the_images_own() -> None:
    rich = recipe_views().rich
    pixels = rich.pixels.double()
    assert rich.statistics.mean.item() == pytest.approx(pixels.mean().item(), rel=1e-6)
    assert rich.statistics.std.item() == pytest.approx(pixels.std().item(), rel=1e-6)


def test_both_cifar10_layouts_read_the_same(folder: Path, batches: Path, photos: dict) -> None:
    found = [cifar(root, view="noise:0.3") for root in (folder, batches)]
    for views in found:
        assert views.rich.classes == NAMES
        for images, half in ((views.rich, "train"), (views.held_out_rich, "test")):
            assert np.array_equal(images.pixels.numpy(), photos[half][0].transpose(0, 3, 1, 2))
            assert np.array_equal(images.labels.numpy(), photos[half][1])
    assert torch.equal(found[0].poor.pixels, found[1].poor.pixels)
    assert found[0].rich.fingerprint == found[1].rich.fingerprint


@pytest.mark.parametrize("limit", [0, 3, 81])
def test_a_limit_out_of_range(limit: int) -> None:
    with pytest.raises(ValueError, match=r"limit must lie between 4 .* and 80"):
        recipe_views(limit=limit)


def test_no_data_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'cifar10' needs a data directory; fix: add --data"):
        cifar(None)
    with pytest.raises(ValueError, match=r"nowhere does not exist or is a file; fix: .*--download"):
        cifar(tmp_path / "nowhere")
    archive = tmp_path / "images.tar"
    archive.touch()
    with pytest.raises(
        ValueError, match=r"images\.tar does not exist or is a file; fix: name the unpacked"
    ):
        cifar(archive)
    with pytest.raises(ValueError, match="has neither train/<class>"):
        cifar(tmp_path)


def test_class_folders_that_differ(folder: Path) -> None:
    (folder / "test" / "cat").rename(folder / "test" / "cow")
    with pytest.raises(ValueError, match=r"differ: cat in .*train alone, cow in .*test alone"):
        cifar(folder)


def test_folders_without_content(folder: Path) -> None:
    (folder / "test" / "cat" / "0002.png").unlink()
    with pytest.raises(ValueError, match=r"class folder .*cat holds no image"):
        cifar(folder)


def test_no_class_folders(tmp_path: Path) -> None:
    for half in ("train", "test"):
        (tmp_path / half).mkdir()
    with pytest.raises(ValueError, match="has 0 class folders"):
        cifar(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "junk"])
def test_a_damaged_image_is_named(folder: Path, damage: str) -> None:
    image = folder / "train" / "bird" / "0005.png"
    image.write_bytes(image.read_bytes()[:600] if damage == "truncated" else b"no image")
    with pytest.raises(ValueError, match=r"image .*0005\.png cannot be read .*; fix:"):
        cifar(folder)


def test_an_image_of_another_size_is_named(folder: Path) -> None:
    Image.new("RGB", (16, 24)).save(folder / "train" / "bird" / "0005.png")
    with pytest.raises(ValueError, match=r"0005\.png is 24x16, expected 32x32"):
        cifar(folder)


def test_damaged_batches_are_named(batches: Path) -> None:
    damaged = batches / CIFAR10.base_folder / "test"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"damaged or incomplete \(test\); fix: .*--download"):
        cifar(batches)


def test_batches_that_are_no_pickle(batches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (batches / CIFAR10.base_folder / "test").write_bytes(b"junk")
    monkeypatch.setattr(CIFAR10, "test_list", [["test", hashlib.md5(b"junk").hexdigest()]])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        cifar(batches)


def test_the_gap_of_free_pairs_is_measured_on_all_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.views._LOOKED_AT", 8)
    views = recipe_views("unpaired-tiny")
    order = views.poor.labels.argsort()  # as folders are read, class by class
    dark = views.poor.pixels.clone()
    dark[views.poor.labels > 0] = 0
    poor = replace(views.poor, pixels=dark).chosen(order)
    (told,) = (line for line in replace(views, poor=poor).summary() if "the made" in line)
    assert told.startswith("warning: free pairs: the made poor images are far")
