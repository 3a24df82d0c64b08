"""Criteria on the relations between the samples of a batch: RKD, CC and DistilVPR."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from structkd._checks import number, whole
from structkd.criteria.base import Criterion, either
from structkd.criteria.numerics import inverse, unit
from structkd.features import Features
from structkd.projectors import Projector, project

_DIFFERENCES = "donot_use_mm_for_euclid_dist"  # of cdist
# A chunk of anchors takes about this many numbers a tensor (4 MiB in float32), or FEWEST anchors
# where the batch is so large that one chunk would hold fewer.
_BUDGET = 2**20
_FEWEST = 8


class RelationalLoss(Criterion):
    r"""Matches distances of pairs and angles of triplets (RKD).

    With h the Huber function of threshold 1 and :math:`\mu` the mean distance of the pairs that do
    not coincide,

    .. math::
        L = \frac{w_d}{B^2} \sum_{ij} h\Bigl( \frac{|s_i - s_j|}{\mu_s},
            \frac{|t_i - t_j|}{\mu_t} \Bigr)
          + \frac{w_a}{B^3} \sum_{ijk} h\bigl( \cos \angle s_i s_j s_k,
            \cos \angle t_i t_j t_k \bigr)

    Both are means over all ordered tuples, as in the authors' code; tuples with a sample twice
    count as 0. Widths may differ. Where samples coincide, distance, angle and gradient are 0. Terms
    with weight 0 are left out: ``RKD-distance``, ``RKD-angle``.

    Angles are computed for a chunk of vertices at a time, with their gradient in the same pass, so
    memory grows with B^2, not B^3: a tensor holds at most max(2^20, 8 B max(B, D)) numbers, and
    there are at most B / 8 chunks. Peak measured at B = 512, D = 512 in float32 on the CPU, forward
    and backward: 62 MiB of tensors, where one tensor over all triples takes 512 MiB. There is no
    second derivative.

    Args:
        distance_weight: Weight >= 0 of the distances.
        angle_weight: Weight >= 0 of the angles.
        gather: Relate the samples of all processes.

    Shape:
        student ``(B, D_s)``, teacher ``(B, D_t)``, any float dtype, B >= 3; output a scalar in
        float32 (float64 for float64 inputs).

    Raises:
        ValueError: If a weight is negative or both are 0.

    References:
        Park et al., *Relational Knowledge Distillation*, CVPR 2019, sections 3.2.1 and 3.2.2; the
        weights are the CRD benchmark's.

    Example:
        >>> import torch
        >>> rows = torch.randn(8, 16)
        >>> terms = RelationalLoss().terms(rows, 2 * rows)  # a change of scale costs nothing
        >>> all(float(term) < 1e-6 for term in terms.values())
        True
    """

    reads = ("embedding",)
    over_ranks = "gathered"
    min_batch = 3

    def __init__(
        self, distance_weight: float = 25.0, angle_weight: float = 50.0, *, gather: bool = False
    ) -> None:
        super().__init__(gather=gather)
        self.distance_weight = number("distance_weight", distance_weight, at_least=0)
        self.angle_weight = number("angle_weight", angle_weight, at_least=0)
        if self.distance_weight == self.angle_weight == 0:
            raise ValueError("distance_weight and angle_weight are both 0: set one above 0")

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        rows_s, rows_t = either(student, teacher, "embedding")
        terms = {}
        if self.distance_weight:
            terms["RKD-distance"] = self.distance_weight * _distance_gap(rows_s, rows_t)
        if self.angle_weight:
            terms["RKD-angle"] = self.angle_weight * _angle_gap(rows_s, rows_t)
        return terms


class DistilVPRLoss(Criterion):
    r"""Matches distances, angles and hyperbolic geodesics of a batch (DistilVPR).

    :class:`RelationalLoss` with a third relation: rows are taken into the Poincaré ball of
    curvature -c by the exponential map at its centre,

    .. math::
        u = \tanh(\sqrt c |x|) \frac{x}{\sqrt c |x|}, \qquad
        d_c(u, v) = \frac{2}{\sqrt c} \, \mathrm{artanh} \bigl( \sqrt c \, |{-u} \oplus_c v| \bigr)

    and :math:`d_c`, divided by its mean over pairs that do not coincide, is matched as the
    distances are: with h the Huber function and means over all ordered tuples,

    .. math::
        L = w_d \, \overline{h(\bar d^s, \bar d^t)} + w_a \, \overline{h(\cos^s, \cos^t)}
            + w_g \, \overline{h(\bar{d_c}^s, \bar{d_c}^t)}

    These are the self-agent relations of the paper. Its cross-agent relations need equal widths and
    have weight 0 in the authors' released options; they are not part of this criterion. Geodesics
    come from the hyperbolic law of cosines in logarithms, which stays finite for embeddings of any
    length, where the authors' code clips points to the inside of the ball. Memory is as in
    :class:`RelationalLoss`.
    Terms with weight 0 are left out: ``VPR-distance``, ``VPR-angle``, ``VPR-geodesic``.

    Args:
        distance_weight: Weight >= 0 of the Euclidean distances.
        angle_weight: Weight >= 0 of the angles.
        geodesic_weight: Weight >= 0 of the geodesic distances.
        curvature: c > 0.
        gather: Relate the samples of all processes.

    Shape:
        student ``(B, D_s)``, teacher ``(B, D_t)``, any float dtype, B >= 3; output a scalar in
        float32 (float64 for float64 inputs).

    Raises:
        ValueError: If a weight is negative, all are 0, or ``curvature`` is not positive.

    References:
        Wang et al., *DistilVPR: Cross-Modal Knowledge Distillation for Visual Place Recognition*,
        AAAI 2024; weights and curvature are the defaults of the authors' code. Hyperbolic formulas:
        Ganea et al., *Hyperbolic Neural Networks*, 2018.

    Example:
        >>> import torch
        >>> criterion = DistilVPRLoss()
        >>> list(criterion.terms(torch.randn(8, 16), torch.randn(8, 32)))
        ['VPR-distance', 'VPR-angle', 'VPR-geodesic']
    """

    reads = ("embedding",)
    over_ranks = "gathered"
    min_batch = 3

    def __init__(
        self,
        distance_weight: float = 1.0,
        angle_weight: float = 1.0,
        geodesic_weight: float = 1.0,
        *,
        curvature: float = 0.1,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        self.distance_weight = number("distance_weight", distance_weight, at_least=0)
        self.angle_weight = number("angle_weight", angle_weight, at_least=0)
        self.geodesic_weight = number("geodesic_weight", geodesic_weight, at_least=0)
        self.curvature = number("curvature", curvature, above=0)
        if self.distance_weight == self.angle_weight == self.geodesic_weight == 0:
            raise ValueError(
                "distance_weight, angle_weight and geodesic_weight are all 0: set one above 0"
            )

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        rows_s, rows_t = either(student, teacher, "embedding")
        terms = {}
        if self.distance_weight:
            terms["VPR-distance"] = self.distance_weight * _distance_gap(rows_s, rows_t)
        if self.angle_weight:
            terms["VPR-angle"] = self.angle_weight * _angle_gap(rows_s, rows_t)
        if self.geodesic_weight:
            geodesics = (_poincare_distances(rows, self.curvature) for rows in (rows_s, rows_t))
            terms["VPR-geodesic"] = self.geodesic_weight * _normalised_gap(*geodesics)
        return terms


class CorrelationCongruenceLoss(Criterion):
    r"""Matches the kernel matrices of a batch (CC).

    With unit rows :math:`x_i` of a linear embedding of each side, and the Gaussian kernel expanded
    to second order,

    .. math::
        K_{ij} = e^{-2 \gamma} \sum_{p=0}^{2} \frac{(2 \gamma)^p}{p!} (x_i^T x_j)^p, \qquad
        L = \frac{1}{B^2} \|K^s - K^t\|_F^2

    Both embeddings train, as published. The teacher's may then collapse, because equal rows are an
    optimum; add a loss on the labels to prevent that. Term: ``CC``.

    Args:
        embedding_dim: Width of both linear embeddings.
        gamma: Inverse bandwidth > 0 of the kernel.
        gather: Relate the samples of all processes.

    Shape:
        student ``(B, D_s)``, teacher ``(B, D_t)``, any float dtype, B >= 2; output
        a scalar in float32 (float64 for float64 inputs).

    Raises:
        ValueError: If a width is not that of the first call, or ``gamma`` is not positive.

    References:
        Peng et al., *Correlation Congruence for Knowledge Distillation*, ICCV 2019, section 3.

    Example:
        >>> import torch
        >>> criterion = CorrelationCongruenceLoss()
        >>> criterion(torch.randn(8, 16), torch.randn(8, 32)).shape
        torch.Size([])
    """

    reads = ("embedding",)
    over_ranks = "gathered"
    min_batch = 2

    def __init__(
        self, *, embedding_dim: int = 128, gamma: float = 0.4, gather: bool = False
    ) -> None:
        super().__init__(gather=gather)
        self.gamma = number("gamma", gamma, above=0)
        self.embedding_dim = whole("embedding_dim", embedding_dim)
        self.student_embedding = Projector(self.embedding_dim, layers=1)
        self.teacher_embedding = Projector(self.embedding_dim, layers=1)

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        rows_s, rows_t = either(student, teacher, "embedding")
        kernel_s = self._kernel(project(self.student_embedding, rows_s, self.embedding_dim))
        kernel_t = self._kernel(project(self.teacher_embedding, rows_t, self.embedding_dim))
        return {"CC": F.mse_loss(kernel_s, kernel_t)}

    def _kernel(self, rows: Tensor) -> Tensor:
        directions = unit(rows)
        scaled = 2 * self.gamma * directions @ directions.T
        return math.exp(-2 * self.gamma) * (1 + scaled + scaled.square() / 2)


def _distance_gap(rows_s: Tensor, rows_t: Tensor) -> Tensor:
    """Returns the gap of Euclidean distances, whose gradient is 0 where rows coincide.

    ``pdist`` takes them from differences: the Gram form would lose the digits of small distances.
    It has every two rows once; a row with itself, which counts as an ordered pair, has no gap.
    """
    gap = _normalised_gap(torch.pdist(rows_s), torch.pdist(rows_t))
    return gap * (len(rows_s) - 1) / len(rows_s)


def _normalised_gap(distances_s: Tensor, distances_t: Tensor) -> Tensor:
    """Returns the mean Huber gap of distances, each divided by their mean."""
    return F.smooth_l1_loss(_mean_normalised(distances_s), _mean_normalised(distances_t))


def _angle_gap(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the mean Huber gap of the cosines of all angles that samples form at a third.

    The mean is over all B^3 ordered triples. One in which a sample coincides with the vertex has no
    angle and counts as 0, in value and in gradient. There is no second derivative.
    """
    gap: Tensor = _AngleGap.apply(
        student, teacher, student.requires_grad and torch.is_grad_enabled()
    )
    return gap


class _AngleGap(torch.autograd.Function):
    """The loss chunk by chunk, and in the same pass its gradient, in closed form.

    That spares the backward a second look at B^3 angles and keeps nothing but a ``(B, D)`` tensor.
    (Checkpointed chunks, on the CPU, leave the heap in pieces: 20 times their size at B = 512.)
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, wants_grad: bool) -> Tensor:
        batch = len(student)
        total = student.new_zeros(())
        slope = torch.zeros_like(student)
        for part in _chunks(student if student.shape[1] >= teacher.shape[1] else teacher):
            arms, shrink = _unit_arms(student, part)
            arms_t, _ = _unit_arms(teacher, part)
            gap = torch.bmm(arms, arms.transpose(1, 2))
            gap -= torch.bmm(arms_t, arms_t.transpose(1, 2))
            huber = gap.clamp(-1, 1)  # the slope of the Huber function
            # h(x) = c (x - c / 2) with c its slope.
            total += (huber * (gap - huber / 2)).sum()
            if wants_grad:
                pull = torch.bmm(huber, arms)
                pull -= (pull * arms).sum(dim=2, keepdim=True) * arms
                pull *= shrink
                slope += pull.sum(dim=0)
                slope[part] -= pull.sum(dim=1)
        # Each angle has two arms.
        ctx.save_for_backward(slope * (2 / batch**3))
        return total / batch**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None


def _poincare_distances(rows: Tensor, curvature: float) -> Tensor:
    r"""Returns geodesic distances ``(B, B)`` after the exponential map into a Poincaré ball.

    With ball radius :math:`1 / \sqrt c`, a row x goes to :math:`\tanh(\sqrt c |x|) x / (\sqrt c
    |x|)`, and :math:`d(u, v) = 2 / \sqrt c \; \mathrm{artanh}(\sqrt c |{-u} \oplus v|)`. Both ball
    and Möbius sum round at the boundary, where tanh is 1. The hyperbolic law of cosines needs
    neither: with :math:`\rho = 2 \sqrt c |x|` and the angle :math:`\theta` between two rows,

    .. math::
        \sinh^2 \tfrac{\sqrt c \, d}{2} = \sinh^2 \tfrac{\rho_i - \rho_j}{2}
            + \sinh \rho_i \sinh \rho_j \sin^2 \tfrac{\theta}{2},

    summed here as logarithms, so that distances are finite for rows of any length.
    """
    length = torch.linalg.vector_norm(rows, dim=1)
    radius = 2 * curvature**0.5 * length
    empty = length == 0
    directions = torch.where(empty[:, None], 0, rows / torch.where(empty, 1, length)[:, None])
    # From differences, as pdist; sin(theta / 2).
    half_chord = torch.cdist(directions, directions, compute_mode=_DIFFERENCES) / 2
    log_sinh = _log_positive(radius, lambda r: r + torch.log(-torch.expm1(-2 * r) / 2))
    turn = 2 * _log_positive(half_chord, torch.log) + log_sinh[:, None] + log_sinh
    gap = _log_positive(
        (radius[:, None] - radius).abs(), lambda g: g + 2 * torch.log(-torch.expm1(-g) / 2)
    )
    # A logarithm of zero has no gradient; mask it before it meets another.
    coincide = (gap == -torch.inf) & (turn == -torch.inf)
    log_square = torch.logaddexp(torch.where(coincide, 0, gap), turn)
    # From e^40 on, asinh(x) is log(2 x) to the last digit of float64.
    far = log_square > 40
    near = 2 * torch.asinh(torch.exp(torch.where(far, 0, log_square) / 2))
    distance = torch.where(far, log_square + 2 * math.log(2), near)
    geodesic: Tensor = torch.where(coincide, 0, distance) / curvature**0.5
    return geodesic


def _mean_normalised(distances: Tensor) -> Tensor:
    """Divides distances by the mean of those that are not zero; all zero stays all zero."""
    count = (distances > 0).sum().clamp_min(1)
    mean = distances.sum() / count
    return distances / torch.where(mean == 0, 1, mean)


def _unit_arms(rows: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Returns unit vectors ``(vertices, B, D)`` from vertices to rows, and 1 / their lengths."""
    arms = rows - rows[part, None]
    shrink = inverse(torch.linalg.vector_norm(arms, dim=2, keepdim=True))
    arms *= shrink
    return arms, shrink


def _log_positive(value: Tensor, log: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns ``log(value)``, and -inf with gradient 0 where value is 0."""
    empty = value == 0
    return torch.where(empty, -torch.inf, log(torch.where(empty, 1, value)))


def _chunks(rows: Tensor) -> Iterator[slice]:
    """Cuts the batch so that a chunk's ``(anchors, B, max(B, D))`` keeps to the budget."""
    batch, width = rows.shape
    size = max(_FEWEST, _BUDGET // (batch * max(batch, width)))
    if size >= batch:
        # Without a range, one compiled graph holds for all batches that need one chunk.
        return iter((slice(None),))
    return (slice(start, start + size) for start in range(0, batch, size))
