"""SemCKD (Chen et al. 2021) with its networks written out, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.reference import maps


def similarities(features: Tensor) -> list[Tensor]:
    rows = [item.flatten() for item in features]
    return [torch.stack([a @ b for b in rows]) for a in rows]


def embedded(row: Tensor, mlp: nn.Sequential) -> Tensor:
    hidden = (mlp[0].weight @ row + mlp[0].bias).clamp(min=0)
    out = mlp[2].weight @ hidden + mlp[2].bias
    return out / torch.sqrt((out**2).sum())


def batch_normalised(features: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    planes = []
    for c in range(features.shape[1]):
        values = features[:, c]
        mean = values.sum() / values.numel()
        variance = ((values - mean) ** 2).sum() / values.numel()
        unit = (values - mean) / torch.sqrt(variance + norm.eps)
        planes.append(norm.weight[c] * unit + norm.bias[c])
    return torch.stack(planes, dim=1)


def projected(features: Tensor, projection: nn.Sequential) -> Tensor:
    for conv, norm in ((projection[0], projection[1]), (projection[3], projection[4])):
        features = batch_normalised(maps.convolve(features, conv.weight), norm).clamp(min=0)
    return maps.convolve(features, projection[6].weight)


def semantic_calibration(
    student: Sequence[Tensor], teacher: Sequence[Tensor], criterion: nn.Module
) -> Tensor:
    batch = len(student[0])
    rows_s = [similarities(features) for features in student]
    rows_t = [similarities(features) for features in teacher]
    pairs = {}
    for i, map_s in enumerate(student):
        for j, map_t in enumerate(teacher):
            small_s, small_t = maps.common_size(map_s, map_t)
            pairs[i, j] = projected(small_s, criterion.projections[i][j]), small_t
    total = torch.zeros((), dtype=student[0].dtype)
    for b in range(batch):
        for i in range(len(student)):
            query = embedded(rows_s[i][b], criterion.queries[i])
            scores = [
                torch.exp(query @ embedded(rows_t[j][b], criterion.keys[j]))
                for j in range(len(teacher))
            ]
            for j in range(len(teacher)):
                projection, wanted = pairs[i, j]
                gap = maps.mean_square(projection[b], wanted[b])
                total = total + scores[j] / sum(scores) * gap
    return total / (batch * len(student))
