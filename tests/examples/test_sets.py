"""An epoch on every data set in its own layout on disk, from its own command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.examples import layouts
from tests.examples.files import two_sides, values, write

SMALL = (
    *("--epochs", "1", "--seeds", "1", "--batch-size", "4", "--precision", "fp32"),
    *("--teacher", "resnet8x0_5", "--student", "resnet8x0_5"),
)


def data(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Writes a data set and gives the arguments that name it."""
    root.mkdir()
    if name == "pairs":
        rich, poor = two_sides(root, count=10)
        return ("--rich", str(rich), "--poor", str(poor), "--size", "16")
    if name == "cml":
        rich, poor = two_sides(root, count=10)
        rich.rename(root / "optics")
        poor.rename(root / "radar")
        return ("--data", str(root), "--size", "16", "--pad", "2")
    if name == "folder":
        layouts.classes_of(root, ["a", "b"], 10, size=20)
        return ("--data", str(root), "--size", "16", "--poor", "lowres:4")
    if name in ("imagenet", "imagenet100"):
        layouts.write_imagenet(root)
        (root / "classes.txt").write_text("\n".join(layouts.WNIDS[:2]))
        more = ("--classes", str(root / "classes.txt")) if name == "imagenet100" else ()
        return ("--data", str(root), "--size", "16", "--poor", "blur:1", *more)
    if name in ("cifar100", "stl10"):
        getattr(layouts, f"write_{name}")(root, monkeypatch)
        return ("--data", str(root), "--poor", "grey")
    found = getattr(layouts, f"write_{name.removeprefix('unpaired-')}")(root)
    return ("--data", str(found))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["pairs", "cml", "folder", "imagenet", "imagenet100", "cifar100", "stl10", "tiny_imagenet",
     "eurosat", "ombria"],
)  # fmt: skip
def test_an_epoch_on_each(
    name: str, tmp_path: Path, train: Callable[..., int], trained: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    arguments = data(name, tmp_path / "data", monkeypatch)
    few = ("--limit", "8") if name in ("ombria", "eurosat", "pairs", "cml", "folder") else ()
    assert train(*arguments, *SMALL, *few, "--method", "kd", name=name, out=tmp_path / "out") == 0
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert [run["method"] for run in runs] == ["kd"]
    assert 0 <= runs[0]["accuracy"] <= 100
    assert len(trained) == 2


@pytest.mark.slow
def test_real_bands_without_pairs(
    tmp_path: Path, train: Callable[..., int], trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = data("unpaired-eurosat", tmp_path / "data", monkeypatch)
    more = ("--limit", "8", "--variant", "ssm", "--matcher", "resnet8x0_5")
    assert train(*arguments, *SMALL, *more, name="unpaired-eurosat", out=tmp_path / "out") == 0
    assert len(trained) == 3  # teacher, matcher, student


def test_a_teacher_is_not_asked_about_images_that_it_cannot_see(
    tmp_path: Path, train: Callable[..., int], trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = data("pairs", tmp_path / "data", monkeypatch)
    out = tmp_path / "out"
    assert train(*arguments, *SMALL, "--method", "kd", name="pairs", kind="compare", out=out) == 0
    text = (out / "results.md").read_text()
    assert "Baseline-T, clean images" in text
    assert "Baseline-T, poor images" not in text


def test_one_line_for_what_is_wrong(
    tmp_path: Path, train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    rich, poor = two_sides(tmp_path)
    write(poor / "boat" / "lonely.png", values(8, 8))
    assert train("--rich", str(rich), "--poor", str(poor), name="pairs", out=tmp_path / "o") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "lonely.png" in told
    assert train("--size", "8", name="tiny", out=tmp_path / "o") == 2
    assert "--size is not for tiny" in capsys.readouterr().err
