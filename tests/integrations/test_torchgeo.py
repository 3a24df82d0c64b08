"""The example over torchgeo's samples, on GeoTIFFs of five bands that are written here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import timm
import torch
from torch.utils.data import DataLoader, Dataset

from integrations import torchgeo_samples as example

SIZE, BANDS, CLASSES, RGB = 64, 5, 3, [2, 1, 0]
# Ten metres a pixel in UTM zone 33 north: the tags of GeoTIFF for scale, corner and projection.
_KEYS = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633)


def _write(path: Path, pixels: np.ndarray, column: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    corner = (0.0, 0.0, 0.0, 500_000.0 + column * SIZE * 10, 5_000_000.0, 0.0)
    tags = [
        (33550, "d", 3, (10.0, 10.0, 0.0), True),
        (33922, "d", 6, corner, True),
        (34735, "H", len(_KEYS), _KEYS, True),
    ]
    tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig", extratags=tags)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles side by side, whose class shows in the last bands and faintly in the first."""
    root, random = tmp_path_factory.mktemp("tiles"), np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 2)):
        for number in range(count):
            mask = random.integers(0, CLASSES, (4, 4), np.uint8).repeat(16, 0).repeat(16, 1)
            contrast = np.array([100, 100, 100, 2000, 3000])
            noise = random.integers(0, 1000, (SIZE, SIZE, BANDS))
            image = (mask[..., None] * contrast + noise).astype(np.uint16)
            _write(root / part / "images" / f"{number}.tif", image, number)
            _write(root / part / "masks" / f"{number}.tif", mask, number)
    return root


class Tiles(Dataset):
    """Samples as torchgeo's: an image, a mask, and something that does not stack."""

    def __init__(self, folder: Path) -> None:
        self.images = sorted((folder / "images").iterdir())

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.images[index]
        image = tifffile.imread(path).astype(np.float32).transpose(2, 0, 1)
        mask = torch.from_numpy(tifffile.imread(path.parents[1] / "masks" / path.name)).long()
        mask[:8] = -100
        return {"image": torch.from_numpy(image), "mask": mask, "crs": object()}


@pytest.fixture
def loaders(folder: Path) -> list[DataLoader]:
    torch.manual_seed(0)
    return [
        DataLoader(Tiles(folder / part), 2, collate_fn=example.collate)
        for part in ("train", "test")
    ]


def _state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def test_two_steps_move_the_student_and_not_the_teacher(loaders: list[DataLoader]) -> None:
    teacher, student = example.unet(BANDS, CLASSES), example.unet(len(RGB), CLASSES)
    taught, new = _state(teacher), _state(student)
    plain = example.train(teacher, list(range(BANDS)), loaders[0], epochs=1)
    trained = _state(teacher)
    distilled = example.train(student, RGB, loaders[0], epochs=1, teacher=teacher)
    assert len(plain) == len(distilled) == 2
    assert all(math.isfinite(loss) for loss in plain + distilled)
    assert distilled[0] > 2 * math.log(CLASSES)  # the criterion's terms are in it
    weights = dict(student.named_parameters())
    assert all(not torch.equal(new[name], weight) for name, weight in weights.items())
    assert any(not torch.equal(taught[name], trained[name]) for name in taught)
    assert all(torch.equal(trained[name], value) for name, value in teacher.state_dict().items())


def test_a_pretrained_backbone_of_many_bands_becomes_the_encoder() -> None:
    backbone = timm.create_model("resnet18", in_chans=BANDS)
    encoder = _state(example.unet(BANDS, CLASSES, backbone).encoder.model)
    assert all(torch.equal(value.cpu(), backbone.state_dict()[k]) for k, value in encoder.items())
    with pytest.raises(RuntimeError, match="size mismatch for conv1"):
        example.unet(len(RGB), CLASSES, backbone)
    with pytest.raises(KeyError):
        example.unet(BANDS, CLASSES, timm.create_model("test_resnet", in_chans=BANDS))


def test_iou_counts_the_pixels_of_the_whole_set(loaders: list[DataLoader]) -> None:
    network = example.unet(len(RGB), CLASSES)
    found = example.iou(network, RGB, loaders[0], CLASSES + 1)
    images, masks = (torch.cat([each[key] for each in loaders[0]]) for key in ("image", "mask"))
    with torch.no_grad():
        answers = network((images[:, RGB] / example.SCALE).to(example.DEVICE)).argmax(1).cpu()
    for label in range(CLASSES):
        here, there, known = answers == label, masks == label, masks != -100
        wanted = (here & there).sum() / ((here | there) & known).sum()
        assert found[label] == pytest.approx(wanted.item())
    assert found[CLASSES].isnan()  # a class that is nowhere


def test_any_dataset_of_such_dicts(
    loaders: list[DataLoader], capsys: pytest.CaptureFixture[str]
) -> None:
    example.compare(*loaders, CLASSES, rgb=RGB, epochs=1)
    said = capsys.readouterr().out.splitlines()
    assert [line.count("%") for line in said] == [CLASSES] * 3


@pytest.mark.slow
def test_torchgeo_itself(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = pytest.importorskip("torchgeo.models", reason="torchgeo is not installed")
    compare = example.compare

    def watched(train: DataLoader, test: DataLoader, *given: Any, **options: Any) -> Any:
        batch = next(iter(test))
        for key, kind in (("image", torch.float32), ("mask", torch.long)):
            tile = torch.from_numpy(tifffile.imread(folder / "test" / f"{key}s" / "0.tif")).to(kind)
            assert batch[key].dtype == kind
            assert torch.equal(batch[key][0], tile.permute(2, 0, 1) if key == "image" else tile)
        assert next(iter(train))["image"].shape == (2, BANDS, SIZE, SIZE)
        return compare(train, test, *given, **options)

    monkeypatch.setattr(example, "compare", watched)
    backbone = models.resnet18(in_chans=BANDS)
    options = {"rgb": RGB, "backbone": backbone, "epochs": 1}
    example.main(folder, str(CLASSES), size=SIZE, batch_size=2, **options)
    said = capsys.readouterr().out.splitlines()
    assert [line.count("%") for line in said] == [CLASSES] * 3
