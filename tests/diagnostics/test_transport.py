"""The exact transport cost between feature sets."""

from __future__ import annotations

import sys
from itertools import permutations

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structkd.diagnostics import transport, transport_cost

seeds = st.integers(0, 2**16)
orders = st.sampled_from([1.0, 1.5, 2.0, 4.0])


def _rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, count=st.integers(1, 5), p=orders)
def test_equals_the_best_assignment(seed: int, count: int, p: float) -> None:
    left, right = _rows(seed, count, 3), 2 * _rows(seed + 1, count, 3)
    best = min(
        sum(float((left[i] - right[j]).square().sum()) ** (p / 2) for i, j in enumerate(order))
        for order in permutations(range(count))
    )
    assert float(transport_cost(left, right, p=p)) == pytest.approx((best / count) ** (1 / p))


@settings(max_examples=20, deadline=None)
@given(seed=seeds, count=st.integers(1, 6), other=st.integers(1, 6), p=orders)
def test_equals_the_one_dimensional_closed_form(
    seed: int, count: int, other: int, p: float
) -> None:
    left, right = _rows(seed, count, 1), _rows(seed + 1, other, 1)
    wanted = float(ot.wasserstein_1d(left[:, 0].numpy(), right[:, 0].numpy(), p=p)) ** (1 / p)
    assert float(transport_cost(left, right, p=p)) == pytest.approx(wanted)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, shift=st.floats(-5, 5), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_is_a_metric_on_sets(seed: int, shift: float, scale: float) -> None:
    left, right, third = (scale * _rows(seed + i, 4 + i, 3) for i in range(3))
    near = transport_cost(left, right)
    assert float(transport_cost(right, left)) == pytest.approx(float(near))
    assert float(transport_cost(left, left.flip(0))) == 0
    assert near <= transport_cost(left, third) + transport_cost(third, right) + 1e-9 * scale
    moved = transport_cost(left, left + shift * scale)
    assert float(moved) == pytest.approx(abs(shift) * scale * 3**0.5, abs=1e-9 * scale)


def test_extreme_units_do_not_overflow() -> None:
    left = torch.tensor([[0.0]])
    for unit in (1e-30, 1e30):
        found = transport_cost(left, left + unit, p=8)
        assert float(found) == pytest.approx(unit, rel=1e-6)


def test_dtype_and_gradient() -> None:
    left = _rows(0, 4, 3)
    assert transport_cost(left, left).dtype == torch.float64
    half = transport_cost(left.half().requires_grad_(), 2 * left.half())
    assert half.dtype == torch.float32
    assert half.shape == ()
    assert not half.requires_grad


@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_what_is_not_finite_gives_nan(junk: float) -> None:
    assert transport_cost(_rows(0, 4, 3), torch.full((4, 3), junk)).isnan()


def test_an_early_stop_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "SIMPLEX_PIVOTS", 1)
    with (
        pytest.warns(UserWarning, match="numItermax"),
        pytest.raises(RuntimeError, match="stopped early"),
    ):
        transport_cost(_rows(0, 20, 3), _rows(1, 20, 3))


@pytest.mark.parametrize(
    ("left", "right", "p", "error", "message"),
    [
        (torch.ones(4, 3), torch.ones(4, 2), 2, ValueError, r"one width, got .*\(4, 3\).*\(4, 2\)"),
        (torch.ones(4, 3), torch.ones(0, 3), 2, ValueError, r"both sets need a sample"),
        (torch.ones(4, 3, 2), torch.ones(4, 3), 2, ValueError, r"features_s must be 2-D"),
        (torch.ones(4, 3).long(), torch.ones(4, 3), 2, TypeError, r"floating-point"),
        (
            torch.ones(4, 3),
            [[1.0]],
            2,
            TypeError,
            r"features_t must be a floating-point tensor, got list",
        ),
        (torch.ones(4, 3), torch.ones(4, 3), 0.5, ValueError, r"p must be finite >= 1"),
    ],
)
def test_bad_input_is_named(left, right, p: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        transport_cost(left, right, p=p)


def test_missing_pot_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match="transport_cost needs POT: pip install POT"):
        transport_cost(_rows(0, 2, 2), _rows(1, 2, 2))
