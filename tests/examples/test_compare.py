"""The comparison: the paper's column, shared results, failures in the open."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import sweep
from crossmodal import cli, comparison, engine, published, report
from crossmodal.registry import METHODS

# The gains as the paper prints them, in its order of the methods: each must be the difference of
# two accuracies that were copied apart from them.
ORDER = (
    *("kd", "alkd", "fitnets", "at", "afkd", "nst", "vid", "crd", "semckd"),
    *("rkd", "fsp", "cc", "ds"),
)
GAINS = {
    "CML": "4.29 3.15 3.89 3.53 3.99 4.93 4.36 5.48 5.13 4.16 4.66 4.62 5.87",
    "CIFAR-100": "1.17 0.43 1.23 1.09 1.46 1.68 1.75 2.02 2.24 1.49 1.07 1.61 2.62",
    "CIFAR-10": "2.10 0.93 2.12 2.31 1.74 2.39 2.42 2.61 2.80 1.56 1.77 2.04 3.30",
    "STL-10": "1.51 0.26 0.93 1.34 0.22 1.58 1.44 1.69 1.85 0.89 1.22 1.40 2.09",
    "Tiny-ImageNet": "0.77 1.31 1.20 1.89 1.87 1.91 0.91 2.19 2.35 0.87 1.26 1.65 2.83",
    "ImageNet-100": "3.12 2.32 2.66 3.03 2.75 3.21 3.33 3.62 3.65 2.72 3.17 3.36 3.99",
    "ImageNet": "2.76 1.90 2.23 2.20 2.37 3.05 3.24 3.17 3.53 3.09 2.94 2.39 4.02",
}
# Table 7's gains are over the first part alone.
TABLE_7 = {
    "kd+ds": 2.03, "fitnets+kd": 0.48, "fitnets+ds": 2.04, "at+kd": 0.49, "at+ds": 2.36,
    "nst+kd": 0.22, "nst+ds": 1.19, "crd+kd": 0.14, "crd+ds": 0.76, "rkd+kd": 0.33, "rkd+ds": 2.01,
}  # fmt: skip


def compare(out: Path, *more: str) -> int:
    return cli.compare(["tiny", "--out", str(out), "--device", "cpu", "--epochs", "1", *more])


@pytest.mark.parametrize("name", GAINS)
def test_published_accuracies_give_the_published_gains(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(published._COLUMNS, "set", name)
    found, printed = published.column("set")
    assert found == name
    gains = [f"{printed[method] - printed['alone']:.2f}" for method in ORDER]
    assert gains == GAINS[name].split()
    assert printed["teacher"] > printed["ds"] > max(printed[method] for method in ORDER[:-1])


def test_published_sums_give_the_published_gains() -> None:
    _, printed = published.column("mnist")
    gains = {sum_: printed[sum_] - printed[sum_.split("+")[0]] for sum_ in TABLE_7}
    assert gains == pytest.approx(TABLE_7, abs=1e-6)
    assert set(printed) == {"teacher", "alone", *ORDER, *TABLE_7}


def test_every_method_has_its_place() -> None:
    assert {*METHODS, "kd+ds"} == set(comparison.EVERYTHING)
    assert published.column("cifar10")[0] == "CIFAR-10"
    assert published.column("nosuch")[0] == "CML"


def test_the_comparison_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trained: list[str]
) -> None:
    methods = ("--methods", "ds+kd", "at", "alone", "kd")
    assert compare(tmp_path, *methods, "--seeds", "2") == 0
    shown = capsys.readouterr().out
    for part in ("Baseline-T", "paper, CML", "88.29 (↑4.29)", "on features", "resnet8x0_5, 1"):
        assert part in shown
    text = (tmp_path / "results.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names == [
        "Baseline-T, clean images", "Baseline-T, poor images", "Baseline-S",
        "*on logits*", "KD", "*on features*", "AT", "*sums*", "DS+KD",
    ]  # fmt: skip
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    accuracy = {m: [r["accuracy"] for r in runs if r["method"] == m] for m in ("alone", "at")}
    gain = (sum(accuracy["at"]) - sum(accuracy["alone"])) / 2
    (line,) = (line for line in lines if line.startswith("| AT |"))
    assert f"({'↓' if gain < 0 else '↑'}{abs(gain):.2f}) | 2 | 87.53 (↑3.53) |" in line
    assert "| DS+KD |" in text
    assert "90.32 (↑6.32)" in text
    assert "examples/compare.py tiny" in text
    assert "ResNet32x4 -> ResNet8x4, 300 epochs. Ours is tiny, resnet8 -> resnet8x0_5, 1" in text
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    trained.clear()
    assert compare(tmp_path, *methods, "--seeds", "2") == 0
    assert trained == []


def test_runs_are_shared_with_train(tmp_path: Path, trained: list[str]) -> None:
    assert compare(tmp_path, "--methods", "alone", "ds", "--seeds", "2") == 0
    trained.clear()
    arguments = ["tiny", "--out", str(tmp_path), "--device", "cpu", "--epochs", "1"]
    assert cli.main([*arguments, "--method", "alone", "ds", "kd", "--seeds", "2"]) == 0
    assert trained == ["kd 0", "kd 1"]
    trained.clear()
    assert compare(tmp_path, "--methods", "kd", "ds", "--seeds", "2") == 0
    assert trained == []


def test_a_failed_method_is_shown_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    distil, tried = engine.distil, []

    def failing(method: str, *rest: object, **options: object) -> engine.Outcome:
        tried.append(method)
        if method == "kd":
            raise FloatingPointError("kd seed 0: the loss of epoch 1 is not finite (KD nan); fix")
        return distil(method, *rest, **options)

    monkeypatch.setattr(engine, "distil", failing)
    arguments = ("--methods", "alone", "kd", "at", "--seeds", "1")
    assert compare(tmp_path, *arguments) == 0
    assert tried == ["alone", "kd", "at"]
    assert "KD │ failed: the loss" in " ".join(capsys.readouterr().out.split())
    text = (tmp_path / "results.md").read_text()
    assert "| KD | failed: the loss of epoch 1 is not finite | 0 |" in text
    assert "- kd: kd seed 0: the loss of epoch 1 is not finite (KD nan)" in text
    # Found again by compare, which reports it; tried again by train, which stops at it.
    tried.clear()
    assert compare(tmp_path, *arguments) == 0
    assert tried == []
    with pytest.raises(FloatingPointError):
        cli.main(["tiny", "--out", str(tmp_path), "--epochs", "1", "--method", "kd"])
    assert tried == ["kd"]


def test_a_teacher_that_diverges_ends_the_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(tmp_path, "--lr", "1e30", "--teacher-epochs", "3") == 2
    assert capsys.readouterr().err.startswith("error: teacher resnet8: the loss of epoch")
    assert not list(tmp_path.glob("*"))


def test_what_does_not_fit_the_networks_fails_before_any_student_trains(
    tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--methods", "alone", "semckd", "--seeds", "1", "--batch-size", "1")
    assert compare(tmp_path, *arguments) == 2
    assert capsys.readouterr().err.startswith("error: batch_size must be")
    assert trained == ["teacher"]


def test_a_sweep_resumes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trained: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    candidates = {
        f"gamma {gamma:g}": ("ds", {"variant": "printed", "gamma": gamma}) for gamma in (1e-3, 1e-2)
    }
    monkeypatch.setitem(sweep.GROUPS, "printed", candidates)
    arguments = "sweep.py tiny --epochs 1 --seeds 1 --group baselines printed --device cpu --out"
    monkeypatch.setattr(sys, "argv", [*arguments.split(), str(tmp_path)])
    assert sweep.main() == 0
    assert trained == ["teacher", "alone 0", "kd 0", "ds 0", "ds 0"]
    trained.clear()
    assert sweep.main() == 0
    assert trained == []
    content = json.loads((tmp_path / "results.json").read_text())
    labels = [run["method"] for run in content["runs"]]
    assert labels[:3] == ["alone", "kd", "gamma 0.001"]
    assert {run["config"]["evaluate"] for run in content["runs"]} == {"val"}
    assert report.rows(content["runs"])[0].method == "alone"
    assert "| gamma 0.01 |" in (tmp_path / "results.md").read_text()
    monkeypatch.setattr(sys, "argv", ["sweep.py", "nosuch"])
    assert sweep.main() == 2
    assert "unknown data set" in capsys.readouterr().err
