"""``train.py``: what is kept, what is made again, and what a user is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import train as script
from tests.examples.entries import class_counts, outcome, results

Runner = Callable[..., int]


def test_a_finished_row_is_not_trained_again(run: Runner, trained: list[str], tmp_path: Path):
    assert run() == 0
    assert trained == ["teacher resnet8", "alone seed 0", "kd seed 0"]
    assert run() == 0
    assert len(trained) == 3
    assert run("--lr", "0.02", "--criterion", "alone") == 0
    assert trained[3:] == ["teacher resnet8", "alone seed 0"]
    assert len(results(tmp_path / "out")) == 3


def test_a_row_by_other_code_is_said_to_be_so_and_made_again(
    run: Runner, trained: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    run("--criterion", "alone")
    monkeypatch.setattr(script.Session, "code", lambda self, role: "another")
    run("--criterion", "alone")
    assert trained.count("alone seed 0") == 2
    assert "by other code" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("--criterion", "KDLos", "did you mean 'KDLoss'"),
        ("--view", "nois:0.5", "did you mean 'noise'"),
        ("--view", "noise:2", "amount"),
        ("--teacher", "resnet9", "near names"),
        ("--limit", "3", "--limit"),
        ("--seeds", "0 1 0", "--seeds has 0 more than once"),
        ("--criterion", "alone alone", "--criterion has alone more than once"),
        ("--device", "nowhere", "--device"),
    ],
)
def test_wrong_options_are_one_line(
    run: Runner, capsys: pytest.CaptureFixture, option: str, value: str, word: str
):
    assert run(option, *value.split()) == 2
    said = capsys.readouterr().err
    assert word in said
    assert len(said.splitlines()) == 1


def test_a_row_that_is_the_same_for_every_seed_is_marked():
    runs = [{"method": "table", "accuracy": 34.78, "seed": seed} for seed in range(3)]
    (row,) = script.rows(runs)
    assert "lost" in row.accuracy


def test_a_recipe_names_an_unknown_option(tmp_path: Path):
    file = tmp_path / "own.yaml"
    file.write_text("like: mnist\nepoch: 3\n")
    file.with_name("mnist.yaml").write_text("reader: mnist\n")
    with pytest.raises(ValueError, match="did you mean 'epochs'"):
        script.recipe(str(file), script.Options)


@pytest.mark.parametrize("own", ["own", "mnist"])
def test_a_recipe_of_ones_own_is_like_a_published_one(tmp_path: Path, own: str):
    file = tmp_path / f"{own}.yaml"
    file.write_text("like: mnist\nepochs: 3\n")
    options = script.recipe(str(file), script.Options)
    assert (options.reader, options.epochs, options.recipe) == ("mnist", 3, own)


@pytest.mark.parametrize("like", ["own", "other", "nothing", "[mnist]"])
def test_a_recipe_that_is_like_none_or_like_itself_is_refused(tmp_path: Path, like: str):
    (tmp_path / "own.yaml").write_text(f"like: {like}\n")
    (tmp_path / "other.yaml").write_text("like: own\n")
    with pytest.raises(ValueError, match=r"is like .* which is none, or is like this one; fix: "):
        script.recipe(str(tmp_path / "own.yaml"), script.Options)


@pytest.mark.parametrize("name", ["s2s_eu", "folders"])
def test_what_has_no_pairs_is_sent_to_the_other_script(name: str, capsys: pytest.CaptureFixture):
    assert script.main([name]) == 2
    assert f"fix: python examples/unpaired.py {name}" in capsys.readouterr().err


def test_a_data_set_of_another_number_of_classes_is_refused(
    run: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    class_counts(monkeypatch, tiny=100)
    assert run() == 2
    assert "100 classes" in capsys.readouterr().err


@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_images_that_are_read_while_training_give_the_same_bits(
    run: Runner, tmp_path: Path, crop: str
):
    held, streamed = tmp_path / "held", tmp_path / "streamed"
    options = ("--criterion", "kd", "--epochs", "1", "--crop", crop)
    assert run(*options, out=held) == 0
    assert run(*options, "--memory", "0", "--workers", "0", out=streamed) == 0
    assert outcome(held) == outcome(streamed)


def test_the_mean_teacher_is_a_row_where_labels_are_few(
    run: Callable[..., int], tmp_path: Path
) -> None:
    assert run("--labels", "8", "--criterion", "alone", "mean teacher", "--seeds", "0") == 0
    lone, mean = json.loads((tmp_path / "out/results.json").read_text())["runs"]
    assert set(lone["terms"]) == {"CE"}
    assert set(mean["terms"]) == {"CE", "MT"}
    assert mean["config"]["loss"] == {"mean teacher": [0.99, 0.9]}
    assert mean["config"]["teacher"] is None
    assert mean["config"]["labelled"] == pytest.approx(1 / 3)
