"""What FSP does beyond the shared contract."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from structkd import Features
from structkd.criteria.flow import FlowMatrixLoss, _flow
from tests.cases.case import generator, normal, pick


def _maps(*shapes: tuple[int, ...], seed: int = 0) -> Features:
    return Features(intermediate=[normal(generator(seed), *shape) for shape in shapes])


def test_pairs_and_chain_take_other_flows() -> None:
    shapes = (2, 3, 4, 4), (2, 5, 4, 4), (2, 4, 2, 2), (2, 6, 2, 2)
    student, teacher = _maps(*shapes), _maps(*shapes, seed=1)
    flow = lambda i, j: FlowMatrixLoss(layer=[i, j])(student, teacher)  # noqa: E731
    torch.testing.assert_close(FlowMatrixLoss("pairs")(student, teacher), flow(0, 1) + flow(2, 3))
    chain = flow(0, 1) + flow(1, 2) + flow(2, 3)
    torch.testing.assert_close(FlowMatrixLoss("chain")(student, teacher), chain)


def test_networks_of_other_sizes_are_compared_as_they_are() -> None:
    """Doubling every pixel changes no mean product, so no flow."""
    student = _maps((2, 3, 4, 4), (2, 5, 4, 4))
    doubled = [
        value.repeat_interleave(2, 2).repeat_interleave(2, 3) for value in student.intermediate
    ]
    assert float(FlowMatrixLoss()(student, doubled)) < 1e-12


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_the_order_of_positions_does_not_matter(seed: int) -> None:
    """A flow is a mean over positions, whose order may change in both of its ends together."""
    rng = generator(seed)
    count, widths = pick(rng, 1, 6), (pick(rng, 1, 4), pick(rng, 1, 4))
    student, teacher = ([normal(rng, 3, count, width) for width in widths] for _ in range(2))
    order = torch.randperm(count, generator=rng)
    moved = [tokens[:, order] for tokens in student]
    torch.testing.assert_close(FlowMatrixLoss()(moved, teacher), FlowMatrixLoss()(student, teacher))
    assert float(FlowMatrixLoss()(moved, student)) < 1e-24


def test_what_does_not_pair_up_is_named() -> None:
    one, two, three, four = (_maps(*[(2, 3, 4, 4)] * count) for count in (1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"flows='pairs'.*holds 3 map\(s\); flows='chain' takes"):
        FlowMatrixLoss()(three, three)
    with pytest.raises(ValueError, match=r"needs at least 2 maps, but .* holds 1"):
        FlowMatrixLoss("chain")(one, one)
    with pytest.raises(ValueError, match=r"in order, got 2 and 4 map"):
        FlowMatrixLoss()(two, four)
    with pytest.raises(ValueError, match=r"student.intermediate\[0\] and \[1\] must lie on grids"):
        FlowMatrixLoss()(_maps((2, 3, 4, 4), (2, 7, 3)), two)
    with pytest.raises(ValueError, match=r"teacher.intermediate\[0\] and \[1\] must lie on grids"):
        FlowMatrixLoss()(two, _maps((2, 6, 3), (2, 7, 3)))
    with pytest.raises(ValueError, match=r"4 module\(s\), but 2 map\(s\) of the student"):
        FlowMatrixLoss(adapters=[None] * 4)(two, two)
    with pytest.raises(TypeError, match=r"adapters\[1\] must be a module or None, got int"):
        FlowMatrixLoss(adapters=[None, 3])
    with pytest.raises(ValueError, match="flows must be one of pairs, chain, got 'stages'"):
        FlowMatrixLoss("stages")


def test_channels_are_those_of_the_first_call() -> None:
    teacher = _maps((2, 3, 4, 4), (2, 5, 4, 4))
    criterion = FlowMatrixLoss()
    criterion(_maps((2, 3, 4, 4), (2, 4, 4, 4)), teacher)
    with pytest.raises(ValueError, match=r"\[\(6, 5\)\].*first call: make a new one"):
        criterion(_maps((2, 3, 4, 4), (2, 6, 4, 4)), teacher)


def test_only_what_differs_is_adapted() -> None:
    """The one weight of all is read as the 1x1 convolutions that a user would give."""
    student = _maps((2, 3, 4, 4), (2, 5, 9), (2, 7, 4), (2, 6))
    teacher = _maps((2, 3, 4, 4), (2, 4, 4, 4), (2, 8, 2, 2), (2, 6), seed=1)
    criterion = FlowMatrixLoss("chain", layer=[0, 3, 2])
    value = criterion(student, teacher)
    assert criterion.convs.weight.shape == (8, 4)
    conv = nn.Conv2d(4, 8, 1).double()
    conv.load_state_dict(
        {"weight": criterion.convs.weight[..., None, None], "bias": criterion.convs.bias}
    )
    by_hand = FlowMatrixLoss("chain", adapters=[None, None, conv], layer=[0, 3, 2])
    torch.testing.assert_close(by_hand(student, teacher), value)
    value.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in criterion.parameters())
    equal = FlowMatrixLoss()
    equal(teacher, teacher)
    assert not list(equal.parameters())


def test_tokens_that_are_adapted_keep_their_grid() -> None:
    """Ends of 4 x 4 and 2 x 2 tokens meet as maps do, whoever brings their channels."""
    student, teacher = _maps((2, 3, 4, 4), (2, 5, 2, 2)), _maps((2, 4, 4, 4), (2, 6, 2, 2), seed=1)
    criterion = FlowMatrixLoss()
    wanted = criterion(student, teacher)
    tokens = [value.flatten(2).transpose(1, 2) for value in student.intermediate]
    torch.testing.assert_close(criterion(tokens, list(teacher.intermediate)), wanted)


@pytest.mark.peer
def test_matrices_equal_torchdistill() -> None:
    """The matrices agree; the losses do not, and ours is the paper's.

    Yim et al., Eq. 2, square the distance of the matrices. torchdistill 1.1 adds up the norms of
    their columns, unsquared, and takes the maximum over a cell where the ends differ in size (the
    CRD benchmark, like us, takes the mean).
    """
    peer = importlib.import_module("torchdistill.losses.mid_level")
    first, last = _maps((4, 3, 6, 6), (4, 5, 6, 6)).intermediate
    wanted = peer.FSPLoss.compute_fsp_matrix(first, last)
    torch.testing.assert_close(_flow(first, last, "the ends"), wanted)
