"""Training: who sees what, what moves, and that a seed decides everything."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from crossmodal import models
from crossmodal.data import NO_LABEL, Batch, Batches, Views
from crossmodal.methods import METHODS, Plan, Setup, resolve
from crossmodal.recipes import Recipe
from crossmodal.training.engine import Outcome, Training, accelerator_for, fit
from crossmodal.training.evaluation import accuracy, features
from crossmodal.training.steps import Distilled, Step, Supervised, cross_entropy, fresh
from structkd import KDLoss
from tests.examples.tiny import opened, recipe


class Quiet:
    def __init__(self) -> None:
        self.warned: list[str] = []

    def begin(self, *anything: object) -> None: ...
    def step(self, *anything: object) -> None: ...
    def epoch(self, *anything: object) -> None: ...
    def warn(self, text: str) -> None:
        self.warned.append(text)


def run(step: Step, batches: Batches, recipe: Recipe, quiet: Quiet | None = None) -> Outcome:
    training = Training("a run", step, batches, recipe)
    return fit(training, accelerator_for(recipe, "cpu"), quiet or Quiet())


def distil(
    method: str,
    teacher: nn.Module,
    views: Views,
    recipe: Recipe,
    plan: Plan | None = None,
    quiet: Quiet | None = None,
) -> tuple[Outcome, Distilled]:
    batches = Batches(recipe, poor=views.poor, rich=views.rich)
    setup = Setup(len(views.poor), recipe.batch_size)
    student = fresh("resnet8x0_5", views.poor, recipe.seed)
    example = batches.take(torch.arange(2))
    step = Distilled(student, teacher, plan or resolve(method), example, setup, recipe.seed)
    outcome = run(step, batches, recipe, quiet)
    step.distiller.detach()
    return outcome, step


def alone(views: Views, recipe: Recipe, quiet: Quiet | None = None) -> Outcome:
    step = Supervised(fresh("resnet8x0_5", views.poor, recipe.seed), "poor")
    return run(step, Batches(recipe, poor=views.poor), recipe, quiet)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_teacher_learns_the_rich_images_and_does_worse_on_poor_ones() -> None:
    views, made = opened(amount=0.6), recipe(epochs=6)
    step = Supervised(fresh("resnet8", views.rich, 0), "rich")
    outcome = run(step, Batches(made, rich=views.rich), made)
    assert outcome.train_accuracy > 90
    accelerator = accelerator_for(made, "cpu")
    rich, poor = (
        accuracy(outcome.network, images, views.rich, accelerator)
        for images in (views.held_out_rich, views.held_out_poor)
    )
    assert rich > 90
    assert poor < rich


def test_the_student_sees_poor_images_only_and_the_teacher_rich_ones(
    views: Views, teacher: nn.Module
) -> None:
    rich = replace(views.rich, pixels=torch.zeros_like(views.rich.pixels))
    rich.pixels[0] = 100
    dark = replace(views, rich=rich, poor=replace(views.poor, pixels=rich.pixels + 50, like=rich))
    seen: dict[str, set[float]] = {"student": set(), "teacher": set()}

    def watch(name: str, model: nn.Module) -> None:
        model.register_forward_pre_hook(
            lambda _, x: seen[name].update(x[0].detach().unique().tolist())
        )

    made = recipe(batch_size=80)
    batches = Batches(made, poor=dark.poor, rich=dark.rich)
    student = fresh("resnet8x0_5", dark.poor, 0)
    step = Distilled(
        student, teacher, resolve("kd"), batches.take(torch.arange(2)), Setup(80, 80), 0
    )
    watch("student", student), watch("teacher", teacher)
    run(step, batches, made)
    mean, std = (float(part) for part in rich.statistics)
    assert sorted(seen["teacher"]) == pytest.approx([(v - mean) / std for v in (0, 100)], rel=1e-4)
    assert sorted(seen["student"]) == pytest.approx([(v - mean) / std for v in (50, 150)], rel=1e-4)


@pytest.mark.parametrize("method", ["kd", "ds"])
def test_the_teacher_stays_as_it_is_and_the_heads_move(
    views: Views, teacher: nn.Module, method: str
) -> None:
    before = state(teacher)
    _, step = distil(method, teacher, views, recipe())
    for name, value in state(teacher).items():
        assert torch.equal(value, before[name]), name
    assert not [name for name in step.state_dict() if "teacher" in name]
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_seed_decides_everything(views: Views, teacher: nn.Module) -> None:
    made = recipe(pad=1, flip=True)
    losses = []
    for seed in (0, 0, 1):
        torch.rand(5)
        losses.append(distil("ds", teacher, views, replace(made, seed=seed))[0].loss)
    assert losses[0] == losses[1] != losses[2]


def test_all_methods_start_from_the_same_student(views: Views, teacher: nn.Module) -> None:
    still = recipe(lr=1e-12, final_lr=0.0)
    students = [distil(method, teacher, views, still)[0].network for method in ("kd", "ds")]
    students.append(alone(views, still).network)
    for name, value in students[0].named_parameters():
        for other in students[1:]:
            torch.testing.assert_close(other.get_parameter(name), value, rtol=0, atol=1e-6)


def test_the_loss_is_weighted_cross_entropy_plus_the_criterion(
    views: Views, teacher: nn.Module
) -> None:
    outcome, _ = distil("kd+ds", teacher, views, recipe())
    assert list(outcome.terms) == ["CE", "KD", "SEM-1", "SEM-2", "DCM-1", "DCM-2"]
    assert outcome.loss == pytest.approx(sum(outcome.terms.values()), rel=1e-5)
    still = recipe(lr=1e-12, final_lr=0.0)
    kd, _ = distil("kd", teacher, views, still)
    assert kd.terms["CE"] == pytest.approx(0.1 * alone(views, still).terms["CE"], rel=1e-4)


@pytest.mark.parametrize(
    "method", [*(m for m in METHODS if m != "alone"), "nst+ds", "fitnets+kd", "at+crd", "kd+ds+rkd"]
)
def test_every_method_trains(views: Views, teacher: nn.Module, method: str) -> None:
    outcome, _ = distil(method, teacher, views, recipe(lr=0.01))
    assert len(outcome.terms) > method.count("+") + 1
    values = torch.tensor([outcome.loss, *outcome.terms.values()])
    assert values.isfinite().all(), outcome.terms
    assert outcome.loss == pytest.approx(sum(outcome.terms.values()), rel=1e-4)


def test_criteria_that_count_epochs_are_told(views: Views, teacher: nn.Module) -> None:
    _, step = distil("ctkd+at", teacher, views, recipe(epochs=3))
    (epoch,) = (b for name, b in step.criterion.named_buffers() if name.endswith("epoch"))
    assert epoch == 4


def test_no_hooks_are_left(views: Views, teacher: nn.Module) -> None:
    outcome, _ = distil("ds", teacher, views, recipe())
    modules = [*outcome.network.modules(), *teacher.modules()]
    assert not any(module._forward_hooks for module in modules)


def test_bf16_channels_last_trains(views: Views, teacher: nn.Module) -> None:
    half, _ = distil("kd+ds", teacher, views, recipe(precision="bf16", channels_last=True))
    full, _ = distil("kd+ds", teacher, views, recipe())
    assert half.loss != full.loss
    assert half.loss == pytest.approx(full.loss, rel=0.1)


def test_a_loss_that_is_not_finite_names_the_epoch_and_the_terms(views: Views) -> None:
    with pytest.raises(FloatingPointError, match=r"a run: the loss of epoch \d .*CE nan"):
        alone(views, recipe(epochs=3, lr=1e30))


def test_one_class_for_everything_is_told(views: Views) -> None:
    quiet = Quiet()
    step = Supervised(fresh("resnet8x0_5", views.poor, 0), "poor")
    with torch.no_grad():
        step.network.fc.bias.copy_(torch.tensor([0.0, 1e4, 0, 0]))
    made = recipe(lr=1e-6)
    run(step, Batches(made, poor=views.poor), made, quiet)
    assert quiet.warned == [
        "a run, epoch 1: 100 % of the images are called class 1, which 25 % of them are: "
        "the training may be lost"
    ]
    silent = Quiet()
    alone(views, recipe(epochs=3), silent)
    assert silent.warned == []


def test_filters_that_collapse_are_named_and_clipping_saves_them(
    views: Views, teacher: nn.Module
) -> None:
    told = {}
    for clip in ("none", "agc:0.1"):
        quiet = Quiet()
        made = recipe(clip=clip, lr=0.1)
        distil("fitnets:weight=3e3", teacher, views, made, quiet=quiet)
        told[clip] = [text for text in quiet.warned if "collapsed" in text]
    assert re.search(r"the filters of layer2.* \(norm .* rank .*\) collapsed", told["none"][0])
    assert told["agc:0.1"] == []


@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_the_learning_rate_rises_then_falls_along_a_cosine(warmup: float) -> None:
    made = recipe(lr=0.4, final_lr=0.0, warmup=warmup)
    optimizer = made.optimized([nn.Parameter(torch.zeros(()))])
    schedule = made.scheduled(optimizer, 12)
    rates = []
    for step in range(12):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    rising = round(12 * warmup)
    linear = [0.4 * (step + 1) / (rising + 1) for step in range(rising)]
    cosine = [0.2 * (1 + math.cos(math.pi * step / (12 - rising))) for step in range(12 - rising)]
    assert rates == pytest.approx(linear + cosine)


def test_falling_weights_reach_nothing_at_the_end(views: Views, teacher: nn.Module) -> None:
    still = recipe(lr=1e-12, final_lr=0.0, epochs=40, batch_size=80)
    constant, _ = distil("kd", teacher, views, still)
    falling, _ = distil("kd", teacher, views, replace(still, falling=True))
    shares = [a["KD"] / b["KD"] for a, b in zip(falling.history, constant.history, strict=True)]
    expected = [0.5 * (1 + math.cos(math.pi * step / 40)) for step in range(40)]
    assert shares == pytest.approx(expected, abs=1e-3)
    assert falling.history[-1]["CE"] == pytest.approx(constant.history[-1]["CE"], rel=1e-5)


def test_accumulated_gradients_are_those_of_the_larger_batch() -> None:
    views = opened()
    step = {}
    for size, many in ((40, 1), (10, 4)):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(144, 4))
        made = recipe(batch_size=size, accumulate=many, epochs=2)
        step[size] = run(Supervised(network, "poor"), Batches(made, poor=views.poor), made).network
    torch.testing.assert_close(step[40][1].weight, step[10][1].weight, rtol=1e-5, atol=1e-6)


def test_clipping_bounds_each_filter_and_the_average_follows(views: Views) -> None:
    sizes = {}
    for clip in ("none", "agc:0.01"):
        made = recipe(lr=1.0, momentum=0.0, weight_decay=0.0, clip=clip, batch_size=80)
        before = fresh("resnet8x0_5", views.poor, 0).conv1.weight
        after = alone(views, made).network.conv1.weight
        moved = (after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
        sizes[clip] = float(moved.detach().max())
    assert sizes["agc:0.01"] <= 0.0101 < sizes["none"]
    mean = alone(views, recipe(ema=0.5, epochs=2)).network
    assert not torch.equal(mean.fc.weight, alone(views, recipe(epochs=2)).network.fc.weight)


def test_rows_without_a_label_are_distilled_and_not_supervised(teacher: nn.Module) -> None:
    views = opened(labels=8)
    assert int((views.poor.known() != NO_LABEL).sum()) == 8
    assert torch.equal(views.poor.known(), views.rich.known())
    outcome, _ = distil("kd", teacher, views, recipe())
    assert outcome.terms["KD"] > 0
    logits, target = torch.randn(4, 3), torch.tensor([1, NO_LABEL, 2, NO_LABEL])
    expected = nn.functional.cross_entropy(logits[::2], target[::2])
    torch.testing.assert_close(cross_entropy(logits, target), expected)
    assert cross_entropy(logits, torch.full((4,), NO_LABEL)) == 0


def test_few_labels_come_in_every_batch_and_alone_for_the_lone_student() -> None:
    views = opened(labels=8)
    known = views.poor.known()
    made = recipe(batch_size=12)
    for share, wanted in ((0.0, None), (1 / 3, 4), (1.0, 12)):
        batches = Batches(made, poor=views.poor, rich=views.rich, labelled=share)
        seen = []
        for batch in batches.epoch(0):
            assert len(batch.index) == 12
            rows = batch.index - views.poor.index[0]
            assert torch.equal(batch.target, known[rows])
            seen.append(int((batch.target != NO_LABEL).sum()))
        assert len(seen) == len(batches) == 6  # as many as with all labels
        assert wanted is None or seen == [wanted] * 6
    many = opened(labels=40)  # chance gives half a batch: nothing to mend
    plain, mixed = (
        [batch.index for batch in Batches(made, poor=many.poor, labelled=share).epoch(1)]
        for share in (0.0, 1 / 3)
    )
    assert all(torch.equal(*both) for both in zip(plain, mixed, strict=True))


def test_labels_come_in_whole_passes_and_to_every_process() -> None:
    views, made = opened(labels=8), recipe(batch_size=12)
    batches = Batches(made, poor=views.poor, labelled=1 / 3)
    rows = torch.cat([batch.index[batch.target != NO_LABEL] for batch in batches.epoch(0)])
    assert rows.bincount().unique().tolist() == [0, 3]  # 24 places for 8 images
    parts = [
        list(Batches(made, poor=views.poor, labelled=1 / 3, share=(rank, 2)).epoch(0))
        for rank in range(2)
    ]
    for whole, *halves in zip(batches.epoch(0), *parts, strict=True):
        assert torch.equal(whole.index, torch.cat([half.index for half in halves]))
    assert not torch.equal(next(batches.epoch(0)).index, next(batches.epoch(1)).index)


def test_pooled_features_come_in_the_order_of_the_images(views: Views, teacher: nn.Module) -> None:
    embedding, pooled = features(teacher, views.rich, views.rich)
    assert embedding.shape == (80, 64)
    assert pooled.shape == (80, 32)
    single, _ = features(teacher, views.rich.chosen(torch.tensor([5])), views.rich)
    torch.testing.assert_close(single[0], embedding[5], rtol=1e-4, atol=1e-5)


def test_a_batch_goes_to_its_layout() -> None:
    batch = Batch(None, torch.randn(2, 3, 4, 4), torch.zeros(2), torch.zeros(2))
    moved = batch.to(torch.device("cpu"), True)
    assert moved.rich is None
    assert moved.poor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"precision": "fp64"}, "precision must be one of auto, fp32, bf16, fp16"),
        ({"warmup": 0.999}, r"warmup must be a share in \[0, 0.95\], got 0.999"),
        ({"clip": "agc"}, "clip must be none, agc:0.1"),
        ({"clip": "agc:x"}, "clip must be none, agc:0.1"),
        ({"ema": 1.0}, "ema must be a decay"),
    ],
)
def test_settings_that_cannot_work(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**wrong)


def test_settings_are_what_differs_from_the_defaults() -> None:
    assert Recipe().settings == {}
    assert Recipe(lr=0.2, seed=3).settings == {"lr": 0.2, "seed": 3}


def test_the_model_names_are_timms() -> None:
    assert models.create("resnet10t", num_classes=5, in_chans=1)(
        torch.randn(2, 1, 32, 32)
    ).shape == (2, 5)


def test_of_a_mixed_batch_the_pairs_are_distilled_and_every_label_counts(
    teacher: nn.Module, views: Views
) -> None:
    own = Batches(recipe(), poor=views.poor)
    pairs = Batches(recipe(), poor=views.poor, rich=views.rich)
    batch = replace(own.take(torch.arange(6)), pairs=pairs.take(torch.arange(40, 46)))
    student = fresh("resnet8x0_5", views.poor, 0)
    step = Distilled(student, teacher, resolve("kd:weight=2"), batch, Setup(80, 16), 0).eval()
    logits, terms = step(batch)
    images = torch.cat([batch.poor, batch.pairs.poor])
    labels = torch.cat([batch.target, batch.pairs.target])
    expected = student(images)
    torch.testing.assert_close(logits, expected[:6])
    torch.testing.assert_close(terms["CE"], 0.1 * nn.functional.cross_entropy(expected, labels))
    kd = KDLoss(temperature=4.0)(expected[6:], teacher(batch.pairs.rich))
    torch.testing.assert_close(terms["KD"], 2 * kd)
    step.distiller.detach()
