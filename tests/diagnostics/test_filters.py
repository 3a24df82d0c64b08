"""Norm and rank of filters before a batch norm."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from structkd import diagnostics


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
