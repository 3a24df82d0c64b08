"""Cases of the flow matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from structkd import Features
from structkd.criteria.flow import FlowMatrixLoss
from tests.cases.case import Case, Example, generator, normal, pick, shaped
from tests.reference import flow, maps


def _flow(flows: str, *, tokens: bool = False):
    def make(seed: int, batch: int) -> Example:
        rng = generator(seed)
        widths = [pick(rng, 1, 3) for _ in range(4 if flows == "pairs" else 3)]

        def network() -> Features:
            count = pick(rng, 2, 4)
            sizes = [(pick(rng, 1, 4), pick(rng, 1, 4)) for _ in widths]
            if tokens:
                return Features(intermediate=[normal(rng, batch, count, w) for w in widths])
            return Features(
                intermediate=[
                    normal(rng, batch, w, *size) for w, size in zip(widths, sizes, strict=True)
                ]
            )

        return Example(FlowMatrixLoss(flows), network(), network())

    def oracle(example: Example) -> Tensor:
        maps_s, maps_t = example.student.intermediate, example.teacher.intermediate
        ends = [(0, 1), (2, 3)] if flows == "pairs" else [(0, 1), (1, 2)]
        return sum(flow.flow_gap((maps_s[i], maps_s[j]), (maps_t[i], maps_t[j])) for i, j in ends)

    return make, ("intermediate",), oracle


def _adapted():
    """Other channels in the student: a 1x1 convolution a map, none where channels agree."""
    widths = [(2, 3), (4, 4), (3, 1)]

    def make(seed: int, batch: int) -> Example:
        rng = generator(seed)
        torch.manual_seed(seed)
        student = Features(intermediate=[normal(rng, batch, s, 2, 3) for s, _ in widths])
        teacher = Features(intermediate=[normal(rng, batch, t, 3, 2) for _, t in widths])
        return Example(shaped(FlowMatrixLoss("chain"), student, teacher), student, teacher)

    def oracle(example: Example) -> Tensor:
        rows = iter(example.criterion.convs.weight)
        shifts = iter(example.criterion.convs.bias)
        maps_s = []
        for features, (width_s, width_t) in zip(example.student.intermediate, widths, strict=True):
            if width_s == width_t:
                maps_s.append(features)
                continue
            weight = torch.stack([next(rows)[:width_s] for _ in range(width_t)])
            bias = torch.stack([next(shifts) for _ in range(width_t)])
            maps_s.append(maps.convolve(features, weight[:, :, None, None], bias))
        maps_t = example.teacher.intermediate
        return sum(
            flow.flow_gap((maps_s[i], maps_s[i + 1]), (maps_t[i], maps_t[i + 1])) for i in (0, 1)
        )

    return make, ("intermediate",), oracle


def _zero(seed: int) -> Example:
    rng = generator(seed)
    feats = Features(intermediate=[normal(rng, 4, 2, 4, 4), normal(rng, 4, 3, 2, 2)])
    return Example(FlowMatrixLoss(), feats, feats)


# The true gradient grows with the cube of the inputs and leaves float16's range.
_HALF = (1e-4, 1e-2, 1.0, 10.0)

CASES = [
    Case("fsp-pairs", *_flow("pairs"), half_scales=_HALF, zero=_zero),
    Case("fsp-chain", *_flow("chain"), half_scales=_HALF),
    Case("fsp-tokens", *_flow("pairs", tokens=True), half_scales=_HALF),
    Case("fsp-adapted", *_adapted(), half_scales=_HALF),
]
