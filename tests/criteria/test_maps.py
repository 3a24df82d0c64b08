"""What FitNets, AT, NST and VID do beyond the shared contract."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structkd import Criterion, Features
from structkd.criteria.maps import AttentionTransferLoss, NeuronSelectivityLoss
from structkd.criteria.regression import FitNetLoss, VariationalInformationLoss
from tests.memory import Memory


def _maps(*shapes: tuple[int, ...], seed: int = 0) -> Features:
    rng = torch.Generator().manual_seed(seed)
    return Features(intermediate=[torch.randn(*shape, generator=rng) for shape in shapes])


@pytest.mark.parametrize("build", [FitNetLoss, VariationalInformationLoss])
def test_trainable_parts_learn_and_are_saved(build: type[Criterion]) -> None:
    student, teacher = _maps((8, 3, 4, 4)), _maps((8, 5, 2, 2), seed=1)
    criterion = build()
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.1)  # before the first call
    criterion(student, teacher)
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    assert set(before) == {name for name, _ in criterion.named_parameters()}
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
        criterion = VariationalInformationLoss(init_variance=wanted)
        with pytest.raises(ValueError, match="before the first call"):
            _ = criterion.variance
        criterion(_maps((2, 2, 2, 2)), _maps((2, 3, 2, 2)))
        torch.testing.assert_close(criterion.variance, torch.full((3,), wanted))
    with pytest.raises(ValueError, match="init_variance must be finite > 1e-05, got 0"):
        VariationalInformationLoss(init_variance=0)


def test_vid_learns_the_residual_of_each_channel() -> None:
    """At the optimum the variance of a channel is its mean squared residual."""
    student, teacher = _maps((64, 2, 2, 2)), _maps((64, 3, 2, 2), seed=1)
    spread = torch.tensor([0.5, 1.0, 2.0])
    teacher = Features(intermediate=teacher.intermediate[0] * spread.view(3, 1, 1))
    criterion = VariationalInformationLoss()
    criterion(student, teacher)
    for layer in (0, 2, 4):
        torch.nn.init.zeros_(criterion.gaussian.mean[layer].weight)
    optimizer = torch.optim.Adam([criterion.gaussian.rho], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        criterion(student, teacher).backward()
        optimizer.step()
    residual = teacher.intermediate[0].square().mean(dim=(0, 2, 3))
    torch.testing.assert_close(criterion.variance.detach(), residual, rtol=0.02, atol=0)


@pytest.mark.parametrize("build", [FitNetLoss, VariationalInformationLoss])
def test_regression_names_what_does_not_fit(build) -> None:
    criterion = build()
    criterion(_maps((2, 3, 2, 2)), _maps((2, 5, 2, 2)))
    with pytest.raises(ValueError, match=r"took its shape from 3.* make a new one"):
        criterion(_maps((2, 4, 2, 2)), _maps((2, 5, 2, 2)))
    with pytest.raises(ValueError, match=r"6 .*channels"):
        criterion(_maps((2, 3, 2, 2)), _maps((2, 6, 2, 2)))
    with pytest.raises(ValueError, match="whose 7 tokens form no square"):
        criterion(_maps((2, 7, 3)), _maps((2, 4, 5)))
    with pytest.raises(ValueError, match=r"layer=2, but student.intermediate holds 1 map"):
        build(layer=2)(_maps((2, 3, 2, 2)), _maps((2, 5, 2, 2)))


def _log_share(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient of FitNets' logarithm with a regressor that changes nothing."""
    criterion = FitNetLoss(form="log", adapter=torch.nn.Identity())
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


def test_fitnets_names_a_bad_form_and_a_single_position() -> None:
    with pytest.raises(ValueError, match="form must be one of squared, log, got 'logarithm'"):
        FitNetLoss(form="logarithm")
    with pytest.raises(ValueError, match=r"at least 2, got 1 .*; use drop_last=True"):
        FitNetLoss(form="log")(_maps((1, 3)), _maps((1, 5)))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        FitNetLoss()(_maps((0, 3)), _maps((0, 5)))


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


KINDS = (lambda: AttentionTransferLoss(p=4), NeuronSelectivityLoss)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    kind=st.sampled_from(KINDS),
    power=st.integers(-10, 15),
    size=st.sampled_from([2, 8]),
)
def test_scale_and_the_order_of_positions_and_channels_do_not_matter(
    seed: int, kind, power: int, size: int
) -> None:
    """The fourth power of the outer scales leaves float32's range."""
    rng = torch.Generator().manual_seed(seed)
    student, teacher = _maps((2, 3, size, size), (2, 4, size, size), seed=seed).intermediate
    value = kind()(student, teacher)
    scaled = (10.0**power * student).requires_grad_()
    again = kind()(scaled, teacher / 3)
    torch.testing.assert_close(again, value, rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(again, scaled)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
    order = torch.randperm(size**2, generator=rng)
    moved = [v.flatten(2)[..., order].unflatten(2, (size, size)) for v in (student, teacher)]
    torch.testing.assert_close(kind()(*moved), value, rtol=1e-4, atol=1e-6)
    mixed = teacher[:, torch.randperm(4, generator=rng)]
    torch.testing.assert_close(kind()(student, mixed), value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("width", "size"), [(64, 4), (4, 24)], ids=["channels", "positions"])
def test_selectivity_of_many_positions_or_channels_takes_the_smaller_product(width, size) -> None:
    """One tensor over all pairs of channels and positions would hold ten times the numbers."""
    student = torch.randn(2, width, size, size, requires_grad=True)
    with Memory() as memory:
        NeuronSelectivityLoss()(student, torch.randn(2, width, size, size)).backward()
    assert memory.largest < 2 * width**2 * size**2 / 3


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


@pytest.mark.peer
def test_vid_equals_torchdistill() -> None:
    """Same definition: its regressor without the mean's conv names, its loss as a mean."""
    peer = pytest.importorskip("torchdistill.losses.mid_level")
    wrapper = pytest.importorskip("torchdistill.models.wrapper")
    student, teacher = torch.randn(4, 3, 5, 5), torch.randn(4, 6, 5, 5)
    regressor = wrapper.Regressor4VID(3, 6, 6, eps=1e-5, init_pred_var=5.0)
    ours = VariationalInformationLoss()
    ours(student, teacher)
    ours.gaussian.mean.load_state_dict(regressor.regressor.state_dict())
    pair = {"student": {"io": "output", "path": "s"}, "teacher": {"io": "output", "path": "t"}}
    theirs = peer.VIDLoss({"pair": pair})
    value = theirs({"s": {"output": regressor(student)}}, {"t": {"output": teacher}})
    torch.testing.assert_close(ours(student, teacher), value)
