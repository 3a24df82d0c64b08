"""Diagnostics agree with their definitions on inputs whose answer is known."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from structkd import diagnostics
from tests.reference import dense, dskd


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


def test_uniformity_of_opposite_points_and_of_one_point() -> None:
    opposite = torch.tensor([[1.0, 0.0], [-5.0, 0.0]])
    assert float(diagnostics.uniformity(opposite, t=2)) == pytest.approx(-8)
    assert float(diagnostics.uniformity(torch.ones(4, 3))) == pytest.approx(0, abs=1e-6)


def test_spread_points_are_more_uniform_than_a_cluster() -> None:
    spread = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    cluster = torch.ones(8) + 0.1 * spread
    assert diagnostics.uniformity(spread) < diagnostics.uniformity(cluster)


@pytest.mark.parametrize(
    "function", [diagnostics.self_similarity, diagnostics.effective_rank, diagnostics.uniformity]
)
def test_bad_input_is_named(function) -> None:
    with pytest.raises(ValueError, match=r"expected 2-D \(N, D\), got float32 \(2, 3, 4\)"):
        function(torch.zeros(2, 3, 4))
    with pytest.raises(TypeError, match="floating-point tensor, got int64"):
        function(torch.zeros(2, 3, dtype=torch.int64))


def test_uniformity_needs_two_rows_and_a_positive_t() -> None:
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        diagnostics.uniformity(torch.ones(1, 3))
    with pytest.raises(ValueError, match="t must be finite > 0, got -1"):
        diagnostics.uniformity(torch.ones(2, 3), t=-1)


# --- predictable_share ----------------------------------------------------------------------------


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


def test_bad_features_are_named() -> None:
    with pytest.raises(TypeError, match="features_t must be a floating-point tensor, got int64"):
        diagnostics.predictable_share(torch.zeros(2, 3), torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match=r"features_s must be \(B, C, H, W\), .* got float32 \(3"):
        diagnostics.predictable_share(torch.zeros(3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="the same samples"):
        diagnostics.predictable_share(torch.zeros(2, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="at least 2 positions, got 1"):
        diagnostics.predictable_share(torch.zeros(1, 3), torch.zeros(1, 3))


# --- filter_collapse ------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block that registers its norms after its convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, bias=False)
        self.conv2 = nn.Conv2d(4, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.bn2 = nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 4, 1)
        self.last = nn.GroupNorm(2, 4)


def test_only_convolutions_before_a_batch_norm_count() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Block(), nn.Conv2d(4, 8, 1), nn.BatchNorm2d(4)
    )
    assert list(diagnostics.filter_collapse(net)) == ["0", "2.conv1", "2.conv2"]
    assert diagnostics.filter_collapse(nn.Linear(2, 2)) == {}


def test_networks_of_timm_count_every_stage() -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model("resnet10t")
    wanted = [name for name, part in net.named_modules() if isinstance(part, nn.Conv2d)]
    found = diagnostics.filter_collapse(net)  # the deep stem's last one comes where its parent does
    assert sorted(found) == sorted(wanted)


def test_norm_and_rank_are_those_of_the_filters() -> None:
    conv = nn.Conv2d(2, 3, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 5.0], [0.0, -1.0]])[:, :, None, None])
    found = diagnostics.filter_collapse(nn.Sequential(conv, nn.BatchNorm2d(3)))["0"]
    assert found.norm == pytest.approx(3)
    assert found.most == 2
    # Directions e1, e2, -e2: singular values 1 and the root of 2.
    share = 1 / (1 + math.sqrt(2))
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert found.rank == pytest.approx(math.exp(entropy))


def test_one_strong_common_gradient_shows_as_a_collapse_and_its_clipping_does_not() -> None:
    """What loses a run: the first steps throw all filters far in one direction."""
    torch.manual_seed(0)
    start = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    before = diagnostics.filter_collapse(start)["0"]
    common = torch.randn(1, 3, 3, 3)

    def after(factor: float) -> diagnostics.FilterDirections:
        net = copy.deepcopy(start)
        with torch.no_grad():
            weight = net[0].weight
            for _ in range(20):
                step = common.expand_as(weight) - 0.1 * weight
                size = step.flatten(1).norm(dim=1) / weight.flatten(1).norm(dim=1)
                weight += 0.1 * step * (factor / size).clamp(max=1)[:, None, None, None]
        return diagnostics.filter_collapse(net)["0"]

    lost, kept = after(math.inf), after(0.01)
    assert lost.norm > 5 * before.norm
    assert lost.rank < 0.7 * before.rank
    assert kept.norm < 1.5 * before.norm
    assert kept.rank > 0.95 * before.rank


def test_filters_that_are_not_finite_are_told() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    nn.init.constant_(net[0].weight, math.nan)
    found = diagnostics.filter_collapse(net)["0"]
    assert math.isnan(found.norm)
    assert math.isnan(found.rank)
