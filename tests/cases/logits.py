"""Cases of the criteria on class scores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from structkd import Criterion, Features, KDLoss
from structkd.criteria.logits import (
    CurriculumTemperatureLoss,
    DKDLoss,
    LogitMSELoss,
    LogitStandardizationLoss,
)
from tests.cases.case import Case, Example, generator, normal, pick
from tests.reference import logits as reference


def _make(build: Callable[[], Criterion], min_classes: int = 1):
    def make(seed: int, batch: int) -> Example:
        rng = generator(seed)
        classes = pick(rng, min_classes, 6)
        return Example(
            build().double(),
            Features(logits=2 * normal(rng, batch, classes)),
            Features(logits=2 * normal(rng, batch, classes)),
            torch.randint(0, classes, (batch,), generator=rng),
        )

    return make


def _same(build: Callable[[], Criterion]):
    def zero(seed: int) -> Example:
        logits = 3 * normal(generator(seed), 4, 5)
        target = torch.tensor([0, 4, 2, 2])
        return Example(build().double(), Features(logits=logits), Features(logits=logits), target)

    return zero


def _ctkd() -> CurriculumTemperatureLoss:
    criterion = CurriculumTemperatureLoss(low=0.5, high=9.0, ramp_epochs=4)
    with torch.no_grad():
        criterion.raw_temperature.fill_(-0.25)
    criterion.step_epoch()
    return criterion


def _dkd_oracle(example: Example) -> Tensor:
    return reference.dkd(
        example.student.logits,
        example.teacher.logits,
        example.target,
        alpha=0.7,
        beta=3.0,
        temperature=2.5,
    )


def _pair(example: Example) -> tuple[Tensor, Tensor]:
    return example.student.logits, example.teacher.logits


# The true gradient grows as the spread of a row shrinks.
_LSKD_HALF = (1e-2, 1.0, 1e2, 1e4)

_READS = ("logits",)

CASES = [
    Case(
        "kd",
        _make(lambda: KDLoss(3.0), min_classes=2),
        _READS,
        lambda e: reference.kd(*_pair(e), 3.0),
        zero=_same(KDLoss),
    ),
    Case(
        "kd-sigmoid",
        _make(lambda: KDLoss(3.0, form="sigmoid")),
        _READS,
        lambda e: reference.kd_sigmoid(*_pair(e), 3.0),
        zero=_same(lambda: KDLoss(form="sigmoid")),
    ),
    Case(
        "logits",
        _make(LogitMSELoss),
        _READS,
        lambda e: reference.logit_mse(*_pair(e)),
        zero=_same(LogitMSELoss),
    ),
    Case(
        "dkd",
        _make(lambda: DKDLoss(0.7, 3.0, 2.5), min_classes=2),
        _READS,
        _dkd_oracle,
        zero=_same(DKDLoss),
    ),
    Case(
        "lskd",
        _make(LogitStandardizationLoss, min_classes=2),
        _READS,
        lambda e: reference.lskd(*_pair(e), temperature=2.0),
        half_scales=_LSKD_HALF,
        zero=_same(LogitStandardizationLoss),
    ),
    Case(
        "ctkd",
        _make(_ctkd, min_classes=2),
        _READS,
        lambda e: reference.kd(*_pair(e), reference.ctkd_temperature(-0.25, 0.5, 9.0)),
        zero=_same(_ctkd),
    ),
]
