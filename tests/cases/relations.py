"""Cases of the criteria on relations within a batch: RKD, DistilVPR, CC."""

from __future__ import annotations

import torch
from torch import Tensor

from structkd import Features
from structkd.criteria.relations import (
    CorrelationCongruenceLoss,
    DistilVPRLoss,
    RelationalLoss,
)
from tests.cases.case import Case, Example, generator, normal, pick, shaped
from tests.reference import relations


def _rows(criterion, *, scale: float = 1.0):
    def make(seed: int, batch: int) -> Example:
        rng = generator(seed)
        return Example(
            criterion(),
            Features(embedding=scale * normal(rng, batch, pick(rng, 1, 5))),
            Features(embedding=scale * normal(rng, batch, pick(rng, 1, 5))),
        )

    return make, ("embedding",)


def _rkd(example: Example) -> Tensor:
    rows = example.student.embedding, example.teacher.embedding
    return 25 * relations.distance_gap(*rows) + 50 * relations.angle_gap(*rows)


def _vpr(example: Example) -> Tensor:
    rows = example.student.embedding, example.teacher.embedding
    return (
        relations.distance_gap(*rows)
        + 2 * relations.angle_gap(*rows)
        + 3 * relations.geodesic_gap(*rows, 0.5)
    )


def _geodesic(example: Example) -> Tensor:
    return relations.geodesic_gap(example.student.embedding, example.teacher.embedding, 0.1)


def _congruence(seed: int, batch: int) -> Example:
    rng = generator(seed)
    torch.manual_seed(seed)
    student = Features(embedding=normal(rng, batch, pick(rng, 1, 5)))
    teacher = Features(embedding=normal(rng, batch, pick(rng, 1, 5)))
    criterion = CorrelationCongruenceLoss(embedding_dim=6)
    return Example(shaped(criterion, student, teacher), student, teacher)


def _congruence_oracle(example: Example) -> Tensor:
    embedded = []
    for rows, projector in (
        (example.student.embedding, example.criterion.student_embedding),
        (example.teacher.embedding, example.criterion.teacher_embedding),
    ):
        linear = projector.net[0]
        embedded.append(torch.stack([linear.weight @ row + linear.bias for row in rows]))
    return relations.correlation_congruence(*embedded, 0.4)


def _turned(criterion, factor: float):
    """A rotation changes no relation; a factor changes geodesics only."""

    def zero(seed: int) -> Example:
        rng = generator(seed)
        rows, turn = normal(rng, 6, 4), torch.linalg.qr(normal(rng, 4, 4))[0]
        return Example(
            criterion(), Features(embedding=factor * rows @ turn), Features(embedding=rows)
        )

    return zero


def _zero_congruence(seed: int) -> Example:
    feats = Features(embedding=normal(generator(seed), 6, 4))
    criterion = shaped(CorrelationCongruenceLoss(embedding_dim=8), feats, feats)
    criterion.teacher_embedding.load_state_dict(criterion.student_embedding.state_dict())
    return Example(criterion, feats, feats)


# Distances and angles do not change with the scale, so their gradient grows as its inverse: at
# 1e-4 it leaves float16's range.
_HALF = (1e-2, 1.0, 1e2, 1e4)

CASES = [
    Case(
        "rkd",
        *_rows(RelationalLoss),
        _rkd,
        min_batch=3,
        half_scales=_HALF,
        zero=_turned(RelationalLoss, 3.0),
    ),
    Case(
        "rkd-angle",
        *_rows(lambda: RelationalLoss(distance_weight=0)),
        lambda example: (
            _rkd(example)
            - 25 * relations.distance_gap(example.student.embedding, example.teacher.embedding)
        ),
        min_batch=3,
        half_scales=_HALF,
    ),
    Case(
        "vpr",
        *_rows(lambda: DistilVPRLoss(1, 2, 3, curvature=0.5)),
        _vpr,
        min_batch=3,
        half_scales=_HALF,
        zero=_turned(DistilVPRLoss, 1.0),
    ),
    # Short rows, where hyperbolic space is flat.
    Case(
        "vpr-geodesic",
        *_rows(lambda: DistilVPRLoss(0, 0), scale=0.01),
        _geodesic,
        min_batch=3,
        half_scales=_HALF,
    ),
    Case("cc", _congruence, ("embedding",), _congruence_oracle, min_batch=2, zero=_zero_congruence),
]
