"""Distributions by class, sample by sample in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.bridge import softmax


def class_distillation(
    logits: Tensor, target: Tensor, teacher: Tensor, classes: Tensor, temperature: float
) -> Tensor:
    """tau^2 times the mean over labelled rows of KL(mean prediction of the class || student)."""
    total, rows = torch.zeros((), dtype=torch.float64), 0
    for student, label in zip(logits, target.tolist(), strict=True):
        if label == -100:
            continue
        own = [
            softmax(row, temperature) for row, c in zip(teacher, classes, strict=True) if c == label
        ]
        mean = [sum(column) / len(own) for column in zip(*own, strict=True)]
        share = softmax(student, temperature)
        total = total + sum(
            p * (torch.log(p) - torch.log(q)) for p, q in zip(mean, share, strict=True)
        )
        rows += 1
    return temperature**2 * total / max(rows, 1)


def class_coral(
    rows: Tensor, target: Tensor, teacher: Tensor, classes: Tensor, mean_weight: float
) -> Tensor:
    """The covariances' and the means' distances class by class, weighed by the rows of each."""
    width, total = rows.shape[1], torch.zeros((), dtype=torch.float64)
    labelled = sum(label != -100 for label in target.tolist())
    for label in sorted({label for label in target.tolist() if label != -100}):
        own = [row for row, c in zip(rows, target.tolist(), strict=True) if c == label]
        theirs = [row for row, c in zip(teacher, classes.tolist(), strict=True) if c == label]
        mean_s, mean_t = sum(own) / len(own), sum(theirs) / len(theirs)
        share = len(own) / labelled
        for i in range(width):
            total = total + share * mean_weight * (mean_s[i] - mean_t[i]) ** 2 / width
            for j in range(width) if len(own) > 1 else []:
                ours = sum((r[i] - mean_s[i]) * (r[j] - mean_s[j]) for r in own) / (len(own) - 1)
                other = sum((r[i] - mean_t[i]) * (r[j] - mean_t[j]) for r in theirs)
                other = other / (len(theirs) - 1)
                total = total + share * (ours - other) ** 2 / (4 * width**2)
    return total
