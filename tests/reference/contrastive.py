"""Contrastive representation distillation (Tian et al., 2020), score by score."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def unit_rows(head: nn.Module, embedding: Tensor) -> list[Tensor]:
    rows = []
    for row in embedding:
        linear = head.net[0]
        projected = torch.stack(
            [(w * row).sum() + b for w, b in zip(linear.weight, linear.bias, strict=True)]
        )
        rows.append(projected / torch.sqrt((projected**2).sum()))
    return rows


def powers(anchors: list[Tensor], bank: Tensor, rows: list[list[int]], tau: float):
    """e^(v.m / tau), one list a sample with the positive first."""
    return [
        [torch.exp((anchor * bank[i]).sum() / tau) for i in picked]
        for anchor, picked in zip(anchors, rows, strict=True)
    ]


def normalizer(found: list[list[Tensor]], dataset_size: int) -> float:
    """The published estimate: the first batch's mean times N, a constant."""
    flat = [float(value.detach()) for row in found for value in row]
    return dataset_size * sum(flat) / len(flat)


def nce(found: list[list[Tensor]], z: float, dataset_size: int) -> Tensor:
    """Eq. 18: log h for the positive, log(1 - h) for each negative."""
    total = torch.zeros((), dtype=found[0][0].dtype)
    for positive, *negatives in found:
        noise = len(negatives) / dataset_size
        total = total - torch.log(positive / z / (positive / z + noise))
        for negative in negatives:
            total = total - torch.log(1 - negative / z / (negative / z + noise))
    return total / len(found)


def moved(bank: Tensor, index: list[int], rows: list[Tensor], momentum: float) -> Tensor:
    """The bank after a batch of distinct positions."""
    result = bank.clone()
    for i, row in zip(index, rows, strict=True):
        blend = [
            momentum * float(m) + (1 - momentum) * float(v)
            for m, v in zip(bank[i], row.detach(), strict=True)
        ]
        length = math.sqrt(sum(value**2 for value in blend))
        result[i] = torch.tensor([value / length for value in blend], dtype=bank.dtype)
    return result


def crd(criterion: nn.Module, student: Tensor, teacher: Tensor, index: Tensor) -> dict[str, Tensor]:
    """Both directions; Z is the criterion's where it is set, this batch's otherwise."""
    size, tau = criterion.dataset_size, criterion.temperature
    negatives = criterion.sample_negatives(len(index)).tolist()
    rows = [[i, *drawn] for i, drawn in zip(index.tolist(), negatives, strict=True)]
    found = {}
    sides = (
        ("CRD-student", criterion.head_s, student, criterion.bank_t),
        ("CRD-teacher", criterion.head_t, teacher, criterion.bank_s),
    )
    for direction, (name, head, embedding, bank) in enumerate(sides):
        table = powers(unit_rows(head, embedding), bank.clone(), rows, tau)
        if criterion.normalized[direction]:
            z = math.exp(float(criterion.log_normalizer[direction]))
        else:
            z = normalizer(table, size)
        found[name] = nce(table, z, size)
    return found


def splitmix(place: int) -> int:
    """The output at a place of SplitMix64 seeded with 0, in Python's unbounded numbers."""
    value = (place + 1) * 0x9E3779B97F4A7C15 % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31
