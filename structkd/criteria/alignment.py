"""Semantic-aware knowledge alignment (SKA): CORAL on tokens that a transport plan refined."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from structkd._checks import choice, describe, whole
from structkd.criteria._maps import adapted, checked_layer, common_positions, map_pair, pooled
from structkd.criteria.base import Criterion
from structkd.criteria.coral import coral_distance
from structkd.criteria.numerics import FORMS
from structkd.features import Features
from structkd.projectors import ConvAdapter, Projector, project
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
        heads: Plans per modality, a divisor of the teacher's channels; by default the largest up to
            8.
        adapter: Module that brings the student's map ``(B, C, H, W)`` to the teacher's channels; by
            default a :class:`ConvAdapter` where the channels of the first call differ.
        planner: Intra-modal planner of the constraint ``rows`` with ``gradient="unrolled"``; the
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
        ValueError: If ``heads`` does not divide the teacher's channels, an option is unknown, the
            planner cannot train or plan tokens, maps do not fit, or tokens that would need a grid
            have none.
        TypeError: If ``planner`` is no :class:`LagrangianPlanner`.

    References:
        Wei et al., *Asymmetric Cross-Modal Knowledge Distillation: Bridging Modalities with Weak
        Semantic Consistency*, AAAI 2026, the Planner.

    Example:
        >>> criterion = SemanticAlignmentLoss(heads=4)
        >>> terms = criterion.terms(torch.randn(8, 16, 7, 7), torch.randn(8, 32, 4, 4))
        >>> sorted(terms)
        ['SKA-embeddings', 'SKA-tokens']
    """

    reads = ("intermediate",)
    over_ranks = "gathered"
    min_batch = 2

    def __init__(
        self,
        *,
        heads: int | None = None,
        adapter: nn.Module | None = None,
        planner: LagrangianPlanner | None = None,
        scale: str = "standard",
        layer: int = -1,
        form: str = "auto",
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        self.heads = None if heads is None else whole("heads", heads)
        self.adapter = ConvAdapter(skip_equal=True) if adapter is None else adapter
        self.scores_s = Projector(layers=1, bias=False)
        self.scores_t = Projector(layers=1, bias=False)
        self.planner = None if planner is None else _check_planner(planner)
        self.scale = choice("scale", scale, SCALES)
        self.layer = checked_layer(layer)
        self.form = choice("form", form, FORMS)

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        map_s, map_t = map_pair(student, teacher, self.layer)
        map_s = adapted(self.adapter, map_s, map_t)
        embedding_s, embedding_t = pooled(map_s), pooled(map_t)
        maps = common_positions(map_s, map_t, "student and teacher intermediate")
        tokens_s, tokens_t = (rearrange(value, "b c h w -> b (h w) c") for value in maps)
        refined_s = _refined(tokens_s, self._mass(tokens_s, self.scores_s).mean(dim=1))
        refined_t = _refined(tokens_t, self._mass(tokens_t, self.scores_t).mean(dim=1))
        return {
            "SKA-tokens": self._coral(refined_s.flatten(1), refined_t.flatten(1)),
            "SKA-embeddings": self._coral(embedding_s, embedding_t),
        }

    def _mass(self, tokens: Tensor, scores: Projector) -> Tensor:
        """Returns what every token receives under its modality's plans, ``(B, heads, N)``."""
        width = tokens.shape[2]
        heads = self.heads or next(count for count in range(8, 0, -1) if width % count == 0)
        if width % heads:
            raise ValueError(f"heads={heads} must divide the teacher's {width} channels")
        planner = self.planner or LagrangianPlanner(math.sqrt(width / heads), gradient="unrolled")
        scored = project(scores, tokens.flatten(0, 1), 2 * width).view(*tokens.shape[:2], -1)
        pattern = "b n (two heads d) -> two b heads n d"
        query, key = rearrange(scored, pattern, two=2, heads=heads)
        # Row masses are 1 / N: what a column receives is the softmax's mean over the rows.
        return planner.received(-query @ key.transpose(-2, -1))

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
