"""Cases of dense structure: the trained convolutions and the closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from structkd import DenseStructureLoss, Features
from tests.cases.case import Case, Example, generator, normal, pick, shaped
from tests.reference import dense, maps

READS = ("intermediate",)


def _stage(rng: torch.Generator, kind: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of one stage without the batch; sizes need not divide, widths go either way."""
    width_s, width_t = pick(rng, 1, 4), pick(rng, 1, 4)
    if kind == "rows":
        return (width_s,), (width_t,)
    if kind == "tokens":
        count = pick(rng, 2, 5)
        return (count, width_s), (count, width_t)
    return (width_s, pick(rng, 2, 4), pick(rng, 1, 3)), (width_t, pick(rng, 2, 4), pick(rng, 1, 3))


def _features(rng: torch.Generator, batch: int, kinds: tuple[str, ...]) -> list[Features]:
    shapes = [_stage(rng, kind) for kind in kinds]
    student = Features(intermediate=[normal(rng, batch, *shape) for shape, _ in shapes])
    teacher = Features(intermediate=[normal(rng, batch, *shape) for _, shape in shapes])
    return [student, teacher]


def _rows(example: Example) -> list[tuple[dense.Rows, dense.Rows]]:
    found = []
    both = (example.student.intermediate, example.teacher.intermediate)
    for map_s, map_t in zip(*both, strict=True):
        map_s, map_t = maps.common_size(maps.tokens_to_map(map_s), maps.tokens_to_map(map_t))
        found.append((dense.positions(map_s), dense.positions(map_t)))
    return found


def _weights(example: Example) -> list[Tensor]:
    widths = [
        tuple(value.shape[-1] if value.dim() == 3 else value.shape[1] for value in pair)
        for pair in zip(example.student.intermediate, example.teacher.intermediate, strict=True)
    ]
    return [weight for weight, _ in example.criterion.convs(widths, torch.zeros(()))]


def _conv(diagonal: str, *kinds: str, floor: float = 0.02):
    def make(seed: int, batch: int) -> Example:
        rng = generator(seed)
        student, teacher = _features(rng, batch, kinds)
        torch.manual_seed(seed)
        criterion = DenseStructureLoss(diagonal=diagonal, lambd=0.3, floor=floor)
        return Example(shaped(criterion, student, teacher), student, teacher)

    def oracle(example: Example) -> Tensor:
        return sum(
            sum(
                dense.stage_terms(
                    dense.mapped(rows_s, weight),
                    rows_t,
                    form=diagonal,
                    lambd=0.3,
                    floor=floor,
                )
            )
            for (rows_s, rows_t), weight in zip(_rows(example), _weights(example), strict=True)
        )

    return make, READS, oracle


def _closed(split: bool, *kinds: str):
    def make(seed: int, batch: int) -> Example:
        student, teacher = _features(generator(seed), batch, kinds)
        criterion = DenseStructureLoss(
            adapter="closed_form", split=split, ridge=0.05, floor=0.02
        ).double()
        return Example(criterion, student, teacher)

    def oracle(example: Example) -> Tensor:
        return sum(
            dense.closed_form(rows_s, rows_t, ridge=0.05, floor=0.02, split=split)
            for rows_s, rows_t in _rows(example)
        )

    return make, READS, oracle


def _zero_squared(seed: int) -> Example:
    """Uncorrelated channels that the adapter has only to reorder and scale."""
    rng = generator(seed)
    rows = normal(rng, 24, 4)
    columns = torch.linalg.qr(rows - rows.mean(0))[0]
    teacher = columns.T.reshape(4, 2, 3, 4).transpose(0, 1)
    order = [2, 0, 3, 1]
    student, teacher = Features(intermediate=teacher[:, order]), Features(intermediate=teacher)
    criterion = shaped(DenseStructureLoss(diagonal="squared", floor=0.0), student, teacher)
    with torch.no_grad():
        criterion.convs.weight.copy_(3 * torch.eye(4, dtype=torch.float64)[:, order])
    return Example(criterion, student, teacher)


CASES = [
    Case("dense-information", *_conv("information", "maps", "maps")),
    Case("dense-squared", *_conv("squared", "maps"), zero=_zero_squared),
    Case("dense-no-floor", *_conv("information", "maps", floor=0.0)),
    Case("dense-tokens", *_conv("information", "tokens", "maps")),
    # One position a sample: a batch of one would leave nothing to correlate.
    Case("dense-rows", *_conv("squared", "rows"), min_batch=2),
    Case("dense-closed-form", *_closed(False, "maps", "tokens")),
    # The halves follow the order of the batch.
    Case("dense-closed-form-split", *_closed(True, "maps"), order_free=False),
    Case("dense-closed-form-rows", *_closed(False, "rows"), min_batch=2),
]
