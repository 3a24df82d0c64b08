"""SemBridge's matching as published, sample by sample in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softened(logits: Tensor, temperature: float) -> list[float]:
    values = [float(value) / temperature for value in logits]
    top = max(values)
    log_total = top + math.log(sum(math.exp(value - top) for value in values))
    return [value - log_total for value in values]


def negative_kl(teacher: Tensor, student: Tensor, temperature: float = 3.0) -> float:
    """-KL(softmax(teacher / T) || softmax(student / T))."""
    log_p, log_q = softened(teacher, temperature), softened(student, temperature)
    return -sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))


def cosine(teacher: Tensor, student: Tensor) -> float:
    x, y = teacher.double().tolist(), student.double().tolist()
    dot = math.fsum(a * b for a, b in zip(x, y, strict=True))
    return dot / math.sqrt(math.fsum(a * a for a in x)) / math.sqrt(math.fsum(b * b for b in y))


def score_table(metric: str, teachers: Tensor, students: Tensor) -> list[list[float]]:
    function = {"kl": negative_kl, "cosine": cosine}[metric]
    return [[function(t, s) for t in teachers] for s in students]


def nearest(
    table: list[list[float]], teacher_labels: Tensor, student_labels: Tensor, k: int = 1
) -> tuple[list[list[float]], list[list[int]]]:
    """Scores and positions of the k best of the class for every student, ties to the first."""
    scores, positions = [], []
    for i, label in enumerate(student_labels.tolist()):
        own = [j for j, other in enumerate(teacher_labels.tolist()) if other == label]
        own.sort(key=lambda j: (-table[i][j], j))
        own = own[:k]
        positions.append(own)
        scores.append([table[i][j] for j in own])
    return scores, positions


def semantic_loss(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """The self-supervised matcher's loss on embeddings a (teacher) and b (student)."""
    batch = len(a)

    def log_softmax(row: list[Tensor]) -> list[Tensor]:
        total = torch.log(sum((torch.exp(x) for x in row), torch.zeros(()).double()))
        return [x - total for x in row]

    logits = [[(b[i] * a[j]).sum() / temperature for j in range(batch)] for i in range(batch)]
    alike = [
        [((a[i] * a[j]).sum() + (b[i] * b[j]).sum()) / 2 * temperature for j in range(batch)]
        for i in range(batch)
    ]
    targets = [[torch.exp(x) for x in log_softmax(row)] for row in alike]
    by_row = [log_softmax(row) for row in logits]
    by_column = [log_softmax([logits[i][j] for i in range(batch)]) for j in range(batch)]
    rows = torch.zeros((), dtype=torch.float64)
    columns = torch.zeros((), dtype=torch.float64)
    for i in range(batch):
        for j in range(batch):
            rows = rows - targets[i][j] * by_row[i][j]
            columns = columns - targets[i][j] * by_column[j][i]
    return (rows / batch + columns / batch) / 2


def rematch_epoch(t: int, start: int, step: int, growth: int) -> int:
    return start + sum(step + growth * (i - 1) for i in range(1, t + 1))
