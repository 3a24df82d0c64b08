from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from structkd.matching.semantic import SemanticMatcher
from tests.reference import matching as reference


def _matcher(**options) -> SemanticMatcher:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(40, 12), nn.BatchNorm1d(12), nn.ReLU())
    student = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU())
    return SemanticMatcher(teacher, student, 12, 6, **{"embed_dim": 8, **options})


def _images(seed: int = 0, batch: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    ms = torch.randn(batch, 10, 2, 2, generator=torch.Generator().manual_seed(seed))
    return ms, ms[:, [3, 2, 1]]


@given(seed=st.integers(0, 2**31), batch=st.integers(2, 6), temperature=st.floats(0.3, 4))
@settings(max_examples=15, deadline=None)
def test_loss_and_gradient_are_the_loops(seed, batch, temperature):
    matcher = _matcher(dropout=0.0, temperature=temperature).double()
    ms, rgb = (part.double() for part in _images(seed, batch))
    a = matcher.teacher_head(matcher.teacher_encoder(ms))
    b = matcher.student_head(matcher.student_encoder(rgb))
    expected = reference.semantic_loss(a, b, temperature)
    loss = matcher(ms, rgb)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    parameters = list(matcher.parameters())
    for one, other in zip(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


def test_head_is_the_printed_one():
    matcher = _matcher().eval()
    head = matcher.teacher_head
    x = torch.randn(3, 12)
    p = x @ head.projection.weight.T + head.projection.bias
    linear = head.refine[1]
    inner = 0.5 * p * (1 + torch.erf(p / 2**0.5)) @ linear.weight.T + linear.bias
    total = p + inner
    centred = total - total.mean(dim=1, keepdim=True)
    expected = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(head(x), expected, rtol=1e-4, atol=1e-5)
    assert head.refine[2].p == 0.1


def test_training_brings_pairs_together():
    matcher = _matcher(dropout=0.0)
    ms, rgb = _images(batch=16)
    optimizer = torch.optim.AdamW(matcher.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        matcher(ms, rgb).backward()
        optimizer.step()
    cosine = matcher.embed_student(rgb) @ matcher.embed_teacher(ms).T
    assert (cosine.argmax(dim=1) == torch.arange(16)).float().mean() >= 0.8


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_embeddings_are_units_in_eval_mode_without_gradient(side):
    matcher = _matcher(dropout=0.5)
    matcher.teacher_encoder[2].eval()  # a frozen norm stays frozen
    images = _images()[side == "student"]
    embed = getattr(matcher, f"embed_{side}")
    first, second = embed(images), embed(images)
    assert first.shape == (5, 8)
    assert torch.equal(first, second)
    assert not first.requires_grad
    torch.testing.assert_close(first.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(embed(images[:2]), first[:2])
    assert matcher.training
    assert matcher.student_encoder.training
    assert not matcher.teacher_encoder[2].training


def test_mode_comes_back_after_an_error():
    matcher = _matcher()
    with pytest.raises(RuntimeError):
        matcher.embed_teacher(torch.zeros(2, 7))
    assert matcher.teacher_head.training


def test_under_autocast_the_loss_is_float32():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = _matcher()(*_images())
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def test_state_dict_round_trip():
    matcher, other = _matcher(), _matcher(temperature=1.0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(matcher.state_dict())
    ms, _ = _images()
    assert torch.equal(matcher.embed_teacher(ms), other.embed_teacher(ms))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: _matcher()(*_images(batch=1)), ValueError, "at least 2, got 1"),
        (lambda: _matcher()(_images()[0], _images(batch=4)[1]), ValueError, "5 and 4 samples"),
        (lambda: _matcher(dropout=1.0), ValueError, r"dropout must be in \[0, 1\)"),
        (lambda: _matcher(temperature=0), ValueError, "temperature"),
        (lambda: SemanticMatcher(len, nn.Identity(), 4, 4), TypeError, "teacher_encoder must be"),
        (
            lambda: SemanticMatcher(nn.Identity(), nn.Identity(), 4, 4).embed_student(
                torch.zeros(2, 4, 3, 3)
            ),
            ValueError,
            r"student_encoder must give \(B, 4\).*pool and flatten",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
