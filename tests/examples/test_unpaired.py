"""``unpaired.py``: free pairs, matches and two folders of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import unpaired
from unpaired import ROWS, rematch_epochs


def test_every_row_trains_and_goes_on_to_the_same_result(recipe: Path, tmp_path: Path):
    pytest.importorskip("faiss")
    rows = list(ROWS)
    arguments = [str(recipe), "--out", str(tmp_path / "out"), "--matcher-epochs", "1"]
    arguments += ["--epochs", "2", "--teacher-epochs", "2", "--rows", *rows]
    assert unpaired.main(arguments) == 0
    found = json.loads((tmp_path / "out/results.json").read_text())["runs"]
    assert [run["method"] for run in found] == rows
    assert all("accuracy" in run for run in found)
    assert ["KD" in run["terms"] for run in found] == [
        bool(row.first) or row.criterion == "" for row in ROWS.values()
    ]
    published = found[rows.index("SemBridge as published")]
    assert len(published["trace"]["transport"]) == 3
    assert unpaired.main(arguments) == 0


def folders(root: Path) -> tuple[Path, Path]:
    random = np.random.default_rng(0)
    for side, shape in (("rich", (16, 16, 3)), ("poor", (16, 16))):
        for number, name in enumerate(("town", "wood")):
            (root / side / name).mkdir(parents=True)
            for k in range(10):
                image = random.integers(0, 80, shape) + 120 * number
                place = root / side / name / f"{side}-{k}.png"
                Image.fromarray(image.astype("uint8")).save(place)
    return root / "rich", root / "poor"


def test_two_folders_that_are_not_paired(tmp_path: Path, capsys: pytest.CaptureFixture):
    rich, poor = folders(tmp_path)
    command = ["folders", "--rich", str(rich), "--poor", str(poor), "--out", str(tmp_path / "out")]
    command += ["--teacher", "resnet8", "--student", "resnet8x0_5", "--epochs", "1"]
    command += ["--batch-size", "4", "--seeds", "0", "--device", "cpu"]
    rows = ["--rows", "alone", "pairs made poor + dense"]
    assert unpaired.main([*command, "--view", "grey", *rows]) == 0
    assert "free pairs" in capsys.readouterr().out
    assert unpaired.main([*command, "--view", "noise:0.5", *rows]) == 2
    assert "--pseudo" in capsys.readouterr().err  # three channels are not one


def test_matches_refuse_missing_labels(recipe: Path, capsys: pytest.CaptureFixture):
    assert unpaired.main([str(recipe), "--labels", "20", "--rows", "matching"]) == 2
    assert "--labels" in capsys.readouterr().err


def test_published_students_are_resnet34():
    for name in ("s2s_eu", "s2s_cn", "m2s_gl"):
        assert unpaired.train.recipe(name, unpaired.Options).student == "resnet34"


def test_rematching_at_the_published_places():
    assert rematch_epochs((30, 30, 5, 4), 200) == [30, 60, 95, 135]
    assert rematch_epochs((30, 30, 5, 4), 20) == [3, 6, 9, 12]


def test_few_labels_leave_the_default_rows_that_match_by_labels_out(recipe: Path, tmp_path: Path):
    options = ("--labels", "16", "--epochs", "1", "--seeds", "0", "--out", str(tmp_path / "few"))
    assert unpaired.main([str(recipe), *options, "--criterion", "kd"]) == 0
    found = json.loads((tmp_path / "few" / "results.json").read_text())["runs"]
    assert [one["method"] for one in found] == [
        "alone",
        "pairs made poor",
        "pairs made poor + dense",
    ]
