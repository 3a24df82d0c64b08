"""Cross-layer distillation with learned layer association (SemCKD)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
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
from structkd.criteria._rows import unit
from structkd.criteria.base import Criterion
from structkd.distributed import world_size
from structkd.features import Features


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
    samples are told apart by their place in the batch. It is kept: use ``drop_last=True``.

    Args:
        student_channels: Channels of every student map, in order.
        teacher_channels: Channels of every teacher map, in order; the counts may differ.
        batch_size: The batch size it is trained with, over all processes with ``gather``, >= 2.
        layer: Position, or several, in ``Features.intermediate`` of the maps to read; all by
            default.
        gather: Compute similarities over the batch of all processes.

    Shape:
        maps ``(B, C, H, W)``, tokens ``(B, N, C)`` or rows ``(B, C)``, of any kinds, any float
        dtype, B = batch_size; output a scalar in float32 (float64 for float64 inputs).

    Raises:
        ValueError: If the batch, the number of maps or their channels are not those it was built
            for, or tokens that would need a grid have none.

    References:
        Chen et al., *Cross-Layer Distillation with Semantic Calibration*, AAAI 2021, with the
        networks and the mean over student layers of the authors' code; its weight is 400.

    Example:
        >>> student = [torch.randn(4, 8, 8, 8), torch.randn(4, 16, 4, 4)]
        >>> teacher = [torch.randn(4, 16, 8, 8), torch.randn(4, 32, 4, 4)]
        >>> criterion = SemanticCalibrationLoss([8, 16], [16, 32], batch_size=4)
        >>> criterion(student, teacher).shape
        torch.Size([])
    """

    reads = ("intermediate",)
    couples = True
    min_batch = 2

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        batch_size: int,
        layer: Layers = None,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        self.layer = checked_layers(layer)
        self.student_channels = _widths("student_channels", student_channels)
        self.teacher_channels = _widths("teacher_channels", teacher_channels)
        self.batch_size = whole("batch_size", batch_size, at_least=2)
        self.queries = nn.ModuleList(_embedding(batch_size) for _ in self.student_channels)
        self.keys = nn.ModuleList(_embedding(batch_size) for _ in self.teacher_channels)
        # One row of projections a student layer.
        self.projections = nn.ModuleList(
            nn.ModuleList(_projection(width_s, width_t) for width_t in self.teacher_channels)
            for width_s in self.student_channels
        )

    @classmethod
    def arguments(
        cls, feats_s: Features, feats_t: Features, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Returns the channels and the batch size of two example passes.

        The batch must be of the size that training uses unless ``batch_size`` is given.
        """
        layer = options.get("layer")
        maps_s = picked_maps(feats_s, layer, "student")
        maps_t = picked_maps(feats_t, layer, "teacher")
        ranks = world_size() if options.get("gather", False) else 1
        return {
            "student_channels": [channels(value) for value in maps_s],
            "teacher_channels": [channels(value) for value in maps_t],
            "batch_size": maps_s[0].shape[0] * ranks,
        }

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        maps_s = picked_maps(student, self.layer, "student")
        maps_t = picked_maps(teacher, self.layer, "teacher")
        self._check(maps_s, self.student_channels, "student")
        self._check(maps_t, self.teacher_channels, "teacher")
        attention = self.attention(maps_s, maps_t)
        gaps = [
            _sample_gaps(projection, map_s, map_t)
            for map_s, row in zip(maps_s, self.projections, strict=True)
            for projection, map_t in zip(row, maps_t, strict=True)  # type: ignore[call-overload]
        ]
        weighted = attention.flatten(1) * torch.stack(gaps, dim=1)
        return {"SemCKD": weighted.sum(dim=1).mean() / len(self.student_channels)}

    def attention(self, maps_s: Sequence[Tensor], maps_t: Sequence[Tensor]) -> Tensor:
        """Returns alpha ``(B, student layers, teacher layers)``, which sums to 1 over the last."""
        queries = [
            unit(query(_similarities(value)))
            for query, value in zip(self.queries, maps_s, strict=True)
        ]
        keys = [
            unit(key(_similarities(value))) for key, value in zip(self.keys, maps_t, strict=True)
        ]
        energy = torch.bmm(torch.stack(queries, dim=1), torch.stack(keys, dim=2))
        return energy.softmax(dim=2)

    def _check(self, maps: Sequence[Tensor], widths: Sequence[int], name: str) -> None:
        found = tuple(channels(value) for value in maps)
        if found != tuple(widths):
            raise ValueError(
                f"{name}.intermediate holds maps of {found} channels, expected "
                f"{name}_channels={tuple(widths)}; build the criterion for the layers it meets "
                "with SemanticCalibrationLoss.from_features(feats_s, feats_t)"
            )
        if maps[0].shape[0] != self.batch_size:
            raise ValueError(
                f"SemanticCalibrationLoss was built for batch_size={self.batch_size}, got "
                f"{maps[0].shape[0]}: its attention reads a similarity to every sample; use "
                "drop_last=True in the DataLoader"
            )

    def extra_repr(self) -> str:
        return f"batch_size={self.batch_size}, layer={self.layer}"


def _widths(name: str, values: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or not values:
        raise TypeError(f"{name} must be a list with the channels of every map, got {values!r}")
    return tuple(whole(f"{name}[{i}]", value) for i, value in enumerate(values))


def _embedding(batch_size: int) -> nn.Module:
    width = max(1, batch_size // 4)
    return nn.Sequential(nn.Linear(batch_size, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))


def _projection(width_s: int, width_t: int) -> nn.Module:
    middle = 2 * width_t
    return nn.Sequential(
        nn.Conv2d(width_s, middle, 1, bias=False),
        nn.BatchNorm2d(middle),
        nn.ReLU(),
        nn.Conv2d(middle, middle, 3, padding=1, bias=False),
        nn.BatchNorm2d(middle),
        nn.ReLU(),
        nn.Conv2d(middle, width_t, 1, bias=False),
    )


def _similarities(features: Tensor) -> Tensor:
    rows = features.flatten(1)
    return rows @ rows.T


def _sample_gaps(projection: nn.Module, map_s: Tensor, map_t: Tensor) -> Tensor:
    """Returns every sample's mean squared error, ``(B,)``."""
    map_s, map_t = common_positions(map_s, map_t, "student and teacher intermediate")
    gap: Tensor = projection(map_s) - map_t
    return reduce(gap.square(), "b c h w -> b", "mean")
