"""What FitNets, AT, NST and VID do beyond the shared contract."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from structkd import Criterion, Features
from structkd.criteria.maps import (
    AttentionTransferLoss,
    NeuronSelectivityLoss,
    _by_channels,
    _by_positions,
)
from structkd.criteria.regression import FitNetLoss, VariationalInformationLoss


def _maps(*shapes: tuple[int, ...], seed: int = 0) -> Features:
    rng = torch.Generator().manual_seed(seed)
    return Features(intermediate=[torch.randn(*shape, generator=rng) for shape in shapes])


class _Largest(TorchDispatchMode):
    """Records the most numbers that any operation put out."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.largest = max(self.largest, leaf.numel())
        return out


def _log_share(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient of FitNets' logarithm with a regressor that changes nothing."""
    criterion = FitNetLoss(student.shape[1], teacher.shape[1], form="log").to(student.dtype)
    torch.nn.init.dirac_(criterion.regressor.conv.weight)
    torch.nn.init.zeros_(criterion.regressor.conv.bias)
    student = student.clone().requires_grad_()
    value = criterion(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


@pytest.mark.parametrize("criterion", [AttentionTransferLoss(), NeuronSelectivityLoss()])
def test_pairing_names_what_does_not_fit(criterion: Criterion) -> None:
    one, two = _maps((2, 3, 2, 2)), _maps((2, 3, 2, 2), (2, 4, 2, 2))
    with pytest.raises(ValueError, match=r"pairs the maps .* got 1 and 2 map\(s\); capture"):
        criterion(one, two)
    with pytest.raises(ValueError, match="whose 5 tokens form no square"):
        criterion(_maps((2, 5, 3)), _maps((2, 4, 3)))
    for small in (_maps((2, 3)), _maps((2, 3, 1, 1)), _maps((2, 1, 3))):
        with pytest.raises(ValueError, match=r"share one only.*: capture an earlier layer"):
            criterion(small, one)


@pytest.mark.parametrize("kind", [AttentionTransferLoss, NeuronSelectivityLoss])
def test_layer_picks_the_pairs(kind: type[Criterion]) -> None:
    maps_s = _maps((2, 3, 2, 2), (2, 4, 4, 4), (2, 5))
    maps_t = _maps((2, 3, 4, 4), (2, 4, 2, 2), (2, 5), seed=1)
    one = lambda k: kind()(  # noqa: E731
        maps_s.intermediate[k], maps_t.intermediate[k]
    )
    torch.testing.assert_close(kind(layer=1)(maps_s, maps_t), one(1))
    torch.testing.assert_close(kind(layer=[-2, 0])(maps_s, maps_t), one(0) + one(1))
    with pytest.raises(ValueError, match=r"layer=3, but student\.intermediate holds 3"):
        kind(layer=3)(maps_s, maps_t)
    with pytest.raises(TypeError, match="layer must be a whole number, got str"):
        kind(layer="layer2")


@pytest.mark.parametrize("kind", [AttentionTransferLoss, NeuronSelectivityLoss])
def test_tokens_of_a_grid_are_the_map_itself(kind: type[Criterion]) -> None:
    student, teacher = torch.randn(2, 3, 2, 4), torch.randn(2, 5, 2, 2)
    tokens = student.flatten(2).transpose(1, 2)
    flat = teacher.flatten(2).transpose(1, 2)
    torch.testing.assert_close(kind()(student, flat), kind()(student, teacher))
    same = torch.randn(2, 5, 2, 4)
    torch.testing.assert_close(kind()(tokens, same), kind()(student, same))


def test_attention_names_a_bad_power() -> None:
    with pytest.raises(ValueError, match=r"p must be finite >= 1, got 0\.5"):
        AttentionTransferLoss(p=0.5)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_attention_does_not_depend_on_the_scale(scale: float) -> None:
    """The fourth power of either scale leaves float32's range."""
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
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


@pytest.mark.parametrize("criterion", [AttentionTransferLoss(), NeuronSelectivityLoss()])
def test_dead_channels_and_maps_have_finite_gradients(criterion: Criterion) -> None:
    student = torch.randn(3, 4, 3, 3)
    student[:, 1] = 0
    student[0] = 0
    student.requires_grad_()
    value = criterion(student, torch.randn(3, 4, 3, 3))
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert (student.grad[0] == 0).all()


def test_selectivity_is_blind_to_order_and_length_of_channels() -> None:
    student, teacher = _maps((2, 6, 3, 3)), _maps((2, 4, 3, 3), seed=1)
    criterion = NeuronSelectivityLoss()
    lengths = torch.tensor([0.5, -2.0, 1.0, 3.0]).view(4, 1, 1)
    mixed = Features(intermediate=teacher.intermediate[0][:, [3, 1, 0, 2]] * lengths)
    value = criterion(student, teacher)
    assert float(value) > 1e-3
    torch.testing.assert_close(criterion(student, mixed), value)


@pytest.mark.parametrize("shape", [(2, 3, 2), (2, 3, 40), (2, 30, 4)])
def test_both_forms_of_selectivity_agree(shape: tuple[int, ...]) -> None:
    batch, width, positions = shape
    unit = lambda w: torch.nn.functional.normalize(torch.randn(batch, w, positions).double(), dim=2)  # noqa: E731
    student, teacher = unit(width), unit(width + 2)
    torch.testing.assert_close(_by_channels(student, teacher), _by_positions(student, teacher))


@pytest.mark.parametrize(
    ("width", "size"), [(64, 4), (4, 24)], ids=["many channels", "many positions"]
)
def test_selectivity_never_builds_all_products(width: int, size: int) -> None:
    batch, positions = 2, size**2
    student = torch.randn(batch, width, size, size, requires_grad=True)
    teacher = torch.randn(batch, width, size, size)
    with _Largest() as mode:
        NeuronSelectivityLoss()(student, teacher).backward()
    smaller = min(width, positions) ** 2
    assert mode.largest <= batch * max(width * positions, smaller)
    assert mode.largest < batch * width**2 * positions / 3


@pytest.mark.peer
def test_vid_equals_torchdistill() -> None:
    """Same definition: its regressor without the mean's conv names, its loss as a mean."""
    peer = pytest.importorskip("torchdistill.losses.mid_level")
    wrapper = pytest.importorskip("torchdistill.models.wrapper")
    student, teacher = torch.randn(4, 3, 5, 5), torch.randn(4, 6, 5, 5)
    regressor = wrapper.Regressor4VID(3, 6, 6, eps=1e-5, init_pred_var=5.0)
    ours = VariationalInformationLoss(3, 6)
    ours.mean.load_state_dict(regressor.regressor.state_dict())
    pair = {"student": {"io": "output", "path": "s"}, "teacher": {"io": "output", "path": "t"}}
    theirs = peer.VIDLoss({"pair": pair})
    value = theirs({"s": {"output": regressor(student)}}, {"t": {"output": teacher}})
    torch.testing.assert_close(ours(student, teacher), value)
