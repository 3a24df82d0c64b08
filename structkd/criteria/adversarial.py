"""Criteria with a discriminator that learns to tell the student from the teacher."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from structkd._checks import choice, class_indices, number, whole
from structkd.criteria._maps import checked_layer, map_pair, pooled
from structkd.criteria.base import Criterion, either, pair
from structkd.criteria.logits import without_masked
from structkd.criteria.supervision import labelled_cross_entropy
from structkd.distributed import Shards
from structkd.features import Features
from structkd.projectors import LazyHead, Projector, project, shaped

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

    A class that either network masks out, by a logit of -inf, counts as 0 in both. The L1 norm
    sums over classes; where K is large, lower ``l1_weight``. The discriminator has no
    batch norm and no dropout: a batch's samples do not mix, and equal inputs give equal values.

    Args:
        hidden_dim: Width of the discriminator.
        blocks: Residual blocks of the discriminator, each x + Linear(ReLU(Linear(x))).
        l1_weight: w_1 >= 0.
        adversarial_weight: w_2 >= 0; it leaves the discriminator's own loss as it is.
        gather: Take the means of the label's parts over the labelled rows of all processes.

    Shape:
        logits ``(B, K)`` or ``(B, K, H, W)`` of both, any float dtype; target ``(B,)`` or
        ``(B, H, W)`` int64 in ``[0, K)`` or -100; output a scalar in float32 (float64 for float64
        inputs).

    Raises:
        ValueError: If the target is missing or out of range, the class counts differ, from those of
            the first call too, or an argument is out of range.
        TypeError: If the target holds no whole numbers.

    References:
        Xu, Hsu & Huang, *Training Shallow and Thin Networks for Acceleration via Knowledge
        Distillation with Conditional Adversarial Networks*, 2017. The sizes of the discriminator
        and the non-saturating form are this library's.

    Example:
        >>> import torch
        >>> criterion = AdversarialLogitsLoss()
        >>> target = torch.zeros(4, dtype=torch.int64)
        >>> terms = criterion.terms(torch.randn(4, 10), torch.randn(4, 10), target)
        >>> list(terms)
        ['ALKD-l1', 'ALKD-adversarial', 'ALKD-label', 'ALKD-discriminator']
    """

    reads = ("logits",)
    over_ranks = "sums"
    pixels = "labelled"

    def __init__(
        self,
        *,
        hidden_dim: int = 128,
        blocks: int = 2,
        l1_weight: float = 1.0,
        adversarial_weight: float = 1.0,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        self.hidden_dim = whole("hidden_dim", hidden_dim)
        self.blocks = whole("blocks", blocks, at_least=0)
        self.l1_weight = number("l1_weight", l1_weight, at_least=0)
        self.adversarial_weight = number("adversarial_weight", adversarial_weight, at_least=0)
        self.discriminator = _ResidualMLP(self.hidden_dim, blocks=self.blocks)

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None, shards: Shards
    ) -> dict[str, Tensor]:
        logits_s, logits_t = without_masked(*pair(student, teacher, "logits"))
        index = class_indices(target, logits_s.shape, reader="AdversarialLogitsLoss")
        outputs = 1 + logits_s.shape[1]

        def naming(scores: Tensor) -> Tensor:
            return labelled_cross_entropy(scores[:, 1:], index, shards)

        seen_s = project(self.discriminator, logits_s.detach(), outputs)
        seen_t = project(self.discriminator, logits_t, outputs)
        judged = _as_constant(self.discriminator, logits_s, outputs)
        return {
            "ALKD-l1": self.l1_weight * (logits_s - logits_t).abs().sum(dim=1).mean(),
            "ALKD-adversarial": self.adversarial_weight * _fool(judged[:, 0]),
            "ALKD-label": self.adversarial_weight * naming(judged),
            "ALKD-discriminator": _tell_apart(seen_s[:, 0], seen_t[:, 0])
            + naming(seen_t)
            + naming(seen_s),
        }


class AdversarialFeatureLoss(Criterion):
    r"""Distillation by a discriminator on features that the student learns to fool.

    With D the score that a row of features is the teacher's and h a linear adapter to the teacher's
    width (none where widths agree), student and adapter minimise

    .. math:: L_S = \frac{w}{B} \sum_b \mathrm{softplus}(-D(h(s_b)))

    and the discriminator, in the same backward pass,

    .. math:: L_D = \frac{1}{B} \sum_b \mathrm{softplus}(-D(t_b)) + \mathrm{softplus}(D(h(s_b)))

    Terms: ``AFKD-adversarial`` and ``AFKD-discriminator``. For how one backward pass trains both,
    and why not by gradient reversal, see :class:`AdversarialLogitsLoss`. The paper writes the
    saturating :math:`\log(1 - D(s))` for the student; the optimum is the same. It adds the labels'
    cross-entropy, which belongs to the training loop.

    Args:
        source: ``embedding``, or ``intermediate`` for a map averaged over its positions.
        layer: Position in ``Features.intermediate`` of the map to read.
        hidden_dim: Width of the discriminator.
        blocks: Residual blocks of the discriminator.
        adapter: Module ``(B, D_s) -> (B, D_t)`` in place of the linear one.
        adversarial_weight: w >= 0; it leaves the discriminator's own loss as it is.
        gather: Accepted by every criterion; without effect here, as samples are not compared.

    Shape:
        embeddings ``(B, D_s)`` and ``(B, D_t)``, or maps ``(B, C, H, W)``, tokens ``(B, N, C)`` or
        rows ``(B, C)``, of any two kinds and sizes, any float dtype; output a scalar in float32
        (float64 for float64 inputs).

    Raises:
        ValueError: If a width is not that of the first call, ``source`` is unknown, or an argument
            is out of range.

    References:
        Wang et al., *Adversarial Learning of Portable Student Networks*, 2018. The sizes of the
        discriminator and the non-saturating form are this library's.

    Example:
        >>> import torch
        >>> criterion = AdversarialFeatureLoss()
        >>> list(criterion.terms(torch.randn(4, 16), torch.randn(4, 32)))
        ['AFKD-adversarial', 'AFKD-discriminator']
    """

    reads = ("embedding",)

    def __init__(
        self,
        *,
        source: str = "embedding",
        layer: int = -1,
        hidden_dim: int = 128,
        blocks: int = 2,
        adapter: nn.Module | None = None,
        adversarial_weight: float = 1.0,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        self.source = choice("source", source, SOURCES)
        self.reads = (self.source,)
        self.layer = checked_layer(layer)
        self.hidden_dim = whole("hidden_dim", hidden_dim)
        self.blocks = whole("blocks", blocks, at_least=0)
        self.adversarial_weight = number("adversarial_weight", adversarial_weight, at_least=0)
        self.adapter = Projector(layers=1, skip_equal=True) if adapter is None else adapter
        self.discriminator = _ResidualMLP(self.hidden_dim, blocks=self.blocks)

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        if self.source == "embedding":
            rows_s, rows_t = either(student, teacher, "embedding")
        else:
            map_s, map_t = map_pair(student, teacher, self.layer)
            rows_s, rows_t = pooled(map_s), pooled(map_t)
        rows_s = project(self.adapter, rows_s, rows_t.shape[1])
        seen_s = project(self.discriminator, rows_s.detach(), 1)
        seen_t = project(self.discriminator, rows_t, 1)
        judged = _as_constant(self.discriminator, rows_s, 1)
        return {
            "AFKD-adversarial": self.adversarial_weight * _fool(judged),
            "AFKD-discriminator": _tell_apart(seen_s, seen_t),
        }


class _ResidualMLP(LazyHead):
    """Linear stem, residual blocks, linear head, on rows ``(B, D)``."""

    def __init__(self, width: int, *, blocks: int) -> None:
        super().__init__()
        self.stem = nn.LazyLinear(width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LazyLinear(width), nn.ReLU(), nn.LazyLinear(width))
            for _ in range(blocks)
        )
        self.head = nn.LazyLinear(0)

    def initialize_parameters(self, rows: Tensor, out_dim: int) -> None:
        shaped(self.stem, rows)
        hidden = rows.new_empty(1, len(self.stem.weight))
        for block in self.blocks:
            for layer in block.children():
                shaped(layer, hidden)
        shaped(self.head, hidden, out_dim)

    def forward(self, rows: Tensor, out_dim: int) -> Tensor:
        widths = rows.shape[1], out_dim
        shape = self.stem.weight.shape[1], len(self.head.weight)
        if widths != shape:
            raise ValueError(
                f"the discriminator takes rows of {shape[0]} numbers, the width of the first call, "
                f"got {widths[0]}: make a new criterion"
            )
        hidden = F.relu(self.stem(rows))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        scores: Tensor = self.head(F.relu(hidden))
        return scores


def _as_constant(discriminator: nn.Module, rows: Tensor, out_dim: int) -> Tensor:
    """Runs the discriminator with detached parameters: gradients reach the rows only."""
    constants = {name: value.detach() for name, value in discriminator.named_parameters()}
    scores: Tensor = functional_call(discriminator, constants, (rows, out_dim))
    return scores


def _fool(score_s: Tensor) -> Tensor:
    return F.softplus(-score_s).mean()


def _tell_apart(score_s: Tensor, score_t: Tensor) -> Tensor:
    return F.softplus(-score_t).mean() + F.softplus(score_s).mean()
