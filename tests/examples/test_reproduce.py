"""The paper's tables from one command: columns, rows, what is trained, and what is said of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from crossmodal.cli import parse
from crossmodal.methods import Setup, resolve
from crossmodal.recipes import Recipe, data_sets
from crossmodal.runs import session
from crossmodal.runs.processes import HELPER
from crossmodal.runs.store import Results
from crossmodal.tables import cells, comparison, published, reproduce
from crossmodal.tables.protocol import differences
from crossmodal.tables.report import Row
from structkd import Features
from tests.examples import layouts
from tests.examples.files import two_sides
from tests.examples.tiny import opened

SMALL = (
    *("--epochs", "1", "--seeds", "1", "--batch-size", "8", "--precision", "fp32"),
    *("--teacher", "resnet8x0_5", "--student", "resnet8x0_5", "--device", "cpu"),
)
Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """``reproduce.py`` with tiny networks on tiny files in the layout of the authors' data set."""
    rich, poor = two_sides(tmp_path / "data" / "cml", count=10)
    rich.rename(rich.with_name("optics"))
    poor.rename(poor.with_name("radar"))

    def ran(*arguments: str) -> int:
        where = ("--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"))
        return reproduce.main([*arguments, *where, *SMALL, "--size", "16", "--pad", "2"])

    return ran


def column(table: str, name: str) -> published.Column:
    return next(c for c in published.tables()[table].columns if c.name == name)


# What is published.


def test_the_tables_have_the_papers_rows_and_columns() -> None:
    found = published.tables()
    shapes = {name: (len(t.columns), len(t.rows)) for name, t in found.items()}
    assert shapes == {
        "table2": (5, 14), "table3": (6, 14), "table4": (6, 14), "table5": (6, 14),
        "table6": (1, 6), "table7": (2, 18),
    }  # fmt: skip
    assert column("table2", "cml-crd_mobilenet_v2").accuracies["ds"] == 81.88
    assert column("table3", "cifar10-crd_shufflenet_v2").accuracies["cc"] == 83.77
    assert column("table5", "imagenet-resnet8x4").accuracies["teacher"] == 76.28
    assert column("table6", "cml-resnet8x4").accuracies["without-SRM"] == 39.15
    assert column("table7", "cml-crd_shufflenet_v1").accuracies["kd+ds"] == 88.84


@pytest.mark.parametrize("name", published.tables())
def test_every_row_is_a_method_and_every_column_can_be_trained(name: str) -> None:
    table = published.tables()[name]
    for method in table.rows.values():
        assert resolve(method).name == method
    for one in table.columns:
        entry = data_sets()[one.dataset]
        assert entry.amount == published.noise(one.dataset) or published.noise(one.dataset) is None
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
    for row, method in published.tables()["table6"].rows.items():
        plan = resolve(method)
        left = set(plan.build(Setup(6, 6)).terms(student, teacher))
        left |= {"SRM"} if plan.supervision == 1 else set()
        assert every - left == (set() if row == "all" else {row.removeprefix("without-")})


# What is trained.


def test_tables_6_and_7_share_what_is_finished_and_a_second_call_trains_nothing(
    run: Run, tmp_path: Path, trained: list[str]
) -> None:
    ablation = ("table6", "--rows", "all", "without-SRM,without-SEM-2")
    assert run(*ablation) == 0
    assert [label.removesuffix(" seed 0") for label in trained] == [
        "teacher resnet8x0_5", "ds", "ds:supervision=0", "ds:terms=[SEM-1,DCM-1,DCM-2]",
    ]  # fmt: skip
    sums = ("table7", "--column", "resnet8x4", "--rows", "ds", "fitnets+ds")
    assert run(*sums) == 0
    assert trained[4:] == ["fitnets+ds seed 0"]
    assert run(*sums) == run(*ablation) == 0
    assert len(trained) == 5
    out = tmp_path / "out"
    assert {path.name for path in out.glob("*.*")} >= {
        "table6.md", "table6.png", "table7.md", "table7.png",
    }  # fmt: skip
    runs = json.loads((out / "cml-resnet32x4" / "results.json").read_text())["runs"]
    ours = {one["method"]: one["accuracy"] for one in runs}
    lines = (out / "table7.md").read_text().splitlines()
    for name, theirs in (("ds", 89.87), ("fitnets+ds", 89.93)):
        off = ours[name] - theirs
        assert f"| {name} | {ours[name]:.2f} | 1 | {theirs:.2f} | {off:+.2f} |" in lines
    assert "| kd+ds | — | — | 90.32 | — |" in lines
    assert "- `epochs` 1, published 300" in lines
    assert "- student `resnet8x0_5`, published `resnet8x4`" in lines
    assert "## CML, resnet32x4 → crd_shufflenet_v1" not in lines
    assert "(`ds:terms=[SEM-1,DCM-1,DCM-2]`)" in (out / "table6.md").read_text()


def test_what_one_column_lacks_is_said_and_the_others_go_on(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "cifar100").mkdir()
    layouts.write_cifar100(tmp_path / "cifar100", monkeypatch)
    command = ["table3", "--column", "resnet8x4", "--rows", "kd", "--data", str(tmp_path)]
    assert reproduce.main([*command, *SMALL, "--out", str(tmp_path / "out")]) == 1
    assert trained == ["teacher resnet8x0_5", "kd seed 0"]
    first, second = (tmp_path / "out" / "table3.md").read_text().split("## CIFAR-10, ")
    assert "Not run" not in first
    assert "Not run: data directory" in second
    assert "| kd | — | — | 83.50 | — |" in second
    trained.clear()
    capsys.readouterr()
    command[2] = "cifar10"
    assert reproduce.main([*command, *SMALL, "--out", str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no column of table3 can be run: data directory")
    assert error.count("\n") == 1
    assert not trained
    assert not list((tmp_path / "other").glob("*.md"))


def test_an_interrupted_call_leaves_the_table_of_what_it_has(
    run: Run, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = session.fit

    def stopped(training: object, *rest: object) -> object:
        if len(trained) == 2:
            raise KeyboardInterrupt
        return whole(training, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(session, "fit", stopped)
        assert run("table2", "--column", "resnet8x4", "--rows", "alone", "kd") == 130
    lines = (tmp_path / "out" / "table2.md").read_text().splitlines()
    for name in ("teacher, clean images", "alone"):
        assert "—" not in next(line for line in lines if line.startswith(f"| {name} |"))
    assert "| kd | — | — | 88.29 | — |" in lines
    assert run("table2", "--column", "resnet8x4", "--rows", "alone", "kd") == 0
    assert trained[2:] == ["kd seed 0"]


def test_a_helper_leaves_the_columns_of_others_alone(
    run: Run, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HELPER, "python examples/compare.py another")
    assert run("table2", "--rows", "alone") == 0
    assert not trained
    assert not (tmp_path / "out").exists()


# What is asked for.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table8"], r"unknown table 'table8'; did you mean 'table\d'\? known: table2, table3"),
        (["table3", "--column", "cifar10-resnet8x5"],
         "unknown column of table3 'cifar10-resnet8x5'; did you mean 'cifar10-resnet8x4'"),
        (["table6", "--column", "cifar10"], "unknown column of table6 'cifar10'; known: cml"),
        (["table2", "--rows", "fitnet"],
         "unknown row of table2 'fitnet'; did you mean 'fitnets'\\? known: alone, kd"),
        (["table2", "--rows"], "--row: expected at least one argument"),
        (["table2", "--method", "kd"], "--method is not for reproduce.py.*fix: --rows"),
        (["table2", "--epohcs", "3"], "--epohcs 3; did you mean '--epochs'"),
        (["table2", "--classes", "x"], "--classes is not for cml"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce.main(arguments) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert re.search(message, told)


def test_columns_by_name_data_set_or_student() -> None:
    table = published.tables()["table3"]
    chosen = [c.name for c in reproduce._columns(table, ["cifar10-resnet8x4", "crd_shufflenet_v1"])]
    assert chosen == [
        "cifar100-crd_shufflenet_v1",
        "cifar10-resnet8x4",
        "cifar10-crd_shufflenet_v1",
    ]
    assert reproduce._columns(table, ["cifar100,cifar10"]) == list(table.columns)
    assert reproduce._columns(table, None) == list(table.columns)


def test_the_list_names_what_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main(["--list"]) == 0
    told = capsys.readouterr().out
    for table in published.tables().values():
        assert table.title in told
    assert reproduce.main(["table6", "--list"]) == 0
    told = capsys.readouterr().out
    assert "without-DCM-2" in told
    assert "39.15" in told
    assert "ds:terms=[SEM-1,SEM-2,DCM-1]" in told
    assert "Table 7" not in told


# What is said of it.


def test_ours_minus_the_published() -> None:
    table = published.tables()["table2"]
    first = column("table2", "cml-resnet8x4")
    failed = Row("crd", (), None, ("crd seed 0: the loss is not finite (epoch 1)",))
    rows = {"alone": Row("alone", (80.0, 82.0), None), "ds": Row("ds", (90.0,), 9.0), "crd": failed}
    ours = cells.Cells(first, rows, 99.0, [])
    names = ("teacher", "alone", "ds", "crd", "kd")
    found = [ours.difference(name) for name in names]
    assert found[:3] == pytest.approx([99.0 - 99.23, 81.0 - 84.0, 90.0 - 89.87])
    assert found[3:] == [None, None]
    text = comparison.markdown(table, [(first, ours)])
    assert "By the published protocol" in text
    for line in (
        "| teacher, clean images | 99.00 | 1 | 99.23 | -0.23 |",
        "| alone | 81.00 ± 1.41 | 2 | 84.00 | -3.00 |",
        "| ds | 90.00 | 1 | 89.87 | +0.13 |",
        "| crd | failed: the loss is not finite | 0 | 89.48 | — |",
        "- crd failed: crd seed 0: the loss is not finite (epoch 1)",
    ):
        assert line in text.splitlines()


def test_runs_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    table, first = published.tables()["table2"], column("table2", "cml-resnet8x4")
    common = {"model": "m", "teacher": "t-1", "training": {"epochs": 5}}

    def one(method: str, seed: int, accuracy: float, **other: object) -> dict[str, object]:
        training = {"epochs": 5} | ({"seed": seed} if seed else {})
        config = {**common, "training": training, "loss": method, **other}
        return {"method": method, "seed": seed, "accuracy": accuracy, "config": config}

    place = cells.folder(tmp_path, first)
    Results(place).write(
        {},
        one("alone", 0, 50.0, teacher=None),
        one("alone", 1, 52.0, teacher=None),
        one("kd", 0, 60.0),
        one("kd", 0, 20.0, teacher="t-2"),
        one("kd", 1, 10.0, training={"epochs": 1, "seed": 1}),
        one("ds", 0, 30.0, model="another"),
        one("ds", 1, 71.0, loss="an older version"),
        one("ds", 1, 70.0),
    )
    assert cells.stored(tmp_path, table, first) is None
    cells.record(tmp_path, first, common, ["`epochs` 5, published 300"], 90.0)
    cells.record(tmp_path, first, common, ["`epochs` 5, published 300"])
    found = cells.stored(tmp_path, table, first)
    assert found is not None
    assert {name: row.accuracies for name, row in found.rows.items()} == {
        "alone": (50.0, 52.0), "kd": (60.0,), "ds": (70.0,),
    }  # fmt: skip
    assert found.teacher == 90.0  # known of these settings
    cells.record(tmp_path, first, common | {"teacher": "t-2"}, [])
    found = cells.stored(tmp_path, table, first)
    assert found is not None
    assert (found.teacher, found.rows["kd"].accuracies) == (None, (20.0,))
    falling = {"epochs": 5, "falling": True}  # nothing of the lone student falls
    Results(place).write({}, one("kd", 2, 65.0, training=falling | {"seed": 2}))
    cells.record(tmp_path, first, common | {"training": falling}, [])
    found = cells.stored(tmp_path, table, first)
    assert found is not None
    rows = {name: row.accuracies for name, row in found.rows.items()}
    assert rows == {"alone": (50.0, 52.0), "kd": (65.0,)}
    (place / "columns.json").write_text("{")
    with pytest.raises(ValueError, match=r"columns.json is damaged .*fix: move it away"):
        cells.stored(tmp_path, table, first)


def told(*options: str, name: str = "cifar10", poverty: str = "noisy 0.1") -> list[str]:
    job = parse([name, "--precision", "fp32", "--out", "-", *options], kind="compare")
    wanted = next(c for c in published.tables()["table3"].columns if c.name == f"{name}-resnet8x4")
    return differences(job, job.recipes, replace(opened(), poverty=poverty), wanted)


def test_what_differs_from_the_published_settings() -> None:
    clipped = "`clip` agc:0.1, of which the paper says nothing"
    assert told() == [clipped]
    assert told("--clip", "none") == []
    assert told("--clip", "none", "--epochs", "3") == ["`epochs` 3, published 300"]
    assert told("--clip", "none", "--teacher-epochs", "4", "--student-lr", "0.05") == [
        "`epochs` 4 (teacher), published 300",
        "`lr` 0.05 (student), published 0.1",
    ]
    options = ("--evaluate", "val", "--limit", "100", "--labels", "50", "--student", "resnet8")
    assert told(*options, "--batch-size", "32", "--falling", poverty="noisy 0.3") == [
        "student `resnet8`, published `resnet8x4`",
        "accuracy on a tenth of the training images, which are held out, not on the test set",
        "100 training images only",
        "50 training images have labels, published all",
        "poor images are noisy 0.3, published noisy 0.1",
        "`batch_size` 32; the recipe has 64, the paper says nothing of it",
        clipped,
        "`falling` on (student), of which the paper says nothing",
    ]


def test_the_published_protocol_is_made_of_a_recipes_fields() -> None:
    known = {**published.protocol(), **published.unmentioned()}
    assert Recipe(**known).settings["epochs"] == 300
    assert not published.protocol().keys() & published.unmentioned().keys()
