"""What FitNets, AT, NST and VID do beyond the shared contract."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from structkd import Criterion, Features
from structkd.criteria.maps import (
    AttentionTransferLoss,
    NeuronSelectivityLoss,
    _by_channels,
    _by_positions,
)
from structkd.criteria.regression import FitNetLoss, VariationalInformationLoss


def _maps(*shapes: tuple[int, ...], seed: int = 0) -> Features:
    rng = torch.Generator().manual_seed(seed)
    return Features(intermediate=[torch.randn(*shape, generator=rng) for shape in shapes])


class _Largest(TorchDispatchMode):
    """Records the most numbers that any operation put out."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.largest = max(self.largest, leaf.numel())
        return out


@pytest.mark.parametrize("build", [FitNetLoss, VariationalInformationLoss])
def test_trainable_parts_learn_and_are_saved(build: type[Criterion]) -> None:
    student, teacher = _maps((8, 3, 4, 4)), _maps((8, 5, 2, 2), seed=1)
    criterion = build.from_features(student, teacher)
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    assert set(before) == {name for name, _ in criterion.named_parameters()}
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = criterion(student, teacher)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    for name, value in criterion.state_dict().items():
        assert not torch.equal(value, before[name]), name
    assert losses[-1] < losses[0]


def test_vid_starts_at_its_variance() -> None:
    for wanted in (5.0, 0.01, 300.0):
        criterion = VariationalInformationLoss(2, 3, init_variance=wanted)
        torch.testing.assert_close(criterion.variance, torch.full((3,), wanted))
    with pytest.raises(ValueError, match="init_variance must be finite > 1e-05, got 0"):
        VariationalInformationLoss(2, 3, init_variance=0)


def test_vid_learns_the_residual_of_each_channel() -> None:
    """At the optimum the variance of a channel is its mean squared residual."""
    student, teacher = _maps((64, 2, 2, 2)), _maps((64, 3, 2, 2), seed=1)
    spread = torch.tensor([0.5, 1.0, 2.0])
    teacher = Features(intermediate=teacher.intermediate[0] * spread.view(3, 1, 1))
    criterion = VariationalInformationLoss(2, 3)
    for layer in (0, 2, 4):
        torch.nn.init.zeros_(criterion.mean[layer].weight)
    optimizer = torch.optim.Adam([criterion.rho], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        criterion(student, teacher).backward()
        optimizer.step()
    residual = teacher.intermediate[0].square().mean(dim=(0, 2, 3))
    torch.testing.assert_close(criterion.variance.detach(), residual, rtol=0.02, atol=0)


def test_from_features_follows_the_layer() -> None:
    student, teacher = _maps((2, 3, 4, 4), (2, 6, 2, 2)), _maps((2, 4, 4, 4), (2, 8, 2, 2))
    criterion = FitNetLoss.from_features(student, teacher, layer=0, kernel_size=3)
    assert criterion.regressor.conv.weight.shape == (4, 3, 3, 3)
    assert criterion(student, teacher).isfinite()


@pytest.mark.parametrize("build", [FitNetLoss, VariationalInformationLoss])
def test_regression_names_what_does_not_fit(build) -> None:
    criterion = build(3, 5)
    with pytest.raises(ValueError, match=r"student.intermediate\[-1\] has 4 channels, expected"):
        criterion(_maps((2, 4, 2, 2)), _maps((2, 5, 2, 2)))
    with pytest.raises(ValueError, match=r"teacher_channels=5; build .*from_features"):
        criterion(_maps((2, 3, 2, 2)), _maps((2, 6, 2, 2)))
    with pytest.raises(ValueError, match="whose 7 tokens form no square"):
        criterion(_maps((2, 7, 3)), _maps((2, 4, 5)))
    with pytest.raises(ValueError, match=r"layer=2, but student.intermediate holds 1 map"):
        build(3, 5, layer=2)(_maps((2, 3, 2, 2)), _maps((2, 5, 2, 2)))
    with pytest.raises(ValueError, match="student_channels must be at least 1"):
        build(0, 5)


def _log_share(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient of FitNets' logarithm with a regressor that changes nothing."""
    criterion = FitNetLoss(student.shape[1], teacher.shape[1], form="log").to(student.dtype)
    torch.nn.init.dirac_(criterion.regressor.conv.weight)
    torch.nn.init.zeros_(criterion.regressor.conv.bias)
    student = student.clone().requires_grad_()
    value = criterion(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), power=st.integers(-15, 15), level=st.sampled_from([0.0, 7.0]))
def test_the_logarithm_does_not_see_the_scale_of_the_teacher(seed, power, level) -> None:
    student, teacher = (_maps((3, 4, 3, 3), seed=seed + k).intermediate[0] for k in range(2))
    value, gradient = _log_share(student, teacher)
    moved, scaled = _log_share(10.0**power * (student + level), 10.0**power * (teacher + level))
    torch.testing.assert_close(moved, value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(10.0**power * scaled, gradient, rtol=1e-3, atol=1e-5)
    assert float(value) >= math.log(0.01) - 1e-6


def test_the_logarithm_lies_between_all_and_nothing_known() -> None:
    teacher = _maps((16, 4, 3, 3)).intermediate[0].double()
    mean = teacher.mean(dim=(0, 2, 3), keepdim=True).expand_as(teacher)
    assert float(_log_share(teacher, teacher)[0]) == pytest.approx(math.log(0.01))
    assert float(_log_share(mean, teacher)[0]) == pytest.approx(math.log(1.01))


@pytest.mark.parametrize("level", [0.0, 1e4 / 3])
def test_a_constant_teacher_pulls_nowhere_and_a_dead_channel_has_no_variance(level: float) -> None:
    student, teacher = _maps((8, 3, 5, 5), (8, 3, 5, 5)).intermediate
    constant = torch.full_like(teacher, level)
    value, gradient = _log_share(student, constant)
    assert float(value) == pytest.approx(math.log(1.01), abs=1e-6)
    assert (gradient == 0).all()
    assert _log_share(torch.full_like(student, float("nan")), constant)[0].isnan()
    # One channel of three is dead: the mean of the variances is two thirds of theirs.
    half = teacher.clone()
    half[:, 1] = level
    student = half + 1
    spread = half[:, [0, 2]].var(dim=(0, 2, 3), unbiased=False).sum() / 3
    wanted = torch.log(1 / spread + 0.01)
    torch.testing.assert_close(_log_share(student, half)[0], wanted, rtol=1e-3, atol=1e-3)


def test_the_default_of_fitnets_is_the_mean_square_to_the_bit() -> None:
    student, teacher = _maps((4, 3, 4, 4)), _maps((4, 5, 4, 4), seed=1)
    criterion = FitNetLoss(3, 5)
    mapped = criterion.regressor(student.intermediate[0])
    wanted = torch.nn.functional.mse_loss(mapped, teacher.intermediate[0])
    assert torch.equal(criterion(student, teacher), wanted)


def test_fitnets_names_a_bad_form_and_a_single_position() -> None:
    with pytest.raises(ValueError, match="form must be one of squared, log, got 'logarithm'"):
        FitNetLoss(3, 5, form="logarithm")
    with pytest.raises(ValueError, match=r"at least 2, got 1 .*; use drop_last=True"):
        FitNetLoss(3, 5, form="log")(_maps((1, 3)), _maps((1, 5)))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        FitNetLoss(3, 5)(_maps((0, 3)), _maps((0, 5)))


@pytest.mark.parametrize("criterion", [AttentionTransferLoss(), NeuronSelectivityLoss()])
def test_pairing_names_what_does_not_fit(criterion: Criterion) -> None:
    one, two = _maps((2, 3, 2, 2)), _maps((2, 3, 2, 2), (2, 4, 2, 2))
    with pytest.raises(ValueError, match=r"pairs the maps .* got 1 and 2 map\(s\); capture"):
        criterion(one, two)
    with pytest.raises(ValueError, match="whose 5 tokens form no square"):
        criterion(_maps((2, 5, 3)), _maps((2, 4, 3)))
    for small in (_maps((2, 3)), _maps((2, 3, 1, 1)), _maps((2, 1, 3))):
        with pytest.raises(ValueError, match=r"share one only.*: capture an earlier layer"):
            criterion(small, one)


@pytest.mark.parametrize("kind", [AttentionTransferLoss, NeuronSelectivityLoss])
def test_layer_picks_the_pairs(kind: type[Criterion]) -> None:
    maps_s = _maps((2, 3, 2, 2), (2, 4, 4, 4), (2, 5))
    maps_t = _maps((2, 3, 4, 4), (2, 4, 2, 2), (2, 5), seed=1)
    one = lambda k: kind()(  # noqa: E731
        maps_s.intermediate[k], maps_t.intermediate[k]
    )
    torch.testing.assert_close(kind(layer=1)(maps_s, maps_t), one(1))
    torch.testing.assert_close(kind(layer=[-2, 0])(maps_s, maps_t), one(0) + one(1))
    with pytest.raises(ValueError, match=r"layer=3, but student\.intermediate holds 3"):
        kind(layer=3)(maps_s, maps_t)
    with pytest.raises(TypeError, match="layer must be a whole number, got str"):
        kind(layer="layer2")


@pytest.mark.parametrize("kind", [AttentionTransferLoss, NeuronSelectivityLoss])
def test_tokens_of_a_grid_are_the_map_itself(kind: type[Criterion]) -> None:
    student, teacher = torch.randn(2, 3, 2, 4), torch.randn(2, 5, 2, 2)
    tokens = student.flatten(2).transpose(1, 2)
    flat = teacher.flatten(2).transpose(1, 2)
    torch.testing.assert_close(kind()(student, flat), kind()(student, teacher))
    same = torch.randn(2, 5, 2, 4)
    torch.testing.assert_close(kind()(tokens, same), kind()(student, same))


def test_attention_names_a_bad_power() -> None:
    with pytest.raises(ValueError, match=r"p must be finite >= 1, got 0\.5"):
        AttentionTransferLoss(p=0.5)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_attention_does_not_depend_on_the_scale(scale: float) -> None:
    """The fourth power of either scale leaves float32's range."""
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    scaled = (scale * student).requires_grad_()
    value = AttentionTransferLoss(p=4)(scaled, teacher)
    torch.testing.assert_close(value, AttentionTransferLoss(p=4)(student, teacher))
    value.backward()
    assert scaled.grad.isfinite().all()
    assert scaled.grad.abs().max() > 0


def test_attention_resizes_only_what_differs() -> None:
    """Two pairs count as their sum, and equal sizes are compared cell by cell."""
    coarse, fine = _maps((2, 3, 2, 2)), _maps((2, 5, 4, 4), seed=1)
    criterion = AttentionTransferLoss()
    both = Features(intermediate=[*coarse.intermediate, *fine.intermediate])
    mirrored = Features(intermediate=[*fine.intermediate, *coarse.intermediate])
    torch.testing.assert_close(criterion(both, mirrored), 2 * criterion(coarse, fine))
    # A checkerboard averages to the flat map; only a comparison at full size tells them apart.
    board = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(2, 2).expand(1, 1, 4, 4)
    assert float(criterion(board, torch.ones(1, 1, 4, 4))) > 1e-3
    # Attention, not features, is averaged: signs that cancel in the features must not.
    signs = (2 * board - 1).clone()
    assert float(criterion(signs, torch.ones(1, 1, 2, 2))) < 1e-12


@pytest.mark.parametrize("criterion", [AttentionTransferLoss(), NeuronSelectivityLoss()])
def test_dead_channels_and_maps_have_finite_gradients(criterion: Criterion) -> None:
    student = torch.randn(3, 4, 3, 3)
    student[:, 1] = 0
    student[0] = 0
    student.requires_grad_()
    value = criterion(student, torch.randn(3, 4, 3, 3))
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert (student.grad[0] == 0).all()


def test_selectivity_is_blind_to_order_and_length_of_channels() -> None:
    student, teacher = _maps((2, 6, 3, 3)), _maps((2, 4, 3, 3), seed=1)
    criterion = NeuronSelectivityLoss()
    lengths = torch.tensor([0.5, -2.0, 1.0, 3.0]).view(4, 1, 1)
    mixed = Features(intermediate=teacher.intermediate[0][:, [3, 1, 0, 2]] * lengths)
    value = criterion(student, teacher)
    assert float(value) > 1e-3
    torch.testing.assert_close(criterion(student, mixed), value)


@pytest.mark.parametrize("shape", [(2, 3, 2), (2, 3, 40), (2, 30, 4)])
def test_both_forms_of_selectivity_agree(shape: tuple[int, ...]) -> None:
    batch, width, positions = shape
    unit = lambda w: torch.nn.functional.normalize(torch.randn(batch, w, positions).double(), dim=2)  # noqa: E731
    student, teacher = unit(width), unit(width + 2)
    torch.testing.assert_close(_by_channels(student, teacher), _by_positions(student, teacher))


@pytest.mark.parametrize(
    ("width", "size"), [(64, 4), (4, 24)], ids=["many channels", "many positions"]
)
def test_selectivity_never_builds_all_products(width: int, size: int) -> None:
    batch, positions = 2, size**2
    student = torch.randn(batch, width, size, size, requires_grad=True)
    teacher = torch.randn(batch, width, size, size)
    with _Largest() as mode:
        NeuronSelectivityLoss()(student, teacher).backward()
    smaller = min(width, positions) ** 2
    assert mode.largest <= batch * max(width * positions, smaller)
    assert mode.largest < batch * width**2 * positions / 3


@pytest.mark.peer
def test_vid_equals_torchdistill() -> None:
    """Same definition: its regressor without the mean's conv names, its loss as a mean."""
    peer = pytest.importorskip("torchdistill.losses.mid_level")
    wrapper = pytest.importorskip("torchdistill.models.wrapper")
    student, teacher = torch.randn(4, 3, 5, 5), torch.randn(4, 6, 5, 5)
    regressor = wrapper.Regressor4VID(3, 6, 6, eps=1e-5, init_pred_var=5.0)
    ours = VariationalInformationLoss(3, 6)
    ours.mean.load_state_dict(regressor.regressor.state_dict())
    pair = {"student": {"io": "output", "path": "s"}, "teacher": {"io": "output", "path": "t"}}
    theirs = peer.VIDLoss({"pair": pair})
    value = theirs({"s": {"output": regressor(student)}}, {"t": {"output": teacher}})
    torch.testing.assert_close(ours(student, teacher), value)
