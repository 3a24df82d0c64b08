"""Projectors and adapters map widths and say when they do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from structkd import ConvAdapter, Projector
from structkd.criteria._maps import to_common_size


def test_one_layer_is_linear_and_more_have_norm_and_relu_between() -> None:
    linear = Projector(6, 4, layers=1)
    assert [type(layer) for layer in linear.net] == [nn.Linear]
    deep = Projector(6, 4, hidden_dim=9, layers=3)
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear]
    assert [type(layer) for layer in deep.net] == kinds
    assert deep.net[0].weight.shape == (9, 6)
    assert deep(torch.randn(5, 6)).shape == (5, 4)


def test_adapter_on_tokens_equals_adapter_on_the_map() -> None:
    adapter = ConvAdapter(3, 5)
    maps = torch.randn(2, 3, 4, 2)
    tokens = maps.flatten(2).transpose(1, 2)
    torch.testing.assert_close(adapter(tokens), adapter(maps).flatten(2).transpose(1, 2))
    torch.testing.assert_close(adapter(maps[:, :, 0, 0]), adapter(maps)[:, :, 0, 0])


def test_adapter_keeps_the_size_for_odd_kernels() -> None:
    assert ConvAdapter(3, 5, kernel_size=3)(torch.randn(2, 3, 4, 6)).shape == (2, 5, 4, 6)


def test_common_size_is_the_smaller_of_each_side() -> None:
    left, right = torch.randn(2, 3, 8, 2), torch.randn(2, 5, 4, 6)
    small, other = to_common_size(left, right)
    assert small.shape == (2, 3, 4, 2)
    assert other.shape == (2, 5, 4, 2)
    torch.testing.assert_close(small[:, :, 0], left[:, :, :2].mean(2))
    same, _ = to_common_size(left, left)
    assert same is left


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Projector(0, 4), ValueError, "in_dim must be at least 1, got 0"),
        (lambda: Projector(4, 2.5), TypeError, "out_dim must be a whole number, got float"),
        (lambda: Projector(4, 4, layers=0), ValueError, "layers must be at least 1"),
        (lambda: Projector(4, 4)(torch.zeros(2, 3)), ValueError, r"takes \(B, 4\), got float32"),
        (lambda: ConvAdapter(4, 4, kernel_size=2), ValueError, "kernel_size must be odd"),
        (lambda: ConvAdapter(4, 2)(torch.zeros(2, 3, 1, 1)), ValueError, r"takes \(B, 4, H, W\)"),
        (lambda: ConvAdapter(4, 2)(torch.zeros(2, 3)), ValueError, r"or \(B, 4\), got float32"),
        (lambda: ConvAdapter(4, 2)(torch.zeros(4)), ValueError, r"got float32 \(4,\)"),
    ],
)
def test_bad_input_is_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
