"""What SemCKD does beyond the shared contract."""

from __future__ import annotations

import pytest
import torch

from structkd import Features
from structkd.criteria.calibration import SemanticCalibrationLoss
from tests.cases.case import shaped


def _networks(batch: int = 8) -> tuple[Features, Features]:
    student = Features(intermediate=[torch.randn(batch, 2, 4, 4), torch.randn(batch, 3, 2, 2)])
    teacher = Features(
        intermediate=[torch.randn(batch, c, s, s) for c, s in ((3, 4), (4, 2), (5, 1))]
    )
    return student, teacher


def test_attention_is_a_distribution_over_teacher_layers() -> None:
    student, teacher = _networks()
    criterion = SemanticCalibrationLoss()
    attention = criterion.attention(student.intermediate, teacher.intermediate)
    assert attention.shape == (8, 2, 3)
    torch.testing.assert_close(attention.sum(dim=2), torch.ones(8, 2))
    assert attention.std(dim=0).max() > 0  # it differs from sample to sample


def test_it_learns_and_is_saved() -> None:
    torch.manual_seed(0)
    student, teacher = _networks()
    criterion = SemanticCalibrationLoss()
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.1)  # before anything has a shape
    shaped(criterion, student, teacher)
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    assert {name for name, _ in criterion.named_parameters()} <= set(before)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = criterion(student, teacher)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    after = criterion.state_dict()
    for name, value in before.items():  # the norms' statistics too
        assert not torch.equal(after[name], value), name

    again = SemanticCalibrationLoss()
    again.load_state_dict(after)
    wanted = criterion.eval()(student, teacher)
    assert torch.equal(again.eval()(student, teacher), wanted)


def test_the_student_learns_through_the_attention_too() -> None:
    student, teacher = _networks()
    maps = [value.requires_grad_() for value in student.intermediate]
    attention = SemanticCalibrationLoss().attention(maps, teacher.intermediate)
    grads = torch.autograd.grad(attention[..., 0].sum(), maps)
    assert all(grad.abs().max() > 0 for grad in grads)


def test_what_does_not_fit_is_named() -> None:
    student, teacher = _networks()
    criterion = shaped(SemanticCalibrationLoss(), student, teacher)
    for other in (criterion, SemanticCalibrationLoss(batch_size=8)):
        with pytest.raises(ValueError, match=r"batch of 8, .*got 6: .* drop_last=True"):
            other(*_networks(batch=6))
    for maps_s, maps_t in ((student, student), (teacher, teacher)):
        with pytest.raises(ValueError, match=r"first call: make a new one.*layer="):
            criterion(maps_s, maps_t)
    with pytest.raises(ValueError, match=r"5 tokens form no square"):
        criterion([torch.randn(8, 5, 2), torch.randn(8, 5, 3)], teacher)
    with pytest.raises(ValueError, match="batch_size must be at least 2, got 1"):
        SemanticCalibrationLoss(batch_size=1)
