"""Cases of semantic-aware knowledge alignment."""

from __future__ import annotations

import torch
from torch import Tensor

from structkd import Features
from structkd.criteria.alignment import SemanticAlignmentLoss
from tests.cases.case import Case, Example, generator, normal, shaped
from tests.reference import alignment

HEADS = 2
# student map, teacher map
_SIZES = {
    "maps": ((4, 1, 2), (4, 1, 2)),
    "adapted": ((3, 2, 4), (4, 2, 2)),
    "tokens": ((3, 4), (3, 4)),
}


def _ska(kind: str, form: str, scale: str):
    size_s, size_t = _SIZES[kind]

    def make(seed: int, batch: int) -> Example:
        rng = generator(seed)
        torch.manual_seed(seed)
        criterion = SemanticAlignmentLoss(heads=HEADS, form=form, scale=scale)
        student = Features(intermediate=normal(rng, batch, *size_s))
        teacher = Features(intermediate=normal(rng, batch, *size_t))
        return Example(shaped(criterion, student, teacher), student, teacher)

    def oracle(example: Example) -> Tensor:
        criterion = example.criterion
        map_s, map_t = example.student.intermediate[0], example.teacher.intermediate[0]
        if criterion.adapter.conv is not None:
            weight, bias = criterion.adapter.conv.weight[:, :, 0, 0], criterion.adapter.conv.bias
            rows = [[weight @ pixel + bias for pixel in item.flatten(1).T] for item in map_s]
            adapted = torch.stack([torch.stack(row, dim=1) for row in rows])
            map_s = adapted.unflatten(2, map_s.shape[2:])
        return sum(
            alignment.alignment(
                map_s,
                map_t,
                criterion.scores_s.net[0].weight,
                criterion.scores_t.net[0].weight,
                heads=HEADS,
                published=scale == "published",
            )
        )

    return make, oracle


def _zero(seed: int) -> Example:
    feats = Features(intermediate=normal(generator(seed), 6, 4, 2, 2))
    criterion = shaped(SemanticAlignmentLoss(heads=HEADS), feats, feats).requires_grad_(False)
    criterion.scores_t.load_state_dict(criterion.scores_s.state_dict())
    return Example(criterion, feats, feats)


# CORAL's true gradient grows with the cube of its inputs, the plan's with another square.
_HALF = (1e-4, 1e-2, 1.0, 10.0)

CASES = [
    Case(
        f"ska-{kind}-{form}-{scale}",
        make,
        ("intermediate",),
        oracle,
        min_batch=2,
        half_scales=_HALF,
        zero=_zero if kind == "maps" else None,
    )
    for kind, form, scale in (
        ("maps", "gram", "standard"),
        ("adapted", "auto", "standard"),
        ("tokens", "matrix", "published"),
    )
    for make, oracle in [_ska(kind, form, scale)]
]
