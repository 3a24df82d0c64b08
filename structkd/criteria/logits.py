"""Criteria on class scores."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from structkd._checks import number
from structkd.criteria.base import Criterion, pair
from structkd.features import Features


class KDLoss(Criterion):
    r"""Soft-label distillation.

    .. math::
        L = \frac{\tau^2}{B} \sum_b KL\left(
            \mathrm{softmax}(t_b / \tau) \,\|\, \mathrm{softmax}(s_b / \tau) \right)

    Term: ``KD``.

    Args:
        temperature: tau > 0.

    Shape:
        logits ``(B, K)`` of both, any float dtype; output a scalar in float32 (float64 for float64
        inputs).

    Raises:
        ValueError: If the class counts differ or ``temperature`` is not positive.

    References:
        Hinton, Vinyals & Dean, *Distilling the Knowledge in a Neural Network*, 2015.

    Example:
        >>> import torch
        >>> KDLoss(temperature=4.0)(torch.eye(3), torch.eye(3))
        tensor(0.)
    """

    reads = ("logits",)

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = number("temperature", temperature, above=0)

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        logits_s, logits_t = pair(student, teacher, "logits")
        divergence = F.kl_div(
            F.log_softmax(logits_s / self.temperature, dim=1),
            F.log_softmax(logits_t / self.temperature, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        return {"KD": self.temperature**2 * divergence}

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
