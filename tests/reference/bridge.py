"""The loss of a mixed batch, row by row in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softmax(logits: Tensor, temperature: float = 1.0) -> list[Tensor]:
    powers = [torch.exp(value / temperature) for value in logits]
    return [power / sum(powers) for power in powers]


def task(logits: Tensor, target: Tensor, labelled: list[int]) -> Tensor:
    """The mean cross-entropy of the rows with a label; probabilities count as they are."""
    total = torch.zeros((), dtype=torch.float64)
    rows = [row for row in labelled if target.dim() > 1 or int(target[row]) != -100]
    for row in rows:
        share = softmax(logits[row])
        if target.dim() > 1:
            total = total - sum(q * torch.log(p) for q, p in zip(target[row], share, strict=True))
        else:
            total = total - torch.log(share[int(target[row])])
    return total / max(len(rows), 1)


def binary(logits: Tensor, target: Tensor, labelled: list[int]) -> Tensor:
    """The mean over rows and classes of the binary cross-entropy."""
    total = torch.zeros((), dtype=torch.float64)
    for row in labelled:
        for value, wanted in zip(logits[row], target[row], strict=True):
            p = 1 / (1 + torch.exp(-value))
            total = total - wanted * torch.log(p) - (1 - wanted) * torch.log(1 - p)
    return total / max(len(labelled) * logits.shape[1], 1)


def distillation(
    logits: Tensor, teacher: Tensor, rows: list[int], temperature: float = 4.0
) -> Tensor:
    """tau^2 times the mean KL of the rows; teacher i belongs to rows[i]."""
    total = torch.zeros((), dtype=torch.float64)
    for place, row in enumerate(rows):
        p, q = softmax(teacher[place], temperature), softmax(logits[row], temperature)
        total = total + sum(a * (torch.log(a) - torch.log(b)) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / max(len(rows), 1)


def regression(logits: Tensor, teacher: Tensor, rows: list[int]) -> Tensor:
    """The mean squared difference of the rows' logits."""
    total = torch.zeros((), dtype=torch.float64)
    for place, row in enumerate(rows):
        for ours, theirs in zip(logits[row], teacher[place], strict=True):
            total = total + (ours - theirs) ** 2
    return total / math.prod((max(len(rows), 1), logits.shape[1]))
