"""``segment.py``: tiny scenes in folders, from nothing to a table, a picture and a prediction."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.classification import multiclass_jaccard_index

import models
import predict
import segment
import train
from data import masks as scenes
from papers import __main__ as papers
from recipe import recipe
from segment import Options
from structkd import Features, SupervisionLoss
from tests.examples import layouts

NAMES = [f"scene{n:02d}" for n in range(12)]
Runner = Callable[..., int]
FAST = (
    "--teacher", "unet8", "--student", "unet8", "--epochs", "2", "--batch-size", "4", "--seeds",
    "0", "--crop", "16", "--device", "cpu",
)  # fmt: skip


def write(folder: Path, name: str, image: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / f"{name}.png")


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    return layouts.write_scenes(tmp_path / "scenes")


@pytest.fixture
def run(folders: Path, tmp_path: Path) -> Runner:
    def run(*more: str, out: Path = tmp_path / "out", root: Path = folders) -> int:
        given = [f"--{side}={root / side}" for side in ("rich", "poor", "masks")]
        return segment.main(["scenes", *given, "--out", str(out), *FAST, *more])

    return run


def results(out: Path) -> list[dict]:
    return json.loads((out / "results.json").read_text())["runs"]


def test_two_folders_and_masks_become_a_table_and_a_picture(
    run: Runner, tmp_path: Path, capsys: pytest.CaptureFixture
):
    rows = ["alone", "mean teacher", "dense", "[kd, {type: ChannelWiseLoss, weight: 3}]"]
    assert run("--labels", "5", "--criterion", *rows) == 0
    found = results(tmp_path / "out")
    assert [one["method"] for one in found] == rows
    for one in found:
        assert 0 <= one["IoU"] <= 100
        assert one["IoU"] == pytest.approx(np.mean(list(one["classes"].values())))
        assert set(one["classes"]) == {"0", "255"}
    assert (tmp_path / "out" / "scenes.png").stat().st_size > 1000
    told = capsys.readouterr().out
    assert "5 of the training scenes have labels" in told
    assert "IoU %" in (tmp_path / "out" / "results.md").read_text()
    # What is finished is not trained again.
    assert run("--labels", "5", "--criterion", *rows) == 0
    assert capsys.readouterr().out.count("(finished before)") == len(rows)


def test_a_training_that_is_cut_off_goes_on_to_the_same_bits(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = ("--criterion", "mean teacher", "{type: DenseStructureLoss, weight: 5}", "--labels", "4")
    run(*rows, out=tmp_path / "whole")
    kept, save = [], segment.train.Epochs.save

    def stopped(self: object, *rest: object) -> None:
        save(self, *rest)
        kept.append(1)
        if len(kept) in (3, 6):  # the first epoch of a student
            raise KeyboardInterrupt

    monkeypatch.setattr(segment.train.Epochs, "save", stopped)
    cut = tmp_path / "cut"
    assert [run(*rows, out=cut) for _ in range(3)] == [130, 130, 0]
    assert [one["IoU"] for one in results(cut)] == [
        one["IoU"] for one in results(tmp_path / "whole")
    ]
    sums = [
        {torch.load(f, weights_only=True)["sha256"] for f in (tmp_path / out).glob("student-*.pt")}
        for out in ("whole", "cut")
    ]
    assert len(sums[0]) == 2
    assert sums[0] == sums[1]


def test_intersection_over_union_is_by_counts_over_all_scenes(folders: Path):
    options = recipe(
        "scenes", Options, rich=(folders / "rich",), poor=(folders / "poor",),
        masks=folders / "masks", device="cpu", test_fraction=0.5,
    )  # fmt: skip
    views = scenes.open_scene_views(options)

    class Bright(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.cat([-images, images], 1)

    found = segment.ious(Bright(), views.held_out_poor, views.poor, views.held_out_masks, options)
    rows = torch.arange(len(views.held_out_poor))
    images = views.poor.statistics.normalise(views.held_out_poor.take(rows))
    wanted = multiclass_jaccard_index(
        (images[:, 0] > 0).long(), views.held_out_masks.take(rows), 2, average=None
    )
    assert found == pytest.approx((100 * wanted).tolist(), abs=1e-4)
    assert found[1] > 50


def test_both_modalities_and_the_mask_are_cropped_alike(folders: Path):
    options = recipe(
        "scenes", Options, rich=(folders / "rich",), poor=(folders / "masks",),
        masks=folders / "masks", device="cpu", crop=16, batch_size=4,
    )  # fmt: skip
    views = scenes.open_scene_views(options)
    batches = scenes.SceneBatches(options, poor=views.poor, rich=views.rich, masks=views.masks)
    seen = []
    # What a training is tried with is as large as what it trains on.
    for batch in (batches.first(), *batches.epoch(0)):
        assert batch.poor.shape[-2:] == batch.rich.shape[-2:] == (16, 16)
        assert torch.equal((batch.poor[:, 0] > 0).long(), batch.target)
        assert torch.equal((batch.rich[:, 0] > 0).long(), batch.target)
        seen.append(batch.target)
    again = [batch.target for batch in batches.epoch(0)]
    assert all(torch.equal(*pair) for pair in zip(seen[1:], again, strict=True))
    # The same bits, in memory or read by workers.
    loaded = views.loaded()
    held = scenes.SceneBatches(options, poor=loaded.poor, rich=loaded.rich, masks=loaded.masks)
    read = scenes.SceneBatches(
        options, poor=views.poor, rich=views.rich, masks=views.masks, workers=2
    )
    for one, other in zip(held.epoch(1), read.epoch(1), strict=True):
        assert torch.equal(one.poor, other.poor)
        assert torch.equal(one.target, other.target)


def test_scenes_without_a_mask_are_pairs_without_labels(folders: Path):
    for name in NAMES[:6]:
        (folders / "masks" / f"{name}.png").unlink()
    options = recipe(
        "scenes", Options, rich=(folders / "rich",), poor=(folders / "poor",),
        masks=folders / "masks", device="cpu",
    )  # fmt: skip
    views = scenes.open_scene_views(options)
    assert len(views.poor) == 11
    assert len(views.held_out_poor) == 1
    assert int((views.poor.known() >= 0).sum()) == 5
    assert (views.masks.take(torch.arange(11)) == -100).flatten(1).all(1).sum() == 6


def test_an_accent_in_either_spelling_is_one_name(folders: Path):
    for side, form in {"rich": "NFC", "poor": "NFD", "masks": "NFD"}.items():
        for file in (folders / side).iterdir():
            file.rename(file.with_stem(unicodedata.normalize(form, f"Évora {file.stem}")))
    options = recipe(
        "scenes", Options, rich=(folders / "rich",), poor=(folders / "poor",),
        masks=folders / "masks",
    )  # fmt: skip
    views = scenes.open_scene_views(options)
    assert (views.poor.known() >= 0).all()
    assert len(views.poor) + len(views.held_out_poor) == 12


def test_an_ignored_value_is_no_label_and_finer_masks_are_voted_on(folders: Path):
    for name in NAMES:
        file = folders / "masks" / f"{name}.png"
        mask = np.array(Image.open(file)).repeat(2, 0).repeat(2, 1)
        mask[:8, :8] = 7
        mask[16, 16] = 255 - mask[16, 16]  # one of four pixels
        Image.fromarray(mask).save(file)
    options = recipe(
        "scenes", Options, rich=(folders / "rich",), poor=(folders / "poor",),
        masks=folders / "masks", ignore=7, finer=2,
    )  # fmt: skip
    targets = scenes.open_scene_views(options).masks.take(torch.arange(3))
    assert (targets[:, :4, :4] == -100).all()
    assert (targets[:, 4:] >= 0).all()
    assert torch.equal(targets[:, 8, 8], targets[:, 9, 9])


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_palette_masks_numbers_are_its_classes(tmp_path: Path, suffix: str):
    numbers = np.array([[0, 1, 2], [255, 2, 1]], np.uint8)
    image = Image.fromarray(numbers, mode="P")
    image.putpalette(np.random.default_rng(0).permutation(768).astype(np.uint8).tolist())
    image.save(tmp_path / f"mask.{suffix}")
    assert np.array_equal(scenes._read_mask(tmp_path / f"mask.{suffix}"), numbers)


@pytest.mark.parametrize("values", [(), (0, 255)])
def test_every_mask_is_read_once(folders: Path, values: tuple, monkeypatch: pytest.MonkeyPatch):
    seen, read = [], scenes.read_bands

    def counted(file: Path, **options: bool) -> np.ndarray:
        seen.append(file.stem)
        return read(file, **options)

    monkeypatch.setattr(scenes, "read_bands", counted)
    options = recipe(
        "scenes", Options, rich=(folders / "rich",), poor=(folders / "poor",),
        masks=folders / "masks", values=values,
    )  # fmt: skip
    views = scenes.open_scene_views(options).held(options)
    assert views.masks.fingerprint != views.held_out_masks.fingerprint
    assert len(views.summary()) == 3
    assert sorted(seen) == NAMES


@pytest.mark.parametrize("kind", ["bands", "numbers"])
def test_scenes_to_test_on_that_are_unlike_those_to_train_on_are_refused(tmp_path: Path, kind: str):
    for half in ("train", "test"):
        for side in ("rich", "poor", "masks"):
            shape = (16, 16, 3) if (side, half, kind) == ("poor", "test", "bands") else (16, 16)
            deep = (side, half, kind) == ("poor", "test", "numbers")
            for name in ("a", "b"):
                image = np.arange(np.prod(shape)).reshape(shape) % 2
                image = image.astype(np.uint16 if deep else np.uint8)
                write(tmp_path / side / half, name, image)
    options = recipe(
        "scenes", Options, rich=(tmp_path / "rich",), poor=(tmp_path / "poor",),
        masks=tmp_path / "masks",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"to train on have 1 band\(s\) in torch.uint8, those"):
        scenes.open_scene_views(options)


def test_any_size_is_predicted_whole():
    network = torch.nn.Sequential(torch.nn.MaxPool2d(32), torch.nn.Upsample(scale_factor=32))
    assert models.padded(network, torch.randn(1, 2, 45, 33)).shape == (1, 2, 45, 33)


def test_the_mean_teacher_believes_what_is_sure_of_scenes_without_labels():
    class Sure(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.scale * torch.cat([-images, images], 1)

    model = train.MeanTeacher(Sure())
    x = torch.tensor([[[[5.0, 0.1]]], [[[-5.0, 5.0]]], [[[5.0, -5.0]]]])
    target = torch.tensor([[[-100, -100]], [[-100, -100]], [[0, -100]]])
    logits, told = model(x, target)
    assert told.tolist() == [[[1, -100]], [[0, 1]], [[-100, -100]]]
    value = SupervisionLoss()(Features(logits=logits), Features(), told)
    value.backward()
    assert model.network.scale.grad is not None
    assert model.average.scale.grad is None
    with torch.no_grad():
        model.network.scale.fill_(2.0)
    model(x, target)
    assert float(model.average.scale) == pytest.approx(1.01)


def _smaller_mask(root: Path) -> None:
    write(root / "masks", NAMES[0], np.zeros((16, 16), np.uint8))


def _odd_value(root: Path) -> None:
    mask = np.array(Image.open(root / "masks" / f"{NAMES[3]}.png"))
    mask[0, 0] = 9
    write(root / "masks", NAMES[3], mask)


def _other_names(root: Path) -> None:
    for file in (root / "masks").iterdir():
        file.rename(file.with_name(f"mask_{file.name}"))


def _lonely(root: Path) -> None:
    (root / "poor" / f"{NAMES[5]}.png").unlink()


def _empty(root: Path) -> None:
    for file in (root / "masks").iterdir():
        file.unlink()


def _damaged(root: Path) -> None:
    (root / "rich" / f"{NAMES[2]}.png").write_bytes(b"no image")


def _colour_mask(root: Path) -> None:
    write(root / "masks", NAMES[1], np.zeros((32, 32, 3), np.uint8))


def _nothing(root: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("wrong", "more", "told"),
    [
        (_smaller_mask, ("--values", "0", "255"), "scene00.png is 16x16, its image is 32x32"),
        (_odd_value, ("--values", "0", "255"), "scene03.png holds 9, the classes are 0, 255"),
        (_colour_mask, ("--values", "0", "255"), "scene01.png has 3 bands"),
        (_other_names, (), "no mask of"),
        (_lonely, (), "scene05.png; fix: add the partners"),
        (_empty, (), "holds no image"),
        (_damaged, (), "scene02.png cannot be read"),
        (_nothing, ("--values", "0", "255", "4"), "no labelled training scene has a pixel of 4"),
        (_nothing, ("--values", "0", "255", "--ignore", "255"), "--ignore 255 is one of --values"),
        (_nothing, ("--values", "0", "255", "--classes", "dry"), "--classes must name each"),
        (_nothing, ("--labels", "99"), "--labels must lie between 1 and 10"),
        (_nothing, ("--crop", "64"), "--crop must be at most 32"),
        (_nothing, ("--crop", "12"), "does not take images of"),
        (_nothing, ("--judged", "flood"), "--judged must be one of 0, 255"),
        (_nothing, ("--layers", "middle"), "--layers must be encoder, decoder or both"),
        (_nothing, ("--criterion", "rkd"), "RelationalLoss"),
    ],
)
def test_wrong_input_is_one_helpful_line(
    run: Runner,
    folders: Path,
    wrong: Callable,
    more: tuple,
    told: str,
    capfd: pytest.CaptureFixture,
):
    wrong(folders)
    assert run("--criterion", "alone", *more) == 2 if "--criterion" not in more else run(*more) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert told in lines[0]


def test_networks_of_smp_are_taken_by_name(run: Runner, tmp_path: Path):
    pytest.importorskip("segmentation_models_pytorch")
    more = ("--teacher", "Unet/resnet18", "--crop", "32", "--epochs", "1", "--layers", "encoder")
    assert run("--criterion", "dense", "--student", "FPN/resnet18", *more) == 0
    assert run("--criterion", "kd", "--student", "FPN/mobilenet_v2", *more) == 0
    assert len(results(tmp_path / "out")) == 2


def test_a_student_marks_the_pixels_of_an_image_file_and_is_exported(
    run: Runner, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert run("--criterion", "alone", "--epochs", "1") == 0
    (student,) = (tmp_path / "out").glob("student-*.pt")
    image = folders / "poor" / f"{NAMES[0]}.png"
    exported = tmp_path / "student.pt2"
    given = predict.Options(student, (image,), masks=tmp_path / "marked", torch_export=exported)
    capsys.readouterr()
    assert predict.predict(given) == 0
    told = capsys.readouterr().out
    assert "% of the pixels" in told
    marked = np.array(Image.open(tmp_path / "marked" / f"{NAMES[0]}.png"))
    assert marked.shape == (32, 32)
    assert set(np.unique(marked)) <= {0, 255}
    network, content = predict.load(student)
    logits = network(predict.read(image, content))
    assert np.array_equal(marked, 255 * logits.argmax(1)[0].numpy())
    program = torch.export.load(exported).module()
    assert torch.allclose(program(predict.read(image, content)), logits, atol=1e-4)


def test_a_mask_takes_no_place_of_an_image_or_of_another_mask(
    run: Runner, folders: Path, tmp_path: Path
):
    assert run("--criterion", "alone", "--epochs", "1") == 0
    (student,) = (tmp_path / "out").glob("student-*.pt")
    image = folders / "poor" / f"{NAMES[0]}.png"
    other = tmp_path / "other" / image.name
    other.parent.mkdir()
    other.write_bytes(image.read_bytes())
    for images, masks in (((image,), image.parent), ((image, other), tmp_path / "marked")):
        with pytest.raises(ValueError, match=rf"would write .*{image.name} over"):
            predict.predict(predict.Options(student, images, masks=masks))
    assert image.read_bytes() == other.read_bytes()
    assert not (tmp_path / "marked").exists()


def test_labels_over_draws_of_scenes_become_one_table(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    given = [f"--{side}={folders / side}" for side in ("rich", "poor", "masks")]
    out = tmp_path / "series"
    own = ["--pixels", "--labels", "4", "all", "--draws", "1", "2", "--criterion", "alone", "dense"]
    more = [*FAST, "--out", str(out), "--epochs", "1"]
    assert papers.main(["labels", "scenes", *given, *own, *more]) == 0
    found = results(out)
    assert len(found) == 8
    assert {one["seed"] for one in found} == {1, 2}
    assert "labels: 4, draw 2" in capsys.readouterr().out
    assert len(list(out.glob("teacher-*.pt"))) == 3  # of either draw of four, and of all
    table = (out / "labels.md").read_text()
    assert "| labels | 4 | all |" in table
    assert table.count("±") == 4
    assert (out / "labels.png").exists()
