"""The loop: who sees what, what moves, what is minimised, and what is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
import train as script
import unpaired
from data import NO_LABEL
from progress import Show
from structkd import KDLoss

Job = Callable[..., script.Session]


class Quiet(Show):
    """Keeps the warnings."""

    def __init__(self) -> None:
        super().__init__(None, None, quiet=True)
        self.warned: list[str] = []

    def warn(self, text: str) -> None:
        self.warned.append(text)


@pytest.fixture
def trained_by(job: Job) -> Callable[..., script.Training]:
    """A training that is over; its network is what there is to evaluate."""

    def trained_by(criterion: str, seed: int = 0, **changes: Any) -> script.Training:
        session = job(**changes)
        torch.manual_seed(11)
        session.teacher = models.create("resnet8", num_classes=4, in_chans=1)
        training = session.student_training(script.Method.of(criterion), seed)
        training.teacher, training.show = session.teacher, Quiet()
        training.network = script.fit(training, training.show)
        return training

    return trained_by


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def equal(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(*pair) for pair in zip(one.parameters(), two.parameters(), strict=True))


# Who sees what.


def test_the_student_sees_poor_images_alone_and_the_teacher_rich_ones(job: Job) -> None:
    session = job(view="lowres:2", batch_size=80)
    views, seen = session.views, {}
    session.teacher = session.network("teacher", 0)
    training = session.student_training(script.Method.of("kd"), 0)
    for name, network in {"student": training.network, "teacher": session.teacher}.items():

        def seeing(_: nn.Module, given: tuple[Tensor], name: str = name) -> None:
            seen[name] = given[0].detach().clone()

        network.register_forward_pre_hook(seeing)
    script.fit(training, Quiet())
    for name, images in {"student": views.poor, "teacher": views.rich}.items():
        expected = images.statistics.normalise(images.pixels.float())
        order = [x.flatten(1).sum(1).sort().values for x in (seen[name], expected)]
        torch.testing.assert_close(*order)
    assert not torch.equal(seen["student"], seen["teacher"])


@pytest.mark.parametrize("criterion", ["kd", "ds"])
def test_the_teacher_stays_as_it_is_and_the_heads_move(
    trained_by: Callable[..., script.Training], criterion: str
) -> None:
    once, more = (trained_by(criterion, epochs=epochs) for epochs in (1, 2))
    for name, value in state(once.teacher).items():
        assert torch.equal(value, state(more.teacher)[name]), name
    assert all(parameter.grad is None for parameter in once.teacher.parameters())
    heads = [dict(t.model.criterion.named_parameters()) for t in (once, more)]
    assert all(not torch.equal(value, heads[1][name]) for name, value in heads[0].items())
    assert not equal(once.network, more.network)


def test_no_hooks_are_left_and_a_finished_job_predicts_as_its_file(
    run: Any, tmp_path: Path
) -> None:
    import predict

    assert run("--criterion", "ds", "--epochs", "1") == 0
    (file,) = (tmp_path / "out").glob("student-ds*.pt")
    network, content = predict.load(file)
    assert not any(module._forward_hooks for module in network.modules())
    assert 0 <= content["accuracy"] <= 100


# What is minimised.


def test_a_seed_decides_everything_and_nothing_else(
    trained_by: Callable[..., script.Training],
) -> None:
    found = []
    for seed in (0, 0, 1):
        torch.rand(5)
        found.append(trained_by("ds", seed, pad=1, flip=True).network)
    assert equal(found[0], found[1])
    assert not equal(found[0], found[2])


def test_all_rows_start_from_the_same_student_and_its_batches(
    trained_by: Callable[..., script.Training],
) -> None:
    still = [trained_by(criterion, lr=1e-12, batch_size=80) for criterion in ("alone", "kd", "ds")]
    for other in still[1:]:
        for one, two in zip(still[0].network.parameters(), other.network.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    ce = [training.history[0]["CE"] for training in still]
    assert ce[1] == pytest.approx(0.1 * ce[0], rel=1e-4)
    assert ce[2] == pytest.approx(ce[0], rel=1e-4)


def test_the_loss_is_cross_entropy_plus_the_terms(
    trained_by: Callable[..., script.Training],
) -> None:
    (row,) = trained_by("[kd, ds]").history
    terms = {k: row[k] for k in ("CE", "KD", "SEM-1", "SEM-2", "DCM-1", "DCM-2")}
    assert row["loss"] == pytest.approx(sum(terms.values()), rel=1e-5)


def test_a_row_of_labels_alone_has_their_weight(trained_by: Callable[..., script.Training]) -> None:
    still = {"lr": 1e-12, "epochs": 1}
    once, twice = (
        trained_by(row, **still).history[0]["CE"]
        for row in ("alone", "[{type: SupervisionLoss, weight: 2}]")
    )
    assert twice == pytest.approx(2 * once, rel=1e-5)


def test_images_without_a_label_are_distilled_and_not_supervised(
    trained_by: Callable[..., script.Training],
) -> None:
    (row,) = trained_by("kd", labels=8, labelled=0.0).history
    assert row["KD"] > 0
    logits, target = torch.randn(4, 3), torch.tensor([1, NO_LABEL, 2, NO_LABEL])
    expected = nn.functional.cross_entropy(logits[::2], target[::2])
    torch.testing.assert_close(script.cross_entropy(logits, target), expected)
    assert script.cross_entropy(logits, torch.full((4,), NO_LABEL)) == 0


def test_of_a_mixed_batch_the_pairs_are_distilled_and_every_label_counts(recipe: Any) -> None:
    options = script.recipe(
        str(recipe), unpaired.Options, rows=("pairs made poor + criterion",), criterion=("kd",),
        out=recipe.parent / "job",
    )  # fmt: skip
    session = unpaired.Session(options)
    session.teacher = session.network("teacher", 0)
    training = session.student_training(session.methods[0], 0)
    batch = next(training.batches.epoch(0))
    logits, terms = training.loss(training.model.eval(), batch, 0.5)
    expected = training.network(batch.poor)
    torch.testing.assert_close(logits, expected)
    ce = nn.functional.cross_entropy(expected, batch.target)
    torch.testing.assert_close(terms["CE"], ce)
    kd = KDLoss(temperature=4.0)(expected[8:], session.teacher.eval()(batch.rich))
    torch.testing.assert_close(terms["KD"], 0.5 * 0.9 * kd)


def test_falling_weights_reach_nothing_at_the_end(
    trained_by: Callable[..., script.Training],
) -> None:
    still = {"lr": 1e-12, "epochs": 20, "batch_size": 80}
    constant, falling = (trained_by("kd", falling=f, **still).history for f in (False, True))
    shares = [a["KD"] / b["KD"] for a, b in zip(falling, constant, strict=True)]
    expected = [0.5 * (1 + math.cos(math.pi * step / 20)) for step in range(20)]
    assert shares == pytest.approx(expected, abs=2e-3)
    assert falling[-1]["CE"] == pytest.approx(constant[-1]["CE"], rel=1e-4)


# How it is minimised.


def test_the_learning_rate_falls_along_a_cosine(
    trained_by: Callable[..., script.Training],
) -> None:
    rates = [row["lr"] for row in trained_by("alone", epochs=6, lr=0.4).history]
    expected = [0.2 * (1 + math.cos(math.pi * epoch / 6)) for epoch in range(1, 7)]
    assert rates == pytest.approx(expected, abs=1e-5)


def test_clipping_bounds_each_filter(trained_by: Callable[..., script.Training]) -> None:
    moved = {}
    for clip in ("none", "agc:0.01"):
        options = {"lr": 1.0, "weight_decay": 0.0, "clip": clip, "batch_size": 80}
        before = trained_by("alone", lr=1e-12).network.conv1.weight
        after = trained_by("alone", **options).network.conv1.weight
        step = (after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
        moved[clip] = float(step.detach().max())
    assert moved["agc:0.01"] <= 0.0101 < moved["none"]


@pytest.mark.parametrize("clip", ["norm:0.01", "value:0.001"])
def test_other_kinds_of_clipping_train(
    trained_by: Callable[..., script.Training], clip: str
) -> None:
    assert not equal(trained_by("kd", clip=clip).network, trained_by("kd", clip="none").network)


def test_the_moving_average_is_what_is_evaluated(
    trained_by: Callable[..., script.Training],
) -> None:
    options = {"epochs": 2, "batch_size": 80}
    first = trained_by("alone", lr=1e-12, **options).network
    last, mean = (trained_by("alone", ema=ema, **options).network for ema in (0.0, 0.5))
    assert not equal(mean, last)
    far = [float((net.fc.weight - first.fc.weight).detach().norm()) for net in (mean, last)]
    assert far[0] < far[1]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_every_optimizer_trains_the_criterion_too(
    trained_by: Callable[..., script.Training], optimizer: str
) -> None:
    once, more = (trained_by("fitnets", optimizer=optimizer, epochs=n, lr=0.01) for n in (1, 2))
    heads = [list(t.model.criterion.parameters()) for t in (once, more)]
    assert heads[0]
    assert all(not torch.equal(*pair) for pair in zip(*heads, strict=True))


def test_bf16_trains_near_fp32(trained_by: Callable[..., script.Training]) -> None:
    half, full = (trained_by("[kd, ds]", precision=p).history[0]["loss"] for p in ("bf16", "fp32"))
    assert half != full
    assert half == pytest.approx(full, rel=0.1)


# What is told.


def test_a_loss_that_is_not_finite_names_the_epoch_and_the_terms(
    trained_by: Callable[..., script.Training],
) -> None:
    with pytest.raises(FloatingPointError, match=r"alone seed 0: the loss of epoch \d .*CE nan"):
        trained_by("alone", epochs=3, lr=1e30, clip="none")


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Students call everything one class while ``bias`` is large."""
    bias, original = {"value": 1e4}, models.create

    def create(name: str, **arguments: Any) -> nn.Module:
        network = original(name, **arguments)

        def called(module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
            return logits + bias["value"] * torch.tensor([0.0, 1, 0, 0])

        network.fc.register_forward_hook(called)
        return network

    monkeypatch.setattr(models, "create", create)
    return bias


def test_one_class_for_everything_is_told_once_with_its_name(
    run: Any, stuck: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--epochs", "12", "--lr", "1e-6", "--criterion", "alone", "--batch-size", "80")
    assert run(*options, "--seeds", "0", "1", "--teacher-epochs", "1") == 0
    said = capsys.readouterr().out
    told = [line for line in said.splitlines() if "may be lost" in line]
    assert len(told) == 3  # once a training: the teacher's and two students'
    assert "alone seed 0, epoch 6: 100 % of the predictions are 'east', but 25 %" in told[1]
    table = (tmp_path / "out/results.md").read_text()
    assert "25.00 ± 0.00 (the same for every seed: lost?)" in table


def test_what_begins_with_one_class_and_learns_is_not_called_lost(
    run: Any, stuck: dict[str, float], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    epoch = Show.epoch

    def better(self: Show, history: list[dict[str, float]]) -> None:
        stuck["value"] = 1e4 if len(history) == self._epochs else 0.0
        epoch(self, history)

    monkeypatch.setattr(Show, "epoch", better)
    for epochs in ("2", "3", "5"):
        assert run("--epochs", epochs, "--criterion", "alone") == 0
    assert "lost" not in capsys.readouterr().out


def test_filters_that_collapse_are_named_and_clipping_saves_them(
    trained_by: Callable[..., script.Training],
) -> None:
    strong = "{type: FitNetLoss, adapter: $normalised, layer: -2, weight: 3000}"
    told = {
        clip: [t for t in trained_by(strong, lr=0.1, clip=clip).show.warned if "collapsed" in t]
        for clip in ("none", "agc:0.1")
    }
    assert "the filters of conv1 (norm" in told["none"][0]
    assert "fix: --clip agc:0.1" in told["none"][0]
    assert told["agc:0.1"] == []


def test_accuracy_counts_every_held_out_image_once(job: Job) -> None:
    session = job()
    images = session.views.held_out_poor
    network = session.network("student", 0)
    found = script.evaluate(network, images, session.views.poor, session.options)
    with torch.no_grad():
        made = session.views.poor.statistics.normalise(images.pixels.float())
        right = (network.eval()(made).argmax(1) == images.labels).sum()
    assert found == pytest.approx(100 * int(right) / 40)
    some = replace(images.chosen(torch.arange(7)), like=None)
    assert 0 <= script.evaluate(network, some, session.views.poor, session.options) <= 100
