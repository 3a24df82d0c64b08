"""Rich images made poor, pixel by pixel in float64."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def mixture(images: Tensor, response: list[list[float]]) -> Tensor:
    batch, count, height, width = images.shape
    made = torch.zeros(batch, len(response), height, width, dtype=torch.float64)
    for b in range(batch):
        for c, row in enumerate(response):
            for i in range(height):
                for j in range(width):
                    made[b, c, i, j] = sum(row[k] * images[b, k, i, j] for k in range(count))
    return made


def coarse(images: Tensor, factor: int) -> Tensor:
    """Means over whole squares, then between the four nearest centres; sides are multiples."""
    batch, channels, height, width = images.shape
    high, wide = height // factor, width // factor
    made = torch.zeros_like(images)
    for b in range(batch):
        for c in range(channels):
            means = [
                [
                    images[
                        b, c, i * factor : (i + 1) * factor, j * factor : (j + 1) * factor
                    ].mean()
                    for j in range(wide)
                ]
                for i in range(high)
            ]
            for i in range(height):
                for j in range(width):
                    total = 0.0
                    for weight_i, row in _between(i, height, high):
                        for weight_j, column in _between(j, width, wide):
                            total = total + weight_i * weight_j * means[row][column]
                    made[b, c, i, j] = total
    return made


def _between(place: int, fine: int, coarse: int) -> list[tuple[float, int]]:
    at = max((place + 0.5) * coarse / fine - 0.5, 0.0)
    low = math.floor(at)
    return [(1 - (at - low), min(low, coarse - 1)), (at - low, min(low + 1, coarse - 1))]


def gaussian(images: Tensor, sigma: float) -> Tensor:
    """The sum over a square of pixels, those outside being the nearest inside."""
    batch, channels, height, width = images.shape
    reach = math.ceil(3 * sigma)
    steps = range(-reach, reach + 1)
    taps = {step: math.exp(-(step**2) / (2 * sigma**2)) for step in steps}
    scale = sum(taps.values()) ** 2
    made = torch.zeros_like(images)
    for b in range(batch):
        for c in range(channels):
            for i in range(height):
                for j in range(width):
                    total = 0.0
                    for k in steps:
                        for m in steps:
                            row = min(max(i + k, 0), height - 1)
                            column = min(max(j + m, 0), width - 1)
                            total += taps[k] * taps[m] * float(images[b, c, row, column])
                    made[b, c, i, j] = total / scale
    return made


def moments(images: Tensor, channel: int) -> tuple[float, float]:
    """Mean and variance of a channel over all pixels of all images."""
    values = [float(value) for value in images[:, channel].flatten()]
    mean = sum(values) / len(values)
    return mean, sum((value - mean) ** 2 for value in values) / len(values)


def grain(images: Tensor, channel: int) -> float:
    """Root of the mean squared steps to the right, plus those down, of a channel."""
    across, down = [], []
    for image in images[:, channel].tolist():
        for row in image:
            across += [(b - a) ** 2 for a, b in itertools.pairwise(row)]
        for row, below in itertools.pairwise(image):
            down += [(b - a) ** 2 for a, b in zip(row, below, strict=True)]
    return math.sqrt(sum(across) / len(across) + sum(down) / len(down))
