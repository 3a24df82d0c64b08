"""Cases of the dimensional-structure criteria."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from structkd import (
    ConvAdapter,
    CORALLoss,
    CrossCorrelationLoss,
    DSLoss,
    Features,
    SupervisionLoss,
    UniformityCalibrationLoss,
)
from tests.cases.case import Case, Example, generator, normal, pick, shaped
from tests.reference import dskd


def _orthonormal(seed: int) -> Tensor:
    return torch.linalg.qr(normal(generator(seed), 12, 5))[0]


def _sem(form: str, center: bool = False, projected: bool = False, floor: float = 0.0):
    def make(seed: int, batch: int) -> Example:
        rng = generator(seed)
        width_s, width_t = pick(rng, 1, 6), pick(rng, 1, 6)
        width_s = width_s if projected else width_t
        torch.manual_seed(seed)
        project_s = nn.Linear(width_s, 4) if projected else None
        project_t = nn.Linear(width_t, 4) if projected else None
        criterion = CrossCorrelationLoss(
            projector=None if projected else "none",
            student_projector=project_s,
            teacher_projector=project_t,
            lambd=0.05,
            center=center,
            form=form,
            floor=floor,
        ).double()
        return Example(
            criterion,
            Features(embedding=normal(rng, batch, width_s)),
            Features(embedding=normal(rng, batch, width_t)),
        )

    def oracle(example: Example) -> Tensor:
        z_s, z_t = example.student.embedding, example.teacher.embedding
        if projected:
            z_s = z_s @ example.criterion.student_projector.weight.T
            z_s = z_s + example.criterion.student_projector.bias
            z_t = z_t @ example.criterion.teacher_projector.weight.T
            z_t = z_t + example.criterion.teacher_projector.bias
        return sum(dskd.sem_terms(z_s, z_t, lambd=0.05, center=center, floor=floor))

    return make, oracle


def _zero_sem(form: str):
    def zero(seed: int) -> Example:
        columns = _orthonormal(seed)
        return Example(
            CrossCorrelationLoss(projector="none", form=form),
            Features(embedding=columns * 3),
            Features(embedding=columns),
        )

    return zero


def _dcm(cross_sign: str, *, tokens: bool = False, raw: bool = False, pool: str | int = "avg"):
    def make(seed: int, batch: int) -> Example:
        rng = generator(seed)
        width_s, width_t = pick(rng, 2, 4), pick(rng, 2, 4)
        torch.manual_seed(seed)
        criterion = UniformityCalibrationLoss(
            ConvAdapter() if pool == "avg" else None,
            sigma="median" if raw else 0.8,
            normalize=not raw,
            pool=pool,
            cross_sign=cross_sign,
        )
        width_s = width_s if pool == "avg" else width_t
        if tokens:
            size_s, size_t = (pick(rng, 1, 3), width_s), (pick(rng, 1, 3), width_t)
        else:
            size_s, size_t = (width_s, 2, pick(rng, 2, 3)), (width_t, 2, 2)
        if pool == "flatten":
            size_s = size_t
        elif pool != "avg":  # twice the teacher's size, and four of its positions a cell
            size_s, size_t = (width_s, 8, 4), (width_t, 4, 2)
        student = Features(intermediate=normal(rng, batch, *size_s))
        teacher = Features(intermediate=normal(rng, batch, *size_t))
        if pool == "avg":
            shaped(criterion, student, teacher)
        return Example(criterion, student, teacher)

    def oracle(example: Example) -> Tensor:
        maps_s, maps_t = example.student.intermediate[0], example.teacher.intermediate[0]
        if pool == "flatten":
            rows_s = torch.stack([item.flatten() for item in maps_s])
            rows_t = torch.stack([item.flatten() for item in maps_t])
        elif pool != "avg":
            rows_s, rows_t = dskd.mean_cells(maps_s, pool), dskd.mean_cells(maps_t, pool)
        else:
            # Averaging and a 1x1 convolution commute: both are linear.
            rows_s = dskd.mean_over_positions(maps_s)
            weight = example.criterion.adapter.conv.weight[:, :, 0, 0]
            rows_s = torch.stack([weight @ row for row in rows_s])
            rows_s = rows_s + example.criterion.adapter.conv.bias
            rows_t = dskd.mean_over_positions(maps_t)
        if not raw:
            rows_s, rows_t = dskd.unit_rows(rows_s), dskd.unit_rows(rows_t)
        sigma = dskd.median_distance(rows_t) if raw else 0.8
        sign = 1 if cross_sign == "separate" else -1
        own = dskd.mean_rbf(rows_s, rows_s, sigma)
        return own + sign * dskd.mean_rbf(rows_s, rows_t, sigma)

    return make, oracle


def _coral(form: str):
    def make(seed: int, batch: int) -> Example:
        rng = generator(seed)
        width = pick(rng, 1, 5)
        return Example(
            CORALLoss(form=form).double(),
            Features(embedding=normal(rng, batch, width)),
            Features(embedding=2 * normal(rng, batch, width)),
        )

    return make, lambda e: dskd.coral(e.student.embedding, e.teacher.embedding)


def _zero_coral(form: str):
    def zero(seed: int) -> Example:
        rows = normal(generator(seed), 6, 9)
        return Example(
            CORALLoss(form=form).double(),
            Features(embedding=rows + 5),
            Features(embedding=rows),
        )

    return zero


def _ds(variant: str):
    def make(seed: int, batch: int) -> Example:
        rng = generator(seed)
        width_s, width_t = pick(rng, 2, 4), pick(rng, 2, 4)
        torch.manual_seed(seed)
        student = Features(
            logits=normal(rng, batch, 3),
            embedding=normal(rng, batch, width_s),
            intermediate=normal(rng, batch, 2, 2, 2),
        )
        teacher = Features(
            embedding=normal(rng, batch, width_t),
            intermediate=normal(rng, batch, 3, 3, 3),
        )
        printed = variant == "printed"
        sem = CrossCorrelationLoss(projector="linear") if printed else None
        criterion = DSLoss(variant=variant, gamma=(0.7, 0.3), sem=sem, srm=True)
        target = torch.randint(0, 3, (batch,), generator=rng)
        return Example(shaped(criterion, student, teacher), student, teacher, target)

    def oracle(example: Example) -> Tensor:
        student, teacher, criterion = example.student, example.teacher, example.criterion
        linear = criterion.sem.student_projector.net[0]
        z_s = student.embedding @ linear.weight.T + linear.bias
        sem = sum(dskd.sem_terms(z_s, teacher.embedding, center=variant == "measured"))
        if variant == "measured":
            sem = sem / teacher.embedding.shape[1]
        conv = criterion.dcm.adapter.conv
        rows_s = dskd.mean_over_positions(student.intermediate[0]) @ conv.weight[:, :, 0, 0].T
        rows_s = dskd.unit_rows(rows_s + conv.bias)
        rows_t = dskd.unit_rows(dskd.mean_over_positions(teacher.intermediate[0]))
        sign = 1 if variant == "printed" else -1
        own = dskd.mean_rbf(rows_s, rows_s, 0.5**0.5)
        dcm = own + sign * dskd.mean_rbf(rows_s, rows_t, 0.5**0.5)
        supervision = dskd.cross_entropy(student.logits, example.target)
        return supervision + 0.7 * sem + 0.3 * dcm

    return make, oracle


def _srm(smoothing: float):
    def make(seed: int, batch: int) -> Example:
        rng = generator(seed)
        classes = pick(rng, 2, 5)
        target = torch.randint(0, classes, (batch,), generator=rng)
        target[1::2] = -100
        student = Features(logits=2 * normal(rng, batch, classes))
        return Example(
            SupervisionLoss(label_smoothing=smoothing).double(), student, Features(), target
        )

    def oracle(example: Example) -> Tensor:
        return dskd.supervision(example.student.logits, example.target, smoothing)

    return make, ("logits",), oracle


def _mlp(seed: int, batch: int) -> Example:
    """MLP projectors: too deep for an oracle of their own, so it takes the modules' outputs."""
    rng = generator(seed)
    torch.manual_seed(seed)
    criterion = CrossCorrelationLoss(projector="mlp", projector_dim=6)
    student = Features(embedding=normal(rng, batch, 3))
    teacher = Features(embedding=normal(rng, batch, 4))
    return Example(shaped(criterion, student, teacher), student, teacher)


def _mlp_oracle(example: Example) -> Tensor:
    criterion = example.criterion
    return sum(
        dskd.sem_terms(
            criterion.student_projector(example.student.embedding),
            criterion.teacher_projector(example.teacher.embedding),
        )
    )


# The true gradient of CORAL grows with the cube of its inputs and leaves float16's range.
_CORAL_HALF = (1e-4, 1e-2, 1.0, 10.0)

# A bandwidth that follows the data makes the true gradient grow as the inputs shrink.
_MEDIAN_HALF = (1e-2, 1.0, 1e2, 1e4)

CASES = [
    Case("srm", *_srm(0.0), reads_teacher=False),
    Case("srm-smoothed", *_srm(0.2), reads_teacher=False),
    *(
        Case(
            f"sem-{form}-{'centred' if center else 'raw'}",
            *_sem_args,
            min_batch=2,
            zero=None if center else _zero_sem(form),
        )
        for form in ("matrix", "gram", "auto")
        for center in (False, True)
        for _sem_args in [
            (_sem(form, center)[0], ("embedding",), _sem(form, center)[1]),
        ]
    ),
    *(
        Case(f"sem-{form}-floor", make, ("embedding",), oracle, min_batch=2)
        for form in ("matrix", "gram")
        for make, oracle in [_sem(form, center=form == "matrix", floor=0.03)]
    ),
    Case(
        "sem-linear",
        _sem("auto", projected=True)[0],
        ("embedding",),
        _sem("auto", projected=True)[1],
        min_batch=2,
    ),
    Case("sem-mlp", _mlp, ("embedding",), _mlp_oracle, min_batch=2),
    *(
        Case(
            name,
            make,
            ("intermediate",),
            oracle,
            min_batch=2,
            half_scales=_MEDIAN_HALF if name == "dcm-median" else Case.half_scales,
        )
        for name, (make, oracle) in {
            "dcm-separate": _dcm("separate"),
            "dcm-align": _dcm("align"),
            "dcm-tokens": _dcm("separate", tokens=True),
            "dcm-median": _dcm("align", raw=True),
            "dcm-flatten": _dcm("separate", pool="flatten"),
            "dcm-cells": _dcm("align", pool=2),
        }.items()
    ),
    *(
        Case(
            f"coral-{form}",
            _coral(form)[0],
            ("embedding",),
            _coral(form)[1],
            min_batch=2,
            half_scales=_CORAL_HALF,
            zero=_zero_coral(form),
        )
        for form in ("matrix", "gram")
    ),
    *(
        Case(
            f"ds-{variant}",
            _ds(variant)[0],
            ("logits", "embedding", "intermediate"),
            _ds(variant)[1],
            min_batch=2,
        )
        for variant in ("measured", "printed")
    ),
]
