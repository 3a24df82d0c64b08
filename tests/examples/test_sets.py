"""An epoch on every data set in its own layout on disk, from its own command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import train
import unpaired
from papers.__main__ import main as papers
from tests.examples import layouts
from tests.examples.entries import outcome
from tests.examples.files import two_sides, values, write

SMALL = (
    *("--epochs", "1", "--seeds", "0", "--batch-size", "4", "--device", "cpu"),
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
        return ("--data", str(root), "--size", "16", "--view", "lowres:4")
    if name in ("imagenet", "imagenet100"):
        layouts.write_imagenet(root)
        (root / "classes.txt").write_text("\n".join(layouts.WNIDS[:2]))
        more = ("--classes", str(root / "classes.txt")) if name == "imagenet100" else ()
        return ("--data", str(root), "--size", "16", "--view", "blur:1", *more)
    if name in ("cifar100", "stl10"):
        getattr(layouts, f"write_{name}")(root, monkeypatch)
        return ("--data", str(root), "--view", "grey")
    found = getattr(layouts, f"write_{name.removeprefix('unpaired-')}")(root)
    return ("--data", str(found))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["pairs", "cml", "folder", "imagenet", "imagenet100", "cifar100", "stl10", "tiny_imagenet",
     "eurosat", "ombria"],
)  # fmt: skip
def test_an_epoch_on_each(
    name: str, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = data(name, tmp_path / "data", monkeypatch)
    few = ("--limit", "8") if name in ("ombria", "eurosat", "pairs", "cml", "folder") else ()
    out = ("--out", str(tmp_path / "out"))
    assert train.main([name, *arguments, *SMALL, *few, "--criterion", "kd", *out]) == 0
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert [run["method"] for run in runs] == ["kd"]
    assert 0 <= runs[0]["accuracy"] <= 100
    assert len(trained) == 2
    assert outcome(tmp_path / "out")[1]


@pytest.mark.slow
def test_real_bands_without_pairs(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    arguments = data("unpaired-eurosat", tmp_path / "data", monkeypatch)
    more = ("--limit", "8", "--rows", "matching", "--matcher", "resnet8x0_5")
    out = ("--out", str(tmp_path / "out"), "--matcher-epochs", "1")
    assert unpaired.main(["unpaired-eurosat", *arguments, *SMALL, *more, *out]) == 0
    assert len(trained) == 3  # teacher, matcher, student


def test_a_teacher_is_not_asked_about_images_that_it_cannot_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = data("pairs", tmp_path / "data", monkeypatch)
    out = ("--criterion", "kd", "--out", str(tmp_path / "out"))
    assert papers(["compare", "pairs", *arguments, *SMALL, *out]) == 0
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "Baseline-T, clean images" in text
    assert "Baseline-T, poor images" not in text


def test_one_line_for_what_is_wrong(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rich, poor = two_sides(tmp_path)
    write(poor / "boat" / "lonely.png", values(8, 8))
    out = ("--out", str(tmp_path / "o"))
    assert train.main(["pairs", "--rich", str(rich), "--poor", str(poor), *out]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "lonely.png" in told
    assert train.main([str(recipe), "--size", "8", *out]) == 2
    assert "--size has no effect on tiny" in capsys.readouterr().err
