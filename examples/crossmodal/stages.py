"""Which of a network's stages a method sees, and the criteria that choose or adapt them."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from structkd import ConvAdapter, Features
from structkd.criteria._maps import channels
from structkd.criteria.base import Criterion, Input

Layers = Literal["one", "all"]


def stages(names: list[str], layers: Layers) -> list[str]:
    """Which of a model's stages to capture: all, or the last but one (the only one of one)."""
    return names if layers == "all" else [names[max(len(names) - 2, 0)]]


def one_stage(feats: Features) -> Features:
    """Features of all stages cut down to the last stage but one."""
    maps = feats.intermediate
    return feats.replace(intermediate=(maps[max(len(maps) - 2, 0)],))


class OneStage(Criterion):
    """Hands a criterion the last stage but one where every stage was captured."""

    def __init__(self, criterion: Criterion) -> None:
        super().__init__()
        self.criterion = criterion

    def terms(
        self, student: Input, teacher: Input, target: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The wrapped criterion's terms."""
        if not isinstance(student, Features) or not isinstance(teacher, Features):
            raise TypeError("student and teacher must be Features")
        return self.criterion.terms(one_stage(student), one_stage(teacher), target)


def regressor(convolution: ConvAdapter) -> nn.Module:
    """The CRD benchmark's map to the teacher's channels: a convolution, batch norm, ReLU.

    The benchmark's weights need the norm: with a bare convolution, FitNets at weight 100 and FSP
    at 50 diverge within a few steps of learning rate 0.1.
    """
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU())


class AdaptedStages(Criterion):
    """Brings every student map to the teacher's channels by a regressor, trained with it.

    For criteria that compare channel by channel. Built from two example forward passes; a stage
    whose channels agree is left as it is.
    """

    reads = ("intermediate",)

    def __init__(self, criterion: Criterion, feats_s: Features, feats_t: Features) -> None:
        super().__init__()
        self.criterion = criterion
        widths = [
            (channels(s), channels(t))
            for s, t in zip(feats_s.intermediate, feats_t.intermediate, strict=False)
        ]
        self.adapters = nn.ModuleList(
            nn.Identity() if width_s == width_t else regressor(ConvAdapter(width_s, width_t))
            for width_s, width_t in widths
        )

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        """The wrapped criterion's terms of the adapted maps."""
        spare = student.intermediate[len(self.adapters) :]  # for the criterion to refuse
        adapted = [
            _adapted(adapter, value)
            for adapter, value in zip(self.adapters, student.intermediate, strict=False)
        ]
        student = student.replace(intermediate=(*adapted, *spare))
        return self.criterion.terms(student, teacher, target)


def _adapted(adapter: nn.Module, features: Tensor) -> Tensor:
    if features.dim() == 4:
        adapted: Tensor = adapter(features)
        return adapted
    # Tokens are a map one pixel high.
    row: Tensor = adapter(features.transpose(1, 2).unsqueeze(2))
    return row.squeeze(2).transpose(1, 2)
