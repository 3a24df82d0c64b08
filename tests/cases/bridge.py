"""Cases of the bridge, where every row has a label, a pair or both."""

from __future__ import annotations

import torch
from torch import Tensor

from structkd import Features, KDLoss
from structkd.matching.bridge import BridgeLoss
from tests.cases.case import Case, Example, generator, normal, pick
from tests.reference import bridge


def _make(*, soft: bool):
    def make(seed: int, batch: int) -> Example:
        rng = generator(seed)
        classes = pick(rng, 1, 5)
        criterion = BridgeLoss(KDLoss(4.0), task_weight=0.7, pair_weight=0.3).double()
        target = torch.randint(0, classes, (batch,), generator=rng)
        target[1::3] = -100
        if soft:
            target = normal(rng, batch, classes).softmax(dim=1)
        student, teacher = (Features(logits=2 * normal(rng, batch, classes)) for _ in range(2))
        return Example(criterion, student, teacher, target)

    return make


def _oracle(example: Example) -> Tensor:
    logits, rows = example.student.logits, list(range(len(example.student.logits)))
    supervised = bridge.task(logits, example.target, rows)
    distilled = bridge.distillation(logits, example.teacher.logits, rows)
    return 0.7 * supervised + 0.3 * distilled


CASES = [
    Case("bridge", _make(soft=False), ("logits",), _oracle),
    Case("bridge-probabilities", _make(soft=True), ("logits",), _oracle),
]
