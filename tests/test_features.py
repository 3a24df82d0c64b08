"""Features holds what a forward pass produced."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from structkd import Features


def test_one_map_becomes_a_tuple_and_several_stay_in_order() -> None:
    one, two = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 2, 2)
    assert Features(intermediate=one).intermediate == (one,)
    assert Features(intermediate=[one, two]).intermediate == (one, two)
    assert Features(intermediate=None).intermediate == ()


def test_is_frozen_and_replace_makes_a_changed_copy() -> None:
    feats = Features(logits=torch.zeros(2, 3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        feats.logits = None
    indexed = feats.replace(index=torch.arange(2))
    assert indexed.logits is feats.logits
    assert indexed.index.tolist() == [0, 1]
    assert feats.index is None


def test_repr_shows_shapes_only() -> None:
    feats = Features(logits=torch.zeros(2, 3), intermediate=(torch.zeros(2, 3, 4, 4),))
    assert repr(feats) == "Features(logits=(2, 3), intermediate=[(2, 3, 4, 4)])"


@pytest.mark.parametrize("field", ["logits", "embedding", "index"])
def test_a_field_that_is_no_tensor_is_named(field: str) -> None:
    with pytest.raises(TypeError, match=rf"Features\.{field} must be a tensor or None, got list"):
        Features(**{field: [1.0]})


def test_a_map_that_is_no_tensor_is_named() -> None:
    with pytest.raises(TypeError, match=r"intermediate\[1\] must be a tensor, got str"):
        Features(intermediate=(torch.zeros(1, 1, 1, 1), "layer2"))


def _full(batch: int = 4) -> Features:
    return Features(
        logits=torch.randn(batch, 3, requires_grad=True),
        embedding=torch.randn(batch, 5),
        intermediate=(torch.randn(batch, 2, 4, 4), torch.randn(batch, 7, 2)),
        index=torch.arange(10, 10 + batch),
        absent={"embedding": "because"},
    )


@pytest.mark.parametrize(
    ("which", "positions"),
    [
        (torch.tensor([False, True, False, True]), [1, 3]),
        (torch.tensor([2, 0]), [2, 0]),
        (torch.tensor([1, 1], dtype=torch.int32), [1, 1]),
        (torch.zeros(4, dtype=torch.bool), []),
        (torch.empty(0, dtype=torch.int64), []),
    ],
    ids=["mask", "positions", "twice", "empty mask", "no positions"],
)
def test_rows_takes_the_same_samples_of_every_field(which, positions: list[int]) -> None:
    feats = _full()
    some = feats.rows(which)
    assert some.index.tolist() == [10 + position for position in positions]
    assert torch.equal(some.logits, feats.logits[positions])
    assert torch.equal(some.embedding, feats.embedding[positions])
    for got, whole in zip(some.intermediate, feats.intermediate, strict=True):
        assert torch.equal(got, whole[positions])
        assert got.shape[1:] == whole.shape[1:]
    assert some.absent == feats.absent
    some.logits.sum().backward()
    counts = torch.tensor([positions.count(row) for row in range(4)], dtype=torch.float32)
    assert torch.equal(feats.logits.grad, counts[:, None].expand(4, 3))


def test_rows_of_nothing_is_nothing() -> None:
    assert repr(Features().rows(torch.tensor([3]))) == "Features()"


@pytest.mark.parametrize(
    ("which", "error", "said"),
    [
        (
            torch.ones(3, dtype=torch.bool),
            ValueError,
            r"Features\.logits.*mask \(4,\).*\(3,\)",
        ),
        (torch.ones(4), TypeError, r"bool mask \(4,\) or int64 positions \(n,\), got float32"),
        ([0, 1], TypeError, "got list"),
        (torch.ones(4, 1, dtype=torch.bool), ValueError, r"got bool \(4, 1\)"),
        (torch.tensor([0, 4]), ValueError, r"in 0\.\.3 .*got values in 0\.\.4"),
        (torch.tensor([-1]), ValueError, r"got values in -1\.\.-1"),
    ],
)
def test_rows_that_are_not_there_are_named(which, error, said: str) -> None:
    with pytest.raises(error, match=said):
        _full().rows(which)
