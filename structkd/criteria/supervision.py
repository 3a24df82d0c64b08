"""Supervision by labels (SRM), of images or of pixels: the task's own losses, as criteria."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from structkd._checks import NO_LABEL, class_indices, labels, number
from structkd.criteria.base import Criterion, missing
from structkd.criteria.numerics import mean_of_sum
from structkd.distributed import Shards
from structkd.features import Features

_LEAST = 1e-7  # of Dice's denominator, as in segmentation_models_pytorch


class SupervisionLoss(Criterion):
    r"""Cross-entropy of the student's logits with the labels, over the rows that have one.

    With :math:`\mathcal{Y}` the rows whose target is not -100,

    .. math::
        L = -\frac{1}{|\mathcal{Y}|} \sum_{b \in \mathcal{Y}} \log \mathrm{softmax}(s_b)_{y_b}

    It is what ``torch.nn.functional.cross_entropy`` computes, as a criterion that can stand in a
    sum. A batch without a label costs exactly 0, with a gradient of 0, where torch's mean is NaN.
    A single logit is a binary answer: its labels are 0 and 1, and L is the binary cross-entropy of
    ``sigmoid(s)``. It reads the student only: the teacher's features may be empty. Term: ``SRM``.

    Args:
        label_smoothing: Share of a label's mass, in [0, 1], that is spread over all classes.
        gather: Take the mean over the labelled rows of all processes. Value and gradient under
            ``DistributedDataParallel`` then equal the single-process run, whatever number of labels
            a rank holds, none included. Without it every rank takes the mean of its own, which is
            the same where all rows have labels. It is off by default, like every criterion's,
            because all processes must then make the call: a validation on rank 0 alone would wait
            for ever.

    Shape:
        the student's logits ``(B, K)`` or ``(B, K, H, W)``, any float dtype; target ``(B,)`` or
        ``(B, H, W)`` int64 in ``[0, K)`` or -100, or probabilities of the shape of the logits,
        where every row is labelled; output a scalar in float32 (float64 for float64 inputs).
        Logits at a fraction of the target's size are brought to it by bilinear interpolation.

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
    pixels = "labelled maps"

    def __init__(self, *, label_smoothing: float = 0.0, gather: bool = False) -> None:
        super().__init__(gather=gather)
        self.label_smoothing = number("label_smoothing", label_smoothing, at_least=0, at_most=1)

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None, shards: Shards
    ) -> dict[str, Tensor]:
        logits, binary = _two_or_more(student, "SupervisionLoss")
        if isinstance(target, Tensor) and target.is_floating_point():
            shape = logits[:, int(binary) :].shape  # as they were given
            if target.shape != shape:
                raise ValueError(
                    f"target probabilities must have shape {tuple(shape)}, "
                    f"got {tuple(target.shape)}; of class indices take target.long()"
                )
            wanted = target.to(logits.dtype)
            if binary:
                wanted = torch.cat([1 - wanted, wanted], dim=1)
        else:
            wanted = class_indices(target, logits.shape, reader="SupervisionLoss")
        smoothing = self.label_smoothing
        return {"SRM": labelled_cross_entropy(logits, wanted, shards, label_smoothing=smoothing)}


class DiceLoss(Criterion):
    r"""One minus the Dice overlap of the student's probabilities with the labels, over classes.

    With :math:`p = \mathrm{softmax}(s)` and the labels y one-hot, over the rows (the pixels of the
    whole batch) whose target is not -100,

    .. math::
        L = \frac{1}{K} \sum_{k \,:\, \sum_b y_{bk} > 0} 1 - \frac{\sum_b p_{bk} y_{bk} + c}
            {\frac{1}{2} \sum_b (p_{bk} + y_{bk}) + c}

    with c the ``smooth``. A class that no row has costs nothing, as in segmentation_models_pytorch,
    whose ``DiceLoss`` this equals. A single logit is a binary answer, by the sigmoid, and counts as
    one class. It reads the student only. Rare classes weigh as much as frequent ones, which is why
    it stands beside a cross-entropy: ``SupervisionLoss() + DiceLoss()``. Term: ``Dice``.

    Args:
        smooth: c >= 0.
        gather: Sum over the rows of all processes; otherwise every rank has an overlap of its own.

    Shape:
        the student's logits ``(B, K)`` or ``(B, K, H, W)``, any float dtype; target ``(B,)`` or
        ``(B, H, W)`` int64 in ``[0, K)``, 0 or 1 where K = 1, or -100; output a scalar in float32
        (float64 for float64 inputs), in [0, 1].

    Raises:
        ValueError: If the target is missing, out of range or of another shape, or ``smooth`` is
            out of range.
        TypeError: If the target holds no whole numbers.

    References:
        Milletari, Navab & Ahmadi, *V-Net: Fully Convolutional Neural Networks for Volumetric
        Medical Image Segmentation*, 2016, with p in place of its square in the denominator.

    Example:
        >>> student = Features(logits=torch.tensor([[[[9.0, -9.0]], [[-9.0, 9.0]]]]))
        >>> target = torch.tensor([[[0, 1]]])
        >>> bool(DiceLoss()(student, Features(), target) < 1e-6)
        True
    """

    reads = ("logits",)
    reads_teacher: ClassVar[bool] = False
    over_ranks = "sums"
    pixels = "labelled maps"

    def __init__(self, *, smooth: float = 0.0, gather: bool = False) -> None:
        super().__init__(gather=gather)
        self.smooth = number("smooth", smooth, at_least=0)

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None, shards: Shards
    ) -> dict[str, Tensor]:
        logits, binary = _two_or_more(student, "DiceLoss")
        index, labelled = (v[:, None] for v in labels(target, logits.shape, reader="DiceLoss"))
        share = torch.where(labelled, logits.softmax(dim=1), 0)
        classes = torch.arange(logits.shape[1], device=logits.device)
        classes = classes.view(-1, *[1] * (logits.dim() - 2))
        truth = (labelled & (index == classes)).to(share.dtype)
        rows = [axis for axis in range(logits.dim()) if axis != 1]
        sums = torch.stack([part.sum(rows) for part in (share * truth, share, truth)])
        common, found, wanted = shards.sum(sums[:, int(binary) :]).unbind()
        scores = (common + self.smooth) / ((found + wanted) / 2 + self.smooth).clamp_min(_LEAST)
        return {"Dice": torch.where(wanted > 0, 1 - scores, 0).mean()}


def _two_or_more(student: Features, reader: str) -> tuple[Tensor, bool]:
    """Returns the student's logits, a single one with a 0 before it, and whether it was single."""
    logits = student.logits
    if logits is None:
        raise ValueError(missing(reader, "student.logits", student, "logits"))
    binary = logits.shape[1] == 1
    if binary:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    return logits, binary


def labelled_cross_entropy(
    logits: Tensor, target: Tensor, shards: Shards, *, label_smoothing: float = 0.0
) -> Tensor:
    """Returns the mean cross-entropy of the rows that have a label, 0 where none has.

    Args:
        logits: ``(B, K, ...)``.
        target: Class indices ``(B, ...)`` in range, -100 where there is no label; or probabilities
            ``(B, K, ...)``.
        shards: The mean is over the rows of all its processes.
        label_smoothing: Share of a label's mass that is spread over all classes.
    """
    # Not torch's own sum, which on a GPU comes out differently from run to run.
    costs = F.cross_entropy(
        logits, target, ignore_index=NO_LABEL, reduction="none", label_smoothing=label_smoothing
    )
    if target.is_floating_point():
        count = costs.new_full((), costs.numel())
    else:
        count = (target != NO_LABEL).count_nonzero()
    return mean_of_sum(costs.sum(), count, shards)
