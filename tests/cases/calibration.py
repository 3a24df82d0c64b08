"""Cases of the cross-layer attention."""

from __future__ import annotations

import torch
from torch import Tensor

from structkd import Features
from structkd.criteria.calibration import SemanticCalibrationLoss
from tests.cases.case import Case, Example, generator, normal, pick, shaped
from tests.reference import calibration


def _semckd(layers_s: int, layers_t: int):
    def make(seed: int, batch: int) -> Example:
        rng = generator(seed)
        torch.manual_seed(seed)
        batch = max(batch, 2)

        def network(layers: int) -> Features:
            return Features(
                intermediate=[
                    normal(rng, batch, pick(rng, 1, 3), pick(rng, 1, 3), pick(rng, 1, 3))
                    for _ in range(layers)
                ]
            )

        student, teacher = network(layers_s), network(layers_t)
        criterion = shaped(SemanticCalibrationLoss(), student, teacher)
        return Example(criterion, student, teacher)

    def oracle(example: Example) -> Tensor:
        return calibration.semantic_calibration(
            example.student.intermediate, example.teacher.intermediate, example.criterion
        )

    return make, ("intermediate",), oracle


CASES = [
    # The query and key networks read the similarities in the order of the batch.
    Case("semckd-2x3", *_semckd(2, 3), min_batch=2, order_free=False),
    Case("semckd-1x1", *_semckd(1, 1), min_batch=2, order_free=False),
]
