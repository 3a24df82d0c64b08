"""The benchmark's folders: what is read, how it is split, what is refused, one epoch of it all."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

import unpaired
from data import Views
from data.decode import read_colours
from data.scenes import read_multispectral
from tests.examples.entries import recipe_views, results

tifffile = pytest.importorskip("tifffile")

CLASSES = ("Forest", "River", "Town")
BANDS, SIZE = 10, 12


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten MS images a class, .tif in both axis orders and .mat; eight photographs, larger."""
    root = tmp_path_factory.mktemp("scenes")
    random = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        for kind in ("MS", "RGB"):
            (root / kind / name).mkdir(parents=True)
        for number in range(10):
            image = random.integers(0, 900, (SIZE, SIZE, BANDS)).astype(np.uint16)
            image[..., label] += 3000
            file = root / "MS" / name / f"{number}"
            if number == 0:
                savemat(f"{file}.mat", {"msi": image, "label": np.eye(3)[label]})
            elif number == 1:
                bands_first = image.transpose(2, 0, 1)
                tifffile.imwrite(f"{file}.tif", bands_first, photometric="minisblack")
            else:
                tifffile.imwrite(f"{file}.tif", image, photometric="minisblack")
        for number in range(8):
            pixels = random.integers(0, 90, (20, 16, 3)).astype(np.uint8)
            pixels[..., label] += 120
            Image.fromarray(pixels).save(root / "RGB" / name / f"photo{number}.jpg")
    return root


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "scenes"))


def opened(root: Path | None, **wanted: object) -> Views:
    return recipe_views("s2s_eu", data=root, **wanted).loaded()


def test_both_modalities_are_read_and_split(original: Path) -> None:
    views = opened(original)
    assert views.rich.classes == list(CLASSES)
    assert views.rich.pixels.shape == (24, BANDS, SIZE, SIZE)
    assert views.poor.pixels.shape == (19, 3, SIZE, SIZE)
    assert views.poor.pixels.dtype == torch.uint8
    assert (len(views.held_out_rich), len(views.held_out_poor)) == (6, 5)
    assert views.originals is None
    for train, test, total in (
        (views.rich, views.held_out_rich, 30),
        (views.poor, views.held_out_poor, 24),
    ):
        assert len({*train.index.tolist(), *test.index.tolist()}) == total
        assert set(test.labels.tolist()) == {0, 1, 2}
    assert torch.equal(opened(original).rich.index, views.rich.index)
    # The bright band tells the class: labels and files stand together.
    for pairs in (views.rich, views.held_out_rich, views.poor, views.held_out_poor):
        brightest = pairs.pixels.float().mean((2, 3))[:, :3].argmax(1)
        assert torch.equal(brightest, pairs.labels)


def test_pseudo_rgb_is_three_of_the_bands(original: Path) -> None:
    views = opened(original)
    assert torch.equal(views.pseudo.pixels, views.rich.pixels[:, [2, 1, 0]])
    assert torch.equal(views.pseudo.labels, views.rich.labels)


def test_validation_leaves_the_test_images_alone(original: Path) -> None:
    test = set(opened(original).held_out_poor.index.tolist())
    views = opened(original, evaluate="val")
    seen = {*views.poor.index.tolist(), *views.held_out_poor.index.tolist()}
    assert not seen & test
    assert set(views.held_out_poor.labels.tolist()) == {0, 1, 2}


def test_axis_orders_and_formats_give_the_same_image(tmp_path: Path) -> None:
    image = np.arange(4 * 5 * BANDS, dtype=np.uint16).reshape(4, 5, BANDS)
    expected = image.transpose(2, 0, 1).astype(np.float32)
    tifffile.imwrite(tmp_path / "last.tif", image, photometric="minisblack")
    tifffile.imwrite(tmp_path / "first.tif", expected, photometric="minisblack")
    savemat(tmp_path / "last.mat", {"msi": image})
    for name in ("last.tif", "first.tif", "last.mat"):
        assert np.array_equal(read_multispectral(tmp_path / name, BANDS), expected), name


def test_photographs_are_brought_to_the_common_size(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), (10, 20, 30)).save(tmp_path / "a.png")
    pixels = read_colours(tmp_path / "a.png", (4, 5), resize=True)
    assert pixels.shape == (3, 4, 5)
    assert (pixels == np.array([10, 20, 30]).reshape(3, 1, 1)).all()


def _without(*parts: str):
    return lambda root: shutil.rmtree(root.joinpath(*parts))


def _written(name: str, content: bytes):
    return lambda root: (root / name).write_bytes(content)


def _image(name: str, shape: tuple[int, ...], value: float = 1.0):
    def write(root: Path) -> None:
        savemat(root / name, {"msi": np.full(shape, value, np.float32)})

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("MS"), r"MS does not exist; fix: --data must name the folder"),
        (_without("RGB"), r"RGB does not exist"),
        (_without("RGB", "River"), r"class folders differ: River in .*MS alone"),
        (lambda root: (root / "MS" / "Sea").mkdir(), r"differ: Sea in .*MS alone"),
        (_written("MS/Town/2.tif", b"II*\x00 no image"), r"2\.tif cannot be read"),
        (_written("MS/Town/0.mat", b"no matlab"), r"0\.mat cannot be read"),
        (_written("RGB/Town/photo1.jpg", b"\xff\xd8 cut"), r"photo1\.jpg cannot be read"),
        (_image("MS/Town/0.mat", (SIZE, SIZE, 14)), r"\(12, 12, 14\), expected 10 bands"),
        (_image("MS/Town/0.mat", (SIZE, SIZE)), r"expected 10 bands"),
        (_image("MS/Town/0.mat", (8, 8, BANDS)), r"Town/0\.mat is 8x8, .* is 12x12"),
        (_image("MS/Town/0.mat", (SIZE, SIZE, BANDS), np.nan), r"holds NaN or infinity"),
        (lambda root: savemat(root / "MS/Town/0.mat", {"x": 1}), r"no key 'msi', only: x"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, damage, message: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message):
        opened(folder)


def test_an_empty_class_folder_is_named(folder: Path) -> None:
    for file in (folder / "RGB" / "Town").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"Town holds no image\(s\)"):
        opened(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"limit": 2}, "limit must lie between 3"), ({"limit": 99}, "between 3 .* and 24")],
)
def test_limits_are_checked(original: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(original, **options)


def test_bad_arguments_are_named(original: Path) -> None:
    with pytest.raises(ValueError, match="needs a data directory"):
        opened(None)
    with pytest.raises(ValueError, match=r"--rgb must lie in 0\.\.9"):
        opened(original, rgb=(10, 1, 0))


# Several labels an image, as M2S-GL's.


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """Sixteen images a class as .mat, every second of which shows the next class as well."""
    random = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        for kind in ("MS", "RGB"):
            (tmp_path / kind / name).mkdir(parents=True)
        for number in range(16):
            marked = np.zeros((1, 3), np.uint16)
            marked[0, [label, (label + number % 2) % 3]] = 1
            image = random.integers(0, 900, (SIZE, SIZE, BANDS)).astype(np.uint16)
            image[..., :3] += 3000 * marked
            file = tmp_path / "MS" / name / f"{number}.mat"
            savemat(file, {"msi": image, "label": marked})
            pixels = random.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "RGB" / name / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize("evaluate", ["test", "val"])
def test_an_image_stands_once_for_each_of_its_labels_on_one_side_of_the_split(
    several: Path, evaluate: str
) -> None:
    views = recipe_views("m2s_gl", data=several, evaluate=evaluate)
    sides = (views.rich, views.held_out_rich)
    files = [[images.read.files[row] for row in images.rows] for images in sides]
    assert not set(files[0]) & set(files[1])
    for images, names in zip(sides, files, strict=True):
        assert set(images.labels.tolist()) == {0, 1, 2}
        bright = images.loaded().pixels.float().mean((2, 3))[:, :3] > 2000
        assert bright[torch.arange(len(images)), images.labels].all()
        # As often as it has labels, and no label twice.
        assert len(set(zip(names, images.labels.tolist(), strict=True))) == len(images)
        assert bright.sum(1).tolist() == [names.count(name) for name in names]
    if evaluate == "test":
        assert sum(map(len, sides)) == 72
    assert sum("stands once for each of its labels" in line for line in views.summary()) == 1


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ([1, 0], r"label has 2 values .* expected 0 or 1 for each of the 3 class folders"),
        ([0, 3, 1], r"label has 3 values \[0, 1, 3\]"),
        ([0, 1, 1], r"marks River, Town, and not its folder Forest; fix: .* order of their names"),
        ([0, 0, 0], r"marks none, and not its folder Forest"),
    ],
)
def test_a_label_that_cannot_be_is_named(several: Path, label: list[int], message: str) -> None:
    content = {"msi": np.zeros((SIZE, SIZE, BANDS), np.uint16), "label": label}
    savemat(several / "MS/Forest/3.mat", content)
    with pytest.raises(ValueError, match=rf"3\.mat: its {message}|3\.mat: its label {message}"):
        recipe_views("m2s_gl", data=several)


def test_images_of_several_labels_train_and_are_matched_by_any(several: Path) -> None:
    pytest.importorskip("faiss")
    out = several / "out"
    command = ["m2s_gl", "--data", str(several), "--out", str(out), "--teacher", "resnet8x0_5"]
    command += ["--student", "resnet8x0_5", "--epochs", "2", "--matcher-epochs", "1"]
    command += ["--batch-size", "16", "--seeds", "0", "--device", "cpu", "--rows"]
    rows = ["pairs made poor + dense", "SemBridge as published"]
    assert unpaired.main([*command, *rows]) == 0
    assert [run["method"] for run in results(out)] == rows
    assert all("accuracy" in run for run in results(out))
