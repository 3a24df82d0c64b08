"""Cases of the distributions by class."""

from __future__ import annotations

import torch
from torch import Tensor

from structkd import ClassCORALLoss, ClassMeanKDLoss, Features
from tests.cases.case import Case, Example, generator, normal, pick
from tests.reference import classwise

CLASSES, TEACHERS = 3, 11


def _teachers(seed: int, width: int) -> tuple[Tensor, Tensor]:
    rows = 2 * normal(generator(seed + 7), TEACHERS, width)
    labels = torch.arange(TEACHERS) % CLASSES
    labels[-1] = -100
    return rows, labels


def _target(rng: torch.Generator, batch: int) -> Tensor:
    target = torch.randint(CLASSES, (batch,), generator=rng)
    target[1::4] = -100
    return target


def _kd(seed: int, batch: int) -> Example:
    rng = generator(seed)
    rows, labels = _teachers(seed, CLASSES)
    criterion = ClassMeanKDLoss(rows, labels, temperature=2.0).double()
    criterion.rows, criterion.classes = rows, labels  # for the oracle
    student = Features(logits=2 * normal(rng, batch, CLASSES))
    return Example(criterion, student, Features(), _target(rng, batch))


def _kd_oracle(example: Example) -> Tensor:
    held, logits = example.criterion, example.student.logits
    return classwise.class_distillation(logits, example.target, held.rows, held.classes, 2.0)


def _coral(mean_weight: float):
    def make(seed: int, batch: int) -> Example:
        rng = generator(seed)
        width = pick(rng, 1, 4)
        rows, labels = _teachers(seed, width)
        criterion = ClassCORALLoss(rows, labels, mean_weight=mean_weight).double()
        criterion.rows, criterion.classes = rows, labels  # for the oracle
        student = Features(embedding=normal(rng, batch, width))
        return Example(criterion, student, Features(), _target(rng, batch))

    return make


def _coral_oracle(example: Example) -> Tensor:
    held, rows = example.criterion, example.student.embedding
    weight = held.mean_weight
    return classwise.class_coral(rows, example.target, held.rows, held.classes, weight)


def _zero(seed: int) -> Example:
    rows, labels = _teachers(seed, 4)
    criterion = ClassCORALLoss(rows, labels).double()
    return Example(criterion, Features(embedding=rows.clone()), Features(), labels)


# CORAL's true gradient grows with the cube of its inputs and leaves float16's range.
_HALF = (1e-4, 1e-2, 1.0, 10.0)

CASES = [
    Case("class-kd", _kd, ("logits",), _kd_oracle, reads_teacher=False),
    *(
        Case(
            f"class-coral-{weight:g}",
            _coral(weight),
            ("embedding",),
            _coral_oracle,
            reads_teacher=False,
            half_scales=_HALF,
            zero=_zero,
        )
        for weight in (1.0, 0.3)
    ),
]
