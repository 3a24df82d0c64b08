"""Cross-layer distillation with learned layer association (SemCKD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn

from structkd._checks import whole
from structkd.criteria._maps import (
    Layers,
    channels,
    checked_layers,
    common_positions,
    picked_maps,
)
from structkd.criteria.base import Criterion
from structkd.criteria.numerics import unit
from structkd.features import Features
from structkd.projectors import LazyHead, StackedLinear, lazy_norm, linear_map, shaped


class SemanticCalibrationLoss(Criterion):
    r"""Lets every student layer choose the teacher layers that it learns from (SemCKD).

    For student layers l and teacher layers m, sample i and flattened maps f,

    .. math::
        A^l = f^l {f^l}^T \in R^{B \times B}, \quad
        q^l_i = \frac{Q_l(A^l_i)}{\|Q_l(A^l_i)\|}, \quad
        k^m_i = \frac{K_m(A^m_i)}{\|K_m(A^m_i)\|}, \quad
        \alpha^{lm}_i = \mathrm{softmax}_m (q^l_i \cdot k^m_i)

    .. math::
        L = \frac{1}{B L_s} \sum_i \sum_{l, m} \alpha^{lm}_i \,
            \mathrm{mean} \, (P_{lm}(F^l_i) - F^m_i)^2

    with :math:`L_s` student layers. Q and K are MLPs (B to 2d, ReLU, to d = B // 4). P is a 1x1, a
    3x3 and a 1x1 convolution without bias, batch norm and ReLU between, twice as wide as the
    teacher's map. Maps of other sizes are average-pooled to a common size before P. Gradients go
    through the attention too. Term: ``SemCKD``.

    Q and K read a whole row of similarities, so the batch size is part of the published model, and
    a sample's place in the batch matters. This is kept as published: use ``drop_last=True``.

    Args:
        batch_size: The batch size it is trained with, over all processes with ``gather``, >= 2; by
            default that of the first call.
        layer: Position, or several, in ``Features.intermediate`` of the maps to read; all by
            default.
        gather: Compute similarities over the batch of all processes.

    Shape:
        maps ``(B, C, H, W)``, tokens ``(B, N, C)`` or rows ``(B, C)``, of any kinds, any float
        dtype, B = batch_size; output a scalar in float32 (float64 for float64 inputs).

    Raises:
        ValueError: If the batch, the number of maps or their channels are not those of the first
            call, or tokens that would need a grid have none.

    References:
        Chen et al., *Cross-Layer Distillation with Semantic Calibration*, AAAI 2021, with the
        networks and the mean over student layers of the authors' code; its weight is 400.

    Example:
        >>> student = [torch.randn(4, 8, 8, 8), torch.randn(4, 16, 4, 4)]
        >>> teacher = [torch.randn(4, 16, 8, 8), torch.randn(4, 32, 4, 4)]
        >>> criterion = SemanticCalibrationLoss()
        >>> criterion(student, teacher).shape
        torch.Size([])
    """

    reads = ("intermediate",)
    over_ranks = "gathered"
    min_batch = 2

    def __init__(
        self,
        *,
        batch_size: int | None = None,
        layer: Layers = None,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        self.layer = checked_layers(layer)
        self.batch_size = (
            None if batch_size is None else whole("batch_size", batch_size, at_least=2)
        )
        self.queries = _Embeddings()
        self.keys = _Embeddings()
        self.projections = _Projections()

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        maps_s = picked_maps(student, self.layer, "student")
        maps_t = picked_maps(teacher, self.layer, "teacher")
        if self.batch_size not in (None, len(maps_s[0])):
            raise ValueError(
                f"SemanticCalibrationLoss was made for a batch of {self.batch_size}, the first that"
                f" it met or its batch_size, got {len(maps_s[0])}: its attention reads a similarity"
                " to every sample; set batch_size=..., and drop_last=True in the DataLoader"
            )
        attention = self.attention(maps_s, maps_t)
        gaps = [
            reduce((projected - map_t).square(), "b c h w -> b", "mean")
            for projected, map_t in self.projections(maps_s, maps_t)
        ]
        self.batch_size = len(maps_s[0])  # its networks have their shape now
        weighted = attention.flatten(1) * torch.stack(gaps, dim=1)
        return {"SemCKD": weighted.sum(dim=1).mean() / len(maps_s)}

    def attention(self, maps_s: Sequence[Tensor], maps_t: Sequence[Tensor]) -> Tensor:
        """Returns alpha ``(B, student layers, teacher layers)``, which sums to 1 over the last."""
        queries = self.queries([_similarities(value) for value in maps_s])
        keys = self.keys([_similarities(value) for value in maps_t])
        energy = torch.bmm(torch.stack(queries, dim=1), torch.stack(keys, dim=2))
        return energy.softmax(dim=2)


class _Embeddings(nn.Module):
    """An MLP a layer, from similarities ``(B, B)`` to unit rows ``(B, B // 4)``."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = StackedLinear(bias=True), StackedLinear(bias=True)

    def forward(self, layers: Sequence[Tensor]) -> list[Tensor]:
        batch = len(layers[0])
        width = max(1, batch // 4)
        hidden = self.hidden([(batch, 2 * width)] * len(layers), layers[0])
        out = self.out([(2 * width, width)] * len(layers), layers[0])
        return [
            unit(F.linear(F.relu(F.linear(rows, *first)), *second))
            for rows, first, second in zip(layers, hidden, out, strict=True)
        ]


class _Projections(LazyHead):
    """Of every student layer to every teacher layer: 1x1, 3x3 and 1x1, with batch norm and ReLU.

    One parameter holds the weights of all pairs, because their number is known at the first call
    only: as :class:`StackedLinear` stores them, the norms' one after another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.mix, self.expand = (StackedLinear(bias=False) for _ in range(3))
        self.norms = nn.ModuleList(lazy_norm(nn.LazyBatchNorm2d) for _ in range(2))

    def initialize_parameters(self, maps_s: Sequence[Tensor], maps_t: Sequence[Tensor]) -> None:
        total = 2 * len(maps_s) * sum(channels(value) for value in maps_t)
        for norm in self.norms:
            shaped(norm, maps_s[0].new_empty(1, total, 1, 1))

    def forward(
        self, maps_s: Sequence[Tensor], maps_t: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Returns every student map at the teacher's channels, and the teacher's, of one size."""
        pairs = [(map_s, map_t) for map_s in maps_s for map_t in maps_t]
        widths = [(channels(map_s), channels(map_t)) for map_s, map_t in pairs]
        example = maps_s[0]
        heads = zip(
            self.reduce([(width_s, 2 * width) for width_s, width in widths], example),
            self.mix([(9 * 2 * width, 2 * width) for _, width in widths], example),
            self.expand([(2 * width, width) for _, width in widths], example),
            strict=True,
        )
        if self.training:
            for norm in self.norms:
                norm.num_batches_tracked.add_(1)  # type: ignore[operator]
        found, start = [], 0
        for pair, ((first, _), (middle, _), (last, _)) in zip(pairs, heads, strict=True):
            map_s, map_t = common_positions(*pair, "student and teacher intermediate")
            place = slice(start, start + len(first))
            start = place.stop
            value = F.relu(self._normed(0, linear_map(map_s, first), place))
            value = F.conv2d(value, middle.unflatten(1, (len(first), 3, 3)), padding=1)
            value = F.relu(self._normed(1, value, place))
            found.append((linear_map(value, last), map_t))
        return found

    def _normed(self, position: int, value: Tensor, place: slice) -> Tensor:
        norm = self.norms[position]
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        return F.batch_norm(
            value,
            norm.running_mean[place],
            norm.running_var[place],
            norm.weight[place],
            norm.bias[place],
            self.training,
            norm.momentum or 0.0,
            norm.eps,
        )


def _similarities(features: Tensor) -> Tensor:
    rows = features.flatten(1)
    return rows @ rows.T
