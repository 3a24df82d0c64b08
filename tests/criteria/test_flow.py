"""What FSP does beyond the shared contract."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structkd import Features
from structkd.criteria.flow import FlowMatrixLoss, _flow


def _maps(*shapes: tuple[int, ...]) -> Features:
    return Features(intermediate=[torch.randn(*shape) for shape in shapes])


def test_pairs_and_chain_take_other_flows() -> None:
    student = _maps((2, 3, 4, 4), (2, 5, 4, 4), (2, 4, 2, 2), (2, 6, 2, 2))
    teacher = _maps((2, 3, 4, 4), (2, 5, 4, 4), (2, 4, 2, 2), (2, 6, 2, 2))
    flow = lambda i, j: FlowMatrixLoss()(  # noqa: E731
        [student.intermediate[i], student.intermediate[j]],
        [teacher.intermediate[i], teacher.intermediate[j]],
    )
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


def test_equal_channels_need_no_parameters() -> None:
    feats = _maps((2, 3, 4, 4), (2, 5, 4, 4))
    criterion = FlowMatrixLoss()
    assert list(criterion.parameters())
    criterion(feats, feats)
    assert not list(criterion.parameters())
    assert not criterion.state_dict()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_the_order_of_positions_does_not_matter(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(16, generator=rng)
    maps = [torch.randn(2, c, 4, 4, generator=rng) for c in (3, 5, 3, 5)]
    moved = [value.flatten(2)[..., order].unflatten(2, (4, 4)) for value in maps[:2]]
    value = FlowMatrixLoss()(maps[:2], maps[2:])
    torch.testing.assert_close(FlowMatrixLoss()(moved, maps[2:]), value)


@pytest.mark.peer
def test_matrices_equal_torchdistill() -> None:
    """The matrices agree; the losses do not, and ours is the paper's.

    Yim et al., Eq. 2, square the distance of the matrices. torchdistill 1.1 adds up the norms of
    their columns, unsquared, and takes the maximum over a cell where the ends differ in size (the
    CRD benchmark, like us, takes the mean).
    """
    peer = pytest.importorskip("torchdistill.losses.mid_level")
    first, last = torch.randn(4, 3, 6, 6), torch.randn(4, 5, 6, 6)
    wanted = peer.FSPLoss.compute_fsp_matrix(first, last)
    torch.testing.assert_close(_flow(first, last, "the ends"), wanted)
