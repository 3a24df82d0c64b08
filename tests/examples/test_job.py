"""Whole jobs on a tiny set: what they leave, what they reuse, what they refuse."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crossmodal import cli, recipes
from crossmodal.data import sources
from crossmodal.methods import METHODS
from crossmodal.methods.variants import VARIANTS
from crossmodal.recipes import data_sets
from crossmodal.runs import preflight, session
from crossmodal.tables import matches, published
from crossmodal.training import evaluation
from tests.examples.tiny import CLASSES, half, opened

ROOT = Path(__file__).parents[2]
Train = Callable[..., int]
Shown = pytest.CaptureFixture[str]


def runs(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "results.json").read_text())["runs"]


def test_a_job_end_to_end(tmp_path: Path, train: Train, capsys: Shown) -> None:
    assert train("--method", "alone,kd", "ds", "--seeds", "2", "--limit", "64") == 0
    shown = capsys.readouterr().out
    assert "preflight: 3 of 3 methods fit; 6 students to train, about" in shown
    assert "[5 of 6] ds seed 0  epoch 2/2" in shown
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["commands"] == [content["command"]]
    assert content["command"].startswith("python examples/train.py tiny --out")
    found = {(run["method"], run["seed"]): run for run in content["runs"]}
    assert list(found) == [(m, s) for m in ("alone", "kd", "ds") for s in (0, 1)]
    for run in found.values():
        assert 0 <= run["accuracy"] <= 100
        assert run["loss"] == pytest.approx(sum(run["terms"].values()), rel=1e-4)
        assert run["config"]["samples"] == 64
    mean = sum(found["ds", seed]["accuracy"] for seed in (0, 1)) / 2
    assert f"| ds | {mean:.2f} ±" in (tmp_path / "results.md").read_text()
    for name in ("accuracy", "self_similarity", "tsne", "curves", "samples"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    left = sorted(path.name.split("-resnet")[0] for path in tmp_path.glob("*.pt"))
    assert left == ["student-alone-seed0", "student-ds-seed0", "student-kd-seed0", "teacher"]
    (history,) = (tmp_path / "history").glob("student-ds-seed1-*.csv")
    rows = list(csv.DictReader(history.open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[-1]["SEM-1"]) == found["ds", 1]["terms"]["SEM-1"]


def test_finished_runs_are_skipped_and_missing_ones_trained(
    tmp_path: Path, train: Train, trained: list[str]
) -> None:
    train("--method", "alone", "--seeds", "2")
    assert trained == ["teacher resnet8", "alone seed 0", "alone seed 1"]
    before = runs(tmp_path)
    trained.clear()
    train("--method", "alone", "kd:temperature=2", "--seeds", "2")
    assert trained == ["kd:temperature=2 seed 0", "kd:temperature=2 seed 1"]
    assert runs(tmp_path)[:2] == before
    trained.clear()
    train("--method", "alone", "--seeds", "1", "--fresh")
    assert trained == ["alone seed 0"]
    trained.clear()
    train("--method", "kd", "--seeds", "1", "--teacher-epochs", "1")
    assert trained == ["teacher resnet8", "kd seed 0"]
    trained.clear()
    train("--method", "kd", "--seeds", "1", "--amount", "0.7")  # changes students, but no teacher
    assert trained == ["kd seed 0"]
    trained.clear()
    train("--method", "alone", "kd", "--seeds", "1", "--falling")  # nothing of `alone` falls
    assert trained == ["kd seed 0"]
    text = (tmp_path / "results.md").read_text()
    assert text.count("Made by") == 6  # a table a command
    assert text.count("| alone |") == 4


def test_a_new_field_of_the_recipe_leaves_results_known(
    tmp_path: Path, train: Train, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train("--method", "alone", "--seeds", "1")
    settings = recipes.Recipe.settings
    trained.clear()
    from dataclasses import field, make_dataclass

    later = make_dataclass(
        "Recipe", [("new", int, field(default=1))], bases=(recipes.Recipe,), frozen=True
    )
    later.settings = settings
    monkeypatch.setattr(recipes, "Recipe", later)
    train("--method", "alone", "--seeds", "1")
    assert trained == []


def test_one_method_that_does_not_fit_is_stored_as_failed_and_the_rest_goes_on(
    tmp_path: Path, train: Train, trained: list[str], capsys: Shown
) -> None:
    # FSP by flows from stage to stage needs as many stages on both sides.
    names = ("--student", "shufflenet_v2_x0_5", "--teacher", "resnet10t")
    methods = ("--methods", "alone", "fsp", "kd")
    assert train(*methods, "--seeds", "1", *names, kind="compare") == 1
    shown = capsys.readouterr().out
    assert "preflight: 2 of 3 methods fit; 2 students" in shown
    assert trained[1:] == ["alone seed 0", "kd seed 0"]
    failed = next(run for run in runs(tmp_path) if run["method"] == "fsp")
    assert "accuracy" not in failed
    assert "failed: " in (tmp_path / "results.md").read_text()


def test_a_method_that_diverges_is_stored_and_not_tried_again(
    tmp_path: Path, train: Train, trained: list[str]
) -> None:
    arguments = ("--methods", "alone", "kd", "--seeds", "1", "--student-lr", "1e30")
    assert train(*arguments, kind="compare") == 1
    assert trained == ["teacher resnet8", "alone seed 0", "kd seed 0"]
    assert all("is not finite" in run["failed"] for run in runs(tmp_path))
    trained.clear()
    assert train(*arguments, kind="compare") == 1
    assert trained == []


def test_the_comparison_has_the_papers_column_for_its_own_networks_alone(
    tmp_path: Path, train: Train, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("--methods", "ds+kd", "at", "alone", "--seeds", "1", kind="compare") == 0
    lines = [x for x in (tmp_path / "results.md").read_text().splitlines() if x.startswith("|")]
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names == [
        "Baseline-T, clean images", "Baseline-T, poor images", "Baseline-S",
        "*on features*", "AT", "*sums*", "DS+KD",
    ]  # fmt: skip
    assert "paper," not in "".join(lines)
    monkeypatch.setitem(published._CONTENT["dskd"]["columns"], "tiny", "CIFAR-10")
    monkeypatch.setitem(published._CONTENT["dskd"], "networks", ["resnet8", "resnet8x0_5"])
    assert train("--methods", "kd", "alone", "--seeds", "1", kind="compare") == 0
    text = (tmp_path / "results.md").read_text()
    assert "| method | accuracy % (gain) | seeds | paper, CIFAR-10 |" in text
    assert "| 83.50 (↑2.10) |" in text


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


def test_published_accuracies_give_the_published_gains() -> None:
    for name, expected in GAINS.items():
        printed = published.columns()[name]
        gains = [f"{printed[method] - printed['alone']:.2f}" for method in ORDER]
        assert gains == expected.split()
    printed = published.columns()["CML"]
    sums = {sum_: printed[sum_] - printed[sum_.split("+")[0]] for sum_ in TABLE_7}
    assert sums == pytest.approx(TABLE_7, abs=1e-6)
    assert {*METHODS, "kd+ds"} - {"ska"} == set(cli.COMPARED)


def test_a_sweep_resumes_on_the_validation_split(
    tmp_path: Path, train: Train, trained: list[str]
) -> None:
    arguments = ("--epochs", "1", "--seeds", "1", "--group", "baselines", "printed")
    assert train(*arguments, kind="sweep") == 0
    assert [name.split(" seed")[0] for name in trained[1:]] == [
        "alone", "kd", "as printed, gamma 0.001", "as printed, gamma 0.01",
    ]  # fmt: skip
    assert {run["config"]["evaluate"] for run in runs(tmp_path)} == {"val"}
    trained.clear()
    assert train(*arguments, kind="sweep") == 0
    assert trained == []
    assert train(*arguments[:4], "--method", "logits", kind="sweep") == 0
    assert [name.split(" seed")[0] for name in trained] == ["logits"]
    assert train(*arguments, name="unpaired-tiny", kind="sweep") == 2


# Without pairs.


def test_an_unpaired_job_end_to_end_and_again(
    tmp_path: Path, train: Train, trained: list[str], capsys: Shown
) -> None:
    assert train("--seeds", "1", "--epochs", "2", name="unpaired-tiny") == 0
    alone, *others = [variant.title.format("kd") for variant in VARIANTS.values()]
    titles = [alone, "bridge", "bridge + dense:weight=5", *others]
    assert trained == ["teacher resnet8", "matcher", *(f"{title} seed 0" for title in titles)]
    assert "Re-matching: " in capsys.readouterr().out
    for run in runs(tmp_path):
        assert run["loss"] == pytest.approx(sum(run["terms"].values()), rel=1e-4)
        unmatched = run["method"] in titles[:3]
        assert len(run["trace"].get("transport", [])) == (0 if unmatched else 3)
    assert (tmp_path / "transport.png").read_bytes().startswith(b"\x89PNG")
    trained.clear()
    # Another matcher moves those that it matches, and nobody else.
    more = ("--seeds", "1", "--variant", "alone", "random", "ssm", "--matcher-epochs", "1")
    assert train(*more, "--epochs", "2", name="unpaired-tiny") == 0
    assert trained == ["matcher", "kd matching (SSM) seed 0"]
    trained.clear()
    # Free pairs weigh less and less; nothing else that is published or has no teacher does.
    rows = ("--variant", "alone", "bridge", "bridge+dense:weight=5", "random", "--seeds", "1")
    assert train("--no-falling", *rows, "--epochs", "2", name="unpaired-tiny") == 0
    assert trained == ["bridge + dense:weight=5 seed 0"]
    assert "falling" not in runs(tmp_path)[-1]["config"]["training"]
    trained.clear()
    # Rows without matches need no matcher.
    rows = ("--variant", "bridge+fitnets", "bridge+kd+ds", "--seeds", "1", "--epochs", "2")
    assert train(*rows, name="unpaired-tiny") == 0
    assert trained == ["bridge + fitnets seed 0", "bridge + kd+ds seed 0"]
    terms = runs(tmp_path)[-1]["terms"]
    assert list(terms) == ["CE", "KD", "SEM-1", "SEM-2", "DCM-1", "DCM-2"]
    trained.clear()
    few = ("--labels", "8", "--variant", "alone", "bridge", "bridge+kd", "--seeds", "1")
    assert train(*few, "--epochs", "1", "--out", str(tmp_path / "few"), name="unpaired-tiny") == 0
    assert trained == [
        "teacher resnet8",
        *(f"{t} seed 0" for t in ("alone", "bridge", "bridge + kd")),
    ]


def test_grey_students_have_one_channel(
    tmp_path: Path, train: Train, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    colours = sources.Source(CLASSES, half(80, 1, channels=3), half(40, 2, channels=3))
    monkeypatch.setattr(sources, "open_tiny", lambda folder, download: colours)
    arguments = ("--poor", "grey", "--variant", "full", "--seeds", "1", "--epochs", "1")
    assert train(*arguments, name="unpaired-tiny") == 0
    weights = torch.load(next(tmp_path.glob("student-*.pt")), weights_only=True)["weights"]
    assert weights["conv1.weight"].shape[1] == 1
    assert train("--poor", "grey", "--method", "ds", "--seeds", "1", "--epochs", "1") == 0


def test_the_time_of_rematching_is_a_share_of_an_epoch() -> None:
    run: dict[str, Any] = {
        "seconds": 10.4,
        "config": {"planner": None, "rematching": {"by": "pass"}},
        "trace": {
            "rematching": {"2": 0.1, "4": 0.3},
            "searching": {"2": 0.01, "4": 0.03},
            "in_use": {"2": 9, "4": 7},
            "transport": [0.0] * 11,
        },
    }
    rest = "20.0 % of an epoch of 1.00 s; 3.8 % of the whole training. "
    rest += "Different teacher images chosen at the last one: 7."
    parts = "20 ms the search, else the student's pass over its images"
    assert matches.rematching_time([run]) == f"Re-matching: 200 ms ({parts}), {rest}"


# What is refused, before anything is trained.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "unknown data set 'nosuch'; known:"),
        (["tiny", "--method", "dss"], "unknown method 'dss'; did you mean 'ds'?"),
        (["tiny", "--method", ","], "--method names none"),
        (["tiny", "--student", "resnet8x5"], "unknown model 'resnet8x5'"),
        (["tiny", "--amount", "1.5"], "amount is the fraction of pixels replaced"),
        (["tiny", "--seeds", "0"], "--seeds must be a count"),
        (["tiny", "--limit", "2"], "limit must lie between"),
        (["tiny", "--epochs", "0"], "epochs must be at least 1"),
        (["tiny", "--device", "nosuch"], "--device 'nosuch' cannot be used"),
        (["tiny", "--device", "meta"], "--device 'meta' cannot be used"),
        (["tiny", "--warmup", "0.999"], "warmup must be a share"),
        (["tiny", "--weight-decai", "0"], "did you mean '--weight-decay'?"),
        (["tiny", "--epochs", "many"], "--epochs: invalid int value"),
        (["cifar10"], "needs a data directory"),
        (["tiny", "--lr", "1e30"], "teacher resnet8: the loss of epoch"),
        (["unpaired-tiny", "--variant", "fulll"], "unknown variant 'fulll'; did you mean 'full'?"),
        (["unpaired-tiny", "--criterion", "alone"], "--criterion must name a criterion"),
        (["unpaired-tiny", "--method", "kd"], "--method is for pairs"),
        (["tiny", "--variant", "full"], "--variant is for images without pairs"),
        (["tiny", "--criterion", "crd"], "--criterion is for images without pairs"),
        (["tiny", "--weights", "1", "1", "0"], "--weights is for images without pairs"),
        (["unpaired-tiny", "--poor", "grey"], "--poor grey needs images of three colours"),
        (["unpaired-tiny", "--weights", "-1", "0", "0"], "weight task must be at least 0"),
        (["unpaired-tiny", "--rgb-bands", "0", "1", "2"], "--rgb-bands is for folders"),
        (["tiny", "--memory", "nan"], "--memory must be at least 0, got nan"),
        (["tiny", "--workers", "-1"], "--workers must be at least 0, got -1"),
        (["tiny", "--fresh", "--resume"], "fix: give one of them"),
        (["tiny", "--method", "kd:weight=-1"], "weight must be a number of at least 0, got '-1'"),
        (["tiny", "--method", "kd:temperature=-1"], "no method can be trained, so no teacher is"),
        (["tiny", "--teacher", "vit_tiny_patch16_224"], "does not take images of 1x12x12 (Input"),
        (["mnist", "--data", "somewhere"], "--data somewhere is not for mnist"),
        (["mnist", "--download"], "--download is not for mnist"),
        (["unpaired-tiny", "--pseudo", "nois:1"], "--pseudo nois:1: unknown poverty 'nois'"),
        (["unpaired-tiny", "--pseudo", "noise:a"], "--pseudo noise:a: 'a' is no number"),
        # What nobody would read.
        (["tiny", "--rematch-by", "pass"], "--rematch-by has no effect here: it is for images"),
        (["tiny", "--matcher", "resnet8"], "--matcher has no effect here"),
        (["tiny", "--matcher-epochs", "1"], "fix: leave it out, or train unpaired-tiny"),
        (["tiny", "--teacher-falling"], "unrecognized arguments: --teacher-falling"),
        (
            ["unpaired-tiny", "--matcher-labelled", "1"],
            "unrecognized arguments: --matcher-labelled",
        ),
        (["tiny", "--amount", "0.5", "--poor", "blur:2"], "plain noise, and --poor is blur:2"),
        (["tiny", "--amount", "0.5", "--poor", "noise:0.2"], "--amount has no effect here"),
        (["eurosat", "--amount", "0.5"], "--amount has no effect here"),
        (["tiny", "--labelled", "0.5"], "it is for few labels; fix: add --labels N"),
        (["unpaired-tiny", "--labelled", "0.5", "--labels", "8"], "--labelled has no effect here"),
        (["tiny", "--pad", "2", "--crop", "resized"], "crops are resized; fix: --crop pad"),
        (["s2s_eu", "--student-momentum", "0.5"], "the optimizer is adam; fix: --optimizer sgd"),
        (["tiny", "--falling", "--method", "alone"], "no row here distils over pairs"),
        (["unpaired-tiny", "--no-falling", "--variant", "full"], "--falling has no effect here"),
        (["unpaired-tiny", "--limit", "4"], "leave a class of unpaired-tiny without an image"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: Shown, trained: list[str], arguments: list[str], message: str
) -> None:
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert cli.main([*arguments, "--out", str(tmp_path / "o"), *device]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert trained == (["teacher resnet8"] if "1e30" in arguments else [])


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("compare", ["unpaired-tiny"], "compare.py compares methods on pairs"),
        ("sweep", ["unpaired-tiny"], "sweep.py compares methods on pairs"),
        ("sweep", ["tiny", "--evaluate", "test"], "invalid choice: 'test'"),
        ("sweep", ["tiny", "--group", "nosuch"], "unknown group 'nosuch'; known: baselines"),
    ],
)
def test_what_a_script_does_not_do_is_refused(
    kind: str, arguments: list[str], message: str, capsys: Shown
) -> None:
    assert cli.main(arguments, kind=kind) == 2
    assert message in capsys.readouterr().err


def test_options_that_are_read_by_somebody_are_taken() -> None:
    assert cli.parse(["tiny", "--amount", "0.5", "--poor", "noise"]).wanted.amount == 0.5
    job = cli.parse(["unpaired-tiny", "--amount", "0.5", "--poor", "blur:2", "--pseudo", "noise"])
    assert job.wanted.pseudo == "noise"
    job = cli.parse(["unpaired-tiny", "--rematch-by", "pass"])
    assert job.rematching.by == "pass"
    assert cli.parse(["tiny", "--labels", "8", "--labelled", "0.5"]).wanted.labels == 8
    both = cli.parse(["tiny", "--momentum", "0.5", "--teacher-optimizer", "adam"])
    assert both.recipes["student"].momentum == 0.5
    groups = cli.parse(["tiny", "--group", "baselines,dense"], kind="sweep").asked
    assert len(groups) == 5


def test_a_home_folder_behind_an_equals_sign_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert cli.parse(["tiny", "--out=~/runs"]).out == Path("/home/someone/runs")


def test_a_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, train: Train, trained: list[str], capsys: Shown,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "file").touch()
    assert train(out=tmp_path / "file") == 2
    assert "is a file; fix: name a folder" in capsys.readouterr().err
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage)
    assert train() == 2
    assert "has 0 MB left, about" in capsys.readouterr().err
    assert trained == []


def test_a_missing_package_is_told_before_training(
    train: Train, trained: list[str], capsys: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert train(name="unpaired-tiny") == 2
    assert "matching is done by FAISS; fix: pip install" in capsys.readouterr().err
    assert trained == []


def test_an_error_that_nobody_raised_on_purpose_keeps_its_traceback(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "accuracy", lambda *a, **k: int("no number"))
    monkeypatch.setattr(session, "open_views", lambda *a: int("no number"))
    with pytest.raises(ValueError, match="invalid literal"):
        train()


def test_the_precision_is_measured_once_and_kept(
    tmp_path: Path, train: Train, trained: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    seconds = iter([1.0, 0.5])
    monkeypatch.setattr(preflight, "timed", lambda *a, **k: next(seconds, 0.001))
    arguments = ("--precision", "auto", "--seeds", "1", "--method", "alone")
    assert train(*arguments) == 0
    assert "precision bf16: a step took 1000 ms in fp32, 500 ms" in capsys.readouterr().out
    (run,) = runs(tmp_path)
    assert run["config"]["training"]["precision"] == "bf16"
    assert run["config"]["training"]["channels_last"] is True
    seconds = iter([0.5, 1.0])  # another day
    trained.clear()
    assert train(*arguments) == 0
    assert trained == []


# Recipes.


def test_recipes_fill_what_is_not_given(tmp_path: Path) -> None:
    job = cli.parse(["cifar10", "--data", "somewhere"])
    assert job.models == {"teacher": "resnet32x4", "student": "resnet8x4", "matcher": "resnet20"}
    student, teacher = job.recipes["student"], job.recipes["teacher"]
    assert (student.epochs, teacher.epochs, student.lr, student.flip) == (300, 300, 0.1, True)
    assert [asked.label for asked in job.asked] == ["alone", "kd", "ds"]
    assert job.seeds == (0, 1, 2)
    assert job.out == Path("runs/cifar10")
    short = cli.parse(
        ["unpaired-cifar10", "--epochs", "20", "--teacher-epochs", "30", "--seeds", "4,7",
         "--fresh-noise", "--weight-decay", "0", "--matcher-lr", "0.5", "--no-flip",
         "--clip", "agc:0.1"]
    )  # fmt: skip
    assert [short.recipes[role].epochs for role in recipes.ROLES] == [30, 20, 20]
    assert short.seeds == (4, 7)
    assert [short.recipes[role].fresh_noise for role in recipes.ROLES] == [False, True, False]
    assert [short.recipes[role].weight_decay for role in recipes.ROLES] == [0, 0, 1e-3]
    assert short.recipes["matcher"].lr == 0.5
    assert not short.recipes["student"].flip
    assert short.recipes["teacher"].clipping() == ("agc", 0.1)
    halved = cli.parse(["unpaired-mnist"])
    assert [halved.recipes[role].epochs for role in recipes.ROLES] == [16, 24, 20]
    scene = cli.parse(["s2s_cn", "--data", "somewhere"])
    assert "paired" not in [asked.label for asked in scene.asked]
    kinds = [type(scene.recipes[role].optimized([torch.nn.Parameter(torch.zeros(1))])).__name__
             for role in recipes.ROLES]  # fmt: skip
    assert kinds == ["Adam", "Adam", "AdamW"]


@pytest.mark.parametrize(
    ("name", "epochs"),
    [
        ("s2s_eu", [30, 60, 95, 135]),
        ("s2s_cn", [45, 60, 80, 105, 135]),
        ("m2s_gl", [15, 45, 80, 120, 165]),
        ("unpaired-mnist", [4, 8, 13, 19]),
    ],
)
def test_rematching_is_as_published_and_scaled(name: str, epochs: list[int]) -> None:
    job = cli.parse([name])
    assert job.rematching.schedule.epochs(job.recipes["student"].epochs) == epochs


def test_a_data_set_of_ones_own_is_an_entry_and_an_unknown_field_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[mine]\nreader = "mnist"\nteacher = "resnet8"\nstudent = "resnet8"\n')
    job = cli.parse(["unpaired-mine", "--recipes", str(file)])
    assert job.entry.unpaired
    file.write_text('[mine]\nreder = "mnist"\nteacher = "resnet8"\nstudent = "resnet8"\n')
    with pytest.raises(ValueError, match="unknown field 'reder'; did you mean 'reader'"):
        cli.parse(["mine", "--recipes", str(file)])
    file.write_text('[mine]\nlike = "tiny"\n[other]\nlike = "mine"\nbands = 3\n')
    others = data_sets(file)
    assert (others["other"].student, others["other"].bands) == ("resnet8x0_5", 3)
    assert others["other"].train == others["tiny"].train
    file.write_text('[mine]\nteacher = "a"\nstudent = "b"\ntrain = { epocs = 3 }\n')
    with pytest.raises(
        ValueError, match="recipe of mine has an unknown field 'epocs'; did you mea"
    ):
        cli.parse(["mine", "--recipes", str(file)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine = 3", r"mine.toml \[mine\] must be a table of a data set's fields, got 3"),
        ('[mine]\nlike = "tinny"', "unknown entry in mine.toml .* 'tinny'; did you mean 'tiny'"),
        ('[mine]\nreader = "mnist"\nteacher = "a"', r"\[mine\] has no student; fix: add student"),
        ('[mine]\nlike = "tiny"\nteacher = 3', "teacher must be a text, got 3"),
        ('[mine]\nlike = "tiny"\ntrain = 3', "train must be a table, got 3"),
        ('[mine]\nlike = "tiny"\nrgb = 3', "rgb must be a list, got 3"),
        ('[mine]\nlike = "tiny"\ntrain = { epochs = "3" }', "epochs must be a whole number, got"),
        ('[mine]\nlike = "tiny"\ntrain = { lr = true }', "lr must be a number, got True"),
        ('[mine]\nlike = "tiny"\ntrain = { flip = 1 }', "flip must be true or false, got 1"),
    ],
)
def test_a_wrong_field_of_an_own_entry_is_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f"{text}\n")
    with pytest.raises(ValueError, match=message):
        cli.parse(["mine", "--recipes", str(file)])


def test_streamed_and_loaded_jobs_end_alike(
    tmp_path: Path, train: Train, trained: list[str]
) -> None:
    for memory in ("0", "1"):
        arguments = ("--method", "ds", "--seeds", "1", "--memory", memory, "--workers", memory)
        assert train(*arguments, out=tmp_path / memory) == 0
    streamed, loaded = (runs(tmp_path / memory)[0] for memory in ("0", "1"))
    for name in ("accuracy", "terms", "config"):
        assert streamed[name] == loaded[name]


# The scripts.


def test_torch_is_not_imported_before_its_threads_are_told_to_sleep() -> None:
    check = (
        "import sys, os, crossmodal; print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT / "examples", env=environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "False PASSIVE\n"


@pytest.mark.parametrize("script", ["train", "compare", "sweep"])
def test_the_scripts_run_from_the_repository_root(script: str) -> None:
    done = subprocess.run(
        [sys.executable, f"examples/{script}.py", "nosuch"], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    known = (
        "mnist, cifar10, cifar100, stl10, tiny_imagenet, imagenet, imagenet100, cml, folder, "
        "pairs, eurosat, ombria; without pairs: s2s_eu, s2s_cn, m2s_gl, unpaired-eurosat, "
        "unpaired-mnist, unpaired-cifar10, unpaired-cifar100, unpaired-stl10, "
        "unpaired-tiny_imagenet, unpaired-imagenet, unpaired-imagenet100, unpaired-cml, "
        "unpaired-folder, unpaired-pairs, unpaired-ombria"
    )
    assert done.stderr == f"error: unknown data set 'nosuch'; known: {known}\n"


@pytest.mark.parametrize("wrong", [("--limit", "5000"), ("--limit", "0"), ("--epochs", "0")])
def test_the_smallest_training_never_trains_on_test_images(wrong: tuple[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "examples/minimal.py", *wrong], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--limit must be 2 to 4000, and --epochs at least 1" in done.stderr


def test_the_smallest_training_fits_a_screen_and_learns() -> None:
    script = ROOT / "examples" / "minimal.py"
    assert len(script.read_text().splitlines()) <= 80
    assert "crossmodal" not in script.read_text()
    done = subprocess.run(
        [sys.executable, str(script), "--limit", "1000", "--epochs", "4"], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    numbers = {line.split(":")[0]: float(line.split()[1]) for line in done.stdout.splitlines()}
    assert list(numbers) == ["teacher", "alone", "distilled"]
    assert numbers["teacher"] > 60
    assert opened().paired
