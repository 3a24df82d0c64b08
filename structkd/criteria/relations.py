"""Criteria on the relations between the samples of a batch: RKD, CC and DistilVPR."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from structkd._checks import number, whole
from structkd.criteria._fields import either
from structkd.criteria._geometry import (
    angle_gap,
    mean_normalised,
    pair_distances,
    poincare_distances,
)
from structkd.criteria._rows import unit
from structkd.criteria.base import Criterion
from structkd.features import Features
from structkd.projectors import Projector


class RelationalLoss(Criterion):
    r"""Matches distances of pairs and angles of triplets (RKD).

    With h the Huber function of threshold 1 and :math:`\mu` the mean distance of the pairs that do
    not coincide,

    .. math::
        L = \frac{w_d}{B^2} \sum_{ij} h\Big( \frac{|s_i - s_j|}{\mu_s},
            \frac{|t_i - t_j|}{\mu_t} \Big)
          + \frac{w_a}{B^3} \sum_{ijk} h\big( \cos \angle s_i s_j s_k, \cos \angle t_i t_j t_k \big)

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
    couples = True
    min_batch = 3

    def __init__(
        self, distance_weight: float = 25.0, angle_weight: float = 50.0, *, gather: bool = False
    ) -> None:
        super().__init__(gather=gather)
        self.distance_weight = number("distance_weight", distance_weight, at_least=0)
        self.angle_weight = number("angle_weight", angle_weight, at_least=0)
        if self.distance_weight == self.angle_weight == 0:
            raise ValueError("distance_weight and angle_weight are both 0: nothing is left")

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        rows_s, rows_t = either(student, teacher, "embedding")
        terms = {}
        if self.distance_weight:
            terms["RKD-distance"] = self.distance_weight * _distance_gap(rows_s, rows_t)
        if self.angle_weight:
            terms["RKD-angle"] = self.angle_weight * angle_gap(rows_s, rows_t)
        return terms

    def extra_repr(self) -> str:
        return f"distance_weight={self.distance_weight}, angle_weight={self.angle_weight}"


class DistilVPRLoss(Criterion):
    r"""Matches distances, angles and hyperbolic geodesics of a batch (DistilVPR).

    :class:`RelationalLoss` with a third relation: rows are taken into the Poincaré ball of
    curvature -c by the exponential map at its centre,

    .. math::
        u = \tanh(\sqrt c |x|) \frac{x}{\sqrt c |x|}, \qquad
        d_c(u, v) = \frac{2}{\sqrt c} \, \mathrm{artanh} \big( \sqrt c \, |{-u} \oplus_c v| \big)

    and :math:`d_c`, divided by its mean over pairs that do not coincide, is matched as the
    distances are: with h the Huber function and means over all ordered tuples,

    .. math::
        L = w_d \, \overline{h(\bar d^s, \bar d^t)} + w_a \, \overline{h(\cos^s, \cos^t)}
            + w_g \, \overline{h(\bar d_c^s, \bar d_c^t)}

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
    couples = True
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
                "distance_weight, angle_weight and geodesic_weight are all 0: nothing is left"
            )

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        rows_s, rows_t = either(student, teacher, "embedding")
        terms = {}
        if self.distance_weight:
            terms["VPR-distance"] = self.distance_weight * _distance_gap(rows_s, rows_t)
        if self.angle_weight:
            terms["VPR-angle"] = self.angle_weight * angle_gap(rows_s, rows_t)
        if self.geodesic_weight:
            geodesics = (poincare_distances(rows, self.curvature) for rows in (rows_s, rows_t))
            terms["VPR-geodesic"] = self.geodesic_weight * _normalised_gap(*geodesics)
        return terms

    def extra_repr(self) -> str:
        return (
            f"distance_weight={self.distance_weight}, angle_weight={self.angle_weight}, "
            f"geodesic_weight={self.geodesic_weight}, curvature={self.curvature}"
        )


class CorrelationCongruenceLoss(Criterion):
    r"""Matches the kernel matrices of a batch (CC).

    With unit rows :math:`x_i` of a linear embedding of each side, and the Gaussian kernel expanded
    to second order,

    .. math::
        K_{ij} = e^{-2 \gamma} \sum_{p=0}^{2} \frac{(2 \gamma)^p}{p!} (x_i^T x_j)^p, \qquad
        L = \frac{1}{B^2} \|K^s - K^t\|_F^2

    Both embeddings train, as published. Nothing then keeps the teacher's from giving way: all rows
    alike would be an optimum, so add a loss on the labels. Term: ``CC``.

    Args:
        student_dim: Width of the student's embedding.
        teacher_dim: Width of the teacher's embedding.
        embedding_dim: Width of both linear embeddings.
        gamma: Inverse bandwidth > 0 of the kernel.
        gather: Relate the samples of all processes.

    Shape:
        student ``(B, student_dim)``, teacher ``(B, teacher_dim)``, any float dtype, B >= 2; output
        a scalar in float32 (float64 for float64 inputs).

    Raises:
        ValueError: If a width is not the one it was built for, or ``gamma`` is not positive.

    References:
        Peng et al., *Correlation Congruence for Knowledge Distillation*, ICCV 2019, section 3.

    Example:
        >>> import torch
        >>> criterion = CorrelationCongruenceLoss(16, 32)
        >>> criterion(torch.randn(8, 16), torch.randn(8, 32)).shape
        torch.Size([])
    """

    reads = ("embedding",)
    couples = True
    min_batch = 2

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        embedding_dim: int = 128,
        gamma: float = 0.4,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        self.gamma = number("gamma", gamma, above=0)
        width = whole("embedding_dim", embedding_dim)
        self.student_embedding = Projector(whole("student_dim", student_dim), width, layers=1)
        self.teacher_embedding = Projector(whole("teacher_dim", teacher_dim), width, layers=1)

    @classmethod
    def arguments(
        cls, feats_s: Features, feats_t: Features, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Returns the widths of two example passes."""
        rows_s, rows_t = either(feats_s, feats_t, "embedding")
        return {"student_dim": rows_s.shape[1], "teacher_dim": rows_t.shape[1]}

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        rows_s, rows_t = either(student, teacher, "embedding")
        kernel_s = self._kernel(self.student_embedding(rows_s))
        kernel_t = self._kernel(self.teacher_embedding(rows_t))
        return {"CC": F.mse_loss(kernel_s, kernel_t)}

    def _kernel(self, rows: Tensor) -> Tensor:
        directions = unit(rows)
        scaled = 2 * self.gamma * directions @ directions.T
        return math.exp(-2 * self.gamma) * (1 + scaled + scaled.square() / 2)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}"


def _distance_gap(rows_s: Tensor, rows_t: Tensor) -> Tensor:
    return _normalised_gap(pair_distances(rows_s), pair_distances(rows_t))


def _normalised_gap(distances_s: Tensor, distances_t: Tensor) -> Tensor:
    """Returns the mean Huber gap of mean-normalised distances over all ordered pairs."""
    return F.smooth_l1_loss(mean_normalised(distances_s), mean_normalised(distances_t))
