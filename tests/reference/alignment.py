"""Semantic-aware alignment as described (Wei et al., the Planner), in plain loops."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.dskd import coral, mean_over_positions


def tokens_of(maps: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """(B, C, H, W) to (B, N, C) row by row; ``size`` averages equal blocks down to it."""
    if maps.dim() == 3:
        return maps
    height, width = maps.shape[2:]
    rows, columns = size or (height, width)
    step_y, step_x = height // rows, width // columns
    found = []
    for y in range(rows):
        for x in range(columns):
            block = maps[:, :, y * step_y : (y + 1) * step_y, x * step_x : (x + 1) * step_x]
            found.append(sum(block[:, :, i, j] for i in range(step_y) for j in range(step_x)))
            found[-1] = found[-1] / (step_y * step_x)
    return torch.stack(found, dim=1)


def masses(tokens: Tensor, query_weight: Tensor, key_weight: Tensor, heads: int) -> Tensor:
    """Mass (heads, N) that each token of one sample (N, C) receives: column means of the plan."""
    count, width = tokens.shape
    size = width // heads
    received = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        query = [query_weight[part] @ token for token in tokens]
        key = [key_weight[part] @ token for token in tokens]
        column = [torch.zeros((), dtype=tokens.dtype) for _ in range(count)]
        for i in range(count):
            cost = [-(query[i] * key[j]).sum() for j in range(count)]
            kernel = [torch.exp(-value / size**0.5) for value in cost]
            total = sum(kernel)
            for j in range(count):
                column[j] = column[j] + kernel[j] / total / count
        received.append(torch.stack(column))
    return torch.stack(received)


def weights(mass_own: Tensor, mass_other: Tensor) -> Tensor:
    """Weight (N,) of every own token: the cross plan's mean over the others' tokens, per head."""
    heads, count = mass_own.shape
    others = mass_other.shape[1]
    found = []
    for j in range(count):
        total = torch.zeros((), dtype=mass_own.dtype)
        for head in range(heads):
            plan = [mass_other[head, i] * mass_own[head, j] for i in range(others)]
            mean_own = sum(mass_own[head, k] for k in range(count)) / count
            total = total + (sum(plan) / others) / mean_own
        found.append(total / heads)
    return torch.stack(found)


def refined(tokens: Tensor, weight: Tensor) -> Tensor:
    """Token times weight, (N, C), with the energy of the mean token restored."""
    scaled = torch.stack([token * factor for token, factor in zip(tokens, weight, strict=True)])
    before = (sum(token for token in tokens) / len(tokens)).square().sum()
    after = (sum(token for token in scaled) / len(tokens)).square().sum()
    return scaled * torch.sqrt(before / after)


def alignment(
    map_s: Tensor,
    map_t: Tensor,
    weight_s: Tensor,
    weight_t: Tensor,
    *,
    heads: int,
    published: bool = False,
) -> tuple[Tensor, Tensor]:
    """L_ot1 and L_ot2; ``weight_*`` stacks a modality's query and key matrices."""
    size = None
    if map_s.dim() == 4:
        size = (min(map_s.shape[2], map_t.shape[2]), min(map_s.shape[3], map_t.shape[3]))
    tokens_s, tokens_t = tokens_of(map_s, size), tokens_of(map_t, size)
    width = tokens_s.shape[2]
    rows_s, rows_t = [], []
    for sample_s, sample_t in zip(tokens_s, tokens_t, strict=True):
        mass_s = masses(sample_s, weight_s[:width], weight_s[width:], heads)
        mass_t = masses(sample_t, weight_t[:width], weight_t[width:], heads)
        rows_s.append(refined(sample_s, weights(mass_s, mass_t)).flatten())
        rows_t.append(refined(sample_t, weights(mass_t, mass_s)).flatten())
    pairs = (
        (torch.stack(rows_s), torch.stack(rows_t)),
        (mean_over_positions(map_s), mean_over_positions(map_t)),
    )
    losses = []
    for left, right in pairs:
        batch, columns = left.shape
        factor = (batch - 1) ** 2 / columns if published else 1.0
        losses.append(coral(left, right) * factor)
    return losses[0], losses[1]
