"""``predict.py``: a student without the job that made it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

import predict
from data.decode import AlikeFiles, fitted


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished") / "job"


@pytest.fixture
def student(run: Callable[..., int], finished: Path, tmp_path: Path) -> Path:
    """Of a job that is run once for all tests and copied."""
    if not finished.exists():
        assert run("--criterion", "kd", "--epochs", "1", out=finished) == 0
    shutil.copytree(finished, tmp_path / "out")
    (file,) = (tmp_path / "out").glob("student-kd*.pt")
    return file


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.full((12, 12), 40, np.uint8)
    pixels[:6] = 200
    Image.fromarray(pixels).save(tmp_path / "north.png")
    return tmp_path / "north.png"


def test_classes_with_probabilities(student: Path, image: Path, capsys: pytest.CaptureFixture):
    assert predict.predict(predict.Options(student, (image,))) == 0
    said = capsys.readouterr().out
    assert "north.png" in said
    assert "%" in said
    content = torch.load(student, weights_only=True)
    for fact in ("network", "arguments", "classes", "bands", "size", "mean", "std", "trained",
                 "accuracy", "structkd"):  # fmt: skip
        assert fact in content


def test_a_teacher_says_what_it_reaches_on_either_side(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    (teacher,) = (tmp_path / "out").glob("teacher-*.pt")
    capsys.readouterr()
    assert predict.predict(predict.Options(teacher)) == 0
    said = capsys.readouterr().out
    assert "% on clean images" in said
    assert "% on poor images" in said


def test_an_exported_file_takes_raw_images(student: Path, image: Path, tmp_path: Path):
    file = tmp_path / "student.pt2"
    predict.predict(predict.Options(student, (image,), torch_export=file))
    network, content = predict.load(student)
    raw = predict.read(image, content)
    exported = torch.export.load(file).module()
    torch.testing.assert_close(exported(raw.repeat(5, 1, 1, 1))[:1], network(raw))


def test_an_onnx_file_answers_as_the_checkpoint(student: Path, image: Path, tmp_path: Path):
    pytest.importorskip("onnxruntime")
    assert predict.predict(predict.Options(student, (image,), onnx=tmp_path / "student.onnx")) == 0


def test_an_image_is_framed_as_the_training_framed_it(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    content = {"bands": 1, "size": [12, 12], "margin": 256 / 224}
    wanted = fitted(pixels[None], 12, margin=256 / 224)
    assert torch.equal(
        predict.read(tmp_path / "a.png", content), torch.tensor(wanted)[None].float()
    )


def test_what_a_checkpoint_says_of_the_frame(job: Callable[..., Any]):
    session = job()
    assert session.facts_of("student")["margin"] == 1.0
    session.views = replace(
        session.views, poor=replace(session.views.poor, read=AlikeFiles([], 12, margin=1.5))
    )
    assert session.facts_of("student")["margin"] == 1.5


def test_an_image_of_another_modality_is_refused(student: Path, tmp_path: Path):
    np.save(tmp_path / "five.npy", np.zeros((5, 12, 14), np.uint8))
    with pytest.raises(ValueError, match="5 band"):
        predict.predict(predict.Options(student, (tmp_path / "five.npy",)))


def test_what_is_not_there_or_cannot_be_written_is_one_line(
    student: Path, image: Path, tmp_path: Path, capfd: pytest.CaptureFixture
):
    def said(*more: object) -> str:
        options = lambda: tyro.cli(predict.Options, args=[str(student), *map(str, more)])  # noqa: E731
        assert predict.reported(lambda: predict.predict(options()), trains=False) == 2
        (line,) = capfd.readouterr().err.splitlines()
        return str(line)

    assert "nowhere.png does not exist; fix: name an image file" in said(tmp_path / "nowhere.png")
    assert f"image {tmp_path} is a folder; fix: name an image file" in said(tmp_path)
    assert "--top must be at least 1, got 0" in said(image, "--top", 0)
    told = said(image, "--torch-export", image / "student.pt2")
    assert "north.png" in told
    assert "resumes" not in told


def test_an_export_makes_its_folder(student: Path, tmp_path: Path):
    file = tmp_path / "new" / "student.pt2"
    assert predict.predict(predict.Options(student, torch_export=file)) == 0
    assert [path.name for path in file.parent.iterdir()] == ["student.pt2"]


def test_a_damaged_file_is_named(student: Path):
    student.write_bytes(student.read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged"):
        predict.load(student)
