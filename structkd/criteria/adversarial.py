"""Criteria that a discriminator learns: telling the student from the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from structkd._checks import choice, labels, number, whole
from structkd.criteria._fields import either, pair
from structkd.criteria._maps import checked_layer, map_pair, pooled
from structkd.criteria._rows import labelled_mean
from structkd.criteria.base import Criterion
from structkd.features import Features

SOURCES = ("embedding", "intermediate")


class AdversarialLogitsLoss(Criterion):
    r"""Distillation by a discriminator on logits that also predicts the label.

    With D the score that a row of logits is the teacher's and C a label prediction from the same
    residual MLP, the student minimises

    .. math::
        L_S = \frac{1}{B} \sum_b \left[ w_1 \|s_b - t_b\|_1
            + w_2 \left( \mathrm{softplus}(-D(s_b)) + CE(C(s_b), y_b) \right) \right]

    and the discriminator, in the same backward pass,

    .. math::
        L_D = \frac{1}{B} \sum_b \left[ \mathrm{softplus}(-D(t_b)) + \mathrm{softplus}(D(s_b))
            + CE(C(t_b), y_b) + CE(C(s_b), y_b) \right]

    Terms: ``ALKD-l1``, ``ALKD-adversarial``, ``ALKD-label`` (the student's) and
    ``ALKD-discriminator``. The first three reach the student through a copy of the discriminator
    with detached parameters, the last reaches the discriminator from detached student logits: one
    optimizer over both trains each on its own loss, and every term can be read. Gradient reversal
    would need one pass less, but hands the student the gradient of :math:`\log(1 - D)`, which
    vanishes where the discriminator wins; softplus(-D), the non-saturating loss, is strongest
    there. A weight on the criterion scales the discriminator's step too.

    The predictions of the label count over the rows that have one, whose target is not -100; the
    other parts need none and use all rows, so that a batch without a label is no error.

    The L1 norm sums over classes; where K is large, lower ``l1_weight``. The discriminator has no
    batch norm and no dropout: a batch's samples do not mix, and equal inputs give equal values.

    Args:
        num_classes: K.
        hidden_dim: Width of the discriminator.
        blocks: Residual blocks of the discriminator, each x + Linear(ReLU(Linear(x))).
        l1_weight: w_1 >= 0.
        adversarial_weight: w_2 >= 0; it leaves the discriminator's own loss as it is.
        gather: Take the means of the label's parts over the labelled rows of all processes.

    Shape:
        logits ``(B, K)`` of both, any float dtype; target ``(B,)`` int64 in ``[0, K)`` or
        -100; output a scalar in float32 (float64 for float64 inputs).

    Raises:
        ValueError: If the target is missing or out of range, the class counts differ from
            ``num_classes``, or an argument is out of range.
        TypeError: If the target holds no whole numbers.

    References:
        Xu, Hsu & Huang, *Training Shallow and Thin Networks for Acceleration via Knowledge
        Distillation with Conditional Adversarial Networks*, 2017. The sizes of the discriminator
        and the non-saturating form are this library's.

    Example:
        >>> import torch
        >>> criterion = AdversarialLogitsLoss(10)
        >>> target = torch.zeros(4, dtype=torch.int64)
        >>> terms = criterion.terms(torch.randn(4, 10), torch.randn(4, 10), target)
        >>> list(terms)
        ['ALKD-l1', 'ALKD-adversarial', 'ALKD-label', 'ALKD-discriminator']
    """

    reads = ("logits",)

    def __init__(
        self,
        num_classes: int,
        *,
        hidden_dim: int = 128,
        blocks: int = 2,
        l1_weight: float = 1.0,
        adversarial_weight: float = 1.0,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        self.num_classes = whole("num_classes", num_classes)
        self.l1_weight = number("l1_weight", l1_weight, at_least=0)
        self.adversarial_weight = number("adversarial_weight", adversarial_weight, at_least=0)
        self.discriminator = _ResidualMLP(
            self.num_classes, hidden_dim, 1 + self.num_classes, blocks=blocks
        )

    @classmethod
    def arguments(
        cls, feats_s: Features, feats_t: Features, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Returns the classes of two example passes."""
        logits, _ = pair(feats_s, feats_t, "logits")
        return {"num_classes": logits.shape[1]}

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        logits_s, logits_t = pair(student, teacher, "logits")
        batch, classes = logits_s.shape
        if classes != self.num_classes:
            raise ValueError(
                f"logits must have num_classes={self.num_classes} columns, got {classes}; build "
                "the criterion with AdversarialLogitsLoss.from_features"
            )
        index, labelled = labels(target, batch, classes, reader="AdversarialLogitsLoss")

        def naming(scores: Tensor) -> Tensor:
            costs = F.cross_entropy(scores[:, 1:], index, reduction="none")
            return labelled_mean(costs, labelled, gather=self.gather)

        judged = _as_constant(self.discriminator, logits_s)
        seen_s, seen_t = self.discriminator(logits_s.detach()), self.discriminator(logits_t)
        return {
            "ALKD-l1": self.l1_weight * (logits_s - logits_t).abs().sum(dim=1).mean(),
            "ALKD-adversarial": self.adversarial_weight * _fool(judged[:, 0]),
            "ALKD-label": self.adversarial_weight * naming(judged),
            "ALKD-discriminator": _tell_apart(seen_s[:, 0], seen_t[:, 0])
            + naming(seen_t)
            + naming(seen_s),
        }

    def extra_repr(self) -> str:
        return f"l1_weight={self.l1_weight}, adversarial_weight={self.adversarial_weight}"


class AdversarialFeatureLoss(Criterion):
    r"""Distillation by a discriminator on features that the student learns to fool.

    With D the score that a row of features is the teacher's and h a linear adapter to the teacher's
    width (none where widths agree), student and adapter minimise

    .. math:: L_S = \frac{w}{B} \sum_b \mathrm{softplus}(-D(h(s_b)))

    and the discriminator, in the same backward pass,

    .. math:: L_D = \frac{1}{B} \sum_b \mathrm{softplus}(-D(t_b)) + \mathrm{softplus}(D(h(s_b)))

    Terms: ``AFKD-adversarial`` and ``AFKD-discriminator``. How one backward pass trains both, and
    why not by gradient reversal, is told at :class:`AdversarialLogitsLoss`. The paper writes the
    saturating :math:`\log(1 - D(s))` for the student; the optimum is the same. It adds the labels'
    cross-entropy, which belongs to the training loop.

    Args:
        student_dim: Width of the student's features.
        teacher_dim: Width of the teacher's.
        source: ``embedding``, or ``intermediate`` for a map averaged over its positions.
        layer: Position in ``Features.intermediate`` of the map to read.
        hidden_dim: Width of the discriminator.
        blocks: Residual blocks of the discriminator.
        adversarial_weight: w >= 0; it leaves the discriminator's own loss as it is.
        gather: Accepted by every criterion; without effect here, where no sample meets another.

    Shape:
        embeddings ``(B, D_s)`` and ``(B, D_t)``, or maps ``(B, C, H, W)``, tokens ``(B, N, C)`` or
        rows ``(B, C)``, of any two kinds and sizes, any float dtype; output a scalar in float32
        (float64 for float64 inputs).

    Raises:
        ValueError: If a width is not the one that the criterion was built for, ``source`` is
            unknown, or an argument is out of range.

    References:
        Wang et al., *Adversarial Learning of Portable Student Networks*, 2018. The sizes of the
        discriminator and the non-saturating form are this library's.

    Example:
        >>> import torch
        >>> criterion = AdversarialFeatureLoss(16, 32)
        >>> list(criterion.terms(torch.randn(4, 16), torch.randn(4, 32)))
        ['AFKD-adversarial', 'AFKD-discriminator']
    """

    reads = ("embedding",)

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        source: str = "embedding",
        layer: int = -1,
        hidden_dim: int = 128,
        blocks: int = 2,
        adversarial_weight: float = 1.0,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        self.student_dim = whole("student_dim", student_dim)
        self.teacher_dim = whole("teacher_dim", teacher_dim)
        self.reads = (choice("source", source, SOURCES),)  # type: ignore[misc]
        self.layer = checked_layer(layer)
        self.adversarial_weight = number("adversarial_weight", adversarial_weight, at_least=0)
        self.adapter: nn.Module = nn.Identity()
        if self.student_dim != self.teacher_dim:
            self.adapter = nn.Linear(self.student_dim, self.teacher_dim)
        self.discriminator = _ResidualMLP(self.teacher_dim, hidden_dim, 1, blocks=blocks)

    @classmethod
    def arguments(
        cls, feats_s: Features, feats_t: Features, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Returns the widths of two example passes, of the field that ``source`` names."""
        source = choice("source", options.get("source", "embedding"), SOURCES)
        rows_s, rows_t = _rows(feats_s, feats_t, source, options.get("layer", -1))
        return {"student_dim": rows_s.shape[1], "teacher_dim": rows_t.shape[1]}

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        rows_s, rows_t = _rows(student, teacher, self.reads[0], self.layer)
        widths = rows_s.shape[1], rows_t.shape[1]
        if widths != (self.student_dim, self.teacher_dim):
            raise ValueError(
                f"student and teacher {self.reads[0]} must have student_dim={self.student_dim} and "
                f"teacher_dim={self.teacher_dim} channels, got {widths[0]} and {widths[1]}; build "
                "the criterion with AdversarialFeatureLoss.from_features"
            )
        rows_s = self.adapter(rows_s)
        judged = _as_constant(self.discriminator, rows_s)
        seen_s, seen_t = self.discriminator(rows_s.detach()), self.discriminator(rows_t)
        return {
            "AFKD-adversarial": self.adversarial_weight * _fool(judged),
            "AFKD-discriminator": _tell_apart(seen_s, seen_t),
        }

    def extra_repr(self) -> str:
        return f"source={self.reads[0]!r}, adversarial_weight={self.adversarial_weight}"


class _ResidualMLP(nn.Module):
    """Linear stem, residual blocks, linear head, on rows ``(B, in_dim)``."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, *, blocks: int) -> None:
        super().__init__()
        width = whole("hidden_dim", hidden_dim)
        self.stem = nn.Linear(in_dim, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
            for _ in range(whole("blocks", blocks, at_least=0))
        )
        self.head = nn.Linear(width, out_dim)

    def forward(self, rows: Tensor) -> Tensor:
        hidden = F.relu(self.stem(rows))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        scores: Tensor = self.head(F.relu(hidden))
        return scores


def _as_constant(discriminator: nn.Module, rows: Tensor) -> Tensor:
    """Runs the discriminator with detached parameters: gradients reach the rows only."""
    constants = {name: value.detach() for name, value in discriminator.named_parameters()}
    scores: Tensor = functional_call(discriminator, constants, (rows,))
    return scores


def _fool(score_s: Tensor) -> Tensor:
    return F.softplus(-score_s).mean()


def _tell_apart(score_s: Tensor, score_t: Tensor) -> Tensor:
    return F.softplus(-score_t).mean() + F.softplus(score_s).mean()


def _rows(student: Features, teacher: Features, source: str, layer: int) -> tuple[Tensor, Tensor]:
    """Returns embeddings, or maps averaged over their positions, as ``(B, C)``."""
    if source == "embedding":
        return either(student, teacher, "embedding")
    map_s, map_t = map_pair(student, teacher, layer)
    return pooled(map_s), pooled(map_t)
