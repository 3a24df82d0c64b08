"""What the criteria on class scores promise beyond the shared contract."""

from __future__ import annotations

import copy
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from structkd import AdversarialLogitsLoss, Features, KDLoss
from structkd.criteria.logits import (
    CurriculumTemperatureLoss,
    DKDLoss,
    LogitMSELoss,
    LogitStandardizationLoss,
)
from structkd.distributed import Shards

GAP = 200.0


def _gap(hot: int, classes: int = 4) -> torch.Tensor:
    """Half-precision logits with one class ahead of the others by 200."""
    logits = torch.zeros(2, classes, dtype=torch.float16)
    logits[:, hot] = GAP
    return logits.requires_grad_()


def _expected_at_gap(own_s: bool, own_t: bool, same: bool) -> float:
    """DKD of one row at tau = 1, alpha = 1, beta = 8, where every softmax is one-hot or uniform.

    ``own``: the network's hot class is the label; ``same``: both networks have one hot class.
    """
    if same:
        return 0.0
    if own_t:
        # Sure of the label against sure of another; three equal others against a hot one.
        return GAP + 8 * (2 * GAP / 3 - math.log(3))
    if own_s:
        return GAP - math.log(3) + 8 * math.log(3)
    return 8 * GAP


@pytest.mark.parametrize("hot_s", [0, 1, 2])
@pytest.mark.parametrize("hot_t", [0, 1, 2])
def test_dkd_at_gaps_of_200_in_float16(hot_s: int, hot_t: int) -> None:
    student, target = _gap(hot_s), torch.tensor([0, 1])
    value = DKDLoss(temperature=1.0)(student, _gap(hot_t).detach(), target)
    value.backward()
    assert student.grad.dtype == torch.float16
    assert student.grad.isfinite().all()
    rows = [_expected_at_gap(hot_s == y, hot_t == y, hot_s == hot_t) for y in (0, 1)]
    assert float(value.detach()) == pytest.approx(sum(rows) / 2, rel=1e-5)


def test_dkd_pulls_where_probabilities_underflow() -> None:
    student, target = _gap(2), torch.tensor([0, 1])
    DKDLoss(temperature=1.0)(student, _gap(0).detach(), target).backward()
    # Row 0: the teacher is sure of class 0, the student of class 2.
    assert student.grad[0, 0] < 0 < student.grad[0, 2]


@pytest.mark.parametrize("hot", [0, 1])
def test_lskd_at_gaps_of_200_in_float16(hot: int) -> None:
    student = _gap(hot)
    value = LogitStandardizationLoss()(student, _gap(1).detach())
    value.backward()
    assert student.grad.isfinite().all()
    assert (value.item() == pytest.approx(0, abs=1e-6)) == (hot == 1)


def test_dkd_parts_add_up_to_kd_in_its_published_identity() -> None:
    rng = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 1, 6, generator=rng, dtype=torch.float64).unbind()
    target = torch.tensor([3])
    parts = DKDLoss(1.0, 1.0, 4.0).terms(student, teacher, target)
    own = torch.softmax(teacher / 4.0, dim=1)[0, 3]
    # KD = TCKD + (1 - p_target of the teacher) NCKD
    torch.testing.assert_close(
        KDLoss(4.0)(student, teacher), parts["DKD-target"] + (1 - own) * parts["DKD-nontarget"]
    )


def test_dkd_weights_scale_their_own_part() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 4, 1])
    one = DKDLoss(1.0, 1.0).terms(logits[0], logits[1], target)
    two = DKDLoss(2.0, 3.0).terms(logits[0], logits[1], target)
    torch.testing.assert_close(two["DKD-target"], 2 * one["DKD-target"])
    torch.testing.assert_close(two["DKD-nontarget"], 3 * one["DKD-nontarget"])


def test_lskd_sees_neither_shift_nor_positive_scale() -> None:
    rng = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 6, generator=rng, dtype=torch.float64).unbind()
    criterion = LogitStandardizationLoss()
    scale = torch.tensor([[0.1], [2.0], [7.0], [30.0]], dtype=torch.float64)
    torch.testing.assert_close(criterion(scale * student - 3, teacher), criterion(student, teacher))


@pytest.mark.parametrize("constant", [0.0, 0.1, -1234.567])
def test_lskd_takes_a_constant_row_as_uniform(constant: float) -> None:
    student = torch.full((2, 7), constant, requires_grad=True)
    teacher = torch.arange(14.0).reshape(2, 7)
    value = LogitStandardizationLoss(temperature=1.0)(student, teacher)
    standard = (teacher - teacher.mean(1, keepdim=True)) / teacher.std(1, False, keepdim=True)
    probabilities = standard.softmax(dim=1)
    wanted = math.log(7) + (probabilities * probabilities.log()).sum(dim=1).mean()
    torch.testing.assert_close(value, wanted)
    value.backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("classes", [7, 1000, 10007])
def test_lskd_does_not_blow_up_the_rounding_of_a_constant_row(classes: int) -> None:
    constants = torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    rows = constants.expand(200, classes).contiguous()
    assert (rows != rows.mean(dim=1, keepdim=True)).any()  # the rounding is there
    rows.requires_grad_()
    LogitStandardizationLoss()(rows, torch.arange(classes).expand(200, -1).float()).backward()
    # Divided by that rounding, the gradient would be 10^6 of an ordinary one.
    assert (rows.grad == 0).all()


def test_lskd_shows_nan_of_one_entry() -> None:
    student = torch.ones(2, 3)
    student[0, 1] = float("nan")
    assert LogitStandardizationLoss()(student, torch.eye(3)[:2]).isnan()


def test_lskd_standard_deviation_is_the_population_one() -> None:
    student, teacher = torch.tensor([[1.0, -1.0]]), torch.tensor([[-1.0, 1.0]])
    value = LogitStandardizationLoss(temperature=1.0)(student, teacher)
    # Z is +-1 exactly; dividing by K - 1 would give +-0.71.
    p = 1 / (1 + math.exp(-2))
    assert float(value) == pytest.approx(2 * (2 * p - 1), rel=1e-6)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: KDLoss(0), r"temperature must be finite > 0, got 0"),
        (lambda: DKDLoss(alpha=-1), r"alpha must be finite >= 0, got -1"),
        (lambda: DKDLoss(beta=float("nan")), r"beta must be finite >= 0, got nan"),
        (lambda: DKDLoss(temperature=-4), r"temperature must be finite > 0"),
        (lambda: LogitStandardizationLoss(temperature=0), r"temperature must be finite > 0"),
        (lambda: KDLoss(form="sigmod"), r"form must be one of softmax, sigmoid, got 'sigmod'"),
    ],
)
def test_bad_arguments_are_named(make, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


SOFT = [KDLoss(), DKDLoss(), LogitStandardizationLoss(), CurriculumTemperatureLoss()]


@pytest.mark.parametrize("criterion", [LogitMSELoss(), *SOFT], ids=repr)
def test_class_counts_that_differ_are_named(criterion) -> None:
    with pytest.raises(ValueError, match=r"logits must have one width, got 4 and 5; both networks"):
        criterion(torch.zeros(2, 4), torch.zeros(2, 5), torch.tensor([0, 1]))


def test_bad_targets_are_named() -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="DKDLoss needs target"):
        DKDLoss()(logits, logits)
    with pytest.raises(ValueError, match=r"target must lie in 0\.\.2 .*got values in 0\.\.3"):
        DKDLoss()(logits, logits, torch.tensor([0, 3]))
    for missing_one in ([-100, -1], [-1, -100]):  # which is the lowest of all, and allowed
        with pytest.raises(ValueError, match=r"or be -100.*got values in -1\.\.0"):
            DKDLoss()(logits, logits, torch.tensor(missing_one))
    with pytest.raises(ValueError, match=r"target must have shape \(2,\), got \(3,\)"):
        DKDLoss()(logits, logits, torch.tensor([0, 1, 2]))
    with pytest.raises(TypeError, match=r"target must be an int64 .* float32.*target\.long\(\)"):
        DKDLoss()(logits, logits, torch.tensor([0.0, 1.0]))
    with pytest.raises(TypeError, match=r"uint8 \(2,\); take target\.long\(\), with -100 where"):
        DKDLoss()(logits, logits, torch.tensor([0, 1], dtype=torch.uint8))  # as masks are read


@pytest.mark.parametrize("criterion", SOFT, ids=lambda c: type(c).__name__)
def test_a_softmax_over_one_logit_is_refused_with_the_cure(criterion) -> None:
    rows, target = torch.randn(2, 1), torch.tensor([0, 0])
    with pytest.raises(ValueError, match=r"at least 2 classes, got 1.*(sigmoid|binary_cross)"):
        criterion(Features(logits=rows), Features(logits=rows), target)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), classes=st.integers(2, 6), shift=st.floats(-50, 50))
def test_a_shift_of_a_rows_logits_changes_nothing(seed: int, classes: int, shift: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, 4, classes, generator=rng, dtype=torch.float64)
    target = torch.randint(0, classes, (4,), generator=rng)
    shifts = shift * torch.randn(4, 1, generator=rng, dtype=torch.float64)
    order = torch.randperm(classes, generator=rng)
    for criterion in SOFT:
        criterion = copy.deepcopy(criterion).double()
        value = criterion(student, teacher, target)
        for moved in ((student + shifts, teacher), (student, teacher - shifts)):
            torch.testing.assert_close(criterion(*moved, target), value, rtol=1e-7, atol=1e-9)
        renamed = student[:, order], teacher[:, order], order.argsort()[target]
        torch.testing.assert_close(criterion(*renamed), value)
    standard = LogitStandardizationLoss()
    scaled = standard((1 + abs(shift)) * student, 3 * teacher)
    torch.testing.assert_close(scaled, standard(student, teacher))


def _masked(seed: int, mask: float, open_: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Classes from ``open_`` on are masked out by the teacher; labels are of the others."""
    rng = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, 4, 6, generator=rng, dtype=torch.float64)
    teacher[:, open_:] = mask
    return student, teacher, torch.randint(0, open_, (4,), generator=rng)


def _by_definition(student: torch.Tensor, teacher: torch.Tensor, tau: float) -> torch.Tensor:
    """KL with 0 log 0 = 0, over the classes that the teacher takes for possible."""
    total = torch.zeros((), dtype=student.dtype)
    for row_s, row_t in zip(student / tau, teacher / tau, strict=True):
        p, q = row_t.softmax(0), row_s.softmax(0)
        total = total + sum(a * (a / b).log() for a, b in zip(p, q, strict=True) if a > 0)
    return tau**2 * total / len(student)


@pytest.mark.parametrize("mask", [-torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("open_", [1, 4])
@pytest.mark.parametrize("both", [False, True], ids=["teacher masks", "both mask"])
@pytest.mark.parametrize(
    "criterion",
    [*SOFT, LogitMSELoss(), AdversarialLogitsLoss()],
    ids=lambda c: type(c).__name__,
)
def test_classes_that_are_masked_out_leave_value_and_gradient_finite(
    criterion, mask: float, open_: int, both: bool
) -> None:
    student, teacher, target = _masked(0, mask, open_)
    if both:
        student[:, open_:] = mask
    student.requires_grad_()
    criterion = copy.deepcopy(criterion).double()
    value = criterion(student, teacher, target)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in criterion.parameters())
    if both:
        assert (student.grad[:, open_:] == 0).all()


def test_masked_classes_are_the_definition() -> None:
    student, teacher, _ = _masked(1, -torch.inf, 4)
    torch.testing.assert_close(KDLoss(2.0)(student, teacher), _by_definition(student, teacher, 2.0))
    ctkd = CurriculumTemperatureLoss().double()
    wanted = _by_definition(student, teacher, float(ctkd.temperature))
    torch.testing.assert_close(ctkd(student, teacher).detach(), wanted, rtol=1e-6, atol=1e-8)
    gap = (student - teacher)[:, :4].square().mean()
    torch.testing.assert_close(LogitMSELoss()(student, teacher), gap)
    share = LogitMSELoss(form="log")
    torch.testing.assert_close(share(student, teacher), share(student[:, :4], teacher[:, :4]))
    cut = LogitStandardizationLoss()(student[:, :4], teacher[:, :4])
    student[:, 4:] = -torch.inf
    torch.testing.assert_close(LogitStandardizationLoss()(student, teacher), cut)


@pytest.mark.parametrize("open_", [1, 4])
def test_float16s_lowest_number_masks_as_infinity_does(open_: int) -> None:
    values = []
    for mask in (-torch.inf, torch.finfo(torch.float16).min):
        student, teacher, target = _masked(2, mask, open_)
        student[:, open_:] = mask
        values.append(DKDLoss(temperature=4.0)(student, teacher, target))
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("classes", [1, 5])
def test_the_sigmoid_form_is_binary_cross_entropy_up_to_the_teachers_entropy(classes: int) -> None:
    rng = torch.Generator().manual_seed(0)
    student, teacher = 2 * torch.randn(2, 6, classes, generator=rng, dtype=torch.float64)
    student.requires_grad_()
    tau, wanted = 3.0, (teacher / 3.0).sigmoid()
    value = KDLoss(tau, form="sigmoid")(student, teacher)
    cost = F.binary_cross_entropy_with_logits(student / tau, wanted, reduction="sum")
    least = F.binary_cross_entropy(wanted, wanted, reduction="sum")
    torch.testing.assert_close(value, tau**2 * (cost - least) / 6)
    (found,) = torch.autograd.grad(value, student)
    (expected,) = torch.autograd.grad(tau**2 * cost / 6, student)
    torch.testing.assert_close(found, expected)


@pytest.mark.peer
def test_kd_equals_torchdistill() -> None:
    mid_level = importlib.import_module("torchdistill.losses.mid_level")
    rng = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 8, 5, generator=rng, dtype=torch.float64).unbind()
    target = torch.randint(0, 5, (8,), generator=rng)

    def peer(alpha: float) -> torch.Tensor:
        criterion = mid_level.KDLoss("s", "output", "t", "output", temperature=4.0, alpha=alpha)
        return criterion({"s": {"output": student}}, {"t": {"output": teacher}}, target)

    ours = KDLoss(4.0)(student, teacher)
    torch.testing.assert_close(0.5 * F.cross_entropy(student, target) + 0.5 * ours, peer(0.5))
    # Without hard labels it drops tau^2 too; Hinton et al. want it wherever tau is not 1.
    torch.testing.assert_close(ours, 16 * peer(0.0))


@pytest.mark.parametrize("labelled", [[0, 2, 3], [5], []], ids=len)
def test_rows_without_a_label_count_in_nothing_that_reads_it(labelled: list[int]) -> None:
    rng = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 4, generator=rng)
    student.requires_grad_()
    target = torch.full((6,), -100)
    target[labelled] = torch.tensor(labelled, dtype=torch.int64) % 4
    terms = DKDLoss().terms(student, teacher, target)
    if labelled:
        kept = (student[labelled], teacher[labelled], target[labelled])
        for name, value in DKDLoss().terms(*kept).items():
            torch.testing.assert_close(terms[name], value)
    (gradient,) = torch.autograd.grad(sum(terms.values()), student)
    without = [row for row in range(6) if row not in labelled]
    assert (gradient[without] == 0).all()
    assert gradient.isfinite().all()
    if not labelled:
        assert all(float(value.detach()) == 0 for value in terms.values())


@pytest.mark.parametrize(
    "kind",
    [KDLoss, lambda: KDLoss(form="sigmoid"), LogitStandardizationLoss, CurriculumTemperatureLoss],
)
def test_a_process_without_rows_adds_nothing(kind) -> None:
    student = torch.zeros(0, 3, requires_grad=True)
    criterion, elsewhere = kind(), Shards((0, 4))
    value = sum(criterion.terms(student, torch.zeros(0, 3), shards=elsewhere).values())
    value.backward()
    assert float(value.detach()) == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in criterion.parameters())
