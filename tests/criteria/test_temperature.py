"""What the learned temperature promises beyond the shared contract."""

from __future__ import annotations

import math

import pytest
import torch

from structkd import KDLoss
from structkd.criteria.logits import CurriculumTemperatureLoss
from tests.reference import logits as reference


def _logits(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, 6, 5, generator=rng, dtype=torch.float64)
    return student.requires_grad_(), teacher


def _ramped(**options: float) -> CurriculumTemperatureLoss:
    """At the full strength of the reversal."""
    return CurriculumTemperatureLoss(ramp_epochs=1, **options).double()


@pytest.mark.parametrize("raw", [-1e4, -3.0, 0.0, 1.0, 3.0, 1e4])
def test_temperature_stays_in_its_bounds(raw: float) -> None:
    criterion = CurriculumTemperatureLoss(low=2.0, high=5.0)
    with torch.no_grad():
        criterion.raw_temperature.fill_(raw)
    assert 2.0 <= float(criterion.temperature) <= 5.0
    if abs(raw) < 10:
        wanted = reference.ctkd_temperature(raw, 2.0, 5.0)
        assert float(criterion.temperature) == pytest.approx(wanted, rel=1e-6)


def test_temperature_stays_in_its_bounds_over_steps() -> None:
    criterion = _ramped(low=1.0, high=21.0)
    optimizer = torch.optim.SGD(criterion.parameters(), lr=50.0)
    student, teacher = _logits()
    for _ in range(50):
        optimizer.zero_grad()
        criterion(student, teacher).backward()
        optimizer.step()
        assert 1.0 <= float(criterion.temperature) <= 21.0


def test_starts_where_the_published_code_starts() -> None:
    wanted = 1 + 20 / (1 + math.exp(-1))
    assert float(CurriculumTemperatureLoss().temperature) == pytest.approx(wanted, rel=1e-6)


def test_temperature_ascends_while_the_student_descends() -> None:
    student, teacher = _logits()
    criterion = _ramped()
    before = criterion(student, teacher)
    before.backward()
    with torch.no_grad():
        moved_student = student - 0.1 * student.grad
        assert criterion(moved_student, teacher) < before
        step = 0.01 * criterion.raw_temperature.grad / criterion.raw_temperature.grad.abs()
        criterion.raw_temperature.sub_(step)
        assert criterion(student, teacher) > before


@pytest.mark.parametrize("epoch", [1, 2, 3, 5, 9])
def test_gradient_is_the_reversed_one_times_the_ramp(epoch: int) -> None:
    criterion = CurriculumTemperatureLoss(ramp_epochs=5, strength=0.7).double()
    for _ in range(epoch - 1):
        criterion.step_epoch()
    student, teacher = _logits()
    criterion(student, teacher).backward()
    raw = criterion.raw_temperature.detach().clone().requires_grad_()
    temperature = 1 + 20 / (1 + torch.exp(-raw))
    (plain,) = torch.autograd.grad(reference.kd(student, teacher, temperature), raw)
    factor = reference.ctkd_ramp(epoch, 5, 0.7)
    torch.testing.assert_close(criterion.raw_temperature.grad, -factor * plain)
    torch.testing.assert_close(float(criterion.reversal), factor)


def test_student_gets_the_plain_gradient_at_that_temperature() -> None:
    student, teacher = _logits()
    criterion = _ramped()
    criterion(student, teacher).backward()
    (plain,) = torch.autograd.grad(KDLoss(float(criterion.temperature))(student, teacher), student)
    torch.testing.assert_close(student.grad, plain)


def test_resumed_ramp_goes_on() -> None:
    criterion = CurriculumTemperatureLoss(ramp_epochs=7)
    for _ in range(3):
        criterion.step_epoch()
    with torch.no_grad():
        criterion.raw_temperature.fill_(-0.4)
    resumed = CurriculumTemperatureLoss(ramp_epochs=7)
    assert resumed.reversal != criterion.reversal
    resumed.load_state_dict(criterion.state_dict())
    assert resumed.reversal == criterion.reversal
    assert resumed.temperature == criterion.temperature
    resumed.step_epoch()
    assert int(resumed.epoch) == 5
    assert int(criterion.epoch) == 4


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"low": 0}, r"low must be finite > 0, got 0"),
        ({"low": 5, "high": 5}, r"high must be finite > 5, got 5"),
        ({"ramp_epochs": 0}, r"ramp_epochs must be at least 1, got 0"),
        ({"strength": -1}, r"strength must be finite >= 0, got -1"),
    ],
)
def test_bad_arguments_are_named(options, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        CurriculumTemperatureLoss(**options)


def test_fractional_epochs_are_named() -> None:
    with pytest.raises(TypeError, match="ramp_epochs must be a whole number, got float"):
        CurriculumTemperatureLoss(ramp_epochs=2.5)
