"""Semantic-aware knowledge alignment (SKA): CORAL on tokens that a transport plan refined."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from structkd._checks import choice, describe, whole
from structkd.criteria._gram import FORMS
from structkd.criteria._maps import channels, checked_layer, common_positions, map_pair, pooled
from structkd.criteria.base import Criterion
from structkd.criteria.coral import coral_distance
from structkd.features import Features
from structkd.projectors import ConvAdapter
from structkd.transport import LagrangianPlanner

SCALES = ("standard", "published")


class SemanticAlignmentLoss(Criterion):
    r"""CORAL between student and teacher on planned tokens and on pooled embeddings.

    The last maps are token sequences ``(B, N, C)``. In each modality and head, queries and keys
    that are learned per modality give a cost, and the planner an intra-modal plan:

    .. math::
        \pi = \mathrm{softmax}(-C / \varepsilon), \quad C = -Q K^T, \quad
        \varepsilon = \sqrt{C_{head}}, \qquad m_j = \tfrac{1}{N} \sum_i \pi_{ij}

    The cross-modal plan is the outer product of the masses :math:`m_s` and :math:`m_t`. A teacher
    token's weight is that plan's mean over the student's tokens over the mean of :math:`m_t`, and
    a student token's the mirror of it. Masses sum to 1 over N tokens in both modalities, so their
    means agree and cancel: the weight of a token is its own mass :math:`m_j`, averaged over heads,
    and the outer product is never built. Refined tokens are token times weight, scaled per sample
    so that the squared norm of the mean token stays what it was. Then

    .. math::
        L = CORAL(\mathrm{flat}(s'), \mathrm{flat}(t')) + CORAL(\bar s, \bar t)

    with :math:`\bar s` the map's mean over positions, which is the embedding where a network
    pools its last map. Terms: ``SKA-tokens``, ``SKA-embeddings``. 7 x 7 x 512 maps are rows of
    25,088 numbers: CORAL's Gram form keeps them to B x B.

    The published total is 0.3 task + 0.4 kd + 0.3 * 0.01 * (L_ot1 + L_ot2), with
    ``scale="published"``; that weighting is the caller's: ``0.4 * KDLoss() + 0.003 *
    SemanticAlignmentLoss(...)``.

    Args:
        student_channels: Channels of the student's map. Where they differ from the teacher's, a
            :class:`ConvAdapter` brings the student's map to the teacher's channels first.
        teacher_channels: Channels of the teacher's map.
        heads: Plans per modality, a divisor of ``teacher_channels``; ``from_features`` takes the
            largest up to 8.
        planner: Intra-modal planner of the constraint ``rows`` with ``gradient="unrolled"``, the
            closed form above by default. Under ``both`` every token would have the same mass,
            whatever its cost, and queries and keys would never learn.
        scale: ``standard`` is :class:`CORALLoss`. ``published`` multiplies each term by
            (B - 1)^2 / d, the published code's covariances.
        layer: Position in ``Features.intermediate`` of the map to read.
        form: CORAL's form, ``auto``, ``matrix`` or ``gram``.
        gather: Estimate the covariances on the batch of all processes.

    Shape:
        maps ``(B, C, H, W)``, tokens ``(B, N, C)`` or rows ``(B, C)``, of any two kinds, which are
        average-pooled to a common size where sizes differ; any float dtype, B >= 2; output a scalar
        in float32 (float64 for float64 inputs). On rows, which are one token, both terms are CORAL
        of the rows and nothing is planned.

    Raises:
        ValueError: If ``heads`` does not divide ``teacher_channels``, an option is unknown, the
            planner cannot train or plan tokens, maps do not fit, or tokens that would need a grid
            have none.
        TypeError: If ``planner`` is no :class:`LagrangianPlanner`.

    References:
        Wei et al., *Asymmetric Cross-Modal Knowledge Distillation: Bridging Modalities with Weak
        Semantic Consistency*, AAAI 2026, the Planner.

    Example:
        >>> criterion = SemanticAlignmentLoss(16, 32, heads=4)
        >>> terms = criterion.terms(torch.randn(8, 16, 7, 7), torch.randn(8, 32, 4, 4))
        >>> sorted(terms)
        ['SKA-embeddings', 'SKA-tokens']
    """

    reads = ("intermediate",)
    couples = True
    min_batch = 2

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        heads: int = 8,
        planner: LagrangianPlanner | None = None,
        scale: str = "standard",
        layer: int = -1,
        form: str = "auto",
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        student_channels = whole("student_channels", student_channels)
        teacher_channels = whole("teacher_channels", teacher_channels)
        self.heads = whole("heads", heads)
        if teacher_channels % self.heads:
            raise ValueError(f"heads={heads} must divide teacher_channels={teacher_channels}")
        self.adapter = (
            None
            if student_channels == teacher_channels
            else ConvAdapter(student_channels, teacher_channels)
        )
        self.scores_s = nn.Linear(teacher_channels, 2 * teacher_channels, bias=False)
        self.scores_t = nn.Linear(teacher_channels, 2 * teacher_channels, bias=False)
        if planner is None:
            epsilon = math.sqrt(teacher_channels / self.heads)
            planner = LagrangianPlanner(epsilon, gradient="unrolled")
        self.planner = _check_planner(planner)
        self.scale = choice("scale", scale, SCALES)
        self.layer = checked_layer(layer)
        self.form = choice("form", form, FORMS)

    @classmethod
    def arguments(
        cls, feats_s: Features, feats_t: Features, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Returns the channels of two example passes, and the most heads up to 8 that they take."""
        map_s, map_t = map_pair(feats_s, feats_t, options.get("layer", -1))
        width = channels(map_t)
        return {
            "student_channels": channels(map_s),
            "teacher_channels": width,
            "heads": next(heads for heads in range(8, 0, -1) if width % heads == 0),
        }

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        map_s, map_t = map_pair(student, teacher, self.layer)
        if self.adapter is not None:
            map_s = self.adapter(map_s)
        embedding_s, embedding_t = pooled(map_s), pooled(map_t)
        tokens_s, tokens_t = self._tokens(map_s, map_t)
        refined_s = _refined(tokens_s, self._mass(tokens_s, self.scores_s).mean(dim=1))
        refined_t = _refined(tokens_t, self._mass(tokens_t, self.scores_t).mean(dim=1))
        return {
            "SKA-tokens": self._coral(refined_s.flatten(1), refined_t.flatten(1)),
            "SKA-embeddings": self._coral(embedding_s, embedding_t),
        }

    def extra_repr(self) -> str:
        return f"heads={self.heads}, scale={self.scale!r}, form={self.form!r}"

    def _tokens(self, map_s: Tensor, map_t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns both as ``(B, N, C)`` of one N, after checking that they fit."""
        width = self.scores_s.in_features
        if channels(map_s) != width or channels(map_t) != width:
            raise ValueError(
                f"the criterion was built for a teacher of {width} channels, got a student's map "
                f"{describe(map_s)} (adapted, if channels differ) and a teacher's "
                f"{describe(map_t)}; build it with from_features"
            )
        map_s, map_t = common_positions(map_s, map_t, "student and teacher intermediate")
        return rearrange(map_s, "b c h w -> b (h w) c"), rearrange(map_t, "b c h w -> b (h w) c")

    def _mass(self, tokens: Tensor, scores: nn.Linear) -> Tensor:
        """Returns what every token receives under its modality's plans, ``(B, heads, N)``."""
        pattern = "b n (two heads d) -> two b heads n d"
        query, key = rearrange(scores(tokens), pattern, two=2, heads=self.heads)
        # Row masses are 1 / N: what a column receives is the softmax's mean over the rows.
        return self.planner.received(-query @ key.transpose(-2, -1))

    def _coral(self, rows_s: Tensor, rows_t: Tensor) -> Tensor:
        distance = coral_distance(rows_s, rows_t, self.form)
        batch, width = rows_s.shape
        return distance if self.scale == "standard" else distance * ((batch - 1) ** 2 / width)


def _refined(tokens: Tensor, weight: Tensor) -> Tensor:
    """Weighs tokens ``(B, N, C)`` by ``(B, N)`` and restores the norm of their mean."""
    refined = tokens * weight[..., None]
    before, after = _mean_norm(tokens), _mean_norm(refined)
    # Tokens that cancel out have no mean to restore.
    return refined * (before / torch.where(after == 0, 1, after))


def _mean_norm(tokens: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(tokens.mean(dim=1), dim=-1)
    return length[:, None, None]


def _check_planner(planner: LagrangianPlanner) -> LagrangianPlanner:
    if not isinstance(planner, LagrangianPlanner):
        raise TypeError(f"planner must be a LagrangianPlanner, got {describe(planner)}")
    if planner.gradient != "unrolled":
        raise ValueError(
            "planner must have gradient='unrolled', or queries and keys would never learn, got "
            f"{planner.gradient!r}"
        )
    if planner.constraint != "rows":
        raise ValueError(
            f"planner must have constraint 'rows', got {planner.constraint!r}: where the mass that "
            "a token receives is prescribed or capped, queries and keys learn nothing or little"
        )
    return planner
