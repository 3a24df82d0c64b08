"""A criterion whose value depends on how many epochs it was told of."""

from __future__ import annotations

import torch
from torch import Tensor

from structkd import Criterion, Features


class Scheduled(Criterion):
    """A gap of the logits that weighs more in every epoch."""

    reads = ("logits",)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ended", torch.tensor(0))

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        gap = (student.logits - teacher.logits).abs().mean()
        return {"scheduled": (1 + self.ended) * gap}

    def epoch_ended(self) -> None:
        self.ended += 1
