"""Cases of contrastive distillation, in the middle of a run and at its first batch."""

from __future__ import annotations

import torch
from torch import Tensor

from structkd import Features
from structkd.criteria.contrastive import ContrastiveRepresentationLoss
from tests.cases.case import Case, Example, generator, normal, pick, shaped
from tests.reference import contrastive as reference

SIZE = 12


def crd(seed: int, batch: int) -> Example:
    """A first batch: Z is not set yet, and the call moves the banks."""
    rng = generator(seed)
    width_s, width_t = pick(rng, 1, 5), pick(rng, 1, 5)
    torch.manual_seed(seed)
    criterion = ContrastiveRepresentationLoss(
        SIZE, embedding_dim=3, negatives=7, temperature=0.5, seed=seed
    ).double()
    index = torch.randperm(SIZE, generator=rng)[:batch]
    student = Features(embedding=normal(rng, batch, width_s), index=index)
    teacher = Features(embedding=normal(rng, batch, width_t))
    return Example(shaped(criterion, student, teacher), student, teacher)


def _later(seed: int, batch: int) -> Example:
    """In eval mode after a training step: nothing moves."""
    example = crd(seed, batch)
    before = crd(seed, batch)
    example.criterion(before.student, before.teacher)
    example.criterion.eval()
    return example


def _oracle(example: Example) -> Tensor:
    student, teacher = example.student, example.teacher
    terms = reference.crd(example.criterion, student.embedding, teacher.embedding, student.index)
    return sum(terms.values())


# order_free=False: the negatives of a sample are drawn by its place in the batch.
CASES = [
    Case("crd", _later, ("embedding",), _oracle, order_free=False),
    Case(
        "crd-first-batch",
        crd,
        ("embedding",),
        _oracle,
        order_free=False,
        pure=False,
    ),
]
