"""The flow between the layers of a network (FSP)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from structkd._checks import choice, describe
from structkd.criteria._maps import (
    Layers,
    adapted,
    channels,
    checked_layers,
    common_positions,
    map_pairs,
)
from structkd.criteria.base import Criterion
from structkd.features import Features
from structkd.projectors import StackedLinear, linear_map

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
        adapters: For every map of the student that is read, a module for maps ``(B, C, H, W)`` that
            brings it to the teacher's channels, or None. FSP compares channel by channel, so by
            default there is a 1x1 convolution wherever the channels of the first call differ.
        layer: Positions in ``Features.intermediate`` of the maps to read; all by default.
        gather: Accepted by every criterion; without effect here, as samples are not compared.

    Shape:
        maps ``(B, C, H, W)``, tokens ``(B, N, C)`` or rows ``(B, C)``, the k-th of the student with
        as many channels as the teacher's once adapted, any float dtype; output a scalar in float32
        (float64 for float64 inputs).

    Raises:
        ValueError: If the numbers of maps, or of adapters, differ or leave one without its partner,
            the ends of a flow share no grid, or channels are not those of the first call.
        TypeError: If an adapter is no module.

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

    def __init__(
        self,
        flows: str = "pairs",
        *,
        adapters: Sequence[nn.Module | None] | None = None,
        layer: Layers = None,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        self.flows = choice("flows", flows, FLOWS)
        self.layer = checked_layers(layer)
        # One parameter for all 1x1 convolutions, or the modules that were given.
        self.convs = StackedLinear(bias=True) if adapters is None else None
        self.adapters = None if adapters is None else nn.ModuleList(_modules(adapters))

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        pairs = map_pairs(student, teacher, type(self).__name__, self.layer)
        maps_t = [map_t for _, map_t in pairs]
        matrices_s = self._matrices(self._adapted(pairs), "student")
        gaps = [
            (flow_s - flow_t).square().mean()
            for flow_s, flow_t in zip(matrices_s, self._matrices(maps_t, "teacher"), strict=True)
        ]
        return {"FSP": torch.stack(gaps).sum()}

    def _adapted(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Returns the student's maps with the teacher's channels."""
        if self.adapters is not None:
            if len(self.adapters) != len(pairs):
                raise ValueError(
                    f"adapters has {len(self.adapters)} module(s), but {len(pairs)} map(s) of the "
                    "student are read: give one or None for each"
                )
            return [
                adapted(adapter, *pair) for adapter, pair in zip(self.adapters, pairs, strict=True)
            ]
        assert self.convs is not None
        widths = [(channels(map_s), channels(map_t)) for map_s, map_t in pairs]
        unequal = [width for width in widths if width[0] != width[1]]
        heads = iter(self.convs(unequal, pairs[0][0]))
        return [
            map_s if width[0] == width[1] else linear_map(map_s, *next(heads))
            for (map_s, _), width in zip(pairs, widths, strict=True)
        ]

    def _matrices(self, maps: Sequence[Tensor], name: str) -> list[Tensor]:
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


def _modules(adapters: Sequence[nn.Module | None]) -> list[nn.Module]:
    for position, adapter in enumerate(adapters):
        if adapter is not None and not isinstance(adapter, nn.Module):
            raise TypeError(
                f"adapters[{position}] must be a module or None, got {describe(adapter)}"
            )
    return [nn.Identity() if adapter is None else adapter for adapter in adapters]


def _flow(first: Tensor, last: Tensor, names: str) -> Tensor:
    """Returns G ``(B, C_1, C_2)``."""
    first, last = (
        rearrange(end, "b c h w -> b c (h w)") for end in common_positions(first, last, names)
    )
    return torch.bmm(first, last.transpose(1, 2)) / first.shape[2]
