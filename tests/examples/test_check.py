"""``data.py check``: what is there, what is wrong, and that nothing is left unsaid."""

from __future__ import annotations

from pathlib import Path

import pytest

from crossmodal.data.command import main
from tests.examples.files import two_sides, values, write


def test_a_sound_set_is_told_as_at_the_start_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rich, poor = two_sides(tmp_path, count=10)
    assert main(["check", "pairs", "--rich", str(rich), "--poor", str(poor)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "classes: 2 (boat, buoy)",
        "train: 16 images, 8 to 8 a class",
        "train, rich: 16 images of 5 band(s), 8x8, float32",
        "train, poor: 16 images of 1 band(s), 8x8, uint8",
        "test: 4 images, 2 to 2 a class",
        "test, rich: 4 images of 5 band(s), 8x8, float32",
        "test, poor: 4 images of 1 band(s), 8x8, uint8",
        "images that cannot be used: 0",
        "rich: 16 training and 4 held-out images, 5x8x8, 2 classes of 8 to 8",
        "poor: 16 training and 4 held-out images, 1x8x8, 2 classes of 8 to 8",
        "pairs: 16 training, 4 held out",
    ]


def test_every_image_that_cannot_be_used_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rich, poor = two_sides(tmp_path, count=40)
    for number in range(10):
        (poor / "buoy" / f"{number:02}.png").write_bytes(b"junk")
    write(rich / "boat" / "39.tif", values(8, 8, 4, kind="uint16"))
    write(poor / "boat" / "38.png", values(9, 8))
    assert main(["check", "pairs", "--rich", str(rich), "--poor", str(poor)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "images that cannot be used: 12" in lines
    assert any("39.tif has 4 band(s)" in line for line in lines)
    assert any("38.png is 9x8" in line for line in lines)
    assert sum("cannot be read" in line for line in lines) == 10
    for number in range(10, 30):
        (poor / "buoy" / f"{number:02}.png").write_bytes(b"junk")
    assert main(["check", "pairs", "--rich", str(rich), "--poor", str(poor)]) == 1
    assert "and 12 more that cannot be used" in capsys.readouterr().out.splitlines()
    assert not any(line.startswith("pairs:") for line in lines)


def test_a_class_far_from_the_rest_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in {"a": 100, "b": 100, "c": 5}.items():
        for number in range(count):
            write(tmp_path / name / f"{number}.png", values(4, 4, 3))
    assert main(["check", "folder", "--data", str(tmp_path), "--poor", "grey"]) == 0
    out = capsys.readouterr().out
    assert "warning: class 'c' has 4 training rich image(s), others about 80" in out
    assert "poor: 164 training and 41 held-out images, 1x4x4" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "pair"], "unknown data set 'pair'; did you mean 'pairs'"),
        (["check", "pairs"], "needs both folders; fix: --rich DIR --poor DIR"),
        (["check", "mnist", "--size", "8"], "--size is not for mnist, which has no options"),
        (["check", "pairs", "--size", "0"], "--size must be at least 1, got 0"),
        (["check", "folder", "--rich", "x"], "--rich is not for folder, which has --size, --test"),
        (["check", "mnist", "--data", "x"], "--data x is not for mnist"),
        (["check", "unpaired-tiny", "--pseudo", "nois"], "--pseudo nois: unknown poverty"),
        (["check", "tiny", "--amount", "0.3", "--poor", "blur:2"], "--amount has no effect here"),
        (["check", "folder", "--dat", "x"], "did you mean '--data'"),
    ],
)
def test_one_line_on_stderr(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
