"""RKD, DistilVPR and CC as their papers define them, pair by pair and triple by triple."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def huber(gap: Tensor) -> Tensor:
    return gap**2 / 2 if abs(float(gap.detach())) < 1 else gap.abs() - 0.5


def length(vector: Tensor) -> Tensor:
    """The norm; 0 with gradient 0 for the zero vector."""
    return torch.sqrt((vector**2).sum()) if bool((vector != 0).any()) else 0 * vector.sum()


def normalised(distances: list[list[Tensor]]) -> list[list[Tensor]]:
    positive = [d for row in distances for d in row if d.detach() > 0]
    mean = sum(positive) / len(positive) if positive else 1.0
    return [[d / mean for d in row] for row in distances]


def gap_of(distances_s: list[list[Tensor]], distances_t: list[list[Tensor]]) -> Tensor:
    batch = len(distances_s)
    left, right = normalised(distances_s), normalised(distances_t)
    total = sum(huber(left[i][j] - right[i][j]) for i in range(batch) for j in range(batch))
    return total / batch**2


def distances(rows: Tensor) -> list[list[Tensor]]:
    return [[length(a - b) for b in rows] for a in rows]


def cosine(a: Tensor, vertex: Tensor, b: Tensor) -> Tensor:
    arm_a, arm_b = a - vertex, b - vertex
    long_a, long_b = length(arm_a), length(arm_b)
    if float(long_a.detach()) == 0 or float(long_b.detach()) == 0:
        return torch.zeros((), dtype=a.dtype)
    return (arm_a / long_a) @ (arm_b / long_b)


def distance_gap(student: Tensor, teacher: Tensor) -> Tensor:
    return gap_of(distances(student), distances(teacher))


def angle_gap(student: Tensor, teacher: Tensor) -> Tensor:
    batch = len(student)
    total = torch.zeros((), dtype=student.dtype)
    for i in range(batch):
        for j in range(batch):
            for k in range(batch):
                angle_s = cosine(student[i], student[j], student[k])
                angle_t = cosine(teacher[i], teacher[j], teacher[k])
                total = total + huber(angle_s - angle_t)
    return total / batch**3


def into_ball(x: Tensor, c: float) -> Tensor:
    norm = math.sqrt(c) * length(x)
    return torch.tanh(norm) * x / norm


def mobius_sum(u: Tensor, v: Tensor, c: float) -> Tensor:
    dot, square_u, square_v = u @ v, u @ u, v @ v
    top = (1 + 2 * c * dot + c * square_v) * u + (1 - c * square_u) * v
    return top / (1 + 2 * c * dot + c**2 * square_u * square_v)


def geodesics(rows: Tensor, c: float) -> list[list[Tensor]]:
    points = [into_ball(row, c) for row in rows]
    table = []
    for i, u in enumerate(points):
        row = []
        for j, v in enumerate(points):
            if i == j:
                row.append(torch.zeros((), dtype=rows.dtype))
            else:
                norm = length(mobius_sum(-u, v, c))
                row.append(2 / math.sqrt(c) * torch.atanh(math.sqrt(c) * norm))
        table.append(row)
    return table


def geodesic_gap(student: Tensor, teacher: Tensor, c: float) -> Tensor:
    return gap_of(geodesics(student, c), geodesics(teacher, c))


def correlation_congruence(student: Tensor, teacher: Tensor, gamma: float) -> Tensor:
    """From the rows of both linear embeddings."""
    batch = len(student)
    total = torch.zeros((), dtype=student.dtype)
    for i in range(batch):
        for j in range(batch):
            kernels = []
            for rows in (student, teacher):
                dot = (rows[i] / length(rows[i])) @ (rows[j] / length(rows[j]))
                kernels.append(
                    math.exp(-2 * gamma)
                    * sum((2 * gamma) ** p / math.factorial(p) * dot**p for p in range(3))
                )
            total = total + (kernels[0] - kernels[1]) ** 2
    return total / batch**2
