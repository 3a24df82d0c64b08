"""Data sets: the splits, both CIFAR-10 layouts, and everything that can be wrong with a folder."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from crossmodal.data import SPLITS, ImagePairs, load
from crossmodal.sources import stratified

NAMES = ["airplane", "bird", "cat"]


@pytest.fixture(scope="module")
def mnist() -> dict[str, ImagePairs]:
    return {split: load("mnist", split=split, amount=0.5) for split in SPLITS}


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


def test_mnist_splits_are_disjoint_and_complete(mnist: dict[str, ImagePairs]) -> None:
    places = {split: set(pairs.index.tolist()) for split, pairs in mnist.items()}
    sizes = {split: len(found) for split, found in places.items()}
    assert sizes == {"train": 4000, "val": 400, "fit": 3600, "test": 1000}
    assert places["fit"] | places["val"] == places["train"]
    assert not places["fit"] & places["val"]
    assert not places["train"] & places["test"]


def test_no_test_image_is_a_training_image(mnist: dict[str, ImagePairs]) -> None:
    train = {image.numpy().tobytes() for image in mnist["train"].clean}
    assert not any(image.numpy().tobytes() in train for image in mnist["test"].clean)


def test_mnist_splits_are_stratified(mnist: dict[str, ImagePairs]) -> None:
    for pairs in mnist.values():
        assert pairs.labels.bincount().tolist() == [len(pairs) // 10] * 10


def test_the_poor_modality_is_the_clean_one_with_half_its_pixels_replaced(
    mnist: dict[str, ImagePairs],
) -> None:
    pairs = mnist["test"]
    kept = pairs.poor == pairs.clean
    assert set(pairs.poor[~kept].unique().tolist()) == {0, 255}
    assert (pairs.poor == 255).float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_a_limit_takes_a_stratified_part_of_train_and_keeps_each_samples_noise() -> None:
    whole = load("tiny", split="train", amount=0.5)
    part = load("tiny", split="train", amount=0.5, limit=20)
    assert part.labels.bincount().tolist() == [5] * 4
    rows = torch.tensor([whole.index.tolist().index(i) for i in part.index.tolist()])
    assert torch.equal(part.poor, whole.poor[rows])
    assert torch.equal(part.clean, whole.clean[rows])
    assert len(load("tiny", split="test", amount=0.5, limit=20)) == 40
    assert len(load("tiny", split="val", amount=0.5, limit=20)) == 8


def test_another_noise_seed_is_another_noisy_set() -> None:
    first, second = (load("tiny", split="train", amount=0.5, seed=seed) for seed in (0, 1))
    assert torch.equal(first.clean, second.clean)
    assert not torch.equal(first.poor, second.poor)


def test_a_larger_stratified_choice_holds_a_smaller() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), [50, 30, 20]))
    small, large = (stratified(labels, count, draw=7) for count in (20, 60))
    assert np.bincount(labels[small]).tolist() == [10, 6, 4]
    assert np.bincount(labels[large]).tolist() == [30, 18, 12]
    assert set(small) < set(large)


def test_statistics_are_the_clean_images_own(pairs: ImagePairs) -> None:
    pixels = pairs.clean.double()
    assert pairs.statistics.mean.item() == pytest.approx(pixels.mean().item(), rel=1e-6)
    assert pairs.statistics.std.item() == pytest.approx(pixels.std().item(), rel=1e-6)


@pytest.mark.parametrize("split", ["train", "test"])
def test_both_cifar10_layouts_read_the_same(
    folder: Path, batches: Path, photos: dict, split: str
) -> None:
    images, labels = photos[split]
    for root in (folder, batches):
        pairs = load("cifar10", data_dir=root, split=split, amount=0.3)
        assert pairs.classes == NAMES
        assert np.array_equal(pairs.clean.numpy(), images.transpose(0, 3, 1, 2))
        assert np.array_equal(pairs.labels.numpy(), labels)
    both = [load("cifar10", data_dir=root, split=split, amount=0.3) for root in (folder, batches)]
    assert torch.equal(both[0].poor, both[1].poor)
    assert both[0].fingerprint == both[1].fingerprint


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"unknown data set 'cifar'; known: .*cifar10, mnist"):
        load("cifar", split="train", amount=0.1)
    with pytest.raises(ValueError, match="split must be one of train, val, fit, test, got 'dev'"):
        load("tiny", split="dev", amount=0.1)


@pytest.mark.parametrize("limit", [0, 3, 81])
def test_a_limit_out_of_range(limit: int) -> None:
    with pytest.raises(ValueError, match=r"limit must lie between 4 .* and 80"):
        load("tiny", split="train", amount=0.1, limit=limit)


def test_no_data_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'cifar10' needs a data directory; fix: add --data"):
        load("cifar10", split="train", amount=0.1)
    with pytest.raises(ValueError, match=r"nowhere does not exist; fix: .*--download"):
        load("cifar10", data_dir=tmp_path / "nowhere", split="train", amount=0.1)
    archive = tmp_path / "images.tar"
    archive.touch()
    with pytest.raises(ValueError, match=r"images\.tar is a file; fix: unpack it"):
        load("cifar10", data_dir=archive, split="train", amount=0.1)
    with pytest.raises(ValueError, match="has neither train/<class>"):
        load("cifar10", data_dir=tmp_path, split="train", amount=0.1)


def test_class_folders_that_differ(folder: Path) -> None:
    (folder / "test" / "cat").rename(folder / "test" / "cow")
    with pytest.raises(ValueError, match="differ: cat, cow in one alone"):
        load("cifar10", data_dir=folder, split="train", amount=0.1)


def test_folders_without_content(folder: Path) -> None:
    (folder / "test" / "cat" / "0002.png").unlink()
    with pytest.raises(ValueError, match=r"class folder .*cat holds no image"):
        load("cifar10", data_dir=folder, split="train", amount=0.1)


def test_no_class_folders(tmp_path: Path) -> None:
    for half in ("train", "test"):
        (tmp_path / half).mkdir()
    with pytest.raises(ValueError, match="has no class folders"):
        load("cifar10", data_dir=tmp_path, split="train", amount=0.1)


@pytest.mark.parametrize("damage", ["truncated", "junk"])
def test_a_damaged_image_is_named(folder: Path, damage: str) -> None:
    image = folder / "train" / "bird" / "0005.png"
    image.write_bytes(image.read_bytes()[:600] if damage == "truncated" else b"no image")
    with pytest.raises(ValueError, match=r"image .*0005\.png cannot be read .*; fix:"):
        load("cifar10", data_dir=folder, split="train", amount=0.1)


def test_an_image_of_another_size_is_named(folder: Path) -> None:
    Image.new("RGB", (16, 24)).save(folder / "train" / "bird" / "0005.png")
    with pytest.raises(ValueError, match=r"0005\.png is 24x16, expected 32x32"):
        load("cifar10", data_dir=folder, split="train", amount=0.1)


def test_damaged_batches_are_named(batches: Path) -> None:
    damaged = batches / CIFAR10.base_folder / "test"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"damaged or incomplete \(test\); fix: .*--download"):
        load("cifar10", data_dir=batches, split="train", amount=0.1)


def test_batches_that_are_no_pickle(batches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (batches / CIFAR10.base_folder / "test").write_bytes(b"junk")
    monkeypatch.setattr(CIFAR10, "test_list", [["test", hashlib.md5(b"junk").hexdigest()]])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        load("cifar10", data_dir=batches, split="test", amount=0.1)
