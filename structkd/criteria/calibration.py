"""Cross-layer distillation with learned layer association (SemCKD)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structkd._checks import whole
from structkd.criteria._maps import channels, to_common_size
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
        gather: Compute similarities over the batch of all processes.

    Shape:
        maps ``(B, C, H, W)``, any float dtype, B = batch_size; output a scalar in float32 (float64
        for float64 inputs).

    Raises:
        ValueError: If the batch, the number of maps or their channels are not those it was built
            for.

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
    min_batch = 2
    ranks = {"intermediate": ((4,), "4-D (B, C, H, W); reshape tokens to maps")}

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        batch_size: int,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
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
    def from_features(
        cls, feats_s: Features, feats_t: Features, **options: Any
    ) -> SemanticCalibrationLoss:
        """Builds the criterion for two example passes, on their device.

        Args:
            feats_s: A batch of the student's features, of the size that training uses unless
                ``batch_size`` says otherwise.
            feats_t: A batch of the teacher's.
            **options: Any keyword of the constructor.
        """
        if not feats_s.intermediate or not feats_t.intermediate:
            raise ValueError(
                "from_features needs intermediate maps of both: name the layers, "
                "FeatureCapture(net, intermediate=[...])"
            )
        first = feats_s.intermediate[0]
        ranks = world_size() if options.get("gather", False) else 1
        options.setdefault("batch_size", first.shape[0] * ranks)
        widths_s, widths_t = (
            [channels(value) for value in feats.intermediate] for feats in (feats_s, feats_t)
        )
        return cls(widths_s, widths_t, **options).to(first.device)

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        self._check(student.intermediate, self.student_channels, "student")
        self._check(teacher.intermediate, self.teacher_channels, "teacher")
        attention = self.attention(student.intermediate, teacher.intermediate)
        gaps = [
            _sample_gaps(projection, map_s, map_t)
            for map_s, row in zip(student.intermediate, self.projections, strict=True)
            for projection, map_t in zip(row, teacher.intermediate, strict=True)  # type: ignore[call-overload]
        ]
        weighted = attention.flatten(1) * torch.stack(gaps, dim=1)
        return {"SemCKD": weighted.sum(dim=1).mean() / len(self.student_channels)}

    def attention(self, maps_s: Sequence[Tensor], maps_t: Sequence[Tensor]) -> Tensor:
        """Returns alpha ``(B, student layers, teacher layers)``, which sums to 1 over the last."""
        queries = [
            F.normalize(query(_similarities(value)), dim=1)
            for query, value in zip(self.queries, maps_s, strict=True)
        ]
        keys = [
            F.normalize(key(_similarities(value)), dim=1)
            for key, value in zip(self.keys, maps_t, strict=True)
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
        return f"batch_size={self.batch_size}"


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
    map_s, map_t = to_common_size(map_s, map_t)
    gap: Tensor = projection(map_s) - map_t
    return gap.square().mean(dim=(1, 2, 3))
