"""The flow between the layers of a network (FSP)."""

from __future__ import annotations

import torch
from torch import Tensor

from structkd._checks import choice
from structkd.criteria._maps import as_map, common_positions
from structkd.criteria.base import Criterion
from structkd.features import Features

FLOWS = ("pairs", "chain")


class FlowMatrixLoss(Criterion):
    r"""Makes the student's flows from layer to layer match the teacher's (FSP).

    A flow has two ends, maps :math:`F_1, F_2` of one network, and the matrix

    .. math:: G_{ij} = \frac{1}{HW} \sum_{h,w} F_{1,i,h,w} \, F_{2,j,h,w}

    of shape ``(C_1, C_2)``. The loss is the mean squared difference of the two networks' matrices,
    over samples and entries, summed over flows. Where the two ends differ in size, the larger is
    average-pooled to the smaller; nothing is resized between the networks, because G does not
    depend on the size. Term: ``FSP``.

    Args:
        flows: How ``Features.intermediate`` lists the flows. ``pairs``: maps (0, 1), (2, 3), ...
            are the first and the last of a stage, as in the paper. ``chain``: each map and the
            next, (0, 1), (1, 2), ..., as in the CRD benchmark.

    Shape:
        maps ``(B, C, H, W)`` or tokens ``(B, N, C)``, the k-th of the student with as many
        channels as the teacher's, any float dtype; output a scalar in float32 (float64 for float64
        inputs).

    Raises:
        ValueError: If the numbers of maps differ or leave one without its partner, the ends of a
            flow are of two kinds, or the matrices of student and teacher differ in shape.

    References:
        Yim et al., *A Gift from Knowledge Distillation*, 2017, Eq. 1-2, as a mean over entries,
        which is the CRD benchmark's.

    Example:
        >>> student = [torch.ones(2, 8, 8, 8), torch.ones(2, 16, 4, 4)]
        >>> teacher = [torch.ones(2, 8, 4, 4), torch.zeros(2, 16, 4, 4)]
        >>> FlowMatrixLoss()(student, teacher)
        tensor(1.)
    """

    reads = ("intermediate",)

    def __init__(self, flows: str = "pairs") -> None:
        super().__init__()
        self.flows = choice("flows", flows, FLOWS)

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        matrices_s = self._matrices(student, "student")
        matrices_t = self._matrices(teacher, "teacher")
        if len(matrices_s) != len(matrices_t):
            raise ValueError(
                f"student and teacher must have as many flows, got {len(matrices_s)} and "
                f"{len(matrices_t)} from {len(student.intermediate)} and "
                f"{len(teacher.intermediate)} maps; capture as many layers of both"
            )
        gaps = []
        for position, (flow_s, flow_t) in enumerate(zip(matrices_s, matrices_t, strict=True)):
            if flow_s.shape != flow_t.shape:
                raise ValueError(
                    f"flow {position} goes from {flow_s.shape[1]} to {flow_s.shape[2]} channels in "
                    f"the student and from {flow_t.shape[1]} to {flow_t.shape[2]} in the teacher; "
                    "FSP compares channel by channel: capture layers with equal channels, or bring "
                    "the student's maps to the teacher's with structkd.ConvAdapter first"
                )
            gaps.append((flow_s - flow_t).square().mean())
        return {"FSP": torch.stack(gaps).sum()}

    def _matrices(self, features: Features, name: str) -> list[Tensor]:
        maps = features.intermediate
        if len(maps) < 2 or (self.flows == "pairs" and len(maps) % 2):
            wanted = "maps in pairs, both ends of each stage" if self.flows == "pairs" else "2 maps"
            hint = "; flows='chain' takes each map and the next" if self.flows == "pairs" else ""
            raise ValueError(
                f"flows={self.flows!r} needs at least {wanted}, but {name}.intermediate holds "
                f"{len(maps)} map(s){hint}"
            )
        starts = range(0, len(maps) - 1, 2 if self.flows == "pairs" else 1)
        return [
            _flow(maps[k], maps[k + 1], f"{name}.intermediate[{k}] and [{k + 1}]") for k in starts
        ]

    def extra_repr(self) -> str:
        return f"flows={self.flows!r}"


def _flow(first: Tensor, last: Tensor, names: str) -> Tensor:
    """Returns G ``(B, C_1, C_2)``."""
    first, last = (as_map(end).flatten(2) for end in common_positions(first, last, names))
    return torch.bmm(first, last.transpose(1, 2)) / first.shape[2]
