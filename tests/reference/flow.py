"""FSP (Yim et al., Eq. 1-2), entry by entry."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference import maps


def flow(first: Tensor, last: Tensor, i: int, j: int) -> Tensor:
    """Entry (i, j) of one sample's matrix, from maps (C, H, W) of one size."""
    _, height, width = first.shape
    total = torch.zeros((), dtype=first.dtype)
    for y in range(height):
        for x in range(width):
            total = total + first[i, y, x] * last[j, y, x] / (height * width)
    return total


def flow_gap(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """The mean squared difference over samples and entries of one flow."""
    first_s, last_s = maps.common_size(*(maps.tokens_to_map(end) for end in student))
    first_t, last_t = maps.common_size(*(maps.tokens_to_map(end) for end in teacher))
    batch, wide_1, wide_2 = len(first_s), first_s.shape[1], last_s.shape[1]
    total = torch.zeros((), dtype=first_s.dtype)
    for b in range(batch):
        for i in range(wide_1):
            for j in range(wide_2):
                gap = flow(first_s[b], last_s[b], i, j) - flow(first_t[b], last_t[b], i, j)
                total = total + gap**2
    return total / (batch * wide_1 * wide_2)
