"""``python examples/data check RECIPE``: all that is there and all that is wrong, in one report."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from tests.examples.files import two_sides, values, write

FILE = Path(__file__).parents[2] / "examples/data/__main__.py"
Check = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Check:
    """Runs the command: its exit code, and the lines that it printed."""
    spec = importlib.util.spec_from_file_location("data_command", FILE)
    command = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, command)
    spec.loader.exec_module(command)

    def run(*arguments: object) -> tuple[int, list[str]]:
        code = command.main(["check", *map(str, arguments)])
        said = capsys.readouterr()
        return code, (said.err if code == 2 else said.out).splitlines()

    return run


def test_a_sound_set_is_told_as_at_the_start_of_a_training(tmp_path: Path, check: Check) -> None:
    rich, poor = two_sides(tmp_path, count=10)
    assert check("pairs", "--rich", rich, "--poor", poor) == (0, [
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
    ])  # fmt: skip


@pytest.mark.parametrize("first", [False, True], ids=["some", "the first of all"])
def test_all_kinds_are_counted_the_damaged_first_three_of_each_named(
    tmp_path: Path, check: Check, first: bool
) -> None:
    # The folder's name is no verdict on what lies in it.
    rich, poor = two_sides(tmp_path / "bands 64x64, holds uint8", count=40)
    command = ("pairs", "--rich", rich, "--poor", poor)
    begin = 0 if first else 1
    for number in range(begin, begin + 5):
        (poor / "boat" / f"{number:02}.png").write_bytes(b"junk")
    write(rich / "boat" / f"{10 * begin:02}.tif", values(8, 8, 4, kind="uint16"))
    write(poor / "boat" / "20.png", values(9, 8))
    write(poor / "boat" / "21.png", values(8, 8, kind="uint16"))
    np.save(rich / "buoy" / "00.npy", np.full((8, 8, 5), np.nan, np.float32))
    (rich / "buoy" / "00.tif").unlink()
    for number in range(30, 34):
        (poor / "buoy" / f"{number:02}.png").unlink()
    code, lines = check(*command)
    assert code == 1
    heads = [line for line in lines[1:] if line[0] != " " and not line.startswith(("tr", "te"))]
    assert heads == [
        "damaged: 6", "without a partner: 4", "of other bands: 1",
        "of another kind of number: 1", "of another size: 1", "images that cannot be used: 13",
    ]  # fmt: skip
    assert lines.count("  and 3 more") == 1
    assert lines.count("  and 1 more") == 1
    for name in ("20.png is 9x8", "21.png holds", f"{10 * begin:02}.tif has 4 band(s)"):
        assert any(name in line for line in lines), name
    # What has no partner may be left out; the rest stays wrong.
    code, lines = check(*command, "--only-pairs")
    assert code == 1
    assert "left out, without a partner: 4" in lines
    assert "images that cannot be used: 9" in lines


def test_partners_that_are_missing_are_no_fault_where_only_pairs_are_wanted(
    tmp_path: Path, check: Check
) -> None:
    rich, poor = two_sides(tmp_path, count=6)
    (poor / "buoy" / "02.png").unlink()
    assert check("pairs", "--rich", rich, "--poor", poor)[0] == 1
    code, lines = check("pairs", "--rich", rich, "--poor", poor, "--only-pairs")
    assert code == 0
    assert lines[-1].startswith("pairs: 9 training, 2 held out")


def test_sets_without_pairs_are_read_whole(tmp_path: Path, check: Check) -> None:
    for name in ("boat", "buoy"):
        for number in range(5):
            ms, rgb = (tmp_path / side / name / f"{number}.tif" for side in ("MS", "RGB"))
            write(ms, values(8, 8, 10, seed=number, kind="uint16"))
            write(rgb.with_suffix(".png"), values(8, 8, 3, seed=number))
    assert check("s2s_eu", "--data", tmp_path)[0] == 0
    (tmp_path / "MS/boat/0.tif").write_bytes(b"junk")
    (tmp_path / "MS/buoy/1.tif").unlink()
    (tmp_path / "MS/buoy/1.mat").write_bytes(b"junk")
    savemat(tmp_path / "MS/buoy/2.mat", {"msi": np.zeros((8, 8, 7))})
    write(tmp_path / "MS/boat/3.tif", values(6, 6, 10, kind="uint16"))
    (tmp_path / "RGB/boat/0.png").write_bytes(b"junk")
    code, lines = check("s2s_eu", "--data", tmp_path)
    assert code == 1
    assert {"damaged: 3", "of other bands: 1", "of another size: 1"} <= set(lines)
    rich, poor = two_sides(tmp_path / "own", count=5)
    (poor / "boat" / "00.png").write_bytes(b"junk")
    assert check("folders", "--rich", rich, "--poor", poor, "--view", "bands:0")[0] == 1


def test_a_class_far_from_the_rest_is_warned_of(tmp_path: Path, check: Check) -> None:
    for name, count in {"a": 100, "b": 100, "c": 5}.items():
        for number in range(count):
            write(tmp_path / name / f"{number}.png", values(4, 4, 3))
    code, lines = check("folder", "--data", tmp_path, "--view", "grey")
    assert code == 0
    told = "warning: class 'c' has 4 training rich image(s), others about 80"
    assert told in lines
    assert "poor: 164 training and 41 held-out images, 1x4x4, 3 classes of 4 to 80" in lines


def test_several_sizes_are_told_before_anything_is_trained(
    tmp_path: Path, check: Check, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    import train

    for name in ("a", "b"):
        for number in range(10):
            size = (8 + 4 * (number % 2), 8)
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size).save(tmp_path / "data" / name / f"{number}.png")
    code, lines = check("folder", "--data", tmp_path / "data")
    assert code == 1
    assert "of another size: 10" in lines
    command = ["folder", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert train.main([*command, "--memory", "0"]) == 2
    said = capsys.readouterr().err
    assert "have 2 sizes: " in said
    assert "fix: --size N" in said
    assert trained == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pair"], "unknown recipe 'pair'; did you mean 'pairs'"),
        (["pairs"], "two folders are needed; fix: --rich DIR --poor DIR"),
        (["mnist", "--size", "8"], "--size has no effect on mnist"),
        (["folder", "--rich", "x"], "--rich has no effect on folder"),
        (["pairs", "--size", "-1"], "--size must be at least 0"),
        (["mnist", "--data", "x"], "--data x is not for mnist"),
        (["scenes"], "recipe scenes is for another script, as its option 'layers' tells"),
        (["folder"], "needs a data directory; fix: add --data DIR"),
    ],
)
def test_what_cannot_be_checked_is_one_line(
    arguments: list[str], message: str, check: Check
) -> None:
    code, lines = check(*arguments)
    assert (code, len(lines)) == (2, 1)
    assert message in lines[0]


def test_what_is_shown_goes_to_an_image_file_alone(
    recipe: Path, check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show = sys.modules["data_command"].main
    assert show(["show", str(recipe), "--out", str(tmp_path / "digit")]) == 2
    assert "to --out FILE.png" in capsys.readouterr().err
    file = tmp_path / "new/digit.png"
    assert show(["show", str(recipe), "--out", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: north\n"
    assert Image.open(file).size == (12, 12)
