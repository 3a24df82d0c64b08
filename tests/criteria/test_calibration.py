"""What SemCKD does beyond the shared contract."""

from __future__ import annotations

import pytest
import torch

from structkd import Features
from structkd.criteria.calibration import SemanticCalibrationLoss


def _networks(batch: int = 8) -> tuple[Features, Features]:
    student = Features(intermediate=[torch.randn(batch, 2, 4, 4), torch.randn(batch, 3, 2, 2)])
    teacher = Features(
        intermediate=[torch.randn(batch, c, s, s) for c, s in ((3, 4), (4, 2), (5, 1))]
    )
    return student, teacher


def test_attention_is_a_distribution_over_teacher_layers() -> None:
    student, teacher = _networks()
    criterion = SemanticCalibrationLoss.from_features(student, teacher)
    attention = criterion.attention(student.intermediate, teacher.intermediate)
    assert attention.shape == (8, 2, 3)
    torch.testing.assert_close(attention.sum(dim=2), torch.ones(8, 2))
    assert attention.std(dim=0).max() > 0  # it differs from sample to sample


def test_it_learns_and_is_saved() -> None:
    torch.manual_seed(0)
    student, teacher = _networks()
    criterion = SemanticCalibrationLoss.from_features(student, teacher)
    names = {name for name, _ in criterion.named_parameters()}
    assert names <= set(criterion.state_dict())
    before = {name: value.detach().clone() for name, value in criterion.named_parameters()}
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = criterion(student, teacher)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for name, value in criterion.named_parameters():
        assert not torch.equal(value, before[name]), name


def test_the_student_learns_through_the_attention_too() -> None:
    student, teacher = _networks()
    criterion = SemanticCalibrationLoss.from_features(student, teacher)
    maps = [value.requires_grad_() for value in student.intermediate]
    attention = criterion.attention(maps, teacher.intermediate)
    grads = torch.autograd.grad(attention[..., 0].sum(), maps)
    assert all(grad.abs().max() > 0 for grad in grads)


def test_what_does_not_fit_is_named() -> None:
    student, teacher = _networks()
    criterion = SemanticCalibrationLoss.from_features(student, teacher)
    with pytest.raises(ValueError, match=r"batch_size=8, got 6: .* drop_last=True"):
        criterion(*_networks(batch=6))
    with pytest.raises(ValueError, match=r"teacher.intermediate holds maps of \(2, 3\) channels"):
        criterion(student, student)
    with pytest.raises(ValueError, match=r"expected student_channels=\(2, 3\).*from_features"):
        criterion(teacher, teacher)
    with pytest.raises(ValueError, match=r"whose 5 tokens form no square"):
        criterion([torch.randn(8, 5, 2), torch.randn(8, 5, 3)], teacher)
    with pytest.raises(ValueError, match="batch_size must be at least 2, got 1"):
        SemanticCalibrationLoss([2], [3], batch_size=1)
    with pytest.raises(TypeError, match="student_channels must be a list"):
        SemanticCalibrationLoss([], [3], batch_size=4)
    with pytest.raises(ValueError, match=r"teacher_channels\[1\] must be at least 1, got 0"):
        SemanticCalibrationLoss([2], [3, 0], batch_size=4)
    with pytest.raises(ValueError, match=r"needs teacher.intermediate: name a layer"):
        SemanticCalibrationLoss.from_features(student, Features(embedding=torch.zeros(8, 3)))
