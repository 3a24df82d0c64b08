"""What FSP does beyond the shared contract."""

from __future__ import annotations

import pytest
import torch

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


def test_what_does_not_pair_up_is_named() -> None:
    one, two, three = _maps((2, 3, 4, 4)), _maps(*[(2, 3, 4, 4)] * 2), _maps(*[(2, 3, 4, 4)] * 3)
    four = _maps(*[(2, 3, 4, 4)] * 4)
    with pytest.raises(ValueError, match=r"student.intermediate holds 3 map\(s\); flows='chain'"):
        FlowMatrixLoss()(three, two)
    with pytest.raises(
        ValueError, match=r"needs at least 2 maps, but teacher.intermediate holds 1"
    ):
        FlowMatrixLoss("chain")(two, one)
    with pytest.raises(ValueError, match="as many flows, got 1 and 2 from 2 and 4 maps"):
        FlowMatrixLoss()(two, four)
    with pytest.raises(ValueError, match="from 3 to 3 channels in the student and from 3 to 5"):
        FlowMatrixLoss()(two, _maps((2, 3, 4, 4), (2, 5, 4, 4)))
    with pytest.raises(ValueError, match=r"student.intermediate\[0\] and \[1\] must lie on grids"):
        FlowMatrixLoss()(_maps((2, 3, 4, 4), (2, 7, 3)), two)
    with pytest.raises(ValueError, match=r"teacher.intermediate\[0\] and \[1\] must lie on grids"):
        FlowMatrixLoss()(two, _maps((2, 6, 3), (2, 7, 3)))
    adapted = FlowMatrixLoss(adapters=[None, None, None, None])
    with pytest.raises(ValueError, match=r"has 4 adapters, but reads 2 map\(s\) of the student"):
        adapted(two, two)
    with pytest.raises(TypeError, match=r"adapters\[1\] must be a module or None, got int"):
        FlowMatrixLoss(adapters=[None, 3])
    with pytest.raises(ValueError, match="flows must be one of pairs, chain, got 'stages'"):
        FlowMatrixLoss("stages")


def test_from_features_adapts_what_differs() -> None:
    student = _maps((2, 3, 4, 4), (2, 5, 9), (2, 7, 4), (2, 6))
    teacher = _maps((2, 3, 4, 4), (2, 4, 4, 4), (2, 7, 8), (2, 6))
    with pytest.raises(ValueError, match=r"build it with FlowMatrixLoss\.from_features"):
        FlowMatrixLoss("chain", layer=[0, 3, 2])(student, teacher)
    criterion = FlowMatrixLoss.from_features(student, teacher, layer=[0, 3, 2], flows="chain")
    kinds = [type(adapter).__name__ for adapter in criterion.adapters]
    assert kinds == ["Identity", "Identity", "ConvAdapter"]
    adapted = [*student.intermediate]
    adapted[2] = criterion.adapters[2](student.intermediate[2])
    plain = FlowMatrixLoss("chain", layer=[0, 3, 2])
    torch.testing.assert_close(criterion(student, teacher), plain(adapted, teacher))


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
