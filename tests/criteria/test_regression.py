"""What FitNets and VID do beyond the shared contract."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structkd import Criterion, Features
from structkd.criteria.regression import FitNetLoss, VariationalInformationLoss
from tests.cases.case import generator, shaped, value_and_gradient

every_kind = pytest.mark.parametrize("kind", [FitNetLoss, VariationalInformationLoss])


def _maps(*shapes: tuple[int, ...], seed: int = 0) -> Features:
    rng = generator(seed)
    return Features(intermediate=[torch.randn(*shape, generator=rng) for shape in shapes])


@every_kind
def test_trainable_parts_learn_and_are_saved(kind: type[Criterion]) -> None:
    student, teacher = _maps((8, 3, 4, 4)), _maps((8, 5, 2, 2), seed=1)
    torch.manual_seed(0)
    criterion = shaped(kind(), student, teacher)
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


@every_kind
def test_what_does_not_fit_is_named(kind: type[Criterion]) -> None:
    student, teacher = _maps((2, 3, 2, 2)), _maps((2, 5, 2, 2))
    criterion = shaped(kind(), student, teacher)
    with pytest.raises(ValueError, match=r"took its shape from 3.*make a new one"):
        criterion(_maps((2, 4, 2, 2)), teacher)
    with pytest.raises(ValueError, match=r"teacher's 6 channels|6 \(teacher\)"):
        criterion(student, _maps((2, 6, 2, 2)))
    with pytest.raises(ValueError, match="whose 7 tokens form no square"):
        criterion(_maps((2, 7, 3)), _maps((2, 4, 5)))
    with pytest.raises(ValueError, match=r"layer=2, but student.intermediate holds 1 map"):
        kind(layer=2)(student, teacher)


# --- VID ------------------------------------------------------------------------------------------


def test_vid_starts_at_its_variance() -> None:
    for wanted in (5.0, 0.01, 300.0):
        criterion = VariationalInformationLoss(init_variance=wanted)
        with pytest.raises(ValueError, match="no shape before the first call"):
            _ = criterion.variance
        shaped(criterion, _maps((2, 2)), _maps((2, 3)))
        torch.testing.assert_close(criterion.variance, torch.full((3,), wanted))
    with pytest.raises(ValueError, match="init_variance must be finite > 1e-05, got 0"):
        VariationalInformationLoss(init_variance=0)


def test_vid_learns_the_residual_of_each_channel() -> None:
    """At the optimum the variance of a channel is its mean squared residual."""
    student, teacher = _maps((64, 2, 2, 2)), _maps((64, 3, 2, 2), seed=1).intermediate[0]
    teacher = Features(intermediate=teacher * torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1))
    criterion = shaped(VariationalInformationLoss(), student, teacher)
    for weight in criterion.gaussian.mean.parameters():
        torch.nn.init.zeros_(weight)
    optimizer = torch.optim.Adam([criterion.gaussian.rho], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        criterion(student, teacher).backward()
        optimizer.step()
    residual = teacher.intermediate[0].square().mean(dim=(0, 2, 3))
    torch.testing.assert_close(criterion.variance.detach(), residual, rtol=0.02, atol=0)


@pytest.mark.peer
def test_vid_equals_torchdistill() -> None:
    """Same definition: its regressor without the mean's conv names, its loss as a mean."""
    peer = importlib.import_module("torchdistill.losses.mid_level")
    wrapper = importlib.import_module("torchdistill.models.wrapper")
    student, teacher = torch.randn(4, 3, 5, 5), torch.randn(4, 6, 5, 5)
    regressor = wrapper.Regressor4VID(3, 6, 6, eps=1e-5, init_pred_var=5.0)
    ours = VariationalInformationLoss()
    ours(student, teacher)
    ours.gaussian.mean.load_state_dict(regressor.regressor.state_dict())
    pair = {"student": {"io": "output", "path": "s"}, "teacher": {"io": "output", "path": "t"}}
    theirs = peer.VIDLoss({"pair": pair})
    value = theirs({"s": {"output": regressor(student)}}, {"t": {"output": teacher}})
    torch.testing.assert_close(ours(student, teacher), value)


# --- FitNets --------------------------------------------------------------------------------------


def test_fitnets_follow_the_layer() -> None:
    student, teacher = _maps((2, 3, 4, 4), (2, 6, 2, 2)), _maps((2, 4, 4, 4), (2, 8, 2, 2))
    criterion = FitNetLoss(layer=0, kernel_size=3)
    assert criterion(student, teacher).isfinite()
    assert criterion.regressor.conv.weight.shape == (4, 3, 3, 3)


def test_the_default_of_fitnets_is_the_mean_square_to_the_bit() -> None:
    student, teacher = _maps((4, 3, 4, 4)), _maps((4, 5, 4, 4), seed=1)
    criterion = FitNetLoss()
    value = criterion(student, teacher)
    mapped = criterion.regressor(student.intermediate[0])
    wanted = torch.nn.functional.mse_loss(mapped, teacher.intermediate[0])
    assert torch.equal(value, wanted)


def test_fitnets_name_a_bad_form_and_a_single_position() -> None:
    with pytest.raises(ValueError, match="form must be one of squared, log, got 'logarithm'"):
        FitNetLoss(form="logarithm")
    with pytest.raises(ValueError, match=r"at least 2, got 1 .*; use drop_last=True"):
        FitNetLoss(form="log")(_maps((1, 3)), _maps((1, 5)))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        FitNetLoss()(_maps((0, 3)), _maps((0, 5)))


def _log_share(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient of FitNets' logarithm with a regressor that changes nothing."""
    criterion = FitNetLoss(form="log", adapter=torch.nn.Identity())
    return value_and_gradient(criterion, student, teacher)


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
    met, gradient = _log_share(constant, constant)
    assert float(met) == pytest.approx(math.log(1.01), abs=1e-6)
    assert (gradient == 0).all()
    # One channel of three is dead: the mean of the variances is two thirds of theirs.
    half = teacher.clone()
    half[:, 1] = level
    spread = half[:, [0, 2]].var(dim=(0, 2, 3), unbiased=False).sum() / 3
    wanted = torch.log(1 / spread + 0.01)
    torch.testing.assert_close(_log_share(half + 1, half)[0], wanted, rtol=1e-3, atol=1e-3)


def test_the_rounding_of_a_mean_is_no_variance() -> None:
    """A mean between two of float32's numbers is half a step off; values are 16.5 steps from it."""
    step = torch.finfo(torch.float32).eps
    teacher = torch.ones(8, 1, 8, 8)
    teacher[::2] += 33 * step
    value, _ = _log_share(teacher + 32 * step, teacher)
    assert float(value) == pytest.approx(math.log((32 / 16.5) ** 2 + 0.01), abs=2e-4)
