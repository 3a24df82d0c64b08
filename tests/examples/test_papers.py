"""``papers``: the papers' tables, grids and figures, from their command lines."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from rich.console import Console

import train as script
import unpaired
from methods import Method
from papers import figures, grid, motivation, published, reports, sembridge, series, tables
from papers.__main__ import COMMANDS, main
from progress import Show
from recipe import recipe as recipe_of
from store import HELPER, Store
from structkd import Features
from table import Row, rows
from tests.examples import layouts
from tests.examples.entries import class_counts
from tests.examples.files import two_sides

SMALL = (
    *("--epochs", "1", "--seeds", "0", "--batch-size", "8", "--device", "cpu"),
    *("--teacher", "resnet8x0_5", "--student", "resnet8x0_5"),
)
Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A table with tiny networks on tiny files in the layout of the authors' data set."""
    rich, poor = two_sides(tmp_path / "data" / "cml", count=10)
    rich.rename(rich.with_name("optics"))
    poor.rename(poor.with_name("radar"))

    def ran(*arguments: str) -> int:
        where = ("--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"))
        return main([*arguments, *where, *SMALL, "--size", "16", "--pad", "2"])

    return ran


def column(table: str, name: str) -> published.Column:
    return next(c for c in published.tables()[table].columns if c.name == name)


# What is published.


def test_the_tables_have_the_papers_rows_and_columns() -> None:
    found = published.tables()
    shapes = {name: (len(t.columns), len(t.rows)) for name, t in found.items()}
    assert shapes == {
        "table2": (5, 15), "table3": (6, 15), "table4": (6, 15), "table5": (6, 15),
        "table6": (1, 12), "table7": (2, 25),
    }  # fmt: skip
    assert column("table2", "cml-crd_mobilenet_v2").accuracies["ds"] == 81.88
    assert column("table3", "cifar10-crd_shufflenet_v2").accuracies["cc"] == 83.77
    assert column("table5", "imagenet-resnet8x4").accuracies["teacher"] == 76.28
    assert column("table6", "cml-resnet8x4").accuracies["without-SRM"] == 39.15
    assert column("table7", "cml-crd_shufflenet_v1").accuracies["kd+ds"] == 88.84
    # The paper has its own method once, beside which stand the measured and the printed form.
    assert column("table3", "cifar10-resnet8x4").accuracies["ds_printed"] == 84.70
    assert column("table6", "cml-resnet8x4").accuracies["printed-without-SEM-1"] == 86.75
    assert column("table7", "cml-resnet8x4").accuracies["rkd+ds_printed"] == 90.17
    assert "kd+ds_printed" in found["table7"].rows
    assert "kd_printed" not in found["table7"].rows


@pytest.mark.parametrize("name", published.tables())
def test_every_row_is_a_criterion_and_every_column_can_be_trained(name: str) -> None:
    table = published.tables()[name]
    for text in table.rows.values():
        assert Method.of(text).label == text
    for one in table.columns:
        noise = published.NOISE.get(one.dataset)
        assert noise is None or recipe_of(one.dataset, script.Options).view == f"noise:{noise:g}"
        assert timm.is_model(one.teacher)
        assert timm.is_model(one.student)
        assert [row for row in one.accuracies if row != "teacher"] == list(table.rows)


def test_each_row_of_table_6_leaves_one_term_out() -> None:
    generator = torch.Generator().manual_seed(0)

    def features(width: int) -> Features:
        maps = torch.randn(6, width, 4, 4, generator=generator)
        return Features(embedding=maps.mean((2, 3)), intermediate=maps)

    student, teacher = features(8), features(16)
    every = {"SRM", "SEM-1", "SEM-2", "DCM-1", "DCM-2"}
    for row, text in published.tables()["table6"].rows.items():
        method = Method.of(text)
        left = set(method.build(1, {}).terms(student, teacher))
        left |= {"SRM"} if method.labels == 1 else set()
        assert every - left == ({row.rpartition("without-")[2]} if "without" in row else set())
        printed = row.startswith("printed-")
        made = method.build(1, {})
        assert made.variant == ("printed" if printed else "measured")


@pytest.mark.parametrize("group", reports.SWEEPS)
def test_every_candidate_of_a_sweep_can_be_made(group: str) -> None:
    found = reports.candidates([group])
    assert [method.label for method in found] == list(reports.SWEEPS[group])
    for method in found:
        json.dumps(method.described)
        if method.parts:
            method.build(3, {"samples": 40, "batch_size": 8, "negatives": 40})


# What is trained for a table.


def test_tables_6_and_7_share_what_is_finished_and_a_second_call_trains_nothing(
    run: Run, tmp_path: Path, trained: list[str]
) -> None:
    ablation = ("table6", "--rows", "all", "without-SRM")
    assert run(*ablation) == 0
    no_labels = "[{type: SupervisionLoss, weight: 0}, ds]"
    assert [label.removesuffix(" seed 0") for label in trained] == [
        "teacher resnet8x0_5", "ds", no_labels,
    ]  # fmt: skip
    sums = ("table7", "--columns", "resnet8x4", "--rows", "ds", "fitnets+ds")
    assert run(*sums) == 0
    assert trained[3:] == ["[fitnets, ds] seed 0"]
    assert run(*sums) == run(*ablation) == 0
    assert len(trained) == 4
    out = tmp_path / "out"
    assert {path.name for path in out.glob("*.*")} >= {
        "table6.md", "table6.png", "table7.md", "table7.png",
    }  # fmt: skip
    runs = json.loads((out / "cml-resnet32x4" / "results.json").read_text())["runs"]
    ours = {one["method"]: one["accuracy"] for one in runs}
    lines = (out / "table7.md").read_text().splitlines()
    for name, spec, theirs in (("ds", "ds", 89.87), ("fitnets+ds", "[fitnets, ds]", 89.93)):
        off = f"{ours[spec]:.2f} | 1 | {theirs:.2f} | {ours[spec] - theirs:+.2f} |"
        assert any(line.startswith(f"| {name} ") and line.endswith(off) for line in lines)
    assert "| kd+ds (`[kd, ds]`) | — | — | 90.32 | — |" in lines
    assert "- `epochs` 1, published 300" in lines
    assert "- student `resnet8x0_5`, published `resnet8x4`" in lines
    assert "## CML, resnet32x4 → crd_shufflenet_v1" not in lines
    assert f"(`{no_labels}`)" in (out / "table6.md").read_text()


def test_what_one_column_lacks_is_said_and_the_others_go_on(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "cifar100").mkdir()
    layouts.write_cifar100(tmp_path / "cifar100", monkeypatch)
    command = ["table3", "--columns", "resnet8x4", "--rows", "kd", "--data", str(tmp_path)]
    assert main([*command, *SMALL, "--out", str(tmp_path / "out")]) == 1
    assert trained == ["teacher resnet8x0_5", "kd seed 0"]
    first, second = (tmp_path / "out" / "table3.md").read_text().split("## CIFAR-10, ")
    assert "Not run" not in first
    assert "Not run: " in second
    assert "| kd | — | — | 83.50 | — |" in second
    trained.clear()
    capsys.readouterr()
    command[2] = "cifar10"
    assert main([*command, *SMALL, "--out", str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no column of table3 can be run: ")
    assert error.count("\n") == 1
    assert not trained
    assert not list((tmp_path / "other").glob("*.md"))


def test_a_column_is_not_trained_on_another_data_set(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    layouts.write_cifar100(tmp_path, monkeypatch)  # three classes of it
    class_counts(monkeypatch, cifar100=100, cifar10=10)
    command = ["table3", "--columns", "resnet8x4", "--rows", "kd", "--data", str(tmp_path)]
    assert main([*command, *SMALL, "--out", str(tmp_path / "out")]) == 2
    assert "cifar100 has 100 classes" in capsys.readouterr().err
    assert not trained


def test_an_interrupted_call_leaves_the_table_of_what_it_has(
    run: Run, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = script.Session.train_student

    def stopped(self: script.Session, method: Method, seed: int) -> object:
        if method.label == "kd":
            raise KeyboardInterrupt
        return whole(self, method, seed)

    asked = ("table2", "--columns", "resnet8x4", "--rows", "alone", "kd")
    with monkeypatch.context() as patched:
        patched.setattr(script.Session, "train_student", stopped)
        assert run(*asked) == 130
    lines = (tmp_path / "out" / "table2.md").read_text().splitlines()
    for name in ("teacher, clean images", "alone"):
        assert "—" not in next(line for line in lines if line.startswith(f"| {name} |"))
    assert "| kd | — | — | 88.29 | — |" in lines
    assert run(*asked) == 0
    assert trained[2:] == ["kd seed 0"]


def test_a_helper_works_on_its_own_column_alone(
    run: Run, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HELPER, "1")
    monkeypatch.setenv(grid.PART, "cml-crd_vgg8")
    assert run("table2", "--rows", "alone") == 0
    assert trained == ["teacher resnet8x0_5", "alone seed 0"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cml-crd_vgg13"]


def test_what_all_columns_take_is_told_before_the_first_and_needs_a_yes(
    run: Run, trained: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(script.Session, "estimated", lambda self, training: 11 * 3600.0)
    asked = ("table2", "--columns", "resnet8x4", "crd_shufflenet_v1", "--rows", "alone")
    assert run(*asked) == 2  # a teacher and a student, and another student: 33 hours
    said = capsys.readouterr()
    assert "2 jobs together: at most about 1 day, 9:00:00" in said.out
    assert "--yes" in said.err
    assert not trained
    assert run(*asked, "--yes") == 0
    assert trained == ["teacher resnet8x0_5", "alone seed 0"]  # SMALL has one student for both


# What is asked for.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table8"], r"unknown command 'table8'; did you mean 'table\d'\? known: table2, table3"),
        (["table3", "--columns", "cifar10-resnet8x5"],
         "unknown column of table3 'cifar10-resnet8x5'; did you mean 'cifar10-resnet8x4'"),
        (["table6", "--columns", "cifar10"], "unknown column of table6 'cifar10'; known: cml"),
        (["table2", "--rows", "fitnet"],
         "unknown row of table2 'fitnet'; did you mean 'fitnets'\\? known: alone, kd"),
        (["table2", "--criterion", "kd"], "--criterion.*fix: --rows"),
        (["table2", "--classes", "x"], "--classes has no effect on cml"),
        (["labels", "mnist", "--labels", "some"], "--labels must be numbers such as 100, or all"),
        (["labels", "mnist", "--labels", "0"], "--labels must be numbers such as 100, or all"),
        (["gap", "mnist"], "--pseudo names what makes the free pairs poor"),
        (["gap", "mnist", "--pseudo", "noise:0.2", "nose:1"], "did you mean 'noise'"),
        (["sweep", "mnist", "--group", "gama"], "unknown 'gama'; did you mean 'gamma'"),
        (["sweep", "mnist", "--evaluate", "test"], "--evaluate"),
        (["plugin", "mnist", "--criterion", "kd"], "--criterion: .*fix: --criteria kd dkd"),
        (["compare", "mnits"], "did you mean 'mnist'"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, trained: list[str],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)  # where runs/ goes
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert re.search(message, told)
    assert not trained


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert f"usage: papers {name}" in capsys.readouterr().out


def test_columns_by_name_data_set_or_student() -> None:
    table = published.tables()["table3"]
    chosen = tables.chosen_columns(table, ["cifar10-resnet8x4", "crd_shufflenet_v1"])
    assert [c.name for c in chosen] == [
        "cifar100-crd_shufflenet_v1", "cifar10-resnet8x4", "cifar10-crd_shufflenet_v1",
    ]  # fmt: skip
    assert tables.chosen_columns(table, ["cifar100", "cifar10"]) == list(table.columns)
    assert tables.chosen_columns(table, []) == list(table.columns)


def test_the_list_has_every_name_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["--list"]) == 0
    told = capsys.readouterr().out
    for table in published.tables().values():
        assert table.title in told
        for name in (*table.rows, *(one.name for one in table.columns)):
            assert name in told
    assert main(["table6", "--list"]) == 0
    told = capsys.readouterr().out
    assert "39.15" in told
    assert "{type: DSLoss, terms: [SEM-1, SEM-2, DCM-1]}" in told
    assert "Table 7" not in told


# What is said of it.


def test_ours_minus_the_published() -> None:
    table = published.tables()["table2"]
    first = column("table2", "cml-resnet8x4")
    failed = Row("crd", (), None, ("the loss is not finite (epoch 1)",))
    ran = {"alone": Row("alone", (80.0, 82.0), None), "ds": Row("ds", (90.0,), 9.0), "crd": failed}
    ours = tables.Cells(first, ran, 99.0, [])
    names = ("teacher", "alone", "ds", "crd", "kd")
    found = [ours.difference(name) for name in names]
    assert found[:3] == pytest.approx([99.0 - 99.23, 81.0 - 84.0, 90.0 - 89.87])
    assert found[3:] == [None, None]
    text = tables.markdown(table, [(first, ours)], {})
    assert "By the published protocol" in text
    for line in (
        "| teacher, clean images | 99.00 | 1 | 99.23 | -0.23 |",
        "| alone | 81.00 ± 1.41 | 2 | 84.00 | -3.00 |",
        "| ds | 90.00 | 1 | 89.87 | +0.13 |",
        "- crd failed: the loss is not finite (epoch 1)",
    ):
        assert line in text.splitlines()


def test_the_papers_protocol_is_one_flag_and_what_is_typed_comes_over_it() -> None:
    wanted = column("table3", "cifar10-resnet8x4")

    def options(*others: str, protocol: bool = True) -> script.Options:
        own = tables.Options(protocol=protocol)
        return tables._options(wanted, [wanted], ["ds_printed"], own, others, "table3")

    assert tables.differences(options("--clip", "agc:0.1", protocol=False), wanted)
    assert tables.differences(options(), wanted) == []
    own = options("--epochs", "3", "--falling")
    assert (own.clip, own.precision, own.criterion) == ("none", "fp32", ("ds_printed",))
    assert tables.differences(own, wanted) == [
        "`epochs` 3, published 300", "`falling` on, of which the paper says nothing",
    ]  # fmt: skip


def test_runs_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    table, first = published.tables()["table2"], column("table2", "cml-resnet8x4")
    common = {"model": "m", "teacher": "t-1", "falling": False, "labelled": None, "code": "c"}
    place = tmp_path / "cml-resnet32x4"

    def one(method: str, seed: int, accuracy: float, **other: object) -> dict[str, object]:
        config = {**common, "seed": seed, "loss": Method.of(method).described, **other}
        return {"method": method, "seed": seed, "accuracy": accuracy, "config": config}

    def asked(told: list[str], clean: float | None, **other: object) -> dict[str, tuple]:
        tables.record(place, first, common | other, told, clean)
        found = tables.stored(tmp_path, table, first)
        assert found is not None
        return {name: row.accuracies for name, row in found.rows.items()}

    Store(place).write(
        {},
        one("alone", 0, 50.0, teacher=None),
        one("alone", 1, 52.0, teacher=None),
        one("kd", 0, 60.0),
        one("kd", 0, 20.0, teacher="t-2"),
        one("kd", 1, 10.0, code="another"),
        one("ds", 0, 30.0, model="another"),
        one("ds", 1, 71.0, loss="an older version"),
        one("ds", 1, 70.0),
    )
    assert tables.stored(tmp_path, table, first) is None
    assert asked(["`epochs` 5, published 300"], 90.0) == {
        "alone": (50.0, 52.0), "kd": (60.0,), "ds": (70.0,),
    }  # fmt: skip
    asked([], None)
    found = tables.stored(tmp_path, table, first)
    assert found is not None
    assert found.teacher == 90.0  # known of these settings
    assert asked([], None, teacher="t-2") == {"alone": (50.0, 52.0), "kd": (20.0,)}
    Store(place).write({}, one("kd", 2, 65.0, falling=True))
    # Nothing of the lone student falls.
    assert asked([], None, falling=True) == {"alone": (50.0, 52.0), "kd": (65.0,)}
    (place / "columns.json").write_text("{")
    with pytest.raises(ValueError, match=r"columns.json is damaged .*fix: move it away"):
        tables.stored(tmp_path, table, first)


def test_what_differs_from_the_published_settings() -> None:
    wanted = column("table3", "cifar10-resnet8x4")

    def told(**changes: object) -> list[str]:
        return tables.differences(recipe_of("cifar10", script.Options, **changes), wanted)

    clipped = "`clip` agc:0.1, of which the paper says nothing"
    assert told() == [clipped]
    assert told(clip="none") == []
    assert told(clip="none", epochs=3) == ["`epochs` 3, published 300"]
    assert told(clip="none", teacher_epochs=4) == ["`teacher_epochs` 4, published 300"]
    options = {"evaluate": "val", "limit": 100, "labels": 50, "student": "resnet8"}
    assert told(**options, batch_size=32, falling=True, view="noise:0.3") == [
        "student `resnet8`, published `resnet8x4`",
        "accuracy on a tenth of the training images, held out, not on the test set",
        "100 training images only",
        "50 training images have labels, published all",
        "poor images by `noise:0.3`, published `noise:0.1`",
        "`batch_size` 32; the recipe has 64, the paper says nothing of it",
        clipped,
        "`falling` on, of which the paper says nothing",
    ]


# One data set.


def test_a_comparison_has_the_papers_families_and_commands_add_up(
    recipe: Path, tmp_path: Path, trained: list[str]
) -> None:
    command = ["compare", str(recipe), "--out", str(tmp_path), "--epochs", "1"]
    assert main([*command, "--criterion", "alone", "kd", "[kd, ds]"]) == 0
    assert main([*command, "--criterion", "alone", "dense"]) == 0
    assert trained.count("alone seed 0") == 1
    text = (tmp_path / "compare.md").read_text()
    assert text.count("Made by `python examples/papers compare") == 2
    found = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert found == [
        "| method", "| ---", "| Baseline-T, clean images", "| Baseline-T, poor images",
        "| Baseline-S", "| *on logits*", "| KD", "| *sums and others*", "| KD+DS",
        "| method", "| ---", "| Baseline-T, clean images", "| Baseline-T, poor images",
        "| Baseline-S", "| *on structure (the paper's)*", "| Dense structure",
    ]  # fmt: skip
    assert "No published column" in text
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {
        f"compare-{kind}{n}.png" for kind in ("accuracy", "curves") for n in ("", "-2")
    }


def test_a_published_column_stands_beside_ours() -> None:
    printed = published.columns(*published.NETWORKS)["CML"]
    assert reports.theirs(["kd"], printed) == "88.29 (↑4.29)"
    assert reports.theirs(["ds", "kd"], printed) == "90.32 (↑6.32)"
    assert reports.theirs(["alone"], printed) == "84.00"
    assert reports.theirs(["vpr"], printed) == ""


def test_a_sweep_is_on_validation_images_and_has_its_best_first(
    recipe: Path, tmp_path: Path, trained: list[str]
) -> None:
    command = ["sweep", str(recipe), "--out", str(tmp_path), "--seeds", "0"]
    assert main([*command, "--group", "baselines", "dense"]) == 0
    assert "Dense structure, 50 seed 0" in trained
    text = (tmp_path / "sweep.md").read_text()
    assert "validation images" in text
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    means = [float(line[1]) for line in lines[2:]]
    assert len(means) == 5
    assert means == sorted(means, reverse=True)


def test_an_ablation_of_any_recipe_tells_what_each_term_is_worth(
    recipe: Path, tmp_path: Path
) -> None:
    assert main(["ablation", str(recipe), "--out", str(tmp_path), "--seeds", "0"]) == 0
    text = (tmp_path / "ablation.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    cells = {line[0]: line[1:] for line in lines[2:]}
    assert list(cells)[:3] == ["alone", "all", "without-SRM"]
    assert len(cells) == 1 + 2 * 6
    whole, less = cells["printed-all"], cells["printed-without-SEM-1"]
    assert float(less[1]) == pytest.approx(float(less[0]) - float(whole[0]), abs=0.011)
    assert less[2] == "-3.12" == cells["without-SEM-1"][2]
    # Labels off: the student's head learns nothing.
    run = {
        run["method"]: run for run in json.loads((tmp_path / "results.json").read_text())["runs"]
    }
    assert run["without-SRM"]["config"]["loss"]["labels"] == 0
    assert run["all"]["config"]["loss"]["labels"] == 1


def test_the_figures_of_trained_students(recipe: Path, tmp_path: Path, trained: list[str]) -> None:
    command = [str(recipe), "--out", str(tmp_path), "--criterion", "alone", "kd"]
    assert script.main(command) == 0
    count = len(trained)
    assert main(["figures", *command]) == 0
    assert len(trained) == count
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "figures-accuracy.png", "figures-curves.png", "samples.png", "self_similarity.png",
        "tsne.png",
    }  # fmt: skip
    assert "a linear map of the lone student's predicts" in (tmp_path / "figures.md").read_text()


def test_the_motivation_in_numbers_and_a_second_call_trains_nothing(
    recipe: Path, tmp_path: Path, trained: list[str]
) -> None:
    command = [
        "motivation",
        str(recipe),
        "--out",
        str(tmp_path),
        "--epochs",
        "1",
        "--seeds",
        "0",
        "1",
    ]
    command += ["--classifiers", "resnet8x0_5", "vit_small4", "--criterion", "alone", "ds"]
    assert main(command) == 0
    # The teacher and four students; of the classifiers the student's kind is among these.
    assert len(trained) == 1 + 4 + 3 * 2
    assert main(command) == 0
    assert len(trained) == 11
    found = json.loads((tmp_path / "motivation.json").read_text())
    numbers = {(run["method"], run["seed"]): run["structure"] for run in found["networks"]}
    kinds = (motivation.RICH, "alone", "ds")
    assert numbers.keys() == {("teacher", 0), *((m, s) for m in kinds for s in (0, 1))}
    assert {(run["classifier"], run["modality"], run["seed"]) for run in found["classifiers"]} == {
        (kind, side, seed)
        for kind in ("resnet8x0_5", "vit_small4") for side in ("rich", "poor") for seed in (0, 1)
    }  # fmt: skip
    text = (tmp_path / "motivation.md").read_text()
    mean = sum(numbers["ds", seed]["uniformity"] for seed in (0, 1)) / 2
    (line,) = (line for line in text.splitlines() if line.startswith("| uniformity |"))
    teachers, *_, ds = line.strip("| ").split(" | ")[1:]
    assert teachers == f"{numbers['teacher', 0]['uniformity']:.2f}"
    assert ds.startswith(f"{mean:.2f} ± ")
    for name in ("classifiers", "self_similarity", "tsne"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_structure_in_numbers_by_hand() -> None:
    embedding = torch.tensor([[1.0, 1, 0], [2, 0, 0], [3, 1, 0]])  # its third channel is dead
    rows = torch.tensor([[1.0, 0], [0, 2], [0, 3]])
    student, teacher = torch.tensor([[1.0, -1], [2, -2]]), torch.tensor([[1.0, -1], [-1, 1]])
    found = motivation.structure(embedding, rows, student, teacher)
    assert found["channels"] == pytest.approx(200 / 3)
    assert found["off_diagonal"] == pytest.approx(4 / (14 * 2) ** 0.5)
    assert found["off_diagonal_centred"] == pytest.approx(0, abs=1e-6)
    assert found["distance"] == pytest.approx(2 * 2**0.5 / 3)
    assert found["uniformity"] == pytest.approx(math.log((1 + 2 * math.exp(-4)) / 3), abs=1e-6)
    assert found["eq5"] == pytest.approx(0, abs=1e-6)
    # Covariances 0.5 and 2 of either sign, four entries, over 4 d^2.
    assert found["coral"] == pytest.approx(4 * 1.5**2 / 16)
    assert "coral" not in motivation.structure(embedding, rows, teacher)


def test_sembridge_tells_what_matching_costs_and_shows_the_matches(
    recipe: Path, tmp_path: Path, trained: list[str]
) -> None:
    pytest.importorskip("faiss")
    command = ["sembridge", str(recipe), "--out", str(tmp_path), "--matcher-epochs", "1"]
    command += ["--teacher-epochs", "1", "--epochs", "2"]
    named = ["--rows", "alone", "SemBridge as published", "own pairs (reference)"]
    assert main([*command, *named]) == 0
    text = (tmp_path / "sembridge.md").read_text()
    assert "Re-matching: " in text
    assert "The matcher: nearest of all is of the class " in text
    assert "have different widths" in text  # resnet8 has 64 and resnet8x0_5 has 32
    assert {path.name for path in tmp_path.glob("*.png")} >= {"transport.png", "matches.png"}
    assert not (tmp_path / "transport-features.png").exists()
    for name, printed in published.SEMBRIDGE.items():
        assert recipe_of(name, unpaired.Options).student == "resnet34"
        assert set(printed) <= set(unpaired.ROWS)
    assert main([*command, *named, "--student", "resnet8"]) == 0
    assert "have different widths" not in (tmp_path / "sembridge.md").read_text().split("<!--")[2]
    with (tmp_path / "transport.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6  # two students with matches, before and after two epochs
    assert all(float(line[name]) > 0 for line in lines for name in sembridge._COSTS.values())
    for name in ("transport", "transport-features", "matches"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert [label for label in trained if "matcher" in label] == ["matcher"]


def test_published_rows_are_the_default_and_two_sets_have_no_pairs_of_their_own(
    recipe: Path,
) -> None:
    rows_of = sembridge._options([str(recipe)], "sembridge", list(unpaired.ROWS)).rows
    assert rows_of == tuple(unpaired.ROWS)
    apart = sembridge._options(["s2s_eu", "--data", "x"], "sembridge", list(unpaired.ROWS))
    assert set(rows_of) - set(apart.rows) == {"own pairs (reference)"}
    chosen = sembridge._options([str(recipe), "--rows", "matching"], "sembridge", ["alone"])
    assert chosen.rows == ("matching",)


def test_methods_at_random_and_within_sembridge_share_what_does_not_depend_on_them(
    recipe: Path, tmp_path: Path, trained: list[str]
) -> None:
    pytest.importorskip("faiss")
    command = ["plugin", str(recipe), "--out", str(tmp_path), "--matcher-epochs", "1"]
    command += ["--epochs", "1", "--teacher-epochs", "1", "--criteria", "kd", "rkd"]
    assert main(command) == 0
    assert sorted(trained) == sorted(
        ["teacher resnet8", "matcher", "alone seed 0"]
        + 2 * ["random in class seed 0", "SemBridge as published seed 0"]
    )
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    weights = [[one.get("weight", 1) for one in run["config"]["loss"]["criterion"]]
               for run in runs if run["method"] == "SemBridge as published"]  # fmt: skip
    assert [one[0] for one in weights] == [0.4, 0.4]  # kd's is the published one
    _, _, head, _, *lines = (tmp_path / "criterion.md").read_text().splitlines()[:7]
    assert head == "| criterion | kd | rkd |"
    named = ["alone", "random in class", "SemBridge as published"]
    assert [line.split(" | ")[0] for line in lines] == [f"| {name}" for name in named]
    assert (tmp_path / "criterion.png").stat().st_size > 10_000
    assert main(command) == 0
    assert len(trained) == 7


# Series.


def test_a_table_and_a_figure_over_the_labels_and_a_second_call_trains_nothing(
    recipe: Path, tmp_path: Path, trained: list[str]
) -> None:
    command = ["labels", str(recipe), "--labels", "all", "8", "--out", str(tmp_path)]
    assert main([*command, "--epochs", "1"]) == 0
    told = (tmp_path / "labels.md").read_text()
    assert "| labels | 8 | all |" in told
    assert f"python examples/papers labels {recipe}" in told
    assert (tmp_path / "labels.png").stat().st_size > 10_000
    assert len(trained) == 6  # a teacher and two students for each number
    assert main([*command, "--epochs", "1"]) == 0
    assert len(trained) == 6


def test_the_gap_of_free_pairs_shares_what_does_not_depend_on_it(
    recipe: Path, tmp_path: Path, trained: list[str]
) -> None:
    command = ["gap", str(recipe), "--epochs", "1", "--out", str(tmp_path)]
    command += ["--rows", "alone", "pairs made poor"]
    assert main([*command, "--pseudo", "noise:0.2", "noise:0.9"]) == 0
    assert "| pseudo | noise:0.2 | noise:0.9 |" in (tmp_path / "pseudo.md").read_text()
    assert (tmp_path / "pseudo.png").stat().st_size > 10_000
    # Neither the teacher nor the lone student depends on the free pairs.
    made = "pairs made poor seed 0"
    assert trained == ["teacher resnet8", "alone seed 0", made, made]
    assert main([*command, "--pseudo", "noise:0.5"]) == 0
    assert trained[4:] == [made]


def test_labels_without_pairs(recipe: Path, tmp_path: Path, trained: list[str]) -> None:
    command = ["labels", str(recipe), "--unpaired", "--labels", "8", "all", "--epochs", "1"]
    rows_of = ["--rows", "alone", "pairs made poor"]
    assert main([*command, *rows_of, "--out", str(tmp_path)]) == 0
    assert trained.count("teacher resnet8") == 1  # it has its own labels
    assert trained.count("pairs made poor seed 0") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["labels", "RECIPE", "--labels", "8", "999"], "--labels must lie between 4"),
        (["gap", "RECIPE", "--pseudo", "noise:0.2", "grey"], "grey does not fit these images"),
        (["axis", "{}", "--values", "1"], "got 1 values and 0 {}"),
    ],
)
def test_a_wrong_value_is_refused_before_the_first_is_trained(
    arguments: list[str], message: str, recipe: Path, tmp_path: Path, trained: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = [str(recipe) if text == "RECIPE" else text for text in arguments]
    assert main([*given, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert trained == []


def test_the_table_has_a_column_a_number() -> None:
    found = {
        "100": [Row("alone", (10.0, 12.0), None), Row("kd", (60.0,), 49.0)],
        "all": [Row("alone", (80.0,), None)],
    }
    lines = series.markdown("labels", found, "digits").splitlines()
    assert lines[2:] == [
        "| labels | 100 | all |",
        "| --- | ---: | ---: |",
        "| alone | 11.00 ± 1.41 | 80.00 |",
        "| kd | 60.00 |  |",
    ]


def test_values_stand_at_their_numbers_where_each_has_its_own() -> None:
    assert series.numbers(["noise:0.3", "noise:0.9"], 10) == {"noise:0.3": 0.3, "noise:0.9": 0.9}
    assert series.numbers(["blur:2", "grey"], 10) == {}
    assert series.numbers(["blur:2", "noise:2"], 10) == {}
    assert series.numbers(["8", "all"], 40) == {"8": 8.0, "all": 40}


def test_an_axis_is_any_option_on_validation_images(
    recipe: Path, tmp_path: Path, trained: list[str]
) -> None:
    command = ["axis", str(recipe), "--epochs", "1", "--out", str(tmp_path)]
    matched = [*command, "--unpaired", "--rows", "alone", "random in class"]
    assert main([*matched, "--values", "0.1", "0.4", "--weights", "0.3", "{}", "0"]) == 0
    text = (tmp_path / "weights_0.3_X_0.md").read_text()
    assert "validation images" in text
    assert "| weights 0.3 {} 0 | 0.1 | 0.4 |" in text
    assert (tmp_path / "weights_0.3_X_0.png").stat().st_size > 10_000
    assert trained == ["teacher resnet8", "alone seed 0", *2 * ["random in class seed 0"]]
    # With pairs; the value is within a criterion, which is one row of the table all the same.
    spec = "{type: KDLoss, temperature: {}}"
    assert main([*command, "--values", "2", "8", "--criterion", "alone", spec]) == 0
    (file,) = tmp_path.glob("criterion*.md")
    assert [line.count("|") for line in file.read_text().splitlines() if spec in line[:40]] == [4]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--values", "1", "2", "--lr", "0.1"], r"one \{\} among the options.*got 2 values and 0"),
        (["--lr", "{}"], "got 0 values and 1"),
        (["--values", "1", "--lr", "{}", "--evaluate", "test"], "--evaluate"),
        (["--values", "1", "--lr", "{}", "--pixels", "--unpaired"], "--pixels needs pairs"),
    ],
)  # fmt: skip
def test_an_axis_that_is_none_is_refused(
    more: list[str], message: str, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["axis", "mnist", *more]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not trained


@pytest.mark.parametrize("at", [{}, {"0.001": 0.001, "0.1": 0.1}])
def test_a_series_is_lines_over_numbers_and_points_over_names(
    at: dict[str, float], tmp_path: Path
) -> None:
    found = {
        value: [Row("alone", (40.0,), None), Row("kd", (50.0 + k, 52.0), None), Row("ds", (), None)]
        for k, value in enumerate(("0.001", "0.1"))
    }
    series.draw(found, at, tmp_path / "s.png", title="T", across="x")
    assert (tmp_path / "s.png").stat().st_size > 10_000


# Figures.

RUNS = [
    {"method": method, "seed": seed, "accuracy": accuracy}
    for method, accuracies in (("alone", (50.0, 52.0)), ("kd", (55.0, 59.0)), ("ds", (60.0, 61.0)))
    for seed, accuracy in enumerate(accuracies)
]


def test_rows_hold_mean_sample_deviation_and_gain() -> None:
    alone, kd, ds = rows(RUNS)
    assert (alone.method, alone.mean, alone.gain) == ("alone", 51.0, None)
    assert alone.std == pytest.approx(2**0.5)  # n - 1
    assert (kd.mean, kd.gain) == (57.0, 6.0)
    assert ds.gained == "+9.50"
    assert kd.accuracy == "57.00 ± 2.83"
    (row,) = rows([{"method": "kd", "accuracy": 40.0}])
    assert (row.std, row.gain, row.accuracy, row.gained) == (None, None, "40.00", "")


def test_failed_seeds_are_told() -> None:
    message = "the loss of epoch 2 is not finite"
    runs = [*RUNS[:3], {"method": "kd", "seed": 1, "failed": message}]
    kd = rows(runs)[1]
    assert (kd.accuracies, kd.gain, kd.failures) == ((55.0,), 4.0, (message,))
    assert kd.accuracy == "55.00 (1 of 2 failed)"
    (gone,) = rows(runs[3:])
    assert gone.accuracy == f"failed: {message}"
    assert (gone.gain, gone.std) == (None, None)


def test_curves_are_drawn_from_a_history(tmp_path: Path) -> None:
    file = tmp_path / "h.csv"
    file.write_text("epoch,loss,accuracy\n1,2.5,30\n2,1.5,\n")
    history = figures.read_history(file)
    assert history == [{"epoch": 1, "loss": 2.5, "accuracy": 30}, {"epoch": 2, "loss": 1.5}]
    figures.draw_curves({"kd": [history], "at": []}, tmp_path / "c.png", title="T")
    with Image.open(tmp_path / "c.png") as image:
        assert image.size[0] > image.size[1]


@pytest.mark.parametrize("count", [8, 20])
def test_every_line_has_a_hue_of_its_own(count: int) -> None:
    names = ["alone", "own pairs (reference)", *(f"method {k}" for k in range(count))]
    found = figures.colours(names)
    assert found[:2] == [figures.LONE, "black"]
    assert len(set(found)) == len(names)


@pytest.mark.parametrize("damage", ["a number", "an epoch's end", "a column", "no number"])
def test_a_damaged_history_is_named(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "h.csv"
    show = Show(Console(), tmp_path)
    show.keep(file)
    show.begin("kd", 2, 1, 0)
    rates = {"seconds": 1.0, "images_per_second": 8.0}
    whole = [{"epoch": 1, "loss": 2.5, "accuracy": 30.0} | rates, {"epoch": 2, "loss": 1.5} | rates]
    show.epoch(whole)
    assert figures.read_history(file) == whole
    text = file.read_text()
    changed = {
        "a number": text.replace("2.5", "2.4"),
        "an epoch's end": text[: text.index("30.0") + 3],
        "a column": text.replace("loss", "lost"),
        "no number": text.replace("2.5", "2x5"),
    }
    file.write_text(changed[damage])
    with pytest.raises(ValueError, match=r"h\.csv is damaged .* fix: move it away"):
        figures.read_history(file)


@pytest.mark.parametrize("count", [1, 3])
def test_figures_are_drawn(tmp_path: Path, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    networks = {f"net {n}": torch.randn(30, 8 + n, generator=generator) for n in range(count)}
    failed = {"method": "dkd", "seed": 0, "failed": "dkd seed 0: it failed"}
    ran = {row.method: row for row in rows([*RUNS[: 2 * count], failed])} | {"not run": None}
    panels = [figures.Panel(ran, {"kd": 70.0} if count > 1 else {}, "T", "teacher 90")] * count
    figures.draw_accuracy(panels, tmp_path / "a.png", title="T")
    figures.draw_self_similarity(networks, tmp_path / "s.png")
    labels = torch.arange(30) % 3
    figures.draw_tsne(networks, labels, ["x", "y", "z"], tmp_path / "t.png")
    for name in ("a", "s", "t"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size[0] > 400
            colours = image.convert("RGB").getcolors(1 << 24)
            assert colours is not None
            assert len(colours) > 10  # not an empty sheet


def test_more_classes_than_hues_still_get_a_figure(tmp_path: Path) -> None:
    features = {"net": torch.randn(40, 8, generator=torch.Generator().manual_seed(0))}
    labels = torch.arange(40) % 20
    figures.draw_tsne(features, labels, [str(n) for n in range(20)], tmp_path / "t.png")
    assert (tmp_path / "t.png").exists()


def test_an_image_is_shown_by_its_bands_from_dark_to_bright() -> None:
    bands = torch.stack([torch.full((4, 4), float(k)) for k in range(5)])
    shown = figures.visible(bands, (4, 2, 0))
    assert shown.shape == (4, 4, 3)
    assert shown[0, 0].tolist() == pytest.approx([1, 0.5, 0], abs=0.02)
    assert figures.visible(bands, ())[0, 0].tolist() == pytest.approx([0, 0.5, 1], abs=0.02)
    assert figures.visible(bands[:1], (4, 2, 0)).shape == (4, 4)  # these bands are not there
    assert figures.visible(torch.ones(1, 4, 4), ()).max() == 0
