"""What AT and NST do beyond the shared contract."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structkd import Criterion, Features
from structkd.criteria.maps import (
    AttentionTransferLoss,
    NeuronSelectivityLoss,
    _by_channels,
    _by_positions,
    _channels_pay,
)
from tests.cases.case import generator
from tests.largest import Largest

every_kind = pytest.mark.parametrize("kind", [AttentionTransferLoss, NeuronSelectivityLoss])
seeds = st.integers(0, 2**16)


def _maps(*shapes: tuple[int, ...], seed: int = 0) -> Features:
    rng = generator(seed)
    return Features(intermediate=[torch.randn(*shape, generator=rng) for shape in shapes])


def _pair(seed: int, size: int = 3) -> tuple[Tensor, Tensor]:
    both = _maps((2, 5, size, size), (2, 4, size, size), seed=seed).intermediate
    return both[0].double(), both[1].double()


def _permuted(value: Tensor, seed: int, dim: int) -> Tensor:
    return value.index_select(dim, torch.randperm(value.shape[dim], generator=generator(seed)))


@every_kind
def test_pairing_names_what_does_not_fit(kind: type[Criterion]) -> None:
    one, two = _maps((2, 3, 2, 2)), _maps((2, 3, 2, 2), (2, 4, 2, 2))
    with pytest.raises(ValueError, match=r"pairs the maps .* got 1 and 2 map\(s\); capture"):
        kind()(one, two)
    with pytest.raises(ValueError, match="whose 5 tokens form no square"):
        kind()(_maps((2, 5, 3)), _maps((2, 4, 3)))
    for small in (_maps((2, 3)), _maps((2, 3, 1, 1)), _maps((2, 1, 3))):
        with pytest.raises(ValueError, match=r"share one only.*: capture an earlier layer"):
            kind()(small, one)


@every_kind
def test_layer_picks_the_pairs(kind: type[Criterion]) -> None:
    maps_s = _maps((2, 3, 2, 2), (2, 4, 4, 4), (2, 5))
    maps_t = _maps((2, 3, 4, 4), (2, 4, 2, 2), (2, 5), seed=1)
    one = [kind()(maps_s.intermediate[k], maps_t.intermediate[k]) for k in range(2)]
    torch.testing.assert_close(kind(layer=1)(maps_s, maps_t), one[1])
    torch.testing.assert_close(kind(layer=[-2, 0])(maps_s, maps_t), one[0] + one[1])
    with pytest.raises(ValueError, match=r"layer=3, but student\.intermediate holds 3"):
        kind(layer=3)(maps_s, maps_t)
    with pytest.raises(TypeError, match="layer must be a whole number, got str"):
        kind(layer="layer2")


@every_kind
def test_tokens_of_a_grid_are_the_map_itself(kind: type[Criterion]) -> None:
    student, teacher, same = _maps((2, 3, 2, 4), (2, 5, 2, 2), (2, 5, 2, 4)).intermediate
    tokens, flat = (value.flatten(2).transpose(1, 2) for value in (student, teacher))
    torch.testing.assert_close(kind()(student, flat), kind()(student, teacher))
    torch.testing.assert_close(kind()(tokens, same), kind()(student, same))


@every_kind
@settings(max_examples=25, deadline=None)
@given(seed=seeds, power_s=st.integers(-9, 9), power_t=st.integers(-9, 9))
def test_the_scale_of_maps_does_not_matter(kind, seed, power_s, power_t) -> None:
    student, teacher = _pair(seed)
    moved = kind()(10.0**power_s * student, -(10.0**power_t) * teacher)
    torch.testing.assert_close(moved, kind()(student, teacher))


@every_kind
@settings(max_examples=25, deadline=None)
@given(seed=seeds, size=st.sampled_from([2, 3, 7]))
def test_positions_have_no_order(kind, seed, size) -> None:
    student, teacher = (value.flatten(2).transpose(1, 2) for value in _pair(seed, size))
    moved = [_permuted(value, seed, 1) for value in (student, teacher)]
    torch.testing.assert_close(kind()(*moved), kind()(student, teacher))


@every_kind
def test_dead_channels_and_maps_have_finite_gradients(kind: type[Criterion]) -> None:
    student, teacher = _maps((3, 4, 3, 3), (3, 4, 3, 3)).intermediate
    student[:, 1] = 0
    student[0] = 0
    student.requires_grad_()
    value = kind()(student, teacher)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert (student.grad[0] == 0).all()


# --- attention ------------------------------------------------------------------------------------


def test_attention_names_a_bad_power() -> None:
    with pytest.raises(ValueError, match=r"p must be finite >= 1, got 0\.5"):
        AttentionTransferLoss(p=0.5)


@pytest.mark.parametrize("scale", [1e-15, 1e15, -1e15])
def test_attention_does_not_leave_float32(scale: float) -> None:
    """The fourth power of either scale does; behind a ReLU the signs are one."""
    student, teacher = _maps((2, 3, 4, 4), (2, 3, 4, 4)).intermediate
    student = student.relu()
    scaled = (scale * student).requires_grad_()
    value = AttentionTransferLoss(p=4)(scaled, teacher)
    torch.testing.assert_close(value, AttentionTransferLoss(p=4)(student, teacher))
    value.backward()
    assert scaled.grad.isfinite().all()
    assert scaled.grad.abs().max() > 0


def test_attention_resizes_only_what_differs() -> None:
    """Two pairs count as their sum, and equal sizes are compared cell by cell."""
    coarse, fine = _maps((2, 3, 2, 2)), _maps((2, 5, 4, 4), seed=1)
    criterion = AttentionTransferLoss()
    both = Features(intermediate=[*coarse.intermediate, *fine.intermediate])
    mirrored = Features(intermediate=[*fine.intermediate, *coarse.intermediate])
    torch.testing.assert_close(criterion(both, mirrored), 2 * criterion(coarse, fine))
    # A checkerboard averages to the flat map; only a comparison at full size tells them apart.
    board = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(2, 2).expand(1, 1, 4, 4)
    assert float(criterion(board, torch.ones(1, 1, 4, 4))) > 1e-3
    # Attention, not features, is averaged: signs that cancel in the features must not.
    signs = (2 * board - 1).clone()
    assert float(criterion(signs, torch.ones(1, 1, 2, 2))) < 1e-12


# --- selectivity ----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=seeds, size=st.sampled_from([2, 5]))
def test_selectivity_is_blind_to_order_and_length_of_channels(seed, size) -> None:
    student, teacher = _pair(seed, size)
    lengths = torch.tensor([0.5, -2.0, 1.0, 3.0]).view(4, 1, 1)
    value = NeuronSelectivityLoss()(student, teacher)
    assert float(value) > 1e-4
    mixed = _permuted(teacher, seed, 1) * lengths
    torch.testing.assert_close(NeuronSelectivityLoss()(student, mixed), value)


@pytest.mark.parametrize("shape", [(2, 3, 2), (2, 3, 40), (2, 30, 4)])
def test_both_forms_of_selectivity_agree(shape: tuple[int, ...]) -> None:
    batch, width, positions = shape
    unit = lambda w: torch.nn.functional.normalize(torch.randn(batch, w, positions).double(), dim=2)  # noqa: E731
    student, teacher = unit(width), unit(width + 2)
    torch.testing.assert_close(_by_channels(student, teacher), _by_positions(student, teacher))


@pytest.mark.parametrize("widths", [(3, 5), (5, 3)])
def test_selectivity_takes_the_smaller_grams(widths: tuple[int, int]) -> None:
    """Those of channels hold 9 + 25 + 15 numbers twice as wide: 98, between 9^2 and 10^2."""
    for positions, pays in ((9, False), (10, True)):
        assert _channels_pay(*(torch.empty(1, width, positions) for width in widths)) == pays


@pytest.mark.parametrize(
    ("width", "size"), [(64, 4), (4, 24)], ids=["many channels", "many positions"]
)
def test_selectivity_never_builds_all_products(width: int, size: int) -> None:
    batch, positions = 2, size**2
    student, teacher = _maps(*[(batch, width, size, size)] * 2).intermediate
    with Largest() as mode:
        NeuronSelectivityLoss()(student.requires_grad_(), teacher).backward()
    smaller = min(width, positions) ** 2
    assert mode.numel <= batch * max(width * positions, smaller)
    assert mode.numel < batch * width**2 * positions / 3
