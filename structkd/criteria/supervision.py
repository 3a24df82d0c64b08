"""Supervision by labels (SRM): the task's own loss, as a criterion."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from structkd._checks import labels, number
from structkd.criteria.base import Criterion, missing
from structkd.criteria.numerics import labelled_mean
from structkd.distributed import Shards
from structkd.features import Features


class SupervisionLoss(Criterion):
    r"""Cross-entropy of the student's logits with the labels, over the rows that have one.

    With :math:`\mathcal{Y}` the rows whose target is not -100,

    .. math::
        L = -\frac{1}{|\mathcal{Y}|} \sum_{b \in \mathcal{Y}} \log \mathrm{softmax}(s_b)_{y_b}

    It is what ``torch.nn.functional.cross_entropy`` computes, as a criterion that can stand in a
    sum. A batch without a label costs exactly 0, with a gradient of 0, where torch's mean is NaN.
    It reads the student only: the teacher's features may be empty. Term: ``SRM``.

    Args:
        label_smoothing: Share of a label's mass, in [0, 1], that is spread over all classes.
        gather: Take the mean over the labelled rows of all processes. Value and gradient under
            ``DistributedDataParallel`` then equal the single-process run, whatever number of labels
            a rank holds, none included. Without it every rank takes the mean of its own, which is
            the same where all rows have labels. It is off by default, like every criterion's,
            because a call is then a collective one: a validation on rank 0 alone would wait for
            the others for ever.

    Shape:
        the student's logits ``(B, K)``, any float dtype; target ``(B,)`` int64 in ``[0, K)`` or
        -100, or probabilities ``(B, K)``, where every row is labelled; output a scalar in float32
        (float64 for float64 inputs).

    Raises:
        ValueError: If the target is missing, out of range or of another shape, or
            ``label_smoothing`` is out of range.
        TypeError: If the target is neither whole numbers nor probabilities.

    References:
        Si et al., *A Dimensional Structure based Knowledge Distillation Method for Cross-Modal
        Learning*, Eq. 1-2.

    Example:
        >>> student = Features(logits=torch.zeros(3, 2))
        >>> target = torch.tensor([0, -100, 1])  # the second row has no label
        >>> SupervisionLoss()(student, Features(), target)
        tensor(0.6931)
    """

    reads = ("logits",)
    reads_teacher: ClassVar[bool] = False
    over_ranks = "sums"

    def __init__(self, *, label_smoothing: float = 0.0, gather: bool = False) -> None:
        super().__init__(gather=gather)
        self.label_smoothing = number("label_smoothing", label_smoothing, at_least=0, at_most=1)

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None, shards: Shards
    ) -> dict[str, Tensor]:
        logits = student.logits
        if logits is None:
            raise ValueError(missing("SupervisionLoss", "student.logits", student, "logits"))
        if logits.shape[1] < 2:
            raise ValueError(
                "SupervisionLoss needs logits of at least 2 classes, got 1, of which the "
                "cross-entropy is always 0: for yes-or-no labels take "
                "torch.nn.functional.binary_cross_entropy_with_logits in the loop"
            )
        if target is not None and target.is_floating_point():
            if target.shape != logits.shape:
                raise ValueError(
                    f"target probabilities must have shape {tuple(logits.shape)}, "
                    f"got {tuple(target.shape)}"
                )
            wanted, labelled = target.to(logits.dtype), torch.ones_like(logits[:, 0]) > 0
        else:
            wanted, labelled = labels(target, *logits.shape, reader="SupervisionLoss")
        return {
            "SRM": labelled_cross_entropy(
                logits, wanted, labelled, shards, label_smoothing=self.label_smoothing
            )
        }


def labelled_cross_entropy(
    logits: Tensor,
    target: Tensor,
    labelled: Tensor,
    shards: Shards,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Returns the mean cross-entropy of the rows that have a label, 0 where none has.

    Args:
        logits: ``(B, K)``.
        target: Class indices ``(B,)`` in range, of any class where there is no label; or
            probabilities ``(B, K)``.
        labelled: Which rows have a label, ``(B,)`` bool.
        shards: The mean is over the rows of all its processes.
        label_smoothing: Share of a label's mass that is spread over all classes.
    """
    costs = F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
    return labelled_mean(costs, labelled, shards)
