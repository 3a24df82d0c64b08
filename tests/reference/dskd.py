"""Dimensional-structure distillation as printed (Si et al., Eq. 2, 6-12), in plain loops."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cross_correlation(
    z_s: Tensor, z_t: Tensor, *, center: bool = False, floor: float = 0.0
) -> list[list[Tensor]]:
    """Eq. 6, entry by entry; a channel that is zero over the batch correlates with nothing.

    The floor, which the paper does not have, is a share of the columns' mean square.
    """
    batch, width = z_s.shape
    extra_s, extra_t = floor * mean_square(z_s, center), floor * mean_square(z_t, center)
    matrix = []
    for i in range(width):
        row = []
        for j in range(width):
            mean_s = sum(z_s[b, i] for b in range(batch)) / batch if center else 0.0
            mean_t = sum(z_t[b, j] for b in range(batch)) / batch if center else 0.0
            dot = sum((z_s[b, i] - mean_s) * (z_t[b, j] - mean_t) for b in range(batch))
            square_s = sum((z_s[b, i] - mean_s) ** 2 for b in range(batch)) + extra_s
            square_t = sum((z_t[b, j] - mean_t) ** 2 for b in range(batch)) + extra_t
            if square_s.item() == 0 or square_t.item() == 0:
                row.append(torch.zeros((), dtype=z_s.dtype))
            else:
                row.append(dot / (torch.sqrt(square_s) * torch.sqrt(square_t)))
        matrix.append(row)
    return matrix


def projected(rows: Tensor, mlp: list[Tensor], eps: float = 1e-5) -> Tensor:
    """Eq. 5's projector, two layers: W2 relu(norm(W1 x)) + b, normalised over the batch.

    Args:
        rows: ``(B, D)``.
        mlp: W1, the norm's gain and shift, W2 and b.
        eps: Added to the variance.
    """
    first, gain, shift, second, bias = mlp
    hidden = []
    for j in range(len(first)):
        column = [sum(first[j, k] * row[k] for k in range(len(row))) for row in rows]
        mean = sum(column) / len(column)
        variance = sum((value - mean) ** 2 for value in column) / len(column)
        normed = [gain[j] * (value - mean) / torch.sqrt(variance + eps) for value in column]
        hidden.append([torch.clamp(value + shift[j], min=0) for value in normed])
    return torch.stack(
        [
            torch.stack(
                [
                    sum(second[i, j] * hidden[j][b] for j in range(len(hidden))) + bias[i]
                    for i in range(len(second))
                ]
            )
            for b in range(len(rows))
        ]
    )


def mean_square(z: Tensor, center: bool) -> Tensor:
    """The columns' sums of squares, averaged over the columns."""
    total = torch.zeros((), dtype=z.dtype)
    for i in range(z.shape[1]):
        mean = sum(value for value in z[:, i]) / len(z) if center else 0.0
        total = total + sum((value - mean) ** 2 for value in z[:, i])
    return total / z.shape[1]


def sem_terms(
    z_s: Tensor, z_t: Tensor, *, lambd: float = 5e-3, center: bool = False, floor: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Eq. 7, its two sums apart."""
    matrix = cross_correlation(z_s, z_t, center=center, floor=floor)
    width = len(matrix)
    on = sum(((1 - matrix[i][i]) ** 2 for i in range(width)), start=torch.zeros(()).double())
    off = sum(
        (matrix[i][j] ** 2 for i in range(width) for j in range(width) if i != j),
        start=torch.zeros(()).double(),
    )
    return on, lambd * off


def mean_rbf(u: Tensor, v: Tensor, sigma: float) -> Tensor:
    """Eq. 11."""
    total = torch.zeros((), dtype=u.dtype)
    for row_u in u:
        for row_v in v:
            total = total + torch.exp(-((row_u - row_v) ** 2).sum() / sigma**2)
    return torch.log(total / (len(u) * len(v)))


def unit_rows(x: Tensor) -> Tensor:
    return torch.stack([row / torch.sqrt((row**2).sum()) for row in x])


def mean_over_positions(maps: Tensor) -> Tensor:
    """(B, C, H, W) or (B, N, C) to (B, C)."""
    if maps.dim() == 4:
        return torch.stack([torch.stack([plane.mean() for plane in item]) for item in maps])
    return torch.stack([sum(token for token in item) / len(item) for item in maps])


def mean_cells(maps: Tensor, cells: int) -> Tensor:
    """(B, C, H, W) to a row of channel means for each of cells x cells blocks of each sample."""
    height, width = maps.shape[2] // cells, maps.shape[3] // cells
    rows = []
    for item in maps:
        for i in range(cells):
            for j in range(cells):
                block = item[:, i * height : (i + 1) * height, j * width : (j + 1) * width]
                rows.append(torch.stack([plane.mean() for plane in block]))
    return torch.stack(rows)


def median_distance(rows: Tensor) -> float:
    distances = sorted(
        math.dist(rows[i].tolist(), rows[j].tolist())
        for i in range(len(rows))
        for j in range(i + 1, len(rows))
    )
    return distances[(len(distances) - 1) // 2]


def coral(x: Tensor, y: Tensor) -> Tensor:
    """Sun & Saenko, Eq. 1-3, entry by entry."""

    def covariance(rows: Tensor, i: int, j: int) -> Tensor:
        count = len(rows)
        mean_i = sum(rows[b, i] for b in range(count)) / count
        mean_j = sum(rows[b, j] for b in range(count)) / count
        return sum((rows[b, i] - mean_i) * (rows[b, j] - mean_j) for b in range(count)) / (
            count - 1
        )

    width = x.shape[1]
    total = torch.zeros((), dtype=x.dtype)
    for i in range(width):
        for j in range(width):
            total = total + (covariance(x, i, j) - covariance(y, i, j)) ** 2
    return total / (4 * width**2)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Eq. 2, with h's softmax written out."""
    total = torch.zeros((), dtype=logits.dtype)
    for row, label in zip(logits, target.tolist(), strict=True):
        peak = row.max()
        total = total - (row[label] - peak - torch.log(torch.exp(row - peak).sum()))
    return total / len(logits)


def supervision(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy with smoothed labels, the mean over rows that have one."""
    costs = []
    for row, label in zip(logits, target.tolist(), strict=True):
        if label == -100:
            continue
        logs = [value - torch.log(sum(torch.exp(v) for v in row)) for value in row]
        even = sum(logs) / len(logs)
        costs.append(-(1 - smoothing) * logs[label] - smoothing * even)
    return sum(costs) / len(costs)
