"""Accuracy over the values of one option: one job a value, one table and one figure."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from crossmodal.runs import preflight
from crossmodal.runs.processes import HELPER
from crossmodal.tables import gap, labels, series
from crossmodal.tables.report import Row
from tests.examples.test_resume import cut


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
    # Neither the teacher nor the lone student depends on the free pairs.
    assert trained == ["teacher resnet8", "alone seed 0", "bridge seed 0", "bridge seed 0"]
    folders = [tmp_path / "noise-0.2", tmp_path / "noise-0.9"]
    first, second = (json.loads((f / "results.json").read_text()) for f in folders)
    assert [run["method"] for run in second["runs"]] == ["alone", "bridge"]
    assert second["runs"][0] == first["runs"][0]
    assert second["runs"][1]["config"]["bridge"] != first["runs"][1]["config"]["bridge"]
    assert second["teacher"] == first["teacher"]
    for kind in ("*.pt", "history/*.csv"):
        names = [sorted(p.name for p in f.glob(kind) if "bridge" not in p.name) for f in folders]
        assert len(names[0]) == 2
        assert names[0] == names[1]
    told = (folders[1] / "results.md").read_text()
    assert "| alone | " in told


def test_a_gap_that_was_cut_off_goes_on_and_a_new_value_takes_over(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["unpaired-tiny", "--variant", "alone", "bridge", "--out", str(tmp_path)]
    command += ["--device", "cpu", "--epochs", "2", "--seeds", "1"]
    values = ["--pseudo", "noise:0.2", "noise:0.9"]
    with monkeypatch.context() as patched:
        cut(patched, "bridge", after=1)
        assert gap.main([*command, *values]) == 130
    # The second folder is not there yet, which --resume does not mind.
    assert gap.main([*command, *values, "--resume"]) == 0
    assert trained.count("teacher resnet8") == trained.count("alone seed 0") == 1
    assert trained.count("bridge seed 0") == 3
    trained.clear()
    assert gap.main([*command, "--pseudo", "noise:0.5"]) == 0
    assert trained == ["bridge seed 0"]
    assert gap.main([*command, "--pseudo", "noise:0.5", "--fresh"]) == 0
    assert trained == ["bridge seed 0", "alone seed 0", "bridge seed 0"]


def test_resume_refuses_a_series_of_which_nothing_was_kept(
    tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["unpaired-tiny", "--pseudo", "noise:0.2", "--out", str(tmp_path), "--resume"]
    assert gap.main([*command, "--device", "cpu"]) == 2
    assert "--resume: nothing was kept" in capsys.readouterr().err


def test_the_measured_precision_is_that_of_the_folders_near(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([1.0, 0.9, 1.0, 0.1])
    monkeypatch.setattr(preflight, "timed", lambda *a, **k: next(seconds, 0.001))
    monkeypatch.setattr(preflight, "estimated", lambda *a: 0.0)
    command = ["tiny", "--labels", "8", "12", "--method", "alone", "--seeds", "1"]
    command += ["--precision", "auto", "--device", "cpu", "--epochs", "1"]
    assert labels.main([*command, "--out", str(tmp_path)]) == 0
    kept = [json.loads((tmp_path / n / "precision.json").read_text()) for n in ("8", "12")]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (labels.main, ["tiny", "--labels"], "argument --labels: expected at least one"),
        (labels.main, ["tiny", "--labels", "8", "999"], "--labels must lie between 4 (one"),
        (gap.main, ["unpaired-tiny", "--pseudo"], "argument --pseudo: expected at least one"),
        (gap.main, ["unpaired-tiny", "--pseudo", "noise:0.2", "nose:1"], "did you mean 'noise'"),
        (gap.main, ["unpaired-tiny", "--pseudo", "noise:0.2", "grey"], "grey needs images of"),
    ],
)
def test_a_wrong_value_is_refused_before_the_first_is_trained(
    script: Callable[[list[str]], int], arguments: list[str], message: str, tmp_path: Path,
    trained: list[str], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert script([*arguments, "--out", str(tmp_path), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
    assert trained == []


def test_gap_needs_a_gap(capsys: pytest.CaptureFixture[str]) -> None:
    assert gap.main(["unpaired-tiny"]) == 2
    assert "--pseudo names what makes the free pairs poor" in capsys.readouterr().err


def test_values_stand_at_their_numbers_or_side_by_side() -> None:
    assert gap.axis(["noise:0.3", "noise:0.9"]).places(10) == {"noise:0.3": 0.3, "noise:0.9": 0.9}
    assert gap.axis(["blur:2", "grey"]).places(10) == {"blur:2": 0.0, "grey": 1.0}
    assert gap.axis(["blur:2", "noise:2"]).places(10) == {"blur:2": 0.0, "noise:2": 1.0}
    assert labels.axis(["8", "all"]).places(40) == {"8": 8.0, "all": 40}
