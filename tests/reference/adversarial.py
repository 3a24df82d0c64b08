"""Adversarial criteria, sample by sample, from the two losses that each player minimises."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _linear(layer: nn.Linear, row: Tensor, frozen: bool) -> Tensor:
    weight, bias = layer.weight, layer.bias
    if frozen:
        weight, bias = weight.detach(), bias.detach()
    return torch.stack([(w * row).sum() + b for w, b in zip(weight, bias, strict=True)])


def _relu(row: Tensor) -> Tensor:
    return torch.stack([value if value.item() > 0 else 0 * value for value in row])


def scores(discriminator: nn.Module, row: Tensor, *, frozen: bool) -> Tensor:
    hidden = _relu(_linear(discriminator.stem, row, frozen))
    for block in discriminator.blocks:
        inner = _relu(_linear(block[0], hidden, frozen))
        hidden = hidden + _linear(block[2], inner, frozen)
    return _linear(discriminator.head, _relu(hidden), frozen)


def _log_probability(score: Tensor) -> Tensor:
    """log of sigmoid."""
    return -torch.log(1 + torch.exp(-score))


def _cross_entropy(row: Tensor, label: int) -> Tensor:
    peak = row.detach().max()
    return torch.log(torch.exp(row - peak).sum()) - (row[label] - peak)


def alkd(
    discriminator: nn.Module,
    logits_s: Tensor,
    logits_t: Tensor,
    target: Tensor,
    *,
    l1_weight: float,
    adversarial_weight: float,
) -> dict[str, Tensor]:
    """Xu, Hsu & Huang, 2017, the student's loss in its non-saturating form."""
    names = ("ALKD-l1", "ALKD-adversarial", "ALKD-label", "ALKD-discriminator")
    found = dict.fromkeys(names, torch.zeros((), dtype=logits_s.dtype))
    batch = len(logits_s)
    for row_s, row_t, label in zip(logits_s, logits_t, target.tolist(), strict=True):
        gap = sum(abs(s - t) for s, t in zip(row_s, row_t, strict=True))
        judged = scores(discriminator, row_s, frozen=True)
        seen_s = scores(discriminator, row_s.detach(), frozen=False)
        seen_t = scores(discriminator, row_t, frozen=False)
        own = -_log_probability(seen_t[0]) - _log_probability(-seen_s[0])
        own = own + _cross_entropy(seen_t[1:], label) + _cross_entropy(seen_s[1:], label)
        parts = (
            l1_weight * gap,
            -adversarial_weight * _log_probability(judged[0]),
            adversarial_weight * _cross_entropy(judged[1:], label),
            own,
        )
        for name, part in zip(names, parts, strict=True):
            found[name] = found[name] + part / batch
    return found


def afkd(
    adapter: nn.Sequential | None,
    discriminator: nn.Module,
    rows_s: Tensor,
    rows_t: Tensor,
    *,
    adversarial_weight: float,
) -> dict[str, Tensor]:
    """Wang et al., 2018, the student's loss in its non-saturating form."""
    fool = tell = torch.zeros((), dtype=rows_s.dtype)
    for row_s, row_t in zip(rows_s, rows_t, strict=True):
        if adapter is not None:
            row_s = _linear(adapter[0], row_s, False)
        fool = fool - _log_probability(scores(discriminator, row_s, frozen=True)[0])
        tell = tell - _log_probability(scores(discriminator, row_t, frozen=False)[0])
        tell = tell - _log_probability(-scores(discriminator, row_s.detach(), frozen=False)[0])
    return {
        "AFKD-adversarial": adversarial_weight * fool / len(rows_s),
        "AFKD-discriminator": tell / len(rows_s),
    }
