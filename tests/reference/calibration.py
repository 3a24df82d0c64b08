"""SemCKD (Chen et al. 2021) with its networks written out, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.reference import maps


def similarities(features: Tensor) -> list[Tensor]:
    rows = [item.flatten() for item in features]
    return [torch.stack([a @ b for b in rows]) for a in rows]


def embedded(row: Tensor, embeddings: nn.Module, layer: int) -> Tensor:
    """The layer's MLP, whose weights are a part of all layers' together."""
    hidden, out = embeddings.hidden, embeddings.out
    width = len(row) // 4 or 1
    for stack, size in ((hidden, 2 * width), (out, width)):
        rows = slice(layer * size, (layer + 1) * size)
        row = stack.weight[rows, : len(row)] @ row + stack.bias[rows]
        row = row.clamp(min=0) if stack is hidden else row
    return row / torch.sqrt((row**2).sum())


def batch_normalised(features: Tensor, norm: nn.BatchNorm2d, start: int) -> Tensor:
    planes = []
    for c in range(features.shape[1]):
        values = features[:, c]
        mean = values.sum() / values.numel()
        variance = ((values - mean) ** 2).sum() / values.numel()
        unit = (values - mean) / torch.sqrt(variance + norm.eps)
        planes.append(norm.weight[start + c] * unit + norm.bias[start + c])
    return torch.stack(planes, dim=1)


def projected(features: Tensor, stacks: nn.Module, width: int, wide: int, narrow: int) -> Tensor:
    """The stack of one pair, which begins at rows ``wide`` and, of the last layer, ``narrow``."""
    rows = slice(wide, wide + 2 * width)
    weight = stacks.reduce.weight[rows, : features.shape[1]][:, :, None, None]
    features = batch_normalised(maps.convolve(features, weight), stacks.norms[0], wide)
    weight = stacks.mix.weight[rows, : 18 * width].reshape(2 * width, 2 * width, 3, 3)
    features = maps.convolve(features.clamp(min=0), weight)
    features = batch_normalised(features, stacks.norms[1], wide).clamp(min=0)
    weight = stacks.expand.weight[narrow : narrow + width, : 2 * width]
    return maps.convolve(features, weight[:, :, None, None])


def semantic_calibration(
    student: Sequence[Tensor], teacher: Sequence[Tensor], criterion: nn.Module
) -> Tensor:
    batch = len(student[0])
    rows_s = [similarities(features) for features in student]
    rows_t = [similarities(features) for features in teacher]
    pairs, narrow = {}, 0
    for i, map_s in enumerate(student):
        for j, map_t in enumerate(teacher):
            small_s, small_t = maps.common_size(map_s, map_t)
            width = map_t.shape[1]
            found = projected(small_s, criterion.projections, width, 2 * narrow, narrow)
            pairs[i, j] = found, small_t
            narrow += width
    total = torch.zeros((), dtype=student[0].dtype)
    for b in range(batch):
        for i in range(len(student)):
            query = embedded(rows_s[i][b], criterion.queries, i)
            scores = [
                torch.exp(query @ embedded(rows_t[j][b], criterion.keys, j))
                for j in range(len(teacher))
            ]
            for j in range(len(teacher)):
                projection, wanted = pairs[i, j]
                gap = maps.mean_square(projection[b], wanted[b])
                total = total + scores[j] / sum(scores) * gap
    return total / (batch * len(student))
