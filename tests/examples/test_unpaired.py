"""``unpaired.py``: free pairs, matches and two folders of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train
import unpaired
from unpaired import ROWS, pair_ranks, rematch_epochs


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
    assert "another --view" in capsys.readouterr().err  # three channels are not one


def test_matches_refuse_missing_labels(recipe: Path, capsys: pytest.CaptureFixture):
    assert unpaired.main([str(recipe), "--labels", "20", "--rows", "matching"]) == 2
    assert "--labels" in capsys.readouterr().err


def test_rematching_keeps_its_places_in_fewer_epochs():
    assert rematch_epochs((30, 30, 5, 4), 24) == [4, 7, 11, 16]  # 3.6, 7.2, 11.4, 16.2
    assert rematch_epochs((30, 30, 5, 4), 3) == [1, 2]


def test_the_place_of_a_pair_among_all_pairs():
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 30, 4, generator=generator)
    scores = queries.double() @ keys.double().T
    wanted = [
        1 + sum(float(other) > float(row[k]) for other in row) for k, row in enumerate(scores)
    ]
    assert pair_ranks(queries, keys).tolist() == wanted
    unit = torch.nn.functional.normalize(keys, dim=1)
    assert pair_ranks(unit, unit).tolist() == [1] * 30
    assert pair_ranks(-unit, unit).tolist() == [30] * 30


def test_a_student_chooses_by_a_pass_of_its_own_or_by_its_training(recipe: Path, tmp_path: Path):
    pytest.importorskip("faiss")
    found = {}
    for by in ("pass", "training"):
        options = train.recipe(
            str(recipe), unpaired.Options, rows=("SemBridge without SSM",), rematch_by=by,
            rematch=(100, 1, 0, 1), epochs=2, teacher_epochs=1, out=tmp_path,
        )  # fmt: skip
        session = unpaired.Session(options)
        session.train_shared()
        (method,) = session.methods
        training = session.student_training(method, 0)
        choose, student = training.choose, training.network
        choose.observe(torch.arange(3), torch.eye(4)[:3])
        before = choose(0)
        after = choose(1)
        student.eval()
        with torch.no_grad():
            logits = unpaired.outputs(student, session.views.poor, choose.device)
        rows = torch.arange(len(logits))
        if by == "training":  # the others were never seen
            rows, logits = rows[:3], torch.eye(4)[:3]
        wanted = before.clone()
        wanted[rows] = session.galleries.again(logits, rows, planned=False)
        assert after.tolist() == wanted.tolist()
        found[by] = session.student_settings(method, 0)
        assert list(choose.trace.given) == [0, 1]
        assert choose.trace.given[1] == after[choose.trace.students].tolist()
    assert found["pass"] != found["training"]


def test_how_good_the_matcher_is(recipe: Path, tmp_path: Path):
    """Of an untrained matcher that compares pixels, against plain loops."""
    pytest.importorskip("faiss")
    options = train.recipe(str(recipe), unpaired.Options, rows=("matching",), out=tmp_path)
    views = unpaired.Session(options).views
    embed = lambda images: torch.nn.functional.normalize(images.flatten(1), dim=1)  # noqa: E731
    pixels = SimpleNamespace(embed_teacher=embed, embed_student=embed, to=lambda device: None)
    cpu = torch.device("cpu")
    teacher = unpaired.models.create("resnet8", num_classes=4, in_chans=1)
    galleries = unpaired.Galleries.of(pixels, teacher, views, cpu)
    found = unpaired.matcher_quality(pixels, views, galleries, cpu)
    rich, poor, made, own = (
        unpaired.outputs(embed, images, cpu)
        for images in (views.rich, views.poor, views.pseudo, views.originals)
    )
    right = 0
    for query, label in zip(poor, views.poor.labels, strict=True):
        scores = [float(query @ key) for key in rich]
        right += int(views.rich.labels[scores.index(max(scores))] == label)
    wanted = {"nearest of all is of the class, %": 100 * right / len(poor)}
    for name, queries, keys in (("free", made, rich), ("hidden", poor, own)):
        ranks = sorted(
            1 + sum(float(query @ other) > float(query @ keys[k]) + 1e-6 for other in keys)
            for k, query in enumerate(queries)
        )
        among = f"of 40 {name} pairs"
        wanted[f"the own is nearest {among}, %"] = 100 * ranks.count(1) / len(ranks)
        wanted[f"its median rank {among}"] = ranks[19]
    assert found == wanted


def test_a_matcher_depends_on_nothing_of_the_students(recipe: Path, tmp_path: Path):
    def name(**changes: object) -> str:
        options = train.recipe(str(recipe), unpaired.Options, out=tmp_path, **changes)
        return unpaired.Session(options).matcher_checkpoint().name

    assert name(epochs=9, lr=0.3, optimizer="adam", batch_size=8) == name()
    assert len({name(), name(matcher_temperature=0.5), name(matcher_epochs=3), name(pad=2)}) == 4


def test_the_matchers_quality_is_printed_and_stands_in_the_results(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    pytest.importorskip("faiss")
    arguments = [str(recipe), "--out", str(tmp_path), "--matcher-epochs", "1", "--epochs", "1"]
    assert unpaired.main([*arguments, "--teacher-epochs", "1", "--rows", "matching"]) == 0
    quality = json.loads((tmp_path / "results.json").read_text())["matcher"]
    (free,) = (f"{told[:-3]} {value:g} %" for told, value in quality.items() if "own is nea" in told
               and "free" in told)  # fmt: skip
    assert free in capsys.readouterr().out.replace("\n", " ")


def test_few_labels_leave_the_default_rows_that_match_by_labels_out(recipe: Path, tmp_path: Path):
    options = ("--labels", "16", "--epochs", "1", "--seeds", "0", "--out", str(tmp_path / "few"))
    assert unpaired.main([str(recipe), *options, "--criterion", "kd"]) == 0
    found = json.loads((tmp_path / "few" / "results.json").read_text())["runs"]
    assert [one["method"] for one in found] == [
        "alone",
        "pairs made poor",
        "pairs made poor + dense",
    ]
