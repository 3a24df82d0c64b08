"""What the dimensional-structure criteria promise beyond the shared contract."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from structkd import (
    CORALLoss,
    CrossCorrelationLoss,
    DistilVPRLoss,
    DSLoss,
    Features,
    Projector,
    RelationalLoss,
    SupervisionLoss,
    UniformityCalibrationLoss,
)
from tests.cases.case import generator, value_and_gradient
from tests.largest import Largest

seeds = st.integers(0, 2**16)
some_batches = st.integers(2, 9)
widths = st.integers(1, 7)
scales = st.sampled_from([1e-4, 1e-2, 1.0, 1e2, 1e4])


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def both_forms(kind, student: Tensor, teacher: Tensor):
    return [value_and_gradient(kind(form), student, teacher) for form in ("matrix", "gram")]


def plain(**options: object) -> CrossCorrelationLoss:
    """Compares embeddings as they are."""
    return CrossCorrelationLoss(projector="none", **options)


# --- CrossCorrelationLoss -------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=seeds, batch=some_batches, width=widths, scale=scales)
def test_correlations_lie_between_minus_one_and_one(seed, batch, width, scale) -> None:
    # With lambd = 1 the loss is |C - I|^2, at most 4 a diagonal and 1 an off-diagonal entry.
    terms = plain(lambd=1.0).terms(randn(seed, batch, width) * scale, randn(seed + 1, batch, width))
    assert 0 <= float(terms["SEM-1"]) <= 4 * width * (1 + 1e-5)
    assert 0 <= float(terms["SEM-2"]) <= width * (width - 1) * (1 + 1e-5)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, batch=some_batches, width=widths, center=st.booleans())
def test_positive_column_scaling_changes_nothing(seed, batch, width, center) -> None:
    student, teacher = randn(seed, batch, width), randn(seed + 1, batch, width)
    factors = 10 ** (8 * torch.rand(width, generator=generator(seed)) - 4)
    criterion = plain(lambd=0.5, center=center)
    torch.testing.assert_close(
        criterion(student * factors, teacher / factors),
        criterion(student, teacher),
        rtol=2e-5,
        atol=2e-5,
    )


@settings(max_examples=40, deadline=None)
@given(seed=seeds, batch=st.integers(3, 9), width=st.integers(1, 40), center=st.booleans())
def test_matrix_and_gram_agree(seed, batch, width, center) -> None:
    student, teacher = randn(seed, batch, width), randn(seed + 1, batch, width)
    (value, gradient), (gram_value, gram_gradient) = both_forms(
        lambda form: plain(lambd=0.3, center=center, form=form), student, teacher
    )
    torch.testing.assert_close(gram_value, value, rtol=1e-5, atol=1e-6)
    # The gradient, and its rounding, goes with one over the column's length.
    shortest = float((student - student.mean(0) * center).norm(dim=0).min())
    torch.testing.assert_close(gram_gradient, gradient, rtol=1e-4, atol=3e-6 / shortest)


@pytest.mark.parametrize("distance", [0.0, 1e-8, 1e-6, 1e-4])
@pytest.mark.parametrize("lambd", [5e-3, 1.0, 1e3])
def test_matrix_and_gram_agree_beside_the_optimum(distance: float, lambd: float) -> None:
    columns = torch.linalg.qr(randn(0, 64, 32))[0]
    student = columns + distance * randn(1, 64, 32)
    (value, gradient), (gram_value, gram_gradient) = both_forms(
        lambda form: plain(lambd=lambd, form=form), student, columns
    )
    assert float(gram_value) >= 0
    torch.testing.assert_close(gram_value, value, rtol=1e-3, atol=(1 + 10 * lambd) * 1e-12)
    torch.testing.assert_close(gram_gradient, gradient, rtol=1e-3, atol=2e-6 * max(1, lambd))


def test_gram_never_builds_the_square() -> None:
    student, teacher = randn(0, 8, 4096).requires_grad_(), randn(1, 8, 4096)
    for criterion in (plain(), CORALLoss()):
        with Largest() as largest:
            criterion(student, teacher).backward()
        assert largest.numel <= 8 * 4096


def test_few_columns_of_many_rows_never_build_the_gram() -> None:
    student, teacher = randn(0, 256, 8).requires_grad_(), randn(1, 256, 8)
    for criterion in (plain(), CORALLoss()):
        with Largest() as largest:
            criterion(student, teacher).backward()
        assert largest.numel <= 2 * 256 * 8


def test_a_dead_channel_counts_one_and_sends_no_gradient() -> None:
    student, teacher = randn(0, 6, 3), randn(1, 6, 3)
    student[:, 1] = 0
    terms = plain().terms(student, student)
    assert float(terms["SEM-1"]) == pytest.approx(1, abs=1e-5)
    _, gradient = value_and_gradient(plain(), student, teacher)
    assert gradient.isfinite().all()
    assert (gradient[:, 1] == 0).all()


@pytest.mark.parametrize("level", [0.1, 0.3, 1e4 / 3])  # whose mean is rounded
@pytest.mark.parametrize("batch", [7, 10_000])
def test_a_constant_channel_is_dead_once_centred(level: float, batch: int) -> None:
    student, teacher = randn(0, batch, 2), randn(1, batch, 2)
    student[:, 0] = level
    value, gradient = value_and_gradient(plain(center=True), student, teacher)
    assert value.isfinite()
    assert float(gradient[:, 0].abs().max()) < 1e-3


def test_centring_is_the_pearson_form() -> None:
    student, teacher = randn(0, 9, 4), randn(1, 9, 4)
    shifted = plain(center=True)(student + 5, teacher - 3)
    torch.testing.assert_close(shifted, plain(center=True)(student, teacher))
    pearson = torch.corrcoef(torch.cat([student, teacher], 1).T)[:4, 4:]
    want = (1 - pearson.diagonal()).square().sum()
    torch.testing.assert_close(plain(center=True).terms(student, teacher)["SEM-1"], want)


def test_the_teachers_projector_is_frozen_unless_asked() -> None:
    frozen = CrossCorrelationLoss(projector="mlp")
    frozen(randn(0, 6, 4), randn(1, 6, 4)).backward()
    assert all(p.grad is not None for p in frozen.student_projector.parameters())
    assert all(p.grad is None for p in frozen.teacher_projector.parameters())
    trained = CrossCorrelationLoss(projector="mlp", train_teacher_projector=True)
    trained(randn(0, 6, 4), randn(1, 6, 4)).backward()
    assert all(p.grad is not None for p in trained.teacher_projector.parameters())


@pytest.mark.parametrize("center", [False, True])
def test_a_trained_teachers_projector_has_one_gradient_in_both_forms(center: bool) -> None:
    student, teacher = randn(0, 6, 4).double(), randn(1, 6, 4).double()
    found = []
    for form in ("matrix", "gram"):
        torch.manual_seed(0)
        criterion = CrossCorrelationLoss(
            student_projector=nn.Linear(4, 5),
            teacher_projector=nn.Linear(4, 5),
            form=form,
            center=center,
            train_teacher_projector=True,
        ).double()
        criterion(student, teacher).backward()
        found.append([parameter.grad for parameter in criterion.parameters()])
    for matrix, gram in zip(*found, strict=True):
        torch.testing.assert_close(matrix, gram)


# --- UniformityCalibrationLoss --------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=seeds, batch=some_batches, width=widths, scale=scales, normalize=st.booleans())
def test_uniformity_lies_between_its_bounds(seed, batch, width, scale, normalize) -> None:
    rows = randn(seed, batch, width) * scale
    terms = UniformityCalibrationLoss(normalize=normalize).terms(
        rows, randn(seed + 1, batch, width)
    )
    # The self-pairs alone give 1/N.
    assert -math.log(batch) - 1e-4 <= float(terms["DCM-1"]) <= 1e-5
    assert float(terms["DCM-2"]) <= 1e-5


def test_spread_points_have_the_lowest_uniformity() -> None:
    angles = torch.arange(6) * math.pi / 3
    spread = torch.stack([angles.cos(), angles.sin()], 1)
    for seed in range(20):
        other = randn(seed, 6, 2)
        criterion = UniformityCalibrationLoss()
        assert criterion.terms(spread, spread)["DCM-1"] < criterion.terms(other, other)["DCM-1"]


def test_identical_rows_reach_the_upper_bound() -> None:
    rows = torch.ones(4, 3)
    terms = UniformityCalibrationLoss().terms(rows, rows)
    assert float(terms["DCM-1"]) == pytest.approx(0, abs=1e-6)


def test_far_rows_do_not_underflow() -> None:
    rows, far = randn(0, 4, 3) * 1e4, randn(1, 4, 3) * 1e4
    terms = UniformityCalibrationLoss(normalize=False, sigma=0.1).terms(rows, far)
    assert float(terms["DCM-1"]) == pytest.approx(-math.log(4), abs=1e-5)
    assert terms["DCM-2"].isfinite()


def test_the_sign_says_what_minimising_does() -> None:
    student, teacher = randn(0, 8, 4), randn(1, 8, 4)

    def distance_after_a_step(cross_sign: str) -> float:
        rows = student.clone().requires_grad_()
        UniformityCalibrationLoss(cross_sign=cross_sign).terms(rows, teacher)["DCM-2"].backward()
        moved = torch.nn.functional.normalize(rows.detach() - 0.1 * rows.grad, dim=1)
        return float(torch.cdist(moved, torch.nn.functional.normalize(teacher, dim=1)).mean())

    assert distance_after_a_step("align") < distance_after_a_step("separate")


def test_median_bandwidth_makes_the_loss_free_of_scale() -> None:
    student, teacher = randn(0, 7, 4), randn(1, 7, 4)
    criterion = UniformityCalibrationLoss(normalize=False, sigma="median")
    torch.testing.assert_close(
        criterion(student * 50, teacher * 50), criterion(student, teacher), rtol=1e-4, atol=1e-5
    )


def test_maps_of_other_sizes_are_averaged_or_pooled_to_a_common_one() -> None:
    student, teacher = randn(0, 4, 3, 8, 8), randn(1, 4, 3, 4, 4)
    for pool in ("avg", "flatten", 2):
        assert UniformityCalibrationLoss(pool=pool)(student, teacher).isfinite()
    pooled = torch.nn.functional.adaptive_avg_pool2d(student, 4)
    flat = UniformityCalibrationLoss(pool="flatten")
    torch.testing.assert_close(flat(student, teacher), flat(pooled, teacher))


def test_layer_picks_the_map() -> None:
    maps = (randn(0, 4, 3, 2, 2), randn(1, 4, 5, 2, 2))
    other = (randn(2, 4, 3, 2, 2), randn(3, 4, 5, 2, 2))
    first = UniformityCalibrationLoss(layer=0)(maps, other)
    torch.testing.assert_close(first, UniformityCalibrationLoss()(maps[0], other[0]))
    with pytest.raises(ValueError, match=r"layer=2, but student.intermediate holds 2"):
        UniformityCalibrationLoss(layer=2)(maps, other)


# --- CORALLoss ------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=seeds, batch=some_batches, width=st.integers(1, 40), scale=scales)
def test_coral_forms_agree_and_are_symmetric(seed, batch, width, scale) -> None:
    student, teacher = randn(seed, batch, width) * scale, randn(seed + 1, batch, width)
    (value, gradient), (gram_value, gram_gradient) = both_forms(
        lambda form: CORALLoss(form=form), student, teacher
    )
    torch.testing.assert_close(gram_value, value, rtol=1e-4, atol=1e-10)
    # Both start from rounded means, which matters where a covariance is nearly the other's.
    length = max(float(student.norm()), float(teacher.norm()))
    rounding = 1e-6 * length**3 / (width * (batch - 1)) ** 2
    torch.testing.assert_close(gram_gradient, gradient, rtol=1e-3, atol=rounding)
    torch.testing.assert_close(CORALLoss()(teacher, student), value, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("form", ["matrix", "gram"])
def test_coral_is_zero_for_shifted_and_for_reordered_rows(form: str) -> None:
    rows = randn(0, 12, 40)
    assert float(CORALLoss(form=form)(rows + 3, rows)) < 1e-12
    assert float(CORALLoss(form=form)(rows.flip(0), rows)) < 1e-12


# --- DSLoss ---------------------------------------------------------------------------------------


def example(batch: int = 6) -> tuple[Features, Features, Tensor]:
    student = Features(
        logits=randn(0, batch, 5),
        embedding=randn(1, batch, 4),
        intermediate=randn(2, batch, 3, 4, 4),
    )
    teacher = Features(embedding=randn(3, batch, 8), intermediate=randn(4, batch, 6, 2, 2))
    return student, teacher, torch.arange(batch) % 5


TERMS = ("SEM-1", "SEM-2", "DCM-1", "DCM-2")


def ds_terms(**options: object) -> dict[str, Tensor]:
    """The terms of the example, with the same weights whatever the options."""
    student, teacher, target = example()
    torch.manual_seed(0)
    return DSLoss(**options).terms(student, teacher, target)


def test_the_five_terms_are_separate_in_name_and_switch() -> None:
    terms = ds_terms(srm=True)
    assert list(terms) == ["SRM", *TERMS]
    for left_out in TERMS:
        left = ds_terms(terms=[name for name in TERMS if name != left_out])
        assert list(left) == [name for name in TERMS if name != left_out]
        for other, value in left.items():
            torch.testing.assert_close(value, terms[other])


def test_the_task_loss_is_added_only_if_asked() -> None:
    student, teacher, target = example()
    assert "SRM" not in ds_terms()
    whole = DSLoss(srm=True)
    cross_entropy = torch.nn.functional.cross_entropy(student.logits, target)
    torch.testing.assert_close(whole.terms(student, teacher, target)["SRM"], cross_entropy)
    with pytest.raises(ValueError, match="SupervisionLoss needs target"):
        whole(student, teacher)


def test_rows_without_a_label_are_distilled_all_the_same() -> None:
    student, teacher, target = example()
    criterion = DSLoss(srm=True)
    full = criterion.terms(student, teacher, target)
    target[[0, 3]] = -100
    some = criterion.terms(student, teacher, target)
    labelled = target != -100
    want = torch.nn.functional.cross_entropy(student.logits[labelled], target[labelled])
    torch.testing.assert_close(some["SRM"], want)
    for name in TERMS:
        torch.testing.assert_close(some[name], full[name])
    none = criterion.terms(student, teacher, torch.full_like(target, -100))
    assert float(none["SRM"]) == 0
    soft = torch.nn.functional.one_hot(target.clamp_min(0), 5).float()  # as Mixup gives them
    hard = criterion(student, teacher, target.clamp_min(0))
    torch.testing.assert_close(criterion(student, teacher, soft), hard)


def test_gamma_scales_the_structure_terms_alone() -> None:
    once, scaled = ds_terms(srm=True, gamma=1.0), ds_terms(srm=True, gamma=(3.0, 0.5))
    for name, factor in {"SRM": 1, "SEM-1": 3, "SEM-2": 3, "DCM-1": 0.5, "DCM-2": 0.5}.items():
        torch.testing.assert_close(scaled[name], factor * once[name])


def test_the_printed_variant_is_the_equations() -> None:
    student, teacher, _ = example()
    criterion = DSLoss(variant="printed", gamma=0.2)
    got = criterion(student, teacher)
    want = CrossCorrelationLoss(
        student_projector=criterion.sem.student_projector,
        teacher_projector=criterion.sem.teacher_projector,
    )
    sem = want(student, teacher)
    dcm = UniformityCalibrationLoss(criterion.dcm.adapter)(student, teacher)
    torch.testing.assert_close(got, 0.2 * (sem + dcm))
    assert criterion.sem.student_projector.out_dim == 4 * 8  # the MLPs raise the width


def test_what_is_switched_off_has_no_parameters_and_reads_nothing() -> None:
    student, teacher, _ = example()
    no_map = (student.replace(intermediate=()), teacher.replace(intermediate=()))
    only_sem = DSLoss(terms=["SEM-2"])
    only_sem(*no_map)
    assert only_sem.dcm is None
    assert sum(p.numel() for p in only_sem.parameters()) == 4 * 8 + 8
    no_row = (student.replace(embedding=None), teacher.replace(embedding=None))
    only_dcm = DSLoss(terms=["DCM-1"])
    only_dcm(*no_row)
    assert only_dcm.sem is None
    assert sum(p.numel() for p in only_dcm.parameters()) == 3 * 6 + 6


def test_parts_are_taken_as_they_are() -> None:
    student, teacher, _ = example()
    sem = CrossCorrelationLoss(reduction="mean", center=True, projector="mlp", projector_dim=9)
    dcm = UniformityCalibrationLoss(cross_sign="align", sigma="median")
    criterion = DSLoss(sem=sem, dcm=dcm, gamma=(2.0, 0.5))
    want = 2 * sem(student, teacher) + 0.5 * dcm(student, teacher)
    torch.testing.assert_close(criterion(student, teacher), want)
    assert (criterion.sem, criterion.dcm) == (sem, dcm)
    assert sem.student_projector.out_dim == 9


# Without an adapter: torch's own convolution on the CPU takes another graph from 16 samples on.
@pytest.mark.parametrize(
    "make",
    [
        lambda: DSLoss(sem=plain()),
        RelationalLoss,
        DistilVPRLoss,
    ],
    ids=["ds", "rkd", "vpr"],
)
def test_one_graph_holds_for_all_batch_sizes(make) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(make(), backend="aot_eager", fullgraph=True)

    def run(batch: int) -> None:
        student = Features(
            embedding=randn(0, batch, 5).requires_grad_(),
            intermediate=randn(1, batch, 3, 2, 2).requires_grad_(),
        )
        teacher = Features(embedding=randn(2, batch, 5), intermediate=randn(3, batch, 3, 2, 2))
        compiled(student, teacher).backward()

    run(8)
    run(12)  # the first other size makes the graph dynamic
    with torch.compiler.set_stance("fail_on_recompile"):
        run(16)
        run(24)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_row_of_zeros_sends_no_gradient(normalize: bool) -> None:
    student = randn(0, 6, 4)
    student[2] = 0
    _, gradient = value_and_gradient(
        UniformityCalibrationLoss(normalize=normalize), student, randn(1, 6, 4)
    )
    assert gradient.isfinite().all()
    assert float(gradient.abs().max()) < 10
    if normalize:
        assert (gradient[2] == 0).all()


def test_maps_tokens_and_rows_meet() -> None:
    kinds = (randn(0, 4, 3, 2, 2), randn(1, 4, 9, 3), randn(2, 4, 3))
    for pool in ("avg", "flatten", 2):
        for student in kinds:
            for teacher in kinds:
                assert UniformityCalibrationLoss(pool=pool)(student, teacher).isfinite()


def test_projectors_that_share_parameters_are_refused() -> None:
    shared = Projector(8)
    both = {"student_projector": shared, "teacher_projector": shared}
    with pytest.raises(ValueError, match=r"share parameters.*copy\.deepcopy"):
        CrossCorrelationLoss(**both)
    trained = CrossCorrelationLoss(**both, train_teacher_projector=True)
    assert all(p.requires_grad for p in trained.parameters())


def test_coral_projects_where_widths_differ() -> None:
    student, teacher, _ = example()
    criterion = CORALLoss()
    value = criterion(student, teacher)
    want = CORALLoss()(criterion.student_projector(student.embedding), teacher.embedding)
    torch.testing.assert_close(value, want)
    equal = CORALLoss()
    equal(teacher, teacher)
    assert not list(equal.parameters())


@pytest.mark.parametrize("form", ["matrix", "gram"])
def test_coral_keeps_its_digits_near_the_optimum(form: str) -> None:
    teacher = randn(0, 4096, 3)
    student = teacher + 1e-4 * randn(1, 4096, 3)
    exact = CORALLoss(form=form)(student.double(), teacher.double())
    torch.testing.assert_close(
        CORALLoss(form=form)(student, teacher).double(), exact, rtol=1e-3, atol=0
    )


# --- SupervisionLoss ------------------------------------------------------------------------------


def test_supervision_is_cross_entropy_with_ignore_index() -> None:
    logits, target = randn(0, 7, 5).requires_grad_(), torch.tensor([0, -100, 4, 2, -100, 1, 1])
    for smoothing in (0.0, 0.3):
        criterion = SupervisionLoss(label_smoothing=smoothing)
        got = criterion(Features(logits=logits), Features(), target)
        want = torch.nn.functional.cross_entropy(logits, target, label_smoothing=smoothing)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(v, logits)[0] for v in (got, want)))
    soft = randn(1, 7, 5).softmax(1)
    want = torch.nn.functional.cross_entropy(logits, soft)
    torch.testing.assert_close(SupervisionLoss()(logits, logits, soft), want)


def test_a_batch_without_labels_costs_nothing() -> None:
    logits = randn(0, 3, 4).requires_grad_()
    value = SupervisionLoss(label_smoothing=0.1)(logits, logits, torch.full((3,), -100))
    (gradient,) = torch.autograd.grad(value, logits)
    assert float(value.detach()) == 0
    assert (gradient == 0).all()


# --- bad input ------------------------------------------------------------------------------------

EMBED, MAP = torch.zeros(4, 3), torch.zeros(4, 3, 2, 2)
SEM = CrossCorrelationLoss()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: plain()(EMBED, torch.zeros(4, 5)),
            ValueError,
            r"one width after projection, got 3 and 5; leave .*student_projector=.*Projector\(5\)",
        ),
        (lambda: CrossCorrelationLoss()(MAP, MAP), ValueError, r"student.embedding must be 2-D"),
        (lambda: CrossCorrelationLoss(lambd=-1), ValueError, "lambd must be finite >= 0, got -1"),
        (lambda: CrossCorrelationLoss(lambd="0"), TypeError, "lambd must be a number, got str"),
        (lambda: CrossCorrelationLoss(lambd=math.nan), ValueError, "lambd must be finite"),
        (
            lambda: CrossCorrelationLoss(form="grams"),
            ValueError,
            "form must be one of auto, matrix, gram, got 'grams'",
        ),
        (
            lambda: UniformityCalibrationLoss(nn.Identity())(MAP, torch.zeros(4, 5, 2, 2)),
            ValueError,
            r"adapter must bring float32 \(4, 3, 2, 2\) to the teacher's 5 channels",
        ),
        (
            lambda: UniformityCalibrationLoss(pool="flatten")(MAP, torch.zeros(4, 2, 3)),
            ValueError,
            "whose 2 tokens form no square",
        ),
        (lambda: UniformityCalibrationLoss(sigma=0), ValueError, "sigma must be finite > 0, got 0"),
        (
            lambda: UniformityCalibrationLoss(sigma="mean"),
            ValueError,
            "sigma must be one of median, got 'mean'",
        ),
        (lambda: UniformityCalibrationLoss(pool="max"), ValueError, "pool must be one of avg, fla"),
        (lambda: UniformityCalibrationLoss(pool=0), ValueError, "pool must be at least 1, got 0"),
        (lambda: UniformityCalibrationLoss(pool=2.0), TypeError, "pool must be a whole number, go"),
        (
            lambda: UniformityCalibrationLoss(cross_sign="+"),
            ValueError,
            "cross_sign must be one of",
        ),
        (
            lambda: CORALLoss(nn.Identity())(EMBED, torch.zeros(4, 5)),
            ValueError,
            r"one width, got 3 and 5; project the student's with structkd.Projector\(5\)",
        ),
        (lambda: DSLoss(gamma=-0.1), ValueError, "gamma must be finite >= 0, got -0.1"),
        (lambda: DSLoss(gamma=(1, -2)), ValueError, r"gamma\[1\] must be finite >= 0"),
        (lambda: DSLoss(gamma=(1, 2, 3)), ValueError, "a number or a pair"),
        (lambda: DSLoss(sem=4), TypeError, "sem must be a CrossCorrelationLoss or None"),
        (lambda: DSLoss(dcm=SEM), TypeError, "dcm must be a UniformityCalibrationLoss"),
        (lambda: CrossCorrelationLoss(projector="conv"), ValueError, "projector must be one of li"),
        (lambda: CrossCorrelationLoss(projector_dim=9), ValueError, "needs projector='mlp'"),
        (
            lambda: CrossCorrelationLoss(projector="mlp", projector_dim=0),
            ValueError,
            "projector_dim must be at least 1",
        ),
        (
            lambda: CrossCorrelationLoss(projector="mlp", student_projector=nn.Linear(4, 8)),
            ValueError,
            "projector and projector_dim say which projectors to make",
        ),
        (lambda: DSLoss(variant="paper"), ValueError, "variant must be one of measured"),
        (lambda: DSLoss(terms=["SEM-3"]), ValueError, "one or more of SEM-1, .* got 'SEM-3'"),
        (lambda: DSLoss(terms=[]), ValueError, "one or more of SEM-1, .* got none"),
        (lambda: DSLoss(sem=SEM, terms=["DCM-1"]), ValueError, "sem has the terms SEM-1, SEM-2"),
        (
            lambda: CrossCorrelationLoss(train_teacher_projector=True),
            ValueError,
            "no teacher_projector to train; pass one, or .*projector='mlp'",
        ),
        (lambda: DSLoss()(EMBED, EMBED), TypeError, "student must be Features or a dict"),
        (lambda: DSLoss()(Features(), Features()), ValueError, r"needs student\.embedding"),
        (
            lambda: DSLoss(srm=True)(Features(), Features(), torch.zeros(4).long()),
            ValueError,
            "SupervisionLoss needs student.logits",
        ),
        (
            lambda: SupervisionLoss()(EMBED, EMBED, torch.full((4,), 3)),
            ValueError,
            r"target must lie in 0..2 \(or be -100, .* got values in 0..3|got values in 3..3",
        ),
        (lambda: SupervisionLoss()(EMBED, EMBED, -torch.ones(4).long()), ValueError, "-1..-1"),
        (
            lambda: SupervisionLoss()(EMBED, EMBED),
            ValueError,
            r"needs target, .*class indices \(B,\).*with -100",
        ),
        (
            lambda: SupervisionLoss()(EMBED, EMBED, torch.zeros(4, 2)),
            ValueError,
            r"probabilities must have shape \(4, 3\), got \(4, 2\)",
        ),
        (lambda: SupervisionLoss(label_smoothing=2), ValueError, "label_smoothing must be finite"),
    ],
)
def test_bad_input_is_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
