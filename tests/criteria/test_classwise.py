"""What the distributions by class are made of, and what does not fit them."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import structkd
from structkd import BridgeLoss, ClassCORALLoss, ClassMeanKDLoss, Features
from structkd.criteria.sums import reads_teacher

ROWS = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 2
STUDENT = Features(logits=torch.randn(4, 3), embedding=torch.randn(4, 3))
MADE = [ClassMeanKDLoss, ClassCORALLoss]
both = pytest.mark.parametrize("kind", MADE, ids=lambda kind: kind.__name__)


def _target(*classes: int) -> torch.Tensor:
    return torch.tensor(classes)


def test_one_sample_a_class_is_distillation_from_it() -> None:
    labels, target = torch.arange(3), _target(2, 0, 1, 1)
    own = ClassMeanKDLoss(ROWS[:3], labels, temperature=4.0)
    wanted = structkd.KDLoss(4.0)(STUDENT.logits, ROWS[:3][target])
    torch.testing.assert_close(own(STUDENT, Features(), target), wanted)


def test_one_class_is_coral_with_all_the_others_scatter() -> None:
    one = torch.zeros(8, dtype=torch.int64)
    shifted = Features(embedding=ROWS.flip(0) * 2 + 5)
    found = ClassCORALLoss(ROWS, one, mean_weight=0)(shifted, Features(), one)
    torch.testing.assert_close(found, structkd.CORALLoss()(ROWS.flip(0) * 2 + 5, ROWS))


@both
def test_a_class_that_only_the_teacher_has_does_not_matter(kind) -> None:
    more = torch.cat([ROWS, ROWS + 3]), torch.cat([LABELS, torch.full((8,), 2)])
    target = _target(0, 1, -100, 1)
    without, with_it = kind(ROWS, LABELS), kind(*more)
    value = without(STUDENT, Features(), target)
    torch.testing.assert_close(with_it(STUDENT, Features(), target), value)


@both
def test_a_class_that_only_the_student_has_is_named(kind) -> None:
    labels = torch.where(LABELS == 1, 2, 0)  # class 1 is missing between the others
    said = r"class\(es\) \[1\] of which the teacher's set has no sample.*-100"
    with pytest.raises(ValueError, match=said):
        kind(ROWS, labels)(STUDENT, Features(), _target(0, 1, 2, 1))
    hidden = kind(ROWS, labels)(STUDENT, Features(), _target(0, -100, 2, -100))
    assert hidden.isfinite()
    if kind is ClassCORALLoss:
        with pytest.raises(
            ValueError, match=r"target must lie in 0\.\.2.*in the teacher's set is 3"
        ):
            kind(ROWS, labels)(STUDENT, Features(), _target(0, 5, 2, 0))


@both
def test_rows_without_a_label_get_no_gradient_even_where_class_0_is_missing(kind) -> None:
    field = kind.reads[0]
    rows = torch.randn(4, 3, requires_grad=True)
    criterion = kind(ROWS, LABELS + 1)
    criterion(Features(**{field: rows}), Features(), _target(1, -100, 2, -100)).backward()
    assert rows.grad.isfinite().all()
    assert not rows.grad[1::2].any()
    assert rows.grad[::2].any()
    none = torch.full((4,), -100)
    value = criterion(Features(**{field: rows}), Features(), none)
    value.backward()
    assert float(value.detach()) == 0


def test_a_bridge_gives_them_their_rows_without_any_features_of_the_teacher() -> None:
    kd = ClassMeanKDLoss(ROWS, LABELS)
    assert not reads_teacher(kd + 0.5 * ClassCORALLoss(ROWS, LABELS))
    assert reads_teacher(kd + structkd.KDLoss())
    loss, target = BridgeLoss(structkd.KDLoss(), kd), _target(0, 1, 1, 0)
    own = torch.tensor([True, True, False, True])
    teacher = Features(logits=torch.randn(1, 3))
    terms = loss.terms(STUDENT, teacher, target, paired=~own, matched=own)
    assert list(terms) == ["task", "pair/KD", "match/ClassKD"]
    wanted = kd(STUDENT.rows(own), Features(), target[own])
    torch.testing.assert_close(terms["match/ClassKD"], wanted)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_teacher_that_ran_in_half_precision_is_summed_up_in_float32(kind, dtype) -> None:
    rows = (300 * ROWS).to(dtype)  # a variance of 90,000 is none that float16 has
    target = _target(0, 1, -100, 1)
    value = kind(rows, LABELS)(STUDENT, Features(), target)
    assert value.isfinite()
    assert torch.equal(value, kind(rows.float(), LABELS)(STUDENT, Features(), target))


@both
def test_statistics_on_another_device_than_the_batch_are_named(kind) -> None:
    field = kind.reads[0]
    student = Features(**{field: torch.empty(4, 3, device="meta")})
    target = torch.zeros(4, dtype=torch.int64, device="meta")
    said = rf"{kind.__name__}'s \w+ is on cpu, its inputs on meta: call criterion.to\('meta'\)"
    with pytest.raises(ValueError, match=said):
        kind(ROWS, LABELS)(student, Features(), target)


class _Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.numel = max(self.numel, made.numel())
        return made


def test_a_large_set_is_summed_up_class_by_class() -> None:
    count, classes, width = 600, 20, 8
    rows, labels = torch.randn(count, width), torch.arange(count) % classes
    with _Largest() as largest:
        found = ClassCORALLoss(rows, labels)
    assert largest.numel <= count * classes  # all at once, it is width times as much
    for label in (0, classes - 1):
        own = rows[label::classes]
        torch.testing.assert_close(found.means[label], own.mean(dim=0))
        torch.testing.assert_close(found.covariances[label], own.T.cov())


def test_from_features_says_what_it_needs_and_projects() -> None:
    feats = Features(logits=torch.randn(2, 3), embedding=torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"needs embedding=\.\.\. and labels=\.\.\..*whole set"):
        ClassCORALLoss.from_features(feats, feats)
    with pytest.raises(ValueError, match=r"ClassMeanKDLoss needs labels=\.\.\.: the teacher's"):
        ClassMeanKDLoss.from_features(feats, feats, logits=ROWS)
    built = ClassCORALLoss.from_features(feats, feats, embedding=ROWS, labels=LABELS)
    assert (built.student_projector.in_dim, built.student_projector.out_dim) == (5, 3)
    with pytest.raises(ValueError, match=r"must be 3 wide.*got 5; pass.*Projector\(5, 3"):
        ClassCORALLoss(ROWS, LABELS)(feats, Features(), _target(0, 1))


@both
@pytest.mark.parametrize(
    ("rows", "labels", "error", "said"),
    [
        (ROWS.long(), LABELS, TypeError, "must be a floating-point tensor, got int64"),
        (ROWS[0], LABELS, ValueError, "must be 2-D"),
        (ROWS * torch.nan, LABELS, ValueError, "must be finite"),
        (ROWS, LABELS[:3], ValueError, r"labels must have shape \(8,\)"),
        (ROWS, LABELS.float(), TypeError, "labels must be an int64 tensor of class indices"),
        (ROWS, torch.full((8,), -100), ValueError, "got -100 alone"),
    ],
)
def test_a_teachers_set_that_does_not_fit_is_named(kind, rows, labels, error, said: str) -> None:
    with pytest.raises(error, match=said):
        kind(rows, labels)


def test_a_class_of_one_sample_has_no_covariance() -> None:
    labels = LABELS.clone()
    labels[0] = 2
    with pytest.raises(ValueError, match=r"at least 2 samples of a class.*class\(es\) \[2\]"):
        ClassCORALLoss(ROWS, labels)


def test_logits_of_other_classes_are_named() -> None:
    with pytest.raises(ValueError, match="score the teacher's 3 classes, got 5"):
        ClassMeanKDLoss(ROWS, LABELS)(torch.randn(2, 5), Features(), _target(0, 1))
