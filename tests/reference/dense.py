"""Dense dimensional structure by its definition, position by position in plain loops."""

from __future__ import annotations

import torch
from torch import Tensor

Rows = list[list[Tensor]]


def positions(maps: Tensor) -> Rows:
    """(B, C, H, W) to one list of channels a position, samples first."""
    batch, width, height, length = maps.shape
    return [
        [maps[b, c, y, x] for c in range(width)]
        for b in range(batch)
        for y in range(height)
        for x in range(length)
    ]


def mapped(rows: Rows, weight: Tensor) -> Rows:
    """A 1x1 convolution without bias."""
    return [
        [sum(weight[i, c] * row[c] for c in range(len(row))) for i in range(len(weight))]
        for row in rows
    ]


def means(rows: Rows) -> list[Tensor]:
    return [sum(row[i] for row in rows) / len(rows) for i in range(len(rows[0]))]


def second(left: Rows, i: int, about_i: Tensor, right: Rows, j: int, about_j: Tensor) -> Tensor:
    """Mean product of two columns' deviations from two points."""
    total = sum((a[i] - about_i) * (b[j] - about_j) for a, b in zip(left, right, strict=True))
    return total / len(left)


def floored(values: list[Tensor], floor: float) -> list[Tensor]:
    mean = sum(values) / len(values)
    return [value + floor * mean for value in values]


def correlations(rows_s: Rows, rows_t: Rows, floor: float) -> Rows:
    """C with a floor under the variances; a pair without any correlates with nothing."""
    zero = torch.zeros((), dtype=torch.float64)
    mean_s, mean_t = means(rows_s), means(rows_t)
    var_s = [second(rows_s, i, m, rows_s, i, m) for i, m in enumerate(mean_s)]
    var_t = [second(rows_t, j, m, rows_t, j, m) for j, m in enumerate(mean_t)]
    var_s, var_t = floored(var_s, floor), floored(var_t, floor)
    matrix = []
    for i in range(len(var_s)):
        line = []
        for j in range(len(var_t)):
            if var_s[i].item() == 0 or var_t[j].item() == 0:
                line.append(zero)
                continue
            covariance = second(rows_s, i, mean_s[i], rows_t, j, mean_t[j])
            line.append(covariance / (torch.sqrt(var_s[i]) * torch.sqrt(var_t[j])))
        matrix.append(line)
    return matrix


def diagonal_cost(value: Tensor, form: str) -> Tensor:
    if form == "squared":
        return (1 - value) ** 2
    positive = value if value.item() > 0 else 0 * value
    return torch.log(1 - positive**2 + 0.01)


def stage_terms(
    rows_s: Rows, rows_t: Rows, *, form: str, lambd: float, floor: float
) -> tuple[Tensor, Tensor]:
    """The diagonal and the off-diagonal term of one stage."""
    matrix = correlations(rows_s, rows_t, floor)
    width = len(matrix)
    zero = torch.zeros((), dtype=torch.float64)
    on = sum((diagonal_cost(matrix[i][i], form) for i in range(width)), start=zero)
    off = sum((matrix[i][j] ** 2 for i in range(width) for j in range(width) if i != j), start=zero)
    return on / width, lambd * off / width


def solved(matrix: Rows, right: list[Tensor]) -> list[Tensor]:
    """Gauss-Jordan elimination; a ridge makes pivoting needless."""
    size = len(matrix)
    lines = [[*line, value] for line, value in zip(matrix, right, strict=True)]
    for k in range(size):
        lines[k] = [value / lines[k][k] for value in lines[k]]
        for other in range(size):
            if other != k:
                factor = lines[other][k]
                lines[other] = [a - factor * b for a, b in zip(lines[other], lines[k], strict=True)]
    return [line[-1] for line in lines]


def regression(rows_s: Rows, rows_t: Rows, ridge: float) -> tuple[Rows, Rows]:
    """Weights and covariances of every teacher channel, ``weights[i][c]``, ``cross[i][c]``."""
    mean_s, mean_t = means(rows_s), means(rows_t)
    width = len(mean_s)
    spread = [
        [second(rows_s, a, mean_s[a], rows_s, b, mean_s[b]) for b in range(width)]
        for a in range(width)
    ]
    load = ridge * sum(spread[a][a] for a in range(width)) / width
    if load.item() == 0:
        load = torch.ones((), dtype=torch.float64)
    loaded = [[spread[a][b] + (load if a == b else 0) for b in range(width)] for a in range(width)]
    cross = [
        [second(rows_s, c, mean_s[c], rows_t, i, mean_t[i]) for c in range(width)]
        for i in range(len(mean_t))
    ]
    return [solved(loaded, line) for line in cross], cross


def share_on_all(rows_s: Rows, rows_t: Rows, ridge: float, floor: float) -> list[Tensor]:
    weights, cross = regression(rows_s, rows_t, ridge)
    mean_t = means(rows_t)
    total = floored([second(rows_t, i, m, rows_t, i, m) for i, m in enumerate(mean_t)], floor)
    return [
        sum(w * c for w, c in zip(weights[i], cross[i], strict=True)) / total[i]
        if total[i].item()
        else torch.zeros((), dtype=torch.float64)
        for i in range(len(total))
    ]


def share_held_out(rows_s: Rows, rows_t: Rows, ridge: float, floor: float) -> list[Tensor]:
    """Fitted on one half, measured on the other by its residuals, both ways."""
    cut = len(rows_s) // 2
    halves = [(rows_s[:cut], rows_t[:cut]), (rows_s[cut:], rows_t[cut:])]
    found = []
    for (fit_s, fit_t), (see_s, see_t) in (halves, halves[::-1]):
        weights, _ = regression(fit_s, fit_t, ridge)
        mean_s, mean_t = means(fit_s), means(fit_t)
        plain, left = [], []
        for i, weight in enumerate(weights):
            gaps = [row[i] - mean_t[i] for row in see_t]
            predicted = [
                sum(w * (row[c] - mean_s[c]) for c, w in enumerate(weight)) for row in see_s
            ]
            plain.append(sum(gap**2 for gap in gaps) / len(gaps))
            residual = sum((g - p) ** 2 for g, p in zip(gaps, predicted, strict=True))
            left.append(residual / len(gaps))
        total = floored(plain, floor)
        found.append([(plain[i] - left[i]) / total[i] for i in range(len(total))])
    return [(one + other) / 2 for one, other in zip(*found, strict=True)]


def closed_form(rows_s: Rows, rows_t: Rows, *, ridge: float, floor: float, split: bool) -> Tensor:
    shares = (share_held_out if split else share_on_all)(rows_s, rows_t, ridge, floor)
    return sum(torch.log(1 - share + 0.01) for share in shares) / len(shares)
