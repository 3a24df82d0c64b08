"""Accuracy over the values of one option: one job a value, one table and one figure."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from crossmodal.runs.processes import HELPER
from crossmodal.tables import gap, labels, series
from crossmodal.tables.report import Row


def test_a_table_and_a_figure_over_the_numbers_and_a_second_call_trains_nothing(
    tmp_path: Path, trained: list[str]
) -> None:
    command = ["tiny", "--labels", "all", "8", "--method", "alone", "kd", "--seeds", "1"]
    command += ["--out", str(tmp_path), "--device", "cpu", "--epochs", "1"]
    assert labels.main(command) == 0
    told = (tmp_path / "labels.md").read_text()
    assert "| labels | 8 | all |" in told
    assert f"python examples/labels.py {command[0]}" in told
    assert (tmp_path / "labels.png").stat().st_size > 10_000
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"8", "all"}
    first = len(trained)
    assert first == 6  # a teacher and two students for each number
    assert labels.main(command) == 0
    assert len(trained) == first


def test_a_helper_works_on_its_own_number_alone(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["tiny", "--method", "alone", "--seeds", "1", "--device", "cpu", "--epochs", "1"]
    own = shlex.join([*command, "--labels", "8", "--out", str(tmp_path / "8")])
    monkeypatch.setenv(HELPER, f"python examples/train.py {own}")
    assert labels.main([*command, "--labels", "8", "12", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"8"}
    assert "alone seed 0" in trained


def test_the_table_has_a_column_a_number() -> None:
    found = {
        "100": [Row("alone", (10.0, 12.0), None), Row("kd", (60.0,), 49.0)],
        "all": [Row("alone", (80.0,), None)],
    }
    lines = series.markdown(labels.axis(["100", "all"]), found, "digits").splitlines()
    assert lines[2:] == [
        "| labels | 100 | all |",
        "| --- | ---: | ---: |",
        "| alone | 11.00 ± 1.41 | 80.00 |",
        "| kd | 60.00 | |",
    ]


@pytest.mark.parametrize("text", ["some", "0", "-3"])
def test_numbers_that_are_none_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert labels.main(["tiny", f"--labels={text}"]) == 2
    assert "--labels must be numbers such as 100, or all" in capsys.readouterr().err


def test_the_gap_of_free_pairs_makes_a_table_and_a_figure(
    tmp_path: Path, trained: list[str]
) -> None:
    command = ["unpaired-tiny", "--pseudo", "noise:0.2", "noise:0.9", "--seeds", "1"]
    command += ["--variant", "alone", "bridge", "--out", str(tmp_path), "--device", "cpu"]
    assert gap.main([*command, "--epochs", "1"]) == 0
    assert "| pseudo | noise:0.2 | noise:0.9 |" in (tmp_path / "pseudo.md").read_text()
    assert (tmp_path / "pseudo.png").stat().st_size > 10_000
    assert trained.count("bridge seed 0") == 2


def test_gap_needs_a_gap(capsys: pytest.CaptureFixture[str]) -> None:
    assert gap.main(["unpaired-tiny"]) == 2
    assert "--pseudo names what makes the free pairs poor" in capsys.readouterr().err


def test_values_stand_at_their_numbers_or_side_by_side() -> None:
    assert gap.axis(["noise:0.3", "noise:0.9"]).places(10) == {"noise:0.3": 0.3, "noise:0.9": 0.9}
    assert gap.axis(["blur:2", "grey"]).places(10) == {"blur:2": 0.0, "grey": 1.0}
    assert gap.axis(["blur:2", "noise:2"]).places(10) == {"blur:2": 0.0, "noise:2": 1.0}
    assert labels.axis(["8", "all"]).places(40) == {"8": 8.0, "all": 40}
