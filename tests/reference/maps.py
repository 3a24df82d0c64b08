"""FitNets, AT, NST and VID as their papers define them, in plain loops."""

from __future__ import annotations

import torch
from torch import Tensor


def zero(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=like.dtype)


def pooled(maps: Tensor, height: int, width: int) -> Tensor:
    """Average pooling to a size, cell by cell; cells overlap where sizes do not divide."""
    old_h, old_w = maps.shape[2:]
    rows = []
    for i in range(height):
        top, bottom = i * old_h // height, -(-(i + 1) * old_h // height)
        row = []
        for j in range(width):
            left, right = j * old_w // width, -(-(j + 1) * old_w // width)
            cells = [maps[:, :, y, x] for y in range(top, bottom) for x in range(left, right)]
            row.append(sum(cells) / len(cells))
        rows.append(torch.stack(row, dim=-1))
    return torch.stack(rows, dim=-2)


def common_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    height = min(student.shape[2], teacher.shape[2])
    width = min(student.shape[3], teacher.shape[3])
    return pooled(student, height, width), pooled(teacher, height, width)


def tokens_to_map(features: Tensor) -> Tensor:
    """(B, N, C) to (B, C, 1, N) and (B, C) to (B, C, 1, 1), value by value."""
    if features.dim() == 4:
        return features
    if features.dim() == 2:
        return torch.stack([torch.stack([v.reshape(1, 1) for v in row]) for row in features])
    return torch.stack(
        [
            torch.stack([torch.stack([t[c] for t in item])[None] for c in range(item.shape[1])])
            for item in features
        ]
    )


def convolve(maps: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution with zero padding that keeps the size, offset by offset."""
    reach = weight.shape[2] // 2
    batch, _, height, width = maps.shape
    result = []
    for y in range(height):
        row = []
        for x in range(width):
            total = torch.zeros(batch, weight.shape[0], dtype=maps.dtype)
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    if 0 <= y + dy < height and 0 <= x + dx < width:
                        tap = weight[:, :, dy + reach, dx + reach]
                        total = total + maps[:, :, y + dy, x + dx] @ tap.T
            row.append(total if bias is None else total + bias)
        result.append(torch.stack(row, dim=-1))
    return torch.stack(result, dim=-2)


def mean_square(left: Tensor, right: Tensor) -> Tensor:
    total, count = zero(left), 0
    for a, b in zip(left.flatten(), right.flatten(), strict=True):
        total, count = total + (a - b) ** 2, count + 1
    return total / count


def log_share(left: Tensor, right: Tensor) -> Tensor:
    """The logarithm of the error's share of the variance of the right one's channels."""
    spread = zero(right)
    for c in range(right.shape[1]):
        values = list(right[:, c].flatten())
        mean = sum(values) / len(values)
        spread = spread + sum((v - mean) ** 2 for v in values) / len(values)
    return torch.log(mean_square(left, right) / (spread / right.shape[1]) + 0.01)


def attention(maps: Tensor, p: float) -> Tensor:
    """mean_c |F_c|^p, (B, 1, H, W)."""
    channels = maps.shape[1]
    return sum(maps[:, c : c + 1].abs() ** p for c in range(channels)) / channels


def attention_transfer(student: Tensor, teacher: Tensor, p: float = 2.0) -> Tensor:
    maps_s, maps_t = common_size(attention(student, p), attention(teacher, p))
    total, count = zero(student), 0
    for map_s, map_t in zip(maps_s, maps_t, strict=True):
        norm_s = torch.sqrt(sum(v**2 for v in map_s.flatten()))
        norm_t = torch.sqrt(sum(v**2 for v in map_t.flatten()))
        for a, b in zip(map_s.flatten(), map_t.flatten(), strict=True):
            total, count = total + (a / norm_s - b / norm_t) ** 2, count + 1
    return total / count


def neuron_selectivity(student: Tensor, teacher: Tensor) -> Tensor:
    """The three double sums over channels of the squared MMD, kernel (x.y)^2."""
    student, teacher = common_size(student, teacher)
    total = zero(student)
    for map_s, map_t in zip(student, teacher, strict=True):
        responses = []
        for maps in (map_s, map_t):
            rows = [plane.flatten() for plane in maps]
            responses.append([row / torch.sqrt((row**2).sum()) for row in rows])
        units_s, units_t = responses
        kernel = lambda left, right: sum((x @ y) ** 2 for x in left for y in right)  # noqa: E731
        count_s, count_t = len(units_s), len(units_t)
        total = (
            total
            + kernel(units_s, units_s) / count_s**2
            + kernel(units_t, units_t) / count_t**2
            - 2 * kernel(units_s, units_t) / (count_s * count_t)
        )
    return total / len(student)


def gaussian_code_length(mean: Tensor, rho: Tensor, teacher: Tensor) -> Tensor:
    """VID: -log q up to its constant, averaged over elements."""
    total, count = zero(mean), 0
    for b in range(len(mean)):
        for c in range(mean.shape[1]):
            variance = torch.log(1 + torch.exp(rho[c])) + 1e-5
            for m, t in zip(mean[b, c].flatten(), teacher[b, c].flatten(), strict=True):
                total = total + (torch.log(variance) + (m - t) ** 2 / variance) / 2
                count += 1
    return total / count
