"""What dense dimensional structure promises beyond the shared contract."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from structkd import CrossCorrelationLoss, DenseStructureLoss, Features
from structkd.criteria.dense import _cut_at
from tests.cases.case import generator, shaped, value_and_gradient
from tests.largest import Largest
from tests.reference import dense

seeds = st.integers(0, 2**16)
CLOSED = {"adapter": "closed_form"}


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def build(student, teacher, **options) -> DenseStructureLoss:
    """A criterion of these maps' shape, always with the same weights."""
    torch.manual_seed(0)
    pair = (Features(intermediate=value) for value in (student, teacher))
    return shaped(DenseStructureLoss(**options), *pair)


def as_identity(criterion: DenseStructureLoss) -> DenseStructureLoss:
    if criterion.convs is not None:
        nn.init.eye_(criterion.convs.weight)
    return criterion


every_form = pytest.mark.parametrize(
    "options",
    [{}, {"diagonal": "squared"}, CLOSED, {**CLOSED, "split": True}],
    ids=["information", "squared", "closed", "split"],
)


@pytest.mark.parametrize("widths", [(3, 5), (5, 3), (3, 9)])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_one_position_a_sample_is_the_form_of_embeddings(widths, floor: float) -> None:
    student, teacher = randn(0, 9, widths[0]), randn(1, 9, widths[1])
    dense = build(student, teacher, diagonal="squared", lambd=0.3, floor=floor)
    linear = nn.Linear(*widths)
    linear.weight = dense.convs.weight
    sem = CrossCorrelationLoss(
        student_projector=linear, center=True, reduction="mean", lambd=0.3, floor=floor
    )
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
    criterion = build(student, teacher, **options)
    rows = [value[0].flatten(1).T for value in (student, teacher)]
    torch.testing.assert_close(criterion(student, teacher), criterion(*rows))


@every_form
def test_a_single_position_is_named(options) -> None:
    with pytest.raises(ValueError, match="needs at least 2, got 1"):
        DenseStructureLoss(**options)(randn(0, 1, 3, 1, 1), randn(1, 1, 4, 5, 5))


@settings(max_examples=25, deadline=None)
@given(seed=seeds, scale=st.sampled_from([1e-3, 1.0, 1e3]), shift=st.sampled_from([0.0, 5.0]))
@every_form
def test_the_scale_and_the_level_of_maps_do_not_matter(options, seed, scale, shift) -> None:
    student, teacher = randn(seed, 4, 3, 3, 3).double(), randn(seed + 1, 4, 5, 3, 3).double()
    criterion = build(student, teacher, **options)
    moved = criterion(student * scale + shift, teacher / scale - 3 * shift)
    torch.testing.assert_close(moved, criterion(student, teacher))


@settings(max_examples=25, deadline=None)
@given(seed=seeds, width=st.integers(1, 6), positions=st.integers(2, 9))
def test_the_information_form_lies_between_its_bounds(seed, width, positions) -> None:
    student, teacher = randn(seed, 2, positions, width), randn(seed + 1, 2, positions, width)
    criterion = build(student, teacher)
    for value in (
        criterion.terms(student, teacher)["Dense-1"],
        DenseStructureLoss(**CLOSED, split=False)(student, teacher),
    ):
        assert math.log(0.01) - 1e-4 <= float(value.detach()) <= math.log(1.01) + 1e-6


def test_the_information_form_pulls_hardest_on_what_is_nearly_predicted() -> None:
    teacher = randn(0, 256, 2)
    noise = randn(1, 256, 2) * torch.tensor([0.3, 3.0])

    def pulls(diagonal: str) -> Tensor:
        criterion = build(teacher, teacher, diagonal=diagonal, terms=["Dense-1"])
        as_identity(criterion)
        return value_and_gradient(criterion, teacher + noise, teacher)[1].norm(dim=0) * noise.std(0)

    information, squared = pulls("information"), pulls("squared")
    assert information[0] / information[1] > squared[0] / squared[1]


@settings(max_examples=25, deadline=None)
@given(seed=seeds)
@pytest.mark.parametrize("options", [{}, {"diagonal": "squared"}, {**CLOSED, "split": False}])
def test_positions_have_no_order(options, seed) -> None:
    student, teacher = randn(seed, 4, 6, 3).double(), randn(seed + 1, 4, 6, 5).double()
    order = torch.randperm(24, generator=generator(seed))
    moved = [value.flatten(0, 1)[order].view(value.shape) for value in (student, teacher)]
    criterion = build(student, teacher, **options)
    torch.testing.assert_close(criterion(*moved), criterion(student, teacher))


# --- closed form ----------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seed=seeds, split=st.booleans())
def test_the_closed_form_sees_no_invertible_map_of_the_students_channels(seed, split) -> None:
    student, teacher = randn(seed, 6, 4, 3, 3).double(), randn(seed + 1, 6, 3, 3, 3).double()
    mix = torch.linalg.qr(randn(seed + 2, 4, 4).double())[0] * torch.tensor([1.0, 2, 3, 4])
    mixed = torch.einsum("ij,bjhw->bihw", mix, student)
    criterion = DenseStructureLoss(**CLOSED, ridge=1e-12, split=split)
    torch.testing.assert_close(criterion(mixed, teacher), criterion(student, teacher))


@settings(max_examples=20, deadline=None)
@given(seed=seeds, split=st.booleans())
def test_the_closed_form_takes_the_teachers_channels_in_any_order(seed, split) -> None:
    student, teacher = randn(seed, 6, 4, 3, 3).double(), randn(seed + 1, 6, 5, 3, 3).double()
    criterion = DenseStructureLoss(**CLOSED, split=split)
    order = torch.randperm(5, generator=generator(seed))
    torch.testing.assert_close(criterion(student, teacher[:, order]), criterion(student, teacher))
    found, moved = criterion.shares(student, teacher), criterion.shares(student, teacher[:, order])
    torch.testing.assert_close(moved[0], found[0][order])


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
    assert _cut_at(159, 16, None) == 79
    assert _cut_at(160, 16, None) is None
    assert _cut_at(160, 16, True) == 80
    assert _cut_at(3, 16, False) is None


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
    student, teacher = randn(0, 4, 3, 3, 3), randn(1, 4, 4, 3, 3)
    criterion = build(student, teacher, **options)
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


@pytest.mark.parametrize("blank", [slice(0, 4), slice(4, 8)], ids=["first", "second"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_half_that_shows_the_student_nothing_predicts_nothing(blank: slice, dtype) -> None:
    """Images without data give one constant map; what is left of its variance is rounding."""
    student, teacher = randn(0, 8, 3, 4, 4), randn(1, 8, 5, 4, 4)
    teacher += student[:, :1]
    student[blank] = torch.tensor([0.0, 3.0, -2.0]).view(3, 1, 1)
    rows_s, rows_t = (dense.positions(value.double()) for value in (student, teacher))
    wanted = dense.closed_form(rows_s, rows_t, ridge=1e-3, floor=1e-2, split=True)
    criterion = DenseStructureLoss(**CLOSED, split=True)
    value, gradient = value_and_gradient(criterion, student.to(dtype), teacher.to(dtype))
    torch.testing.assert_close(value.double(), wanted, rtol=1e-4, atol=1e-4)
    assert gradient.abs().max() < 1


@every_form
@pytest.mark.parametrize("side", [0, 1])
def test_one_nan_is_enough(options, side: int) -> None:
    maps = [randn(0, 4, 3, 3, 3), randn(1, 4, 4, 3, 3)]
    maps[side][2, 1, 0, 1] = math.nan
    assert DenseStructureLoss(**options)(*maps).isnan()


@every_form
def test_fewer_positions_than_channels_are_taken(options) -> None:
    student, teacher = randn(0, 3, 24, 1, 2), randn(1, 3, 40, 1, 2)
    value, gradient = value_and_gradient(DenseStructureLoss(**options), student, teacher)
    assert value.isfinite()
    assert gradient.isfinite().all()


@every_form
def test_sizes_that_do_not_divide_and_grids_of_tokens(options) -> None:
    criterion, student = DenseStructureLoss(**options), randn(0, 2, 3, 7, 5)
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
        return as_identity(build(student, teacher, diagonal="squared", floor=floor))

    def sem(floor: float) -> CrossCorrelationLoss:
        return CrossCorrelationLoss(projector="none", center=True, floor=floor)

    for make in (dense, sem):
        others = value_and_gradient(make(0.0), student, teacher)[1][:, [0, 1, 3]].abs().max()
        assert steepest(make(0.0)) > 0.05 / gap * float(others)
        # 1 / sqrt(floor) is ten times what a column of mean variance is multiplied by.
        assert steepest(make(0.01)) < 20 * float(others)


@pytest.mark.parametrize("level", [0.0, 100.0])
@pytest.mark.parametrize("options", [{}, {"diagonal": "squared"}, {**CLOSED, "split": False}])
def test_float32_keeps_its_digits_beside_the_optimum(options, level: float) -> None:
    teacher = randn(0, 32, 6, 8, 8) * torch.logspace(-1, 1, 6).view(6, 1, 1) + level
    student = teacher + 0.01 * randn(1, 32, 6, 8, 8)
    criterion = as_identity(build(student, teacher, **options))
    value, gradient = value_and_gradient(criterion, student, teacher)
    exact, wanted = value_and_gradient(criterion.double(), student.double(), teacher.double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        gradient.double(), wanted, rtol=1e-2, atol=2e-3 * float(wanted.abs().max())
    )


def test_a_compiled_criterion_keeps_its_digits_too() -> None:
    """It shifts the columns itself, and any shift would do but for the digits."""
    teacher = randn(0, 8, 3, 4, 4) + 1000
    student = teacher + 0.01 * randn(1, 8, 3, 4, 4)
    criterion = as_identity(build(student, teacher))
    exact = criterion.double()(student.double(), teacher.double())
    torch.compiler.reset()
    compiled = torch.compile(criterion.float(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(student, teacher).double(), exact, rtol=1e-3, atol=1e-3)


@every_form
@pytest.mark.parametrize("widths", [(2, 3), (3, 2), (2, 4)])
def test_the_gradient_is_differentiable_itself(options, widths) -> None:
    student = randn(0, 3, widths[0], 2, 2).double().requires_grad_()
    teacher = randn(1, 3, widths[1], 2, 2).double()
    criterion = build(student, teacher, **options)
    assert torch.autograd.gradgradcheck(lambda value: criterion(value, teacher), student)


@every_form
@pytest.mark.parametrize("widths", [(3, 6), (6, 3)])
def test_channels_last_changes_nothing(options, widths) -> None:
    pair = [randn(width, 4, width, 5, 5) for width in widths]
    last = [value.to(memory_format=torch.channels_last) for value in pair]
    criterion = build(*pair, **options)
    torch.testing.assert_close(criterion(*last), criterion(*pair))


@every_form
def test_nothing_larger_than_the_maps_and_the_channels_is_built(options) -> None:
    student, teacher = randn(0, 8, 16, 20, 20).requires_grad_(), randn(1, 8, 16, 20, 20)
    criterion = build(student, teacher, **options)
    with Largest() as largest:
        criterion(student, teacher).backward()
    assert largest.numel <= student.numel() + teacher.numel()  # one buffer for both


@every_form
@pytest.mark.parametrize("widths", [(6, 9), (9, 6)])
def test_the_graph_keeps_the_columns_and_no_wide_copy_of_the_maps(options, widths) -> None:
    student = randn(0, 4, widths[0], 24, 24).bfloat16().requires_grad_()
    teacher = randn(1, 4, widths[1], 24, 24).bfloat16()
    criterion, kept = build(student, teacher, **options), {}

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
    criterion = build(leaf, teacher, **options)
    (wanted,) = torch.autograd.grad(criterion(leaf, teacher), leaf)
    student = 1.0 * leaf
    value = criterion(student, teacher)
    student.relu_()
    (found,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@every_form
def test_function_transforms_give_the_same_gradient(options) -> None:
    student, teacher = randn(0, 3, 3, 4, 4).requires_grad_(), randn(1, 3, 4, 4, 4)
    criterion = build(student, teacher, **options)
    (wanted,) = torch.autograd.grad(criterion(student, teacher), student)
    found = torch.func.grad(lambda value: criterion(value, teacher))(student.detach())
    torch.testing.assert_close(found, wanted)


def test_stages_are_summed_and_layer_picks_them() -> None:
    maps_s = (randn(0, 4, 3, 6, 6), randn(1, 4, 5, 3, 3), randn(2, 4, 6, 2, 2))
    maps_t = (randn(3, 4, 4, 6, 6), randn(4, 4, 4, 3, 3), randn(5, 4, 8, 1, 1))
    every, singles = build(maps_s, maps_t), []
    assert every.convs.weight.shape == (4 + 4 + 8, 6)
    for stage, rows in enumerate(every.convs.weight.split([4, 4, 8])):
        one = DenseStructureLoss(layer=stage)
        one.load_state_dict({"convs.weight": rows[:, : maps_s[stage].shape[1]]})
        singles.append(one(maps_s, maps_t))
    torch.testing.assert_close(every(maps_s, maps_t), sum(singles))
    two = DenseStructureLoss(layer=[0, -1])
    two.load_state_dict({"convs.weight": every.convs.weight[[0, 1, 2, 3, *range(8, 16)]]})
    torch.testing.assert_close(two(maps_s, maps_t), singles[0] + singles[2])


def test_terms_switch_apart() -> None:
    pair = randn(0, 6, 3, 2, 2), randn(1, 6, 4, 2, 2)
    both = build(*pair).terms(*pair)
    assert list(both) == ["Dense-1", "Dense-2"]
    for name, value in both.items():
        alone = build(*pair, terms=[name]).terms(*pair)
        assert list(alone) == [name]
        torch.testing.assert_close(alone[name], value)
    assert list(DenseStructureLoss(**CLOSED).terms(*pair)) == ["Dense-1"]
    assert DenseStructureLoss(lambd=0).terms(*pair)["Dense-2"].item() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "mlp"}, "adapter must be one of con"),
        ({"diagonal": "log"}, "diagonal must be one of i"),
        ({"floor": -1}, "floor must be finite >= 0"),
        ({"lambd": -1}, "lambd must be finite >= 0"),
        ({**CLOSED, "ridge": 0}, "ridge must be finite > 0"),
        ({**CLOSED, "split": "half"}, "split must be True, Fal"),
        ({**CLOSED, "diagonal": "squared"}, "goes with adapter='conv'"),
        ({**CLOSED, "terms": ["Dense-2"]}, "got 'Dense-2'"),
    ],
)
def test_a_bad_option_is_named(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        DenseStructureLoss(**options)


def test_maps_that_do_not_fit_are_named() -> None:
    three, four, five = (randn(width, 4, width, 2, 2) for width in (3, 4, 5))
    criterion = build([three, five], [four, four])
    for maps in (
        ([four, three], [four, four]),
        ([three, five], [four, five]),
        ([three], [four]),
        ([five, three], [four, four]),  # as many weights, of other stages
    ):
        with pytest.raises(ValueError, match=r"took\b.*\bshape .*first call: make a new"):
            criterion(*maps)
    with pytest.raises(ValueError, match=r"in order, got 2 and 1 map\(s\); capture as many"):
        criterion([three, five], [four])
    with pytest.raises(ValueError, match=r"layer=1, but teacher.intermediate holds 1"):
        DenseStructureLoss(layer=[0, 1])([three, three], [four])
