"""Whole jobs on a tiny set: what they leave, what they reuse, what they refuse."""

from __future__ import annotations

import csv
import io
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import models
import train as script
import unpaired
from data.readers import READERS, Reader
from data.sources import Part, Source
from progress import Show
from tests.examples import conftest
from tests.examples.entries import results

Runner = Callable[..., int]
Shown = pytest.CaptureFixture[str]


def test_a_job_leaves_results_a_table_weights_histories_and_tensorboard_files(
    run: Runner, tmp_path: Path, capsys: Shown
) -> None:
    out = tmp_path / "out"
    options = ("--criterion", "alone", "kd", "ds", "--seeds", "0", "1", "--limit", "64")
    assert run(*options, "--epochs", "2", "--tensorboard") == 0
    shown = capsys.readouterr().out
    assert "preflight: 6 students to train, about" in shown
    assert "[5 of 6] ds seed 0  epoch 2/2" in shown
    content = json.loads((out / "results.json").read_text())
    assert content["commands"] == [content["command"]]
    assert "--limit 64" in content["command"]
    assert {"python", "structkd", "torch", "timm"} <= set(content["versions"])
    found = {(one["method"], one["seed"]): one for one in content["runs"]}
    assert list(found) == [(m, s) for m in ("alone", "kd", "ds") for s in (0, 1)]
    for one in found.values():
        assert 0 <= one["accuracy"] <= 100
        assert one["loss"] == pytest.approx(sum(one["terms"].values()), rel=1e-4)
    mean = sum(found["ds", seed]["accuracy"] for seed in (0, 1)) / 2
    text = (out / "results.md").read_text()
    assert f"| ds | {mean:.2f} ±" in text
    assert "teacher resnet8, clean images" in text
    left = sorted(path.name.split("-resnet")[0] for path in out.glob("*.pt"))
    assert left == ["student-alone-seed0", "student-ds-seed0", "student-kd-seed0", "teacher"]
    assert len(list((out / "history").glob("*.csv"))) == 7
    (history,) = (out / "history").glob("student-ds-seed1-*.csv")
    rows = list(csv.DictReader(history.open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[-1]["SEM-1"]) == found["ds", 1]["terms"]["SEM-1"]
    boards = {file.parent.name for file in out.glob("tensorboard/**/events.out*")}
    assert boards == {file.stem for file in (out / "history").glob("*.csv")}


def test_what_is_finished_is_known_by_all_that_it_depends_on(
    run: Runner, trained: list[str], tmp_path: Path
) -> None:
    def made(*options: str) -> list[str]:
        trained.clear()
        assert run("--epochs", "1", *options) == 0
        return list(trained)

    both = ("--criterion", "alone", "kd")
    assert made("--criterion", "alone") == ["teacher resnet8", "alone seed 0"]
    before = results(tmp_path / "out")
    assert made(*both) == ["kd seed 0"]
    assert results(tmp_path / "out")[:1] == before
    assert made(*both, "--fresh") == ["alone seed 0", "kd seed 0"]
    assert made(*both, "--teacher-epochs", "2") == ["teacher resnet8", "kd seed 0"]
    assert made(*both, "--view", "noise:0.7") == ["alone seed 0", "kd seed 0"]  # and no teacher
    assert made(*both, "--falling") == ["kd seed 0"]  # nothing of a lone student falls
    assert made(*both, "--seeds", "0", "1") == ["alone seed 1", "kd seed 1"]
    assert made(*both, "--workers", "0", "--memory", "1", "--tensorboard") == []
    commands = json.loads((tmp_path / "out/results.json").read_text())["commands"]
    assert len(commands) == 8


def test_without_pairs_another_matcher_moves_those_alone_that_it_matches(
    recipe: Path, trained: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("faiss")

    def made(*options: str) -> list[str]:
        trained.clear()
        command = [str(recipe), "--out", str(tmp_path / "out"), "--epochs", "1", *options]
        assert unpaired.main(command) == 0
        return list(trained)

    rows = ("alone", "pairs made poor", "random in class", "matching")
    titles = [f"{row} seed 0" for row in rows]
    first = ("--matcher-epochs", "1", "--rows", *rows)
    assert made(*first) == ["teacher resnet8", "matcher", *titles]
    assert made("--matcher-epochs", "2", "--rows", *rows) == ["matcher", titles[3]]
    assert made(*first, "--no-falling") == []  # of these no row has a weight that falls
    assert made("--no-falling", "--rows", "pairs made poor + dense") == [
        "pairs made poor + dense seed 0"
    ]
    assert made("--labels", "8", "--rows", "alone", "pairs made poor + dense") == [
        "alone seed 0", "pairs made poor + dense seed 0",
    ]  # fmt: skip


def test_a_row_that_diverges_is_stored_and_not_tried_again(
    run: Runner, trained: list[str], tmp_path: Path, capsys: Shown
) -> None:
    assert run("--criterion", "alone") == 0
    options = ("--criterion", "alone", "kd", "--lr", "1e30", "--clip", "none")
    assert run(*options) == 2  # the teacher: nothing to go on with
    said = capsys.readouterr().err
    assert re.search(
        r"teacher resnet8: the loss of epoch \d is not finite .*fix: a smaller --lr", said
    )
    strong = ("--criterion", "alone", "{type: KDLoss, weight: 1.0e+38}", "--clip", "none")
    assert run(*strong) == 1
    failed = results(tmp_path / "out")[-1]
    assert "is not finite" in failed["failed"]
    trained.clear()
    assert run(*strong) == 1
    assert trained == []


def test_an_error_that_nobody_raised_on_purpose_keeps_its_traceback(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(READERS, "tiny", Reader(lambda *a: int("no number"), data="optional"))
    with pytest.raises(ValueError, match="invalid literal"):
        run()


# Before anything is trained.


def told_seconds(said: str) -> float:
    days, hours, minutes, seconds = re.search(
        r"about (?:(\d+) days?, )?(\d+):(\d+):(\d+)", said
    ).groups()
    numbers = {"days": days or 0, "hours": hours, "minutes": minutes, "seconds": seconds}
    return timedelta(**{name: int(number) for name, number in numbers.items()}).total_seconds()


class Slow(nn.Module):
    """Waits for every image that it is asked about after its training."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.fc = network, network.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training and len(x) > 2:
            time.sleep(0.02 * len(x))
        return self.network(x)


def test_preflight_counts_the_evaluation(
    run: Runner, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    create = models.create
    monkeypatch.setattr(models, "create", lambda *a, **k: Slow(create(*a, **k)))
    started = time.perf_counter()
    assert run("--epochs", "1", "--criterion", "alone") == 0
    seconds = time.perf_counter() - started
    told = told_seconds(capsys.readouterr().out)
    # The teacher looks at both sides of 40 held-out images, the student at one: 2.4 seconds.
    assert 2 <= told <= 3 * seconds + 2


def test_preflight_counts_the_reading_of_images(
    run: Runner, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    source = Source(conftest.CLASSES, conftest.half(80, seed=1), conftest.half(40, seed=2))
    read = source.train.read

    def slow(rows: Any) -> Any:
        time.sleep(0.004 * len(rows))
        return read(rows)

    slowed = Source(source.classes, Part(source.train.labels, slow), source.test)
    monkeypatch.setitem(READERS, "tiny", Reader(lambda *a: slowed, data="optional"))
    options = ("--epochs", "3", "--criterion", "alone", "--memory", "0", "--workers", "0")
    assert run(*options) == 0
    # Two networks, three epochs of 80 images each.
    assert told_seconds(capsys.readouterr().out) >= 2


def test_what_takes_more_than_a_day_begins_with_yes_alone(
    run: Runner, trained: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    options = ("--epochs", "100000000", "--teacher-epochs", "1", "--criterion", "alone")
    assert run(*options) == 2
    said = capsys.readouterr().err
    assert "more than a day; fix: --yes" in said
    assert trained == []

    def stopping(self: Show, history: list[dict[str, float]]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Show, "epoch", stopping)
    assert run(*options, "--yes") == 130
    assert trained == ["teacher resnet8"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes fp16")
def test_fp16_without_a_gpu_is_one_line(run: Runner, trained: list[str], capsys: Shown) -> None:
    assert run("--precision", "fp16") == 2
    said = capsys.readouterr().err
    assert "--precision fp16" in said
    assert "fix: --precision bf16 or fp32" in said
    assert said.count("\n") == 1
    assert trained == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "unknown recipe 'nosuch'; known: cifar10, cifar100, cml"),
        (["mnist", "--student", "resnet8x5"], "'resnet8x5'"),
        (["mnist", "--teacher", "vit_tiny_patch16_224"], "does not take images of 1x28x28 (Input"),
        (["cifar10"], "needs a data directory; fix: add --data DIR"),
        (["mnist", "--download"], "--download is not for mnist"),
        (["mnist", "--ema", "1"], "--ema must lie in [0, 0.999999], got 1.0"),
        (["mnist", "--labelled", "2"], "--labelled must lie in"),
        (["mnist", "--memory", "nan"], "--memory must be at least 0, got nan"),
        (["mnist", "--workers", "-1"], "--workers must be at least 0, got -1"),
        (["mnist", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["mnist", "--weight-decay", "-1"], "--weight-decay must be at least 0"),
        (["mnist", "--seeds", "-1"], "--seeds must be whole numbers of at least 0"),
        (["mnist", "--jobs", "2", "--fresh"], "--fresh trains one student after another"),
        (["mnist", "--device", "meta"], "--device 'meta' cannot be used"),
        (["mnist", "--clip", "agc:x"], "--clip must be none, agc:0.1"),
        (["unpaired", "mnist", "--rows", "match"], "unknown 'match'; did you mean 'matching'"),
        (["unpaired", "mnist", "--pseudo", "nois:1"], "--pseudo nois:1: unknown view 'nois'"),
        (["unpaired", "mnist", "--weights", "-1", "0", "0"], "--weights must be at least 0"),
        (["unpaired", "mnist", "--criterion", "alone"], "--criterion: row 'SemBridge as"),
        (["unpaired", "mnist", "--limit", "10"], "leave a class of"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, trained: list[str], capsys: Shown,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # As mnist's, without waiting for all of its digits.
    few = Source(
        [str(n) for n in range(10)],
        digits(40),
        digits(20),
    )
    monkeypatch.setitem(READERS, "mnist", replace(READERS["mnist"], open=lambda *a: few))
    main = script.main
    if arguments[0] == "unpaired":
        main, arguments = unpaired.main, arguments[1:]
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path / "o"), *device]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert trained == []


def digits(count: int) -> Part:
    import numpy as np

    labels = np.arange(count) % 10
    return Part(labels, np.zeros((count, 1, 28, 28), np.uint8).__getitem__)


# Recipes.


@pytest.mark.parametrize("name", ["s2s_eu", "s2s_cn", "m2s_gl"])
def test_the_s2s_jobs_train_the_published_pair(name: str) -> None:
    options = script.recipe(name, unpaired.Options)
    assert (options.teacher, options.student) == ("resnet34", "resnet34")
    assert (options.optimizer, options.lr, options.batch_size) == ("adam", 1e-3, 256)
    assert options.epochs == 200


@pytest.mark.parametrize(
    ("name", "epochs"),
    [("s2s_eu", [30, 60, 95, 135]), ("s2s_cn", [45, 60, 80, 105, 135]),
     ("m2s_gl", [15, 45, 80, 120, 165])],
)  # fmt: skip
def test_rematching_is_as_published(name: str, epochs: list[int]) -> None:
    options = script.recipe(name, unpaired.Options)
    assert unpaired.rematch_epochs(options.rematch, options.epochs) == epochs


def test_a_recipe_fills_what_is_not_given_and_halves_have_twice_the_passes() -> None:
    options = script.parsed(
        ["cifar10", "--data", "somewhere", "--epochs", "20", "--no-flip"], script.Options
    )
    assert (options.epochs, options.lr, options.flip) == (20, 0.1, False)
    assert options.criterion == ("alone", "kd", "dense")
    assert options.seeds == (0, 1, 2)
    halved = script.parsed(["mnist"], unpaired.Options)
    assert (halved.epochs, halved.teacher_epochs, halved.recipe) == (24, 16, "unpaired-mnist")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- mnist", "cannot be read"),
        ("like: [", "cannot be read"),
        ("like: tinny", "tinny"),
        ("reader: nosuch", "unknown reader 'nosuch'"),
        ("like: tiny\nteacher: 3", "teacher must be like"),
        ("like: tiny\nflip: 1", "flip must be like True, got 1"),
        ("like: tiny\nepochs: '3'", "epochs must be like 100, got '3'"),
        ("like: tiny\nepocs: 3", "did you mean 'epochs'"),
        ("like: tiny\nlr: fast", "lr must be"),
        ("like: tiny\nevaluate: validation", "evaluate must be one of test, val, got 'validation'"),
        ("like: tiny\nlimit: many", "limit must be of type int, got 'many'"),
        ("like: tiny\nseeds: [a]", "seeds must be like (0, 1, 2), got 'a'"),
        ("like: tiny\ncriterion: [alone, no]", "criterion must be like ('alone', "),
    ],
)
def test_a_recipe_that_cannot_be_is_one_line(
    text: str, message: str, recipe: Path, capsys: Shown
) -> None:
    file = recipe.with_name("mine.yaml")
    file.write_text(text)
    assert script.main([str(file), "--out", str(recipe.parent / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


# The scripts.


@pytest.mark.parametrize("name", ["train", "unpaired"])
def test_the_help_says_what_every_option_is(name: str, capsys: Shown) -> None:
    main = {"train": script.main, "unpaired": unpaired.main}[name]
    with pytest.raises(SystemExit):
        main(["mnist", "--help"])
    said = capsys.readouterr().out
    for option in ("--criterion", "--teacher-epochs", "--yes"):
        assert option in said
    assert "Start even if the table takes longer than a day." in said


def test_a_bar_that_is_interrupted_gives_the_cursor_back(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(self: Show, history: list[dict[str, float]]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Show, "epoch", stopping)
    screen = io.StringIO()
    options = script.recipe(str(recipe), script.Options, out=tmp_path / "out")
    job = script.Session(options, console=Console(file=screen, force_terminal=True))
    with pytest.raises(KeyboardInterrupt):
        job.run()
    hidden, shown = (screen.getvalue().rfind(f"\x1b[?25{end}") for end in "lh")
    assert shown > hidden >= 0
