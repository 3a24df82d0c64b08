"""What dense dimensional structure promises beyond the shared contract."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structkd.criteria._closed_form import cut_at
from torch import Tensor, nn

from structkd import CrossCorrelationLoss, DenseStructureLoss, DSLoss, Features
from tests.cases.case import generator

seeds = st.integers(0, 2**16)
CLOSED = {"adapter": "closed_form"}


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def value_and_gradient(criterion: nn.Module, student: Tensor, teacher: Tensor):
    student = student.clone().requires_grad_()
    value = criterion(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def build(width_s: int, width_t: int, **options) -> DenseStructureLoss:
    torch.manual_seed(0)
    return DenseStructureLoss(width_s, width_t, **options)


every_form = pytest.mark.parametrize(
    "options",
    [{}, {"diagonal": "squared"}, CLOSED, {**CLOSED, "split": True}],
    ids=["information", "squared", "closed", "split"],
)


@pytest.mark.parametrize("widths", [(3, 5), (5, 3), (3, 9)])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_one_position_a_sample_is_the_form_of_embeddings(widths, floor: float) -> None:
    student, teacher = randn(0, 9, widths[0]), randn(1, 9, widths[1])
    dense = build(*widths, diagonal="squared", lambd=0.3, floor=floor)
    linear = nn.Linear(*widths)
    linear.weight = nn.Parameter(dense.convs[0].weight.detach()[:, :, 0, 0])
    sem = CrossCorrelationLoss(linear, center=True, reduction="mean", lambd=0.3, floor=floor)
    want = value_and_gradient(sem, student, teacher)
    for maps in (
        (student, teacher),
        (student[:, :, None, None], teacher[:, :, None, None]),
        (student[:, None], teacher[:, None]),
    ):
        value, gradient = value_and_gradient(dense, *maps)
        torch.testing.assert_close(value, want[0])
        torch.testing.assert_close(gradient.reshape(9, -1), want[1], rtol=1e-4, atol=1e-6)


@every_form
def test_positions_are_samples_whatever_map_they_lie_in(options) -> None:
    """One sample of many positions, and many samples of one, are the same rows."""
    student, teacher = randn(0, 1, 3, 4, 6), randn(1, 1, 4, 4, 6)
    criterion = build(3, 4, **options)
    rows = [value[0].flatten(1).T for value in (student, teacher)]
    torch.testing.assert_close(criterion(student, teacher), criterion(*rows))


@every_form
def test_a_single_position_is_named(options) -> None:
    with pytest.raises(ValueError, match="needs at least 2, got 1"):
        build(3, 4, **options)(randn(0, 1, 3, 1, 1), randn(1, 1, 4, 5, 5))


@settings(max_examples=25, deadline=None)
@given(seed=seeds, scale=st.sampled_from([1e-3, 1.0, 1e3]), shift=st.sampled_from([0.0, 5.0]))
@every_form
def test_the_scale_and_the_level_of_maps_do_not_matter(options, seed, scale, shift) -> None:
    student, teacher = randn(seed, 4, 3, 3, 3).double(), randn(seed + 1, 4, 5, 3, 3).double()
    criterion = build(3, 5, **options).double()
    moved = criterion(student * scale + shift, teacher / scale - 3 * shift)
    torch.testing.assert_close(moved, criterion(student, teacher))


@settings(max_examples=25, deadline=None)
@given(seed=seeds, width=st.integers(1, 6), positions=st.integers(2, 9))
def test_the_information_form_lies_between_its_bounds(seed, width, positions) -> None:
    student, teacher = randn(seed, 2, positions, width), randn(seed + 1, 2, positions, width)
    criterion = build(width, width)
    for value in (
        criterion.terms(student, teacher)["Dense-1"],
        DenseStructureLoss(**CLOSED, split=False)(student, teacher),
    ):
        assert math.log(0.01) - 1e-4 <= float(value.detach()) <= math.log(1.01) + 1e-6


def test_the_information_form_pulls_hardest_on_what_is_nearly_predicted() -> None:
    teacher = randn(0, 256, 2)
    noise = randn(1, 256, 2) * torch.tensor([0.3, 3.0])

    def pulls(diagonal: str) -> Tensor:
        criterion = build(2, 2, diagonal=diagonal, terms=["Dense-1"])
        nn.init.dirac_(criterion.convs[0].weight)
        return value_and_gradient(criterion, teacher + noise, teacher)[1].norm(dim=0) * noise.std(0)

    information, squared = pulls("information"), pulls("squared")
    assert information[0] / information[1] > squared[0] / squared[1]


# --- closed form ----------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seed=seeds, split=st.booleans())
def test_the_closed_form_sees_no_invertible_map_of_the_students_channels(seed, split) -> None:
    student, teacher = randn(seed, 6, 4, 3, 3).double(), randn(seed + 1, 6, 3, 3, 3).double()
    mix = torch.linalg.qr(randn(seed + 2, 4, 4).double())[0] * torch.tensor([1.0, 2, 3, 4])
    mixed = torch.einsum("ij,bjhw->bihw", mix, student)
    criterion = DenseStructureLoss(**CLOSED, ridge=1e-12, split=split)
    torch.testing.assert_close(criterion(mixed, teacher), criterion(student, teacher))


def test_the_closed_form_finds_any_linear_map() -> None:
    student = randn(0, 16, 4, 4, 4)
    teacher = torch.einsum("ij,bjhw->bihw", randn(1, 7, 4), student) + 3
    for split in (True, False):
        value = DenseStructureLoss(**CLOSED, ridge=1e-6, floor=0.0, split=split)(student, teacher)
        assert float(value) == pytest.approx(math.log(0.01), abs=0.05)


def test_halves_do_not_take_overfitting_for_knowledge() -> None:
    """Noise on fewer positions than channels: on its own positions a regression knows it all."""
    student, teacher = randn(0, 12, 32), randn(1, 12, 5)
    flattered = DenseStructureLoss(**CLOSED, split=False)(student, teacher)
    honest = DenseStructureLoss(**CLOSED)(student, teacher)
    assert float(flattered) < -2
    assert float(honest) > math.log(1.01)


def test_few_positions_are_cut_in_halves() -> None:
    assert cut_at(159, 16, None) == 79
    assert cut_at(160, 16, None) is None
    assert cut_at(160, 16, True) == 80
    assert cut_at(3, 16, False) is None


def test_the_closed_form_has_nothing_to_train_or_save() -> None:
    criterion = DenseStructureLoss(**CLOSED)
    assert not list(criterion.parameters())
    assert not criterion.state_dict()
    student, teacher = randn(0, 8, 3, 4, 4), randn(1, 8, 6, 4, 4)
    rows = student.clone()
    for _ in range(60):
        value, gradient = value_and_gradient(criterion, rows, teacher)
        rows = rows - 20 * gradient
    assert value < criterion(student, teacher) - 0.5


# --- bad input ------------------------------------------------------------------------------------


@every_form
def test_constant_maps_and_dead_channels_say_nothing_and_stay_finite(options) -> None:
    criterion = build(3, 4, **options)
    student, teacher = randn(0, 4, 3, 3, 3), randn(1, 4, 4, 3, 3)
    nothing = 1.0 if options.get("diagonal") == "squared" else math.log(1.01)
    for constant in (torch.zeros(3), torch.tensor([0.1, 300.0, -7.0])):
        flat = constant.view(3, 1, 1).expand(4, 3, 3, 3)
        value, gradient = value_and_gradient(criterion, flat, teacher)
        assert float(value) == pytest.approx(nothing, abs=1e-5)
        assert gradient.isfinite().all()
    value, _ = value_and_gradient(criterion, student, torch.ones_like(teacher))
    assert float(value) == pytest.approx(nothing, abs=1e-5)
    student[:, 1], teacher[:, 2] = 0, 0
    value, gradient = value_and_gradient(criterion, student, teacher)
    assert value.isfinite()
    assert gradient.isfinite().all()


@every_form
@pytest.mark.parametrize("side", [0, 1])
def test_one_nan_is_enough(options, side: int) -> None:
    maps = [randn(0, 4, 3, 3, 3), randn(1, 4, 4, 3, 3)]
    maps[side][2, 1, 0, 1] = math.nan
    assert build(3, 4, **options)(*maps).isnan()


@every_form
def test_fewer_positions_than_channels_are_taken(options) -> None:
    value, gradient = value_and_gradient(
        build(24, 40, **options), randn(0, 3, 24, 1, 2), randn(1, 3, 40, 1, 2)
    )
    assert value.isfinite()
    assert gradient.isfinite().all()


@every_form
def test_sizes_that_do_not_divide_and_grids_of_tokens(options) -> None:
    criterion = build(3, 4, **options)
    student = randn(0, 2, 3, 7, 5)
    value = criterion(student, randn(1, 2, 4, 3, 8))
    assert value.isfinite()
    patches = randn(1, 2, 16, 4)  # a ViT's, on their grid
    laid_out = patches.transpose(1, 2).reshape(2, 4, 4, 4)
    torch.testing.assert_close(criterion(student, patches), criterion(student, laid_out))


@pytest.mark.parametrize("gap", [1e-5, 1e-3])
def test_the_floor_bounds_the_gradient_of_a_nearly_dead_channel(gap: float) -> None:
    """What a batch norm behind it would have to bear: the gradient goes as one over sigma."""
    student, teacher = randn(0, 64, 4), randn(1, 64, 4)
    student[:, 2] *= gap

    def steepest(criterion: nn.Module) -> float:
        return float(value_and_gradient(criterion, student, teacher)[1][:, 2].abs().max())

    def dense(floor: float) -> DenseStructureLoss:
        criterion = build(4, 4, diagonal="squared", floor=floor)
        nn.init.dirac_(criterion.convs[0].weight)
        return criterion

    for make in (dense, lambda floor: CrossCorrelationLoss(center=True, floor=floor)):
        others = value_and_gradient(make(0.0), student, teacher)[1][:, [0, 1, 3]].abs().max()
        assert steepest(make(0.0)) > 0.05 / gap * float(others)
        # 1 / sqrt(floor) is ten times what a column of mean variance is multiplied by.
        assert steepest(make(0.01)) < 20 * float(others)


@pytest.mark.parametrize("level", [0.0, 100.0])
@pytest.mark.parametrize("options", [{}, {"diagonal": "squared"}, {**CLOSED, "split": False}])
def test_float32_keeps_its_digits_beside_the_optimum(options, level: float) -> None:
    teacher = randn(0, 32, 6, 8, 8) * torch.logspace(-1, 1, 6).view(6, 1, 1) + level
    student = teacher + 0.01 * randn(1, 32, 6, 8, 8)
    criterion = build(6, 6, **options)
    for conv in criterion.convs:
        nn.init.dirac_(conv.weight)
    value, gradient = value_and_gradient(criterion, student, teacher)
    exact, wanted = value_and_gradient(criterion.double(), student.double(), teacher.double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        gradient.double(), wanted, rtol=1e-2, atol=2e-3 * float(wanted.abs().max())
    )


@every_form
@pytest.mark.parametrize("widths", [(2, 3), (3, 2), (2, 4)])
def test_the_gradient_is_differentiable_itself(options, widths) -> None:
    student = randn(0, 3, widths[0], 2, 2).double().requires_grad_()
    teacher = randn(1, 3, widths[1], 2, 2).double()
    criterion = build(*widths, **options).double()
    assert torch.autograd.gradgradcheck(lambda value: criterion(value, teacher), student)


def test_channels_last_changes_nothing() -> None:
    student, teacher = randn(0, 4, 3, 5, 5), randn(1, 4, 6, 5, 5)
    last = [value.to(memory_format=torch.channels_last) for value in (student, teacher)]
    for widths in ((3, 6), (6, 3)):
        pair = (student, teacher) if widths == (3, 6) else (teacher, student)
        moved = last if widths == (3, 6) else last[::-1]
        torch.testing.assert_close(build(*widths)(*moved), build(*widths)(*pair))


@every_form
def test_nothing_larger_than_the_maps_and_the_channels_is_built(options) -> None:
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else (out,):
                if isinstance(value, Tensor):
                    self.numel = max(self.numel, value.numel())
            return out

    student, teacher = randn(0, 8, 16, 20, 20).requires_grad_(), randn(1, 8, 16, 20, 20)
    criterion = build(16, 16, **options)
    with Largest() as largest:
        criterion(student, teacher).backward()
    assert largest.numel <= student.numel() + teacher.numel()  # one buffer for both


@every_form
@pytest.mark.parametrize("widths", [(6, 9), (9, 6)])
def test_the_graph_keeps_the_columns_and_no_wide_copy_of_the_maps(options, widths) -> None:
    student = randn(0, 4, widths[0], 24, 24).bfloat16().requires_grad_()
    teacher = randn(1, 4, widths[1], 24, 24).bfloat16()
    criterion, kept = build(*widths, **options), {}

    def note(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        value = criterion(student, teacher)
    on_map = not options.get("adapter") and widths[0] > widths[1]
    columns = 2 * widths[1] if on_map else sum(widths)
    if on_map:
        columns += widths[0]  # the convolution's own input
    assert sum(kept.values()) < 1.1 * 4 * columns * student[:, 0].numel()
    value.backward()
    assert student.grad.isfinite().all()


@every_form
def test_a_map_that_is_overwritten_after_the_loss_changes_no_gradient(options) -> None:
    leaf, teacher = randn(0, 3, 3, 4, 4).requires_grad_(), randn(1, 3, 4, 4, 4)
    criterion = build(3, 4, **options)
    (wanted,) = torch.autograd.grad(criterion(leaf, teacher), leaf)
    student = 1.0 * leaf
    value = criterion(student, teacher)
    student.relu_()
    (found,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@every_form
def test_function_transforms_give_the_same_gradient(options) -> None:
    student, teacher = randn(0, 3, 3, 4, 4).requires_grad_(), randn(1, 3, 4, 4, 4)
    criterion = build(3, 4, **options)
    (wanted,) = torch.autograd.grad(criterion(student, teacher), student)
    found = torch.func.grad(lambda value: criterion(value, teacher))(student.detach())
    torch.testing.assert_close(found, wanted)


def test_stages_are_summed_and_layer_picks_them() -> None:
    maps_s = (randn(0, 4, 3, 6, 6), randn(1, 4, 5, 3, 3), randn(2, 4, 6, 2, 2))
    maps_t = (randn(3, 4, 4, 6, 6), randn(4, 4, 4, 3, 3), randn(5, 4, 8, 1, 1))
    feats = Features(intermediate=maps_s), Features(intermediate=maps_t)
    every = DenseStructureLoss.from_features(*feats)
    assert len(every.convs) == 3
    singles = 0.0
    for stage in range(3):
        one = DenseStructureLoss.from_features(*feats, layer=stage)
        one.load_state_dict({"convs.0.weight": every.convs[stage].weight})
        singles = singles + one(*feats)
    torch.testing.assert_close(every(*feats), singles)
    assert len(DenseStructureLoss.from_features(*feats, layer=[0, -1]).convs) == 2


def test_terms_switch_apart() -> None:
    pair = randn(0, 6, 3, 2, 2), randn(1, 6, 4, 2, 2)
    both = build(3, 4).terms(*pair)
    assert list(both) == ["Dense-1", "Dense-2"]
    for name, value in both.items():
        alone = build(3, 4, terms=[name]).terms(*pair)
        assert list(alone) == [name]
        torch.testing.assert_close(alone[name], value)
    assert list(DenseStructureLoss(**CLOSED).terms(*pair)) == ["Dense-1"]
    assert build(3, 4, lambd=0).terms(*pair)["Dense-2"].item() == 0


PAIR = randn(0, 4, 3, 2, 2), randn(1, 4, 4, 2, 2)
EMBEDDED = tuple(Features(embedding=value.mean((2, 3)), intermediate=value) for value in PAIR)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: DenseStructureLoss(), ValueError, "are needed for adapter='conv'; build"),
        (lambda: DenseStructureLoss([3, 4], [5]), ValueError, "as many stages.* got 2 and 1"),
        (lambda: DenseStructureLoss(3, 0), ValueError, "teacher_channels must be at least 1"),
        (lambda: DenseStructureLoss(3, 4, adapter="mlp"), ValueError, "adapter must be one of con"),
        (lambda: DenseStructureLoss(3, 4, diagonal="log"), ValueError, "diagonal must be one of i"),
        (lambda: DenseStructureLoss(3, 4, floor=-1), ValueError, "floor must be finite >= 0"),
        (lambda: DenseStructureLoss(3, 4, lambd=-1), ValueError, "lambd must be finite >= 0"),
        (lambda: DenseStructureLoss(**CLOSED, ridge=0), ValueError, "ridge must be finite > 0"),
        (lambda: DenseStructureLoss(**CLOSED, split="half"), ValueError, "split must be True, Fal"),
        (
            lambda: DenseStructureLoss(**CLOSED, diagonal="squared"),
            ValueError,
            "goes with adapter='conv'",
        ),
        (lambda: DenseStructureLoss(**CLOSED, terms=["Dense-2"]), ValueError, "got 'Dense-2'"),
        (lambda: build(5, 4)(*PAIR), ValueError, "student's map of stage 0 has 3 channels, expe"),
        (lambda: build(3, 5)(*PAIR), ValueError, "teacher's map of stage 0 has 4 channels, expe"),
        (
            lambda: build(3, 4)([PAIR[0], PAIR[0]], [PAIR[1]]),
            ValueError,
            r"in order, got 2 and 1 map\(s\); capture as many",
        ),
        (
            lambda: build(3, 4)([PAIR[0]] * 2, [PAIR[1]] * 2),
            ValueError,
            r"was built for 1 stage\(s\), got 2; build it with",
        ),
        (
            lambda: build([3, 3], [4, 4], layer=[0, 1])([PAIR[0]] * 2, [PAIR[1]]),
            ValueError,
            "layer=1, but teacher.intermediate holds 1",
        ),
        (
            lambda: DSLoss.from_features(*EMBEDDED, diagonal="squared"),
            ValueError,
            "diagonal belong to the dense part.*aligned=True",
        ),
        (
            lambda: DSLoss.from_features(*EMBEDDED, terms=["SEM-1", "Dense-1"]),
            ValueError,
            "Dense-1 belong to the dense part",
        ),
        (
            lambda: DSLoss.from_features(*EMBEDDED, aligned=True, variant="printed"),
            ValueError,
            "'printed' has no dense terms",
        ),
        (
            lambda: DSLoss.from_features(*EMBEDDED, aligned=True, terms=["SEM-1"]),
            ValueError,
            "names none of Dense-1, Dense-2",
        ),
        (
            lambda: DSLoss.from_features(*EMBEDDED, adapter="closed_form"),
            ValueError,
            "adapter belong to the dense part",
        ),
        (
            lambda: DSLoss.from_features(*EMBEDDED, aligned=True, sigma=1.0),
            ValueError,
            "sigma belong to the UniformityCalibrationLoss, which aligned=True leaves out",
        ),
        (lambda: DSLoss.from_features(*EMBEDDED, aligned="yes"), TypeError, "aligned must be True"),
        (
            lambda: DSLoss.from_features(*EMBEDDED, aligned=True, gamma=(1, 2)),
            ValueError,
            "a number or a triple",
        ),
        (
            lambda: DSLoss(dense=CrossCorrelationLoss(), gamma=1),
            TypeError,
            "dense must be a DenseStructureLoss or None, got CrossCorrelationLoss",
        ),
    ],
)
def test_bad_input_is_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


# --- DSLoss(aligned=True) -------------------------------------------------------------------------


def test_aligned_pairs_are_compared_densely_and_alone() -> None:
    criterion = DSLoss.from_features(*EMBEDDED, aligned=True)
    assert criterion.sem is None
    assert criterion.dcm is None
    assert criterion.reads == ("intermediate",)
    torch.manual_seed(0)
    dense = DenseStructureLoss.from_features(*EMBEDDED)
    criterion.dense.load_state_dict(dense.state_dict())
    want = {name: 20 * value for name, value in dense.terms(*EMBEDDED).items()}
    found = criterion.terms(*EMBEDDED)
    assert list(found) == list(want)
    for name, value in want.items():
        torch.testing.assert_close(found[name], value)


def test_sem_and_dcm_stand_beside_it_if_asked() -> None:
    names = ["SEM-1", "SEM-2", "DCM-1", "DCM-2", "Dense-1", "Dense-2"]
    criterion = DSLoss.from_features(
        *EMBEDDED, aligned=True, terms=names, gamma=(1, 2, 3), lambd=0.5, floor=0.1, layer=[0]
    )
    assert list(criterion.terms(*EMBEDDED)) == names
    assert criterion.gamma == (1, 2, 3)
    assert (criterion.dense.lambd, criterion.dense.floor, criterion.dense.layer) == (0.5, 0.1, (0,))
    assert (criterion.sem.lambd, criterion.sem.floor, criterion.dcm.layer) == (5e-3, 0.0, -1)


def test_aligned_takes_the_closed_form_without_parameters() -> None:
    criterion = DSLoss.from_features(*EMBEDDED, aligned=True, adapter="closed_form")
    assert not list(criterion.parameters())
    assert list(criterion.terms(*EMBEDDED)) == ["Dense-1"]


def test_pairs_that_are_not_aligned_stay_as_they_were() -> None:
    torch.manual_seed(0)
    said = DSLoss.from_features(*EMBEDDED, aligned=False)
    torch.manual_seed(0)
    unsaid = DSLoss.from_features(*EMBEDDED)
    assert said.dense is None
    assert list(DSLoss.from_features(*EMBEDDED, terms="SEM-1").terms(*EMBEDDED)) == ["SEM-1"]
    assert said.gamma == (5.0, 0.02)
    torch.testing.assert_close(said(*EMBEDDED), unsaid(*EMBEDDED))
