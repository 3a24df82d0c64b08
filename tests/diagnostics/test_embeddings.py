"""Measures of embeddings agree with their definitions on inputs whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structkd import diagnostics
from tests.reference import dskd


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(1, 6), width=st.integers(1, 5))
def test_self_similarity_is_the_cross_correlation_with_itself(seed, rows, width) -> None:
    z = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).double()
    want = torch.tensor([[float(c) for c in row] for row in dskd.cross_correlation(z, z)])
    torch.testing.assert_close(diagnostics.self_similarity(z), want.double())


def test_self_similarity_of_a_dead_channel_is_zero() -> None:
    z = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    torch.testing.assert_close(
        diagnostics.self_similarity(z), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    )


@pytest.mark.parametrize(
    "function", [diagnostics.self_similarity, diagnostics.effective_rank, diagnostics.uniformity]
)
def test_autocast_around_them_changes_nothing(function) -> None:
    z = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = function(z)
    torch.testing.assert_close(found, function(z), rtol=0, atol=0)


@settings(max_examples=20, deadline=None)
@given(rank=st.integers(1, 6), scale=st.floats(1e-3, 1e3))
def test_effective_rank_of_equal_singular_values_is_their_number(rank, scale) -> None:
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0][:, :rank]
    assert float(diagnostics.effective_rank(basis * scale)) == pytest.approx(rank)


def test_effective_rank_of_two_unequal_values() -> None:
    z = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(diagnostics.effective_rank(z)) == pytest.approx(math.exp(entropy))
    assert float(diagnostics.effective_rank(torch.zeros(3, 2))) == 1


@pytest.mark.parametrize("entry", [math.nan, math.inf])
@pytest.mark.parametrize(
    "function", [diagnostics.self_similarity, diagnostics.effective_rank, diagnostics.uniformity]
)
def test_a_number_that_is_not_finite_gives_nan_and_stops_no_training(function, entry) -> None:
    z = torch.randn(5, 3)
    z[1, 2] = entry
    assert function(z).isnan().any()


def test_uniformity_of_opposite_points_and_of_one_point() -> None:
    opposite = torch.tensor([[1.0, 0.0], [-5.0, 0.0]])
    assert float(diagnostics.uniformity(opposite, t=2)) == pytest.approx(-8)
    assert float(diagnostics.uniformity(torch.ones(4, 3))) == pytest.approx(0, abs=1e-6)


def test_spread_points_are_more_uniform_than_a_cluster() -> None:
    spread = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    cluster = torch.ones(8) + 0.1 * spread
    assert diagnostics.uniformity(spread) < diagnostics.uniformity(cluster)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (diagnostics.self_similarity, "embedding"),
        (diagnostics.effective_rank, "embedding"),
        (diagnostics.uniformity, "features"),
    ],
)
def test_bad_input_is_named(function, name) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be 2-D \(N, D\), got float32 \(2, 3, 4\)"):
        function(torch.zeros(2, 3, 4))
    with pytest.raises(TypeError, match=f"{name} must be a floating-point tensor, got int64"):
        function(torch.zeros(2, 3, dtype=torch.int64))


def test_uniformity_needs_two_rows_and_a_positive_t() -> None:
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        diagnostics.uniformity(torch.ones(1, 3))
    with pytest.raises(ValueError, match="t must be finite > 0, got -1"):
        diagnostics.uniformity(torch.ones(2, 3), t=-1)
