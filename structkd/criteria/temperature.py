"""Soft-label distillation whose temperature is learned against the student."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from structkd._checks import number, whole
from structkd.criteria._fields import pair
from structkd.criteria.base import Criterion
from structkd.criteria.logits import softened_divergence
from structkd.features import Features

# Where the published code starts: sigmoid(1), which is a temperature of 15.6 in (1, 21).
START = 1.0


class CurriculumTemperatureLoss(Criterion):
    r"""Soft-label distillation at a learned temperature that makes the task ever harder.

    .. math::
        L = \frac{T^2}{B} \sum_b KL\left(
            \mathrm{softmax}(t_b / T) \,\|\, \mathrm{softmax}(s_b / T) \right), \qquad
        T = low + (high - low) \, \mathrm{sigmoid}(\hat T)

    :math:`\hat T` is one learned number for all samples (the paper's global version). The student
    descends L; the gradient of T is multiplied by

    .. math::
        -\lambda(e) = -\tfrac{1}{2} \lambda \left( 1 - \cos \frac{\pi \min(e, E)}{E} \right)

    so that one optimizer step makes T ascend it. T^2 is part of what T ascends, as in the published
    code. The epoch e counts from 1 and is a buffer, so a resumed run goes on where it stopped: call
    :meth:`step_epoch` at the end of every epoch. Term: ``CTKD``.

    A weight decay of the optimizer pulls :math:`\hat T` towards 0 like any parameter, and in the
    published code it does.

    Args:
        low: Lower bound of T, > 0.
        high: Upper bound of T, > ``low``. The published code writes (1, 21) as t_start 1, t_end 20.
        ramp_epochs: E, the epochs until the reversal has its full strength.
        strength: lambda >= 0, the full strength.
        gather: Accepted by every criterion; without effect here, where no sample meets another.

    Shape:
        logits ``(B, K)`` of both, any float dtype; output a scalar in float32 (float64 for float64
        inputs).

    Raises:
        ValueError: If the class counts differ, the bounds are not in order, or an argument is out
            of range.

    References:
        Li et al., *Curriculum Temperature for Knowledge Distillation*, 2023.

    Example:
        >>> criterion = CurriculumTemperatureLoss(ramp_epochs=10)
        >>> loss = criterion(torch.randn(4, 10), torch.randn(4, 10))
        >>> criterion.step_epoch()
        >>> print(f"{criterion.temperature:.2f} {criterion.reversal:.3f}")
        15.62 0.095
    """

    reads = ("logits",)
    epoch: Tensor

    def __init__(
        self,
        *,
        low: float = 1.0,
        high: float = 21.0,
        ramp_epochs: int = 10,
        strength: float = 1.0,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        self.low = number("low", low, above=0)
        self.high = number("high", high, above=self.low)
        self.ramp_epochs = whole("ramp_epochs", ramp_epochs)
        self.strength = number("strength", strength, at_least=0)
        self.raw_temperature = nn.Parameter(torch.tensor(START))
        self.register_buffer("epoch", torch.tensor(1))

    @classmethod
    def arguments(
        cls, feats_s: Features, feats_t: Features, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Checks that both networks score the same classes; the constructor needs no width."""
        pair(feats_s, feats_t, "logits")
        return {}

    @property
    def temperature(self) -> Tensor:
        """The present temperature, a scalar in ``[low, high]`` outside the graph."""
        return self._bounded().detach()

    @property
    def reversal(self) -> Tensor:
        """The present strength of the reversal, a scalar in ``[0, strength]``."""
        raw = self.raw_temperature
        progress = self.epoch.to(raw.dtype).clamp(0, self.ramp_epochs) / self.ramp_epochs
        return 0.5 * self.strength * (1 - torch.cos(math.pi * progress))

    def epoch_ended(self) -> None:
        """Moves the ramp on by one epoch; :meth:`step_epoch` calls it, in sums too."""
        self.epoch += 1

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        logits_s, logits_t = pair(student, teacher, "logits")
        bounded = self._bounded()
        constant = bounded.detach()
        # The bracket is exactly 0: the value is T's, the gradient is -reversal times T's.
        reversed_ = constant - self.reversal * (bounded - constant)
        return {"CTKD": softened_divergence(logits_s, logits_t, reversed_)}

    def extra_repr(self) -> str:
        return (
            f"low={self.low}, high={self.high}, ramp_epochs={self.ramp_epochs}, "
            f"strength={self.strength}"
        )

    def _bounded(self) -> Tensor:
        return self.low + (self.high - self.low) * torch.sigmoid(self.raw_temperature)
