"""What SemCKD does beyond the shared contract."""

from __future__ import annotations

import torch

from structkd import Features
from structkd.criteria.calibration import SemanticCalibrationLoss


def _networks(batch: int = 8) -> tuple[Features, Features]:
    student = Features(intermediate=[torch.randn(batch, 2, 4, 4), torch.randn(batch, 3, 2, 2)])
    teacher = Features(
        intermediate=[torch.randn(batch, c, s, s) for c, s in ((3, 4), (4, 2), (5, 1))]
    )
    return student, teacher


def test_attention_is_a_distribution_that_differs_from_sample_to_sample_and_trains() -> None:
    student, teacher = _networks()
    maps = [value.requires_grad_() for value in student.intermediate]
    attention = SemanticCalibrationLoss().attention(maps, teacher.intermediate)
    assert attention.shape == (8, 2, 3)
    torch.testing.assert_close(attention.sum(dim=2), torch.ones(8, 2))
    assert attention.std(dim=0).max() > 0
    grads = torch.autograd.grad(attention[..., 0].sum(), maps)
    assert all(grad.abs().max() > 0 for grad in grads)


def test_an_optimizer_made_before_the_first_call_trains_all_of_it() -> None:
    torch.manual_seed(0)
    student, teacher = _networks()
    criterion = SemanticCalibrationLoss()
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.1)
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        loss = criterion(student, teacher)
        loss.backward()
        if step == 0:
            before = {k: v.detach().clone() for k, v in criterion.named_parameters()}
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for name, value in criterion.named_parameters():
        assert not torch.equal(value, before[name]), name


def test_evaluation_uses_the_running_statistics_that_were_saved() -> None:
    student, teacher = _networks()
    criterion, resumed = SemanticCalibrationLoss(), SemanticCalibrationLoss(batch_size=8)
    for _ in range(3):
        criterion(student, teacher)
    resumed.load_state_dict(criterion.state_dict())
    trained = criterion(student, teacher)
    kept = {name: value.clone() for name, value in criterion.state_dict().items()}
    assert not torch.isclose(criterion.eval()(student, teacher), trained)
    assert all(torch.equal(kept[name], value) for name, value in criterion.state_dict().items())
    resumed(student, teacher)
    torch.testing.assert_close(resumed.eval()(student, teacher), criterion(student, teacher))
