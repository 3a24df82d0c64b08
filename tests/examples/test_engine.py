"""Training: who sees what, what moves, and that a seed decides everything."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from crossmodal import engine, models
from crossmodal.config import Config
from crossmodal.data import ImagePairs, load
from crossmodal.engine import distil, train_teacher
from crossmodal.evaluation import capture_features, evaluate
from crossmodal.registry import METHODS

CONFIG = Config(epochs=1, batch_size=16, pad=0, flip=False)


@pytest.fixture
def teacher() -> nn.Module:
    torch.manual_seed(7)
    return models.create("resnet8", num_classes=4, in_chans=1)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_teacher_learns_the_clean_images_and_does_worse_on_poor_ones() -> None:
    train = load("tiny", split="train", amount=0.6)
    test = load("tiny", split="test", amount=0.6)
    outcome = train_teacher("resnet8", train, replace(CONFIG, epochs=6))
    assert outcome.train_accuracy > 90
    clean = evaluate(outcome.model, test, modality="clean", statistics=train.statistics)
    poor = evaluate(outcome.model, test, modality="poor", statistics=train.statistics)
    assert clean > 90
    assert poor < clean


def test_the_student_sees_poor_images_only_and_the_teacher_clean_ones(
    pairs: ImagePairs, teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    dark = torch.zeros_like(pairs.clean)
    pairs = replace(pairs, clean=dark, poor=dark + 200)  # normalised: 0 and 200
    seen: dict[str, set[float]] = {"student": set(), "teacher": set()}

    def watch(name: str, model: nn.Module) -> nn.Module:
        model.register_forward_pre_hook(lambda _, x: seen[name].update(x[0].unique().tolist()))
        return model

    original = models.create
    monkeypatch.setattr(models, "create", lambda *a, **k: watch("student", original(*a, **k)))
    distil("kd+ds", "resnet8x0_5", watch("teacher", teacher), pairs, CONFIG)
    assert seen == {"student": {200.0}, "teacher": {0.0}}


@pytest.mark.parametrize("method", ["kd", "ds"])
def test_the_teacher_stays_as_it_is(pairs: ImagePairs, teacher: nn.Module, method: str) -> None:
    before = state(teacher)
    distil(method, "resnet8x0_5", teacher, pairs, CONFIG)
    for name, value in state(teacher).items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_seed_decides_everything(pairs: ImagePairs, teacher: nn.Module) -> None:
    config = replace(CONFIG, pad=1, flip=True, fresh_noise=True)
    first = distil("ds", "resnet8x0_5", teacher, pairs, config)
    torch.rand(5)
    second = distil("ds", "resnet8x0_5", teacher, pairs, config)
    third = distil("ds", "resnet8x0_5", teacher, pairs, replace(config, seed=1))
    assert first.loss == second.loss
    assert first.loss != third.loss


def test_all_methods_start_from_the_same_student(pairs: ImagePairs, teacher: nn.Module) -> None:
    still = replace(CONFIG, lr=1e-12, final_lr=0.0)
    students = [
        distil(method, "resnet8x0_5", teacher, pairs, still).model
        for method in ("alone", "kd", "ds")
    ]
    for name, value in students[0].named_parameters():
        for other in students[1:]:
            torch.testing.assert_close(other.get_parameter(name), value, rtol=0, atol=1e-6)


def test_the_loss_is_weighted_cross_entropy_plus_the_criterion(
    pairs: ImagePairs, teacher: nn.Module
) -> None:
    outcome = distil("kd+ds", "resnet8x0_5", teacher, pairs, CONFIG)
    assert list(outcome.terms) == ["CE", "KD", "SEM-1", "SEM-2", "DCM-1", "DCM-2"]
    assert outcome.loss == pytest.approx(sum(outcome.terms.values()), rel=1e-5)
    still = replace(CONFIG, lr=1e-12, final_lr=0.0)
    alone = distil("alone", "resnet8x0_5", None, pairs, still).terms["CE"]
    kd = distil("kd", "resnet8x0_5", teacher, pairs, still).terms["CE"]
    assert kd == pytest.approx(0.1 * alone, rel=1e-4)


def test_the_criterions_heads_are_trained(
    pairs: ImagePairs, teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    original = engine._criterion

    def keep(*arguments: object) -> object:
        criterion = original(*arguments)
        built.append((criterion, state(criterion)))
        return criterion

    monkeypatch.setattr(engine, "_criterion", keep)
    distil("ds", "resnet8x0_5", teacher, pairs, CONFIG)
    ((criterion, before),) = built
    assert before
    assert all(not torch.equal(v, before[name]) for name, v in criterion.named_parameters())


# Sums that mix criteria of one stage with criteria of all.
@pytest.mark.parametrize("method", [*METHODS, "nst+ds", "fitnets+kd", "at+crd", "kd+ds+rkd"])
def test_every_method_trains(pairs: ImagePairs, teacher: nn.Module, method: str) -> None:
    config = replace(CONFIG, lr=0.01)
    outcome = distil(method, "resnet8x0_5", teacher, pairs, config)
    assert len(outcome.terms) > method.count("+") + (method != "alone")
    values = torch.tensor([outcome.loss, *outcome.terms.values()])
    assert values.isfinite().all(), outcome.terms
    assert outcome.loss == pytest.approx(sum(outcome.terms.values()), rel=1e-4)
    for name, value in outcome.model.state_dict().items():
        assert value.isfinite().all(), name


def test_semckd_trains_where_the_only_batch_is_incomplete(
    pairs: ImagePairs, teacher: nn.Module
) -> None:
    outcome = distil("semckd", "resnet8x0_5", teacher, pairs, replace(CONFIG, batch_size=200))
    assert outcome.loss < float("inf")


def test_criteria_that_count_epochs_are_told(
    pairs: ImagePairs, teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    original = engine._criterion
    monkeypatch.setattr(engine, "_criterion", lambda *a: built.append(original(*a)) or built[-1])
    distil("ctkd+at", "resnet8x0_5", teacher, pairs, replace(CONFIG, epochs=3))
    (epoch,) = (buffer for name, buffer in built[0].named_buffers() if name.endswith("epoch"))
    assert epoch == 4


def test_no_hooks_are_left_on_the_student(pairs: ImagePairs, teacher: nn.Module) -> None:
    model = distil("ds", "resnet8x0_5", teacher, pairs, CONFIG).model
    assert not any(module._forward_hooks for module in [*model.modules(), *teacher.modules()])


def test_bf16_autocast_trains(pairs: ImagePairs, teacher: nn.Module) -> None:
    outcome = distil("kd+ds", "resnet8x0_5", teacher, pairs, replace(CONFIG, precision="bf16"))
    full = distil("kd+ds", "resnet8x0_5", teacher, pairs, CONFIG)
    assert outcome.loss != full.loss
    assert outcome.loss == pytest.approx(full.loss, rel=0.1)


def test_a_loss_that_is_not_finite_names_the_epoch_and_the_terms(pairs: ImagePairs) -> None:
    with pytest.raises(FloatingPointError, match=r"alone seed 0: the loss of epoch \d .*CE nan"):
        distil("alone", "resnet8x0_5", None, pairs, replace(CONFIG, epochs=3, lr=1e30))


def test_pooled_features_come_in_the_order_of_the_images(
    pairs: ImagePairs, teacher: nn.Module
) -> None:
    statistics = pairs.statistics
    embedding, pooled = capture_features(teacher, pairs, modality="clean", statistics=statistics)
    assert embedding.shape == (80, 64)
    assert pooled.shape == (80, 32)
    one = replace(pairs, clean=pairs.clean[5:6], poor=pairs.poor[5:6], labels=pairs.labels[5:6])
    single, _ = capture_features(teacher, one, modality="clean", statistics=statistics)
    torch.testing.assert_close(single[0], embedding[5])


@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_the_learning_rate_rises_then_falls_along_a_cosine(warmup: float) -> None:
    config = replace(CONFIG, lr=0.4, final_lr=0.0, warmup=warmup)
    weight = nn.Parameter(torch.zeros(()))
    optimizer = config.optimizer([weight])
    scheduler = config.scheduler(optimizer, 12)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    rising = round(12 * warmup)
    linear = [0.4 * (step + 1) / (rising + 1) for step in range(rising)]
    cosine = [0.2 * (1 + math.cos(math.pi * step / (12 - rising))) for step in range(12 - rising)]
    assert rates == pytest.approx(linear + cosine)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"precision": "fp16"}, "precision must be fp32 or bf16"),
        ({"warmup": 1.0}, "warmup must be a share in \\[0, 1\\), got 1.0"),
    ],
)
def test_settings_that_cannot_work(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **wrong)


def test_a_method_that_needs_a_teacher_says_so(pairs: ImagePairs) -> None:
    with pytest.raises(ValueError, match="method 'kd' needs a teacher, got None"):
        distil("kd", "resnet8x0_5", None, pairs, CONFIG)
