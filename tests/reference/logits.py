"""Criteria on class scores as published, in plain loops over float64 numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softmax(row: Tensor, temperature: Tensor | float = 1.0) -> list[Tensor]:
    peak = max(float(value.detach()) for value in row)
    powers = [torch.exp((value - peak) / temperature) for value in row]
    total = sum(powers)
    return [power / total for power in powers]


def kl(p: list[Tensor], q: list[Tensor]) -> Tensor:
    return sum(a * (torch.log(a) - torch.log(b)) for a, b in zip(p, q, strict=True))


def kd(logits_s: Tensor, logits_t: Tensor, temperature: Tensor | float) -> Tensor:
    """Hinton et al., 2015."""
    total = torch.zeros((), dtype=logits_s.dtype)
    for row_s, row_t in zip(logits_s, logits_t, strict=True):
        total = total + kl(softmax(row_t, temperature), softmax(row_s, temperature))
    return temperature**2 * total / len(logits_s)


def kd_sigmoid(logits_s: Tensor, logits_t: Tensor, temperature: float) -> Tensor:
    """KD where every class is a question of its own."""
    total = torch.zeros((), dtype=logits_s.dtype)
    for row_s, row_t in zip(logits_s, logits_t, strict=True):
        for s, t in zip(row_s, row_t, strict=True):
            p, q = (1 / (1 + torch.exp(-value / temperature)) for value in (t, s))
            total = total + kl([p, 1 - p], [q, 1 - q])
    return temperature**2 * total / len(logits_s)


def logit_mse(logits_s: Tensor, logits_t: Tensor, power: int = 2) -> Tensor:
    """Ba & Caruana, 2014, without the half and averaged over classes."""
    total = torch.zeros((), dtype=logits_s.dtype)
    for row_s, row_t in zip(logits_s, logits_t, strict=True):
        for s, t in zip(row_s, row_t, strict=True):
            total = total + abs(s - t) ** power
    return total / (logits_s.shape[0] * logits_s.shape[1])


def dkd(
    logits_s: Tensor,
    logits_t: Tensor,
    target: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    """Zhao et al., 2022: probabilities first, as the paper writes them."""
    total = torch.zeros((), dtype=logits_s.dtype)
    for row_s, row_t, label in zip(logits_s, logits_t, target.tolist(), strict=True):
        p_s, p_t = softmax(row_s, temperature), softmax(row_t, temperature)
        others_s = [p for k, p in enumerate(p_s) if k != label]
        others_t = [p for k, p in enumerate(p_t) if k != label]
        rest_s, rest_t = sum(others_s), sum(others_t)
        tckd = kl([p_t[label], rest_t], [p_s[label], rest_s])
        nckd = kl([p / rest_t for p in others_t], [p / rest_s for p in others_s])
        total = total + alpha * tckd + beta * nckd
    return temperature**2 * total / len(logits_s)


def z_score(row: Tensor) -> Tensor:
    """Sun et al., 2024, Alg. 1 without the temperature; sigma divides by K."""
    mean = sum(row) / len(row)
    deviation = torch.sqrt(sum((value - mean) ** 2 for value in row) / len(row))
    if deviation.item() == 0:
        return torch.zeros_like(row)
    return torch.stack([(value - mean) / deviation for value in row])


def lskd(logits_s: Tensor, logits_t: Tensor, *, temperature: float) -> Tensor:
    """Sun et al., 2024, Alg. 2."""
    standard_s = torch.stack([z_score(row) for row in logits_s])
    standard_t = torch.stack([z_score(row) for row in logits_t])
    return kd(standard_s, standard_t, temperature)


def ctkd_temperature(raw: float, low: float, high: float) -> float:
    return low + (high - low) / (1 + math.exp(-raw))


def ctkd_ramp(epoch: int, ramp_epochs: int, strength: float) -> float:
    """Li et al., 2023: cosine from 0 to the full strength; epochs count from 1."""
    progress = min(epoch, ramp_epochs) / ramp_epochs
    return strength * (1 - math.cos(math.pi * progress)) / 2


def dice(logits: Tensor, target: Tensor, smooth: float) -> Tensor:
    """One minus the overlap of every class that some row has, the mean over all classes."""
    classes = logits.shape[1]
    total = torch.zeros((), dtype=logits.dtype)
    for k in range(classes):
        common = found = wanted = torch.zeros((), dtype=logits.dtype)
        for row, label in zip(logits, target.tolist(), strict=True):
            if label == -100:
                continue
            share = softmax(row)[k] if classes > 1 else 1 / (1 + torch.exp(-row[0]))
            yes = float(label == (k if classes > 1 else 1))
            common, found, wanted = common + share * yes, found + share, wanted + yes
        if wanted > 0:
            total = total + 1 - (common + smooth) / ((found + wanted) / 2 + smooth)
    return total / classes


def channel_wise(maps_s: Tensor, maps_t: Tensor, temperature: float) -> Tensor:
    """Every channel's softmax over positions, by a loop over samples and channels."""
    total = torch.zeros((), dtype=maps_s.dtype)
    for sample_s, sample_t in zip(maps_s, maps_t, strict=True):
        for channel_s, channel_t in zip(sample_s, sample_t, strict=True):
            total = total + kl(
                softmax(channel_t.flatten(), temperature), softmax(channel_s.flatten(), temperature)
            )
    return temperature**2 * total / (maps_s.shape[0] * maps_s.shape[1])
