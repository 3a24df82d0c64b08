"""The share of a teacher that a linear map of the student predicts."""

from __future__ import annotations

import math

import pytest
import torch

from structkd import diagnostics
from tests.reference import dense


def maps(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("split", [False, True])
def test_the_share_is_the_regressions(split: bool) -> None:
    student, teacher = maps(0, 3, 2, 2, 3), maps(1, 3, 4, 2, 3)
    teacher[:, 0] += 2 * student[:, 1]
    measure = dense.share_held_out if split else dense.share_on_all
    want = measure(dense.positions(student), dense.positions(teacher), 0.05, 0.0)
    share = diagnostics.predictable_share(student, teacher, ridge=0.05, split=split)
    torch.testing.assert_close(share, torch.stack(want))


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0, 3.0])
def test_the_share_is_what_noise_leaves(noise: float) -> None:
    student = maps(0, 64, 3, 8, 8)
    teacher = student[:, [2, 0]] + noise * maps(1, 64, 2, 8, 8)
    share = diagnostics.predictable_share(student, teacher)
    torch.testing.assert_close(share, torch.full_like(share, 1 / (1 + noise**2)), rtol=0, atol=0.03)


def test_the_share_of_rows_tokens_and_other_sizes() -> None:
    student = maps(0, 32, 3, 4, 4)
    tokens = student.flatten(2).transpose(1, 2)
    whole = diagnostics.predictable_share(student, student)
    torch.testing.assert_close(diagnostics.predictable_share(student, tokens), whole)
    pooled = torch.nn.functional.avg_pool2d(student, 2)
    assert diagnostics.predictable_share(student, pooled).min() > 0.99
    assert diagnostics.predictable_share(student, student.mean((2, 3))).shape == (3,)


def test_the_share_of_nothing_and_of_nan() -> None:
    student, teacher = maps(0, 32, 3, 4, 4), maps(1, 32, 2, 4, 4)
    teacher[:, 1] = 7
    assert diagnostics.predictable_share(student, teacher)[1] == 0
    nothing = diagnostics.predictable_share(torch.ones_like(student), teacher)
    torch.testing.assert_close(nothing, torch.zeros_like(nothing))
    student[3, 1, 0, 0] = math.nan
    assert diagnostics.predictable_share(student, teacher)[0].isnan()


def test_autocast_around_it_changes_nothing() -> None:
    student = maps(0, 32, 3, 4, 4).float()
    teacher = student[:, :1] + 0.5 * maps(1, 32, 2, 4, 4).float()
    for split in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            found = diagnostics.predictable_share(student, teacher, split=split)
        wanted = diagnostics.predictable_share(student, teacher, split=split)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_bad_features_are_named() -> None:
    with pytest.raises(TypeError, match=r"teacher\S* must be a floating-point tensor, got int64"):
        diagnostics.predictable_share(torch.zeros(2, 3), torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match=r"student\S* must be .*got float32 \(3"):
        diagnostics.predictable_share(torch.zeros(3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="the same samples"):
        diagnostics.predictable_share(torch.zeros(2, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="at least 2, got 1"):
        diagnostics.predictable_share(torch.zeros(1, 3), torch.zeros(1, 3))
