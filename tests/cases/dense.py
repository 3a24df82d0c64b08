"""Cases of dense dimensional structure: the trained adapter and the closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from structkd import DenseStructureLoss, DSLoss, Features
from tests.cases.case import Case, Example, generator, normal, pick
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


def _conv(diagonal: str, *kinds: str, floor: float = 0.02):
    def make(seed: int, batch: int) -> Example:
        rng = generator(seed)
        student, teacher = _features(rng, batch, kinds)
        torch.manual_seed(seed)
        criterion = DenseStructureLoss.from_features(
            student, teacher, diagonal=diagonal, lambd=0.3, floor=floor
        )
        return Example(criterion, student, teacher)

    def oracle(example: Example) -> Tensor:
        return sum(
            sum(
                dense.stage_terms(
                    dense.mapped(rows_s, conv.weight[:, :, 0, 0]),
                    rows_t,
                    form=diagonal,
                    lambd=0.3,
                    floor=floor,
                )
            )
            for (rows_s, rows_t), conv in zip(_rows(example), example.criterion.convs, strict=True)
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
    criterion = DenseStructureLoss(4, 4, diagonal="squared", floor=0.0).double()
    order = [2, 0, 3, 1]
    weight = 3 * torch.eye(4, dtype=torch.float64)[:, order]
    criterion.convs[0].weight = nn.Parameter(weight[:, :, None, None])
    student = teacher[:, order]
    return Example(criterion, Features(intermediate=student), Features(intermediate=teacher))


def _ds():
    def make(seed: int, batch: int) -> Example:
        student, teacher = _features(generator(seed), batch, ("maps", "maps"))
        torch.manual_seed(seed)
        criterion = DSLoss.from_features(student, teacher, aligned=True, gamma=0.7, floor=0.02)
        return Example(criterion, student, teacher)

    def oracle(example: Example) -> Tensor:
        convs = example.criterion.dense.convs
        return 0.7 * sum(
            sum(
                dense.stage_terms(
                    dense.mapped(rows_s, conv.weight[:, :, 0, 0]),
                    rows_t,
                    form="information",
                    lambd=0.05,
                    floor=0.02,
                )
            )
            for (rows_s, rows_t), conv in zip(_rows(example), convs, strict=True)
        )

    return make, READS, oracle


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
    Case("ds-aligned", *_ds()),
]
