"""The unpaired jobs: who sees what, who is matched with whom, and the whole run on a tiny set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crossmodal import cli, data, engine, models
from crossmodal.batches import Batch
from crossmodal.config import Config
from crossmodal.data import DataSet
from crossmodal.sources import Source
from crossmodal.unpaired import cli as unpaired_cli
from crossmodal.unpaired import matching, outputs, recipes, training, variants
from crossmodal.unpaired.batches import MatchedBatches
from crossmodal.unpaired.matching import Galleries, random_match
from crossmodal.unpaired.variants import VARIANTS, Weights
from crossmodal.unpaired.views import Unpaired, grey, halves, open_embedded
from structkd.matching.dataset import RematchSchedule

CONFIG = Config(epochs=4, batch_size=16, pad=1, flip=False)
EVERY = RematchSchedule(1, 1)


@pytest.fixture(autouse=True)
def small_matcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipes.MATCHERS, "tiny", recipes.MatcherRecipe("resnet8x0_5", 2))


@pytest.fixture
def views() -> Unpaired:
    return open_embedded("tiny", "noisy", amount=0.2)


@pytest.fixture
def teacher(views: Unpaired) -> nn.Module:
    torch.manual_seed(7)
    return models.create("resnet8", num_classes=4, in_chans=1)


@pytest.fixture
def galleries(views: Unpaired, teacher: nn.Module) -> Galleries:
    matcher = matching.new_matcher("resnet8x0_5", views, CONFIG)
    return matching.galleries(matcher, teacher, views, "cpu")


def train(out: Path, *more: str) -> int:
    return cli.main(["unpaired-tiny", "--out", str(out), "--device", "cpu", *more])


def chooser(
    name: str, views: Unpaired, galleries: Galleries, teacher: nn.Module
) -> training.Chooser:
    student = engine.fresh_model("resnet8x0_5", views.poor, CONFIG)
    logits = galleries.teacher_logits
    rematching = training.Rematching(EVERY, "pass")
    return training.Chooser(VARIANTS[name], student, views, galleries, logits, rematching, CONFIG)


def test_halves_are_disjoint_stratified_and_all_there_is() -> None:
    labels = torch.tensor(np.random.default_rng(0).integers(0, 5, 501))
    first, second = halves(labels)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(501))
    counts = [torch.bincount(labels[rows]) for rows in (first, second)]
    assert (counts[0] - counts[1]).abs().max() <= 1
    assert torch.equal(halves(labels)[0], first)


def test_teacher_and_student_share_no_image(views: Unpaired) -> None:
    assert not set(views.rich.index.tolist()) & set(views.poor.index.tolist())
    assert torch.equal(views.pseudo.index, views.rich.index)
    assert views.originals is not None
    assert torch.equal(views.originals.index, views.poor.index)
    train_set = data.load("tiny", split="train", amount=0.2)
    rows = {index: row for row, index in enumerate(train_set.index.tolist())}
    for pairs, images in ((views.rich, train_set.clean), (views.poor, train_set.poor)):
        for index, image in zip(pairs.index.tolist(), pairs.clean, strict=True):
            assert torch.equal(image, images[rows[index]])


def test_grey_is_the_luma_in_one_channel() -> None:
    pixel = torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1)
    assert grey(pixel).shape == (1, 1, 1, 1)
    assert int(grey(pixel)) == round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    with pytest.raises(ValueError, match="three colours, got 1 channel"):
        grey(pixel[:, :1])


def test_random_matches_share_the_class_and_reach_every_teacher() -> None:
    labels, teachers = torch.arange(3).repeat(200), torch.arange(3).repeat_interleave(4)
    ids = random_match(labels, teachers, torch.Generator().manual_seed(0))
    assert torch.equal(teachers[ids], labels)
    assert set(ids.tolist()) == set(range(12))


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ("alone", "paired")])
def test_matches_share_the_class_in_every_epoch(
    name: str, views: Unpaired, galleries: Galleries, teacher: nn.Module
) -> None:
    choose = chooser(name, views, galleries, teacher)
    for epoch in range(3):
        ids = choose(epoch)
        assert torch.equal(views.rich.labels[ids], views.poor.labels)


def test_what_changes_the_matches(
    views: Unpaired, galleries: Galleries, teacher: nn.Module
) -> None:
    def changes(name: str) -> list[bool]:
        choose = chooser(name, views, galleries, teacher)
        seen = [choose(epoch).clone() for epoch in range(3)]
        return [not torch.equal(a, b) for a, b in pairwise(seen)]

    assert changes("random") == [True, True]
    assert changes("ssm") == changes("full-dynm") == [False, False]
    assert changes("full")[0]  # from the matcher's choice to the student's


def test_a_rematch_takes_the_teacher_of_least_divergence(
    views: Unpaired, galleries: Galleries, teacher: nn.Module
) -> None:
    student = engine.fresh_model("resnet8x0_5", views.poor, CONFIG)
    logits = matching.outputs(student.eval(), views.poor, views.poor, "cpu")
    p = (galleries.teacher_logits.double() / 3).softmax(1)
    q = (logits.double() / 3).log_softmax(1)
    divergence = (p * p.log()).sum(1) - q @ p.T
    divergence[views.poor.labels[:, None] != views.rich.labels] = torch.inf
    chosen = galleries.again(logits, torch.arange(len(logits)), planned=False)
    best = divergence.min(1).values
    assert torch.allclose(divergence.gather(1, chosen[:, None])[:, 0], best, atol=1e-6)


def test_a_rematch_by_epoch_goes_by_the_latest_predictions(
    views: Unpaired, galleries: Galleries, teacher: nn.Module
) -> None:
    student = engine.fresh_model("resnet8x0_5", views.poor, CONFIG)
    rematching = training.Rematching(RematchSchedule(2, 1))
    logits = galleries.teacher_logits
    choose = training.Chooser(
        VARIANTS["full"], student, views, galleries, logits, rematching, CONFIG
    )
    first = choose(0)
    seen = torch.arange(30)  # of 40: the rest was in no batch
    images = views.poor.clean[seen]
    for _ in range(2):  # the second time counts
        predicted = torch.randn(30, 4)
        batch = Batch(images, images, views.poor.labels[seen], seen)
        choose.observe(batch, predicted)
    assert torch.equal(choose(1), first)
    again = choose(2)
    assert torch.equal(again[:30], galleries.again(predicted, seen, planned=False))
    assert torch.equal(again[30:], first[30:])


def test_a_planned_match_spreads_the_students(views: Unpaired, galleries: Galleries) -> None:
    student_logits = torch.zeros(len(views.poor), 4)  # all alike: the nearest serves a whole class
    rows = torch.arange(len(student_logits))
    crowd = torch.bincount(galleries.again(student_logits, rows, planned=False)).max()
    planned = torch.bincount(galleries.again(student_logits, rows, planned=True)).max()
    assert crowd == 10
    assert planned <= matching.CAPACITY


def test_batches_hold_the_matched_image(views: Unpaired) -> None:
    still = replace(CONFIG, pad=0)
    ids = random_match(views.poor.labels, views.rich.labels, torch.Generator().manual_seed(0))
    asked: list[int] = []

    def choose(epoch: int) -> Tensor:
        asked.append(epoch)
        return ids

    batches = MatchedBatches(views.poor, views.rich, choose, still)
    for _ in range(2):
        seen = []
        for batch in batches:
            seen += batch.index.tolist()
            for image, poor, index, target in zip(
                batch.clean, batch.poor, batch.index, batch.target, strict=True
            ):
                mean, std = views.rich.statistics
                assert torch.allclose(image, (views.rich.clean[ids[index]] - mean) / std)
                mean, std = views.poor.statistics
                assert torch.allclose(poor, (views.poor.clean[index] - mean) / std)
                assert target == views.poor.labels[index] == views.rich.labels[ids[index]]
        assert len(set(seen)) == len(seen) == 16 * len(batches)
    assert asked == [0, 1]


def test_the_two_sides_are_cropped_apart(views: Unpaired) -> None:
    batches = MatchedBatches(views.poor, views.poor, lambda e: torch.arange(40), CONFIG)
    batch = next(iter(batches))
    same = [torch.equal(a, b) for a, b in zip(batch.clean, batch.poor, strict=True)]
    assert not all(same)


def test_the_weights_are_the_published_ones() -> None:
    plan = variants.plan(VARIANTS["full"], "kd", Weights())
    assert plan.supervision == 0.3
    assert {name: method.weight for name, method in plan.parts} == {
        "kd": 0.4,
        "ska": pytest.approx(0.003),
    }
    without = variants.plan(VARIANTS["full"], "kd", Weights(ska=0))
    assert [name for name, _ in without.parts] == ["kd"]
    other = variants.plan(VARIANTS["ssm"], "crd", Weights())
    assert [method.weight for _, method in other.parts] == [pytest.approx(0.4 * 0.8)]
    alone = variants.plan(VARIANTS["alone"], "kd", Weights())
    assert (alone.parts, alone.supervision, alone.name) == ((), 1.0, "alone")


@pytest.mark.parametrize("criterion", ["dkd", "at", "kd+ds"])
def test_any_criterion_distils(
    criterion: str, views: Unpaired, galleries: Galleries, teacher: nn.Module
) -> None:
    config = replace(CONFIG, epochs=2, lr=0.01)
    plan = variants.plan(VARIANTS["full"], criterion, Weights())
    outcome, trace = training.distil(
        VARIANTS["full"],
        plan,
        engine.fresh_model("resnet8x0_5", views.poor, config),
        teacher,
        views,
        galleries,
        training.Rematching(EVERY),
        config,
    )
    assert {"CE", "SKA-tokens", "SKA-embeddings"} < set(outcome.terms)
    assert torch.tensor(list(outcome.terms.values())).isfinite().all()
    assert len(trace.transport) == 3
    assert list(trace.rematching) == [1]


def test_matching_leaves_training_as_it_is(
    views: Unpaired, galleries: Galleries, teacher: nn.Module
) -> None:
    choose = chooser("full", views, galleries, teacher)
    model = choose._model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    choose(0)
    choose(1)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_transport_is_at_most_what_the_pairs_cost(
    views: Unpaired, galleries: Galleries, teacher: nn.Module
) -> None:
    choose = chooser("random", views, galleries, teacher)
    for epoch in range(3):
        choose(epoch)
    for distance, pairs in zip(choose.trace.transport, choose.trace.matched, strict=True):
        assert 0 < distance <= pairs * (1 + 1e-5)


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(200, [30, 60, 95, 135]), (24, [4, 8, 13, 19]), (12, [2, 4, 6, 8]), (1, [])],
)
def test_the_published_schedule_scales(epochs: int, expected: list[int]) -> None:
    published = recipes.SCENES["s2s_eu"].rematch
    assert recipes.scaled(published, epochs).epochs(epochs) == expected


def test_published_schedules() -> None:
    epochs = {name: recipe.rematch.epochs(200) for name, recipe in recipes.SCENES.items()}
    assert epochs == {
        "s2s_eu": [30, 60, 95, 135],
        "s2s_cn": [45, 60, 80, 105, 135],
        "m2s_gl": [15, 45, 80, 120, 165],
    }


def test_the_time_of_rematching_is_a_share_of_an_epoch() -> None:
    run: dict[str, Any] = {
        "seconds": 10.4,
        "config": {"planner": None, "training": {"epochs": 10}, "rematching": {"by": "pass"}},
        "trace": {
            "rematching": {"2": 0.1, "4": 0.3},
            "searching": {"2": 0.01, "4": 0.03},
            "in_use": {"2": 9, "4": 7},
        },
    }
    rest = "20.0 % of an epoch of 1.00 s; 3.8 % of the whole training. "
    rest += "Different teacher images chosen at the last one: 7."
    parts = "20 ms the search, else the student's pass over its images"
    assert outputs.rematching_time([run]) == f"Re-matching: 200 ms ({parts}), {rest}"
    run["config"]["rematching"] = {"by": "epoch"}
    parts = "by what the student predicted in training"
    assert outputs.rematching_time([run]) == f"Re-matching: 200 ms ({parts}), {rest}"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    labels: list[str] = []
    original = engine.minimise

    def recorded(label: str, *rest: object) -> engine.Outcome:
        labels.append(label)
        return original(label, *rest)

    monkeypatch.setattr(engine, "minimise", recorded)
    monkeypatch.setattr(matching, "minimise", recorded)
    return labels


def test_the_job_end_to_end_and_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trained: list[str]
) -> None:
    short = ("--epochs", "2", "--criterion", "kd")
    assert train(tmp_path, "--seeds", "1", *short) == 0
    titles = [variant.title.format("kd") for variant in VARIANTS.values()]
    assert trained == ["matcher", "teacher resnet8", *(f"{title} seed 0" for title in titles)]
    shown = capsys.readouterr().out
    assert "none in both" in " ".join(shown.split())
    assert "Re-matching: " in shown
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["dataset"] == "unpaired-tiny"
    assert [run["method"] for run in results["runs"]] == titles
    for run in results["runs"]:
        assert run["loss"] == pytest.approx(sum(run["terms"].values()), rel=1e-4)
        watched = 0 if run["method"] == "alone" else 1 + run["config"]["training"]["epochs"]
        assert len(run["trace"]["transport"]) == watched
    markdown = (tmp_path / "results.md").read_text()
    assert all(f"| {title} |" in markdown for title in titles)
    for name in ("accuracy", "transport"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    left = sorted(path.name.split("-resnet")[0] for path in tmp_path.glob("*.pt"))
    assert left == sorted(["matcher", "teacher", *(f"student-{n}-kd-seed0" for n in VARIANTS)])

    trained.clear()
    assert train(tmp_path, "--seeds", "2", "--variant", "random,ssm", *short) == 0
    assert trained == ["kd random seed 1", "kd matching (SSM) seed 1"]
    trained.clear()
    # Another matcher moves those that it matches, and nobody else.
    more = ["--seeds", "1", "--variant", "alone", "random", "ssm", "--matcher-epochs", "1"]
    assert train(tmp_path, *more, *short) == 0
    assert trained == ["matcher", "kd matching (SSM) seed 0"]


def test_a_seed_decides_everything(
    views: Unpaired, galleries: Galleries, teacher: nn.Module
) -> None:
    short = replace(CONFIG, epochs=2)

    def classifiers() -> Iterator[Tensor]:
        for _ in range(2):
            torch.rand(3)
            model = engine.fresh_model("resnet8x0_5", views.poor, short)
            plan = variants.plan(VARIANTS["full-ssm"], "kd", Weights())
            rematching = training.Rematching(EVERY)
            outcome, _ = training.distil(
                VARIANTS["full-ssm"], plan, model, teacher, views, galleries, rematching, short
            )
            yield outcome.model.fc.weight

    first, second = classifiers()
    assert torch.equal(first, second)


def test_grey_students_have_one_channel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = data.DATA_SETS["tiny"].open(None, False)

    def coloured(images: data.Rows) -> object:
        return replace(images, read=lambda rows: np.repeat(source_read(images, rows), 3, axis=1))

    def source_read(images: object, rows: object) -> object:
        return images.read(rows)

    colours = Source(source.classes, coloured(source.train), coloured(source.test))
    recipe = data.DATA_SETS["tiny"].recipe
    monkeypatch.setitem(data.DATA_SETS, "tiny", DataSet(lambda folder, download: colours, recipe))
    arguments = ("--poor", "grey", "--variant", "full", "--seeds", "1", "--epochs", "1")
    assert train(tmp_path, *arguments) == 0
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    weights = torch.load(next(tmp_path.glob("student-full*.pt")), weights_only=True)["weights"]
    assert weights["conv1.weight"].shape[1] == 1
    assert 0 <= run["accuracy"] <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "fulll"], "unknown variant 'fulll'; did you mean 'full'?"),
        (["--variant", ","], "--variant names none"),
        (["--criterion", "alone"], "--criterion must name a criterion"),
        (["--criterion", "kdd"], "unknown method 'kdd'"),
        (["--poor", "grey"], "--poor grey needs images of three colours"),
        (["--weights", "-1", "0", "0"], "weight task must be at least 0"),
        (["--rgb-bands", "0", "1", "2"], "--rgb-bands is for s2s_eu"),
        (["--limit", "4"], "leave a class of tiny without an image"),
        (["--lr", "1e30", "--variant", "alone"], "is not finite"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert train(tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_recipes_fill_what_is_not_given() -> None:
    job = unpaired_cli.parse(["unpaired-mnist"])
    recipe = data.DATA_SETS["mnist"].recipe
    assert (job.teacher, job.student, job.matcher) == (recipe.teacher, recipe.student, "resnet8")
    # Half the images: twice the passes.
    assert job.config.epochs == 2 * recipe.epochs
    assert (job.teacher_config.epochs, job.matcher_config.epochs) == (2 * recipe.teacher_epochs, 20)
    assert (job.config.lr, job.config.batch_size) == (recipe.lr, recipe.batch_size)
    assert job.variants == tuple(VARIANTS)
    assert job.seeds == (0, 1, 2)
    scene = unpaired_cli.parse(["s2s_cn", "--data", "somewhere"])
    assert (scene.teacher, scene.student) == ("resnet34", "mobilenetv2_100")
    assert (scene.config.epochs, scene.config.batch_size, scene.config.lr) == (200, 256, 1e-3)
    assert scene.matcher_config.epochs == 100
    assert "paired" not in scene.variants
    parameters = [nn.Parameter(torch.zeros(1))]
    assert type(scene.config.optimizer(parameters)) is torch.optim.Adam
    assert type(scene.matcher_config.optimizer(parameters)) is torch.optim.AdamW
