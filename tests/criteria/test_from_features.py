"""Every public criterion is built from example features of every kind, and says what it cannot."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import yaml
from structkd.specs import build_criterion
from torch import Tensor

import structkd
from structkd import Criterion, CriterionSum, Features
from tests.criteria.test_contract import PUBLIC

BATCH, CLASSES = 6, 5
OPTIONS: dict[str, dict[str, Any]] = {
    "ContrastiveRepresentationLoss": {"dataset_size": 20, "negatives": 4},
    "AdversarialFeatureLoss": {"source": "intermediate"},
    "SemanticAlignmentLoss": {"heads": 2},
    "DSLoss": {"srm": True},
    # Of a teacher's whole set: 10 samples, the teacher's embedding being 8 wide.
    "ClassMeanKDLoss": {"logits": torch.eye(10, CLASSES), "labels": torch.arange(10) % CLASSES},
    "ClassCORALLoss": {"embedding": torch.eye(10, 8), "labels": torch.arange(10) % CLASSES},
}
SHAPES = {
    "maps": lambda width: ((width, 4, 4), (2 * width, 2, 2)),
    "tokens": lambda width: ((16, width), (9, 2 * width)),
    "rows": lambda width: ((width,), (2 * width,)),
}
# On one position attention and selectivity are 0 whatever the maps hold.
NEED_POSITIONS = ("AttentionTransferLoss", "NeuronSelectivityLoss")
every_public = pytest.mark.parametrize("kind", PUBLIC, ids=lambda kind: kind.__name__)


def _network(layout: str, width: int, dtype: torch.dtype = torch.float32) -> Features:
    rng = torch.Generator().manual_seed(width)

    def randn(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=rng, dtype=dtype).requires_grad_()

    return Features(
        logits=randn(CLASSES),
        embedding=randn(width),
        intermediate=tuple(randn(*shape) for shape in SHAPES[layout](width)),
        index=torch.arange(BATCH),
    )


def _build(kind: type[Criterion], student: Features, teacher: Features) -> Criterion:
    torch.manual_seed(0)
    return kind.from_features(student, teacher, **OPTIONS.get(kind.__name__, {}))


@every_public
@pytest.mark.parametrize("layout_t", list(SHAPES))
@pytest.mark.parametrize("layout_s", list(SHAPES))
def test_any_student_meets_any_teacher(kind, layout_s: str, layout_t: str) -> None:
    student, teacher = _network(layout_s, 6), _network(layout_t, 8)
    criterion = _build(kind, student, teacher)
    target = torch.arange(BATCH) % CLASSES
    if kind.__name__ in NEED_POSITIONS and "rows" in (layout_s, layout_t):
        with pytest.raises(ValueError, match=r"share one only.*capture an earlier layer"):
            criterion(student, teacher, target)
        return
    value = criterion(student, teacher, target)
    assert value.isfinite()
    value.backward()
    reached = [student.logits.grad, student.embedding.grad]
    reached += [value.grad for value in student.intermediate]
    assert any(grad is not None and grad.abs().max() > 0 for grad in reached)


@every_public
def test_the_criterion_has_the_precision_of_the_features(kind) -> None:
    student, teacher = (_network("maps", width, torch.float64) for width in (6, 8))
    criterion = _build(kind, student, teacher)
    assert all(p.dtype == torch.float64 for p in criterion.parameters())
    assert criterion(student, teacher, torch.arange(BATCH) % CLASSES).dtype == torch.float64


@every_public
def test_an_option_that_does_not_exist_is_named_with_its_like(kind) -> None:
    student, teacher = _network("maps", 6), _network("maps", 8)
    with pytest.raises(TypeError, match=f"{kind.__name__} has no option 'gathr'; near.*gather"):
        kind.from_features(student, teacher, gathr=True)


@every_public
def test_gather_is_an_option_of_each(kind) -> None:
    student, teacher = _network("maps", 6), _network("maps", 8)
    options = OPTIONS.get(kind.__name__, {})
    assert kind.from_features(student, teacher, gather=True, **options).gather
    assert not kind.from_features(student, teacher, **options).gather


def test_what_the_caller_gives_goes_first() -> None:
    student, teacher = _network("maps", 6), _network("maps", 8)
    own = torch.nn.Linear(6, 8)
    for kind in (structkd.CORALLoss, structkd.CrossCorrelationLoss):
        assert kind.from_features(student, teacher, student_projector=own).student_projector is own
    adapter = structkd.ConvAdapter(12, 16, kernel_size=3)
    built = structkd.UniformityCalibrationLoss.from_features(student, teacher, adapter=adapter)
    assert built.adapter is adapter
    first = structkd.UniformityCalibrationLoss.from_features(student, teacher, layer=0)
    assert (first.adapter.in_channels, first.adapter.out_channels) == (6, 8)


def test_members_of_a_sum_load_whatever_their_order() -> None:
    student, teacher = _network("maps", 6), _network("maps", 8)
    make = lambda: (  # noqa: E731
        structkd.FitNetLoss.from_features(student, teacher),
        structkd.CorrelationCongruenceLoss.from_features(student, teacher),
    )
    (fit, cc), (other_fit, other_cc) = make(), make()
    saved, other = fit + 0.5 * cc, 0.5 * other_cc + other_fit
    other.load_state_dict(saved.state_dict())
    torch.testing.assert_close(other(student, teacher), saved(student, teacher))
    named = CriterionSum({"hint": fit, "kernel": cc}, {"kernel": 0.5})
    torch.testing.assert_close(named(student, teacher), saved(student, teacher))
    assert {name.split(".")[1] for name in named.state_dict()} == {"hint", "kernel"}


def test_a_weight_falls_to_zero_along_a_cosine_without_a_recompile() -> None:
    torch._dynamo.reset()
    total = 8
    student, teacher = torch.eye(4), torch.eye(4).flip(0)
    whole = CriterionSum({"dense": structkd.CORALLoss(), "kd": structkd.LogitMSELoss()})
    feats = (
        Features(logits=student, embedding=student),
        Features(logits=teacher, embedding=2 * teacher),
    )
    full = {name: float(value) for name, value in whole.terms(*feats).items()}
    compiled = torch.compile(whole, backend="eager", fullgraph=True)
    compiled(*feats)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(total + 2):
            share = structkd.falling(step, total)
            whole.set_weight("dense", 20 * share)
            want = 20 * math.cos(math.pi * min(step, total) / total / 2) ** 2
            value = float(compiled(*feats)) - full["Logits"]
            assert value == pytest.approx(want * full["CORAL"], abs=1e-5)
    assert structkd.falling(0, total) == 1
    assert structkd.falling(total, total) == 0
    for step, steps in ((-1, 4), (1, 0)):
        with pytest.raises(ValueError, match="must be at least"):
            structkd.falling(step, steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_that_changes_before_backward_counts_from_the_next_step(dtype) -> None:
    logits = torch.eye(4, dtype=dtype).requires_grad_()
    teacher = structkd.Features(logits=torch.eye(4, dtype=dtype).flip(0))
    sums = 3.0 * structkd.KDLoss(), structkd.BridgeLoss(structkd.KDLoss(), task_weight=0)
    for criterion, name in zip(sums, ("KDLoss", "pair"), strict=True):
        value = criterion(structkd.Features(logits=logits), teacher)
        (wanted,) = torch.autograd.grad(value, logits, retain_graph=True)
        criterion.set_weight(name, 7.0)
        (found,) = torch.autograd.grad(value, logits)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        assert criterion.weights[name] == 7.0


def test_a_number_that_yaml_reads_as_text_is_told() -> None:
    feats = Features(logits=torch.eye(4))
    for said in ("weight: 1e-3", "temperature: 1e-3"):
        spec = yaml.safe_load(f"{{type: KDLoss, {said}}}")
        with pytest.raises(TypeError, match=r"must be a number, got str '1e-3'; YAML.*1\.0e-3 as"):
            build_criterion(spec, feats, feats)


def test_epochs_count_inside_sums_and_once() -> None:
    ctkd = structkd.CurriculumTemperatureLoss()
    whole = 0.5 * (structkd.KDLoss() + 2 * ctkd) + structkd.LogitMSELoss()
    whole.step_epoch()
    assert int(ctkd.epoch) == 2
