"""The data sets' own layouts on disk, each with a few tiny images."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image
from torchvision.datasets import CIFAR100, STL10

from tests.examples.files import values, write

WNIDS = ["n01443537", "n01629819", "n01641577"]
EUROSAT_CLASSES = ["Forest", "River"]
GEO_KEYS = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1)
# The flooded shares of a scene's patches, twice over, and the classes that they are.
SHARES = (0.0, 0.009, 0.01, 0.099, 0.1, 0.399, 0.4, 1.0)
LABELS = (0, 0, 1, 1, 2, 2, 3, 3)


def classes_of(
    root: Path, names: list[str], count: int, size: int = 8, suffix: str = ".png"
) -> None:
    for label, name in enumerate(names):
        for number in range(count):
            write(
                root / name / f"{number}{suffix}", values(size, size, 3, seed=10 * label + number)
            )


def write_recipe(root: Path) -> Path:
    """A recipe over image files, which another process can read."""
    classes_of(root / "data", ["boat", "buoy"], 20, size=12)
    options = {
        "reader": "folder", "data": str(root / "data"), "teacher": "resnet8", "lr": 0.05,
        "student": "resnet8x0_5", "view": "noise:0.2", "epochs": 2, "batch_size": 8, "pad": 1,
        "device": "cpu", "seeds": [0, 1], "criterion": ["alone", "dense"],
    }  # fmt: skip
    (root / "own.yaml").write_text(yaml.safe_dump(options))
    return root / "own.yaml"


def write_scenes(root: Path) -> Path:
    """Rich colour images, poor grey ones, and masks of 0 and 255: what is bright is flooded."""
    random = np.random.default_rng(0)
    for number in range(12):
        flooded = random.random((4, 4)).repeat(8, 0).repeat(8, 1) > 0.6
        rich = np.where(flooded[..., None], [180, 60, 200], [40, 160, 50])
        poor = np.where(flooded, 130, 110) + random.integers(-20, 20, (32, 32))
        for side, image in {"rich": rich, "poor": poor, "masks": flooded * 255}.items():
            write(root / side / f"scene{number:02d}.png", image.astype(np.uint8))
    return root


def write_tiny_imagenet(tmp_path: Path) -> Path:
    root = tmp_path / "tiny-imagenet-200"
    for label, name in enumerate(WNIDS):
        for number in range(2):
            image = values(64, 64, 3, seed=10 * label + number)
            write(root / "train" / name / "images" / f"{name}_{number}.JPEG", image)
        (root / "train" / name / f"{name}_boxes.txt").write_text("")
    notes = []
    for number, name in enumerate(reversed(WNIDS)):
        grey = values(64, 64, seed=50 + number)  # some of the published ones have one channel
        write(root / "val" / "images" / f"val_{number}.JPEG", grey)
        notes.append(f"val_{number}.JPEG\t{name}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(notes))
    (root / "wnids.txt").write_text("\n".join(reversed(WNIDS)) + "\n")
    (root / "words.txt").write_text("")
    return root


def write_imagenet(tmp_path: Path) -> Path:
    classes_of(tmp_path / "train", WNIDS, 2, size=40, suffix=".JPEG")
    classes_of(tmp_path / "val", WNIDS, 1, size=50, suffix=".JPEG")
    return tmp_path


def summed(file: Path) -> list[str]:
    return [file.name, hashlib.md5(file.read_bytes()).hexdigest()]


def write_cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = tmp_path / CIFAR100.base_folder
    base.mkdir()
    for seed, (half, count) in enumerate({"train": 8, "test": 4}.items()):
        rows = values(count, 3 * 32 * 32, seed=seed)
        fine = [number % 4 for number in range(count)]
        content = {"data": rows, "fine_labels": fine, "coarse_labels": [0] * count}
        (base / half).write_bytes(pickle.dumps(content))
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": ["a", "b", "c", "d"]}))
    monkeypatch.setattr(CIFAR100, "train_list", [summed(base / "train")])
    monkeypatch.setattr(CIFAR100, "test_list", [summed(base / "test")])
    md5 = summed(base / "meta")[1]
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5})
    return tmp_path


def write_stl10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = tmp_path / STL10.base_folder
    base.mkdir()
    for seed, (half, count) in enumerate({"train": 6, "test": 3}.items()):
        # Published column by column: every image is stored transposed.
        values(count, 3, 96, 96, seed=seed).transpose(0, 1, 3, 2).tofile(base / f"{half}_X.bin")
        (np.arange(count) % 3 + 1).astype(np.uint8).tofile(base / f"{half}_y.bin")
    values(2, 3, 96, 96).tofile(base / "unlabeled_X.bin")
    (base / "class_names.txt").write_text("airplane\nbird\ncar\n")
    (base / "fold_indices.txt").write_text("0 1\n")
    for name in ("train_list", "test_list"):
        found = [summed(base / file) for file, _ in getattr(STL10, name)]
        monkeypatch.setattr(STL10, name, found)
    return tmp_path


def geotiff(file: Path, zone: int, east: float, north: float, bands: int = 13) -> None:
    """As EuroSAT's: pixel by pixel, corner and UTM zone in the GeoTIFF tags."""
    file.parent.mkdir(parents=True, exist_ok=True)
    corner = (0.0, 0.0, 0.0, east, north, 0.0)
    keys = (*GEO_KEYS, zone)
    tifffile.imwrite(
        file, values(64, 64, bands, seed=int(east) % 1000, kind="uint16"),
        photometric="minisblack", planarconfig="contig",
        extratags=[(33922, 12, 6, corner, True), (34735, 3, len(keys), keys, True)],
    )  # fmt: skip


def write_eurosat(tmp_path: Path) -> Path:
    """Ten places of two images a class, the two half a kilometre apart."""
    for label, name in enumerate(EUROSAT_CLASSES):
        for number in range(20):
            spot = 10 * label + number // 2
            geotiff(tmp_path / "ms" / name / f"{name}_{number + 1}.tif", 32630 + spot % 2,
                    400_000 + 30_000 * spot + 500 * (number % 2), 5_000_000)  # fmt: skip
    return tmp_path / "ms"


def write_ombria(tmp_path: Path) -> Path:
    """Scenes of 128x128; the patches of every mask take the shares above in turn, twice."""
    root = tmp_path / "ombria"
    for half, count in {"train": 12, "test": 3}.items():
        for scene in range(count):
            name = f"{scene:04}.png"
            for seed, kind in enumerate(("s1_before", "s1_after", "s2_before", "s2_after")):
                shape = (128, 128) if kind[1] == "1" else (128, 128, 3)
                write(root / half / kind / name, values(*shape, seed=10 * scene + seed))
            mask = np.zeros((4, 4, 64 * 64), dtype=bool)
            for number, share in enumerate(2 * SHARES):
                mask[number // 4, number % 4, : int(np.ceil(share * 4096))] = True
            whole = mask.reshape(4, 4, 64, 64).transpose(0, 2, 1, 3).reshape(256, 256)
            (root / half / "mask").mkdir(exist_ok=True)
            Image.fromarray(whole).save(root / half / "mask" / name)
    return root
