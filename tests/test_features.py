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
