"""Distances and angles within a batch, in memory that grows with B^2."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# A chunk of anchors takes about this many numbers a tensor (4 MiB in float32), or FEWEST anchors
# where the batch is so large that one chunk would hold fewer.
_BUDGET = 2**20
_FEWEST = 8


def pair_distances(rows: Tensor) -> Tensor:
    """Returns Euclidean distances ``(B, B)`` of ``(B, D)``, exactly 0 where rows coincide.

    They are taken from differences, since the Gram form loses the digits of small distances; the
    gradient is 0 where rows coincide.
    """
    distances: Tensor = _PairDistances.apply(rows)
    return distances


def angle_gap(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the mean Huber gap of the cosines of all angles that samples form at a third.

    The mean is over all B^3 ordered triples. One in which a sample coincides with the vertex has no
    angle and counts as 0, in value and in gradient. There is no second derivative.
    """
    gap: Tensor = _AngleGap.apply(
        student, teacher, student.requires_grad and torch.is_grad_enabled()
    )
    return gap


class _PairDistances(torch.autograd.Function):
    """Distances chunk by chunk; the backward makes each chunk's differences again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        distances = rows.new_empty(len(rows), len(rows))
        for part in _chunks(rows):
            distances[part] = torch.linalg.vector_norm(rows - rows[part, None], dim=2)
        ctx.save_for_backward(rows, distances)
        return distances

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        rows, distances = ctx.saved_tensors
        pull = (grad + grad.T) * _inverse(distances)
        result = torch.empty_like(rows)
        for part in _chunks(rows):
            differences = rows[part, None] - rows
            result[part] = torch.bmm(pull[part, None], differences).squeeze(1)
        return result


class _AngleGap(torch.autograd.Function):
    """The loss chunk by chunk, and in the same pass its gradient, in closed form.

    That spares the backward a second look at B^3 angles and keeps nothing but a ``(B, D)`` tensor.
    (Checkpointed chunks, on the CPU, leave the heap in pieces: 20 times their size at B = 512.)
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, wants_grad: bool) -> Tensor:
        batch = len(student)
        total = student.new_zeros(())
        slope = torch.zeros_like(student)
        for part in _chunks(student if student.shape[1] >= teacher.shape[1] else teacher):
            arms, inverse = _unit_arms(student, part)
            arms_t, _ = _unit_arms(teacher, part)
            gap = torch.bmm(arms, arms.transpose(1, 2))
            gap -= torch.bmm(arms_t, arms_t.transpose(1, 2))
            huber = gap.clamp(-1, 1)  # the slope of the Huber function
            # h(x) = c (x - c / 2) with c its slope.
            total += (huber * (gap - huber / 2)).sum()
            if wants_grad:
                pull = torch.bmm(huber, arms)
                pull -= (pull * arms).sum(dim=2, keepdim=True) * arms
                pull *= inverse
                slope += pull.sum(dim=0)
                slope[part] -= pull.sum(dim=1)
        # Each angle has two arms.
        ctx.save_for_backward(slope * (2 / batch**3))
        return total / batch**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None


def poincare_distances(rows: Tensor, curvature: float) -> Tensor:
    r"""Returns geodesic distances ``(B, B)`` after the exponential map into a Poincaré ball.

    With ball radius :math:`1 / \sqrt c`, a row x goes to :math:`\tanh(\sqrt c |x|) x / (\sqrt c
    |x|)`, and :math:`d(u, v) = 2 / \sqrt c \; \mathrm{artanh}(\sqrt c |{-u} \oplus v|)`. Both ball
    and Möbius sum round at the boundary, where tanh is 1. The hyperbolic law of cosines needs
    neither: with :math:`\rho = 2 \sqrt c |x|` and the angle :math:`\theta` between two rows,

    .. math::
        \sinh^2 \tfrac{\sqrt c \, d}{2} = \sinh^2 \tfrac{\rho_i - \rho_j}{2}
            + \sinh \rho_i \sinh \rho_j \sin^2 \tfrac{\theta}{2},

    summed here as logarithms, so that distances are finite for rows of any length.
    """
    length = torch.linalg.vector_norm(rows, dim=1)
    radius = 2 * curvature**0.5 * length
    empty = length == 0
    directions = torch.where(empty[:, None], 0, rows / torch.where(empty, 1, length)[:, None])
    half_chord = pair_distances(directions) / 2  # sin(theta / 2)
    log_sinh = _log_positive(radius, lambda r: r + torch.log(-torch.expm1(-2 * r) / 2))
    turn = 2 * _log_positive(half_chord, torch.log) + log_sinh[:, None] + log_sinh
    gap = _log_positive(
        (radius[:, None] - radius).abs(), lambda g: g + 2 * torch.log(-torch.expm1(-g) / 2)
    )
    # A logarithm of zero has no gradient; mask it before it meets another.
    coincide = (gap == -torch.inf) & (turn == -torch.inf)
    log_square = torch.logaddexp(torch.where(coincide, 0, gap), turn)
    # From e^40 on, asinh(x) is log(2 x) to the last digit of float64.
    far = log_square > 40
    near = 2 * torch.asinh(torch.exp(torch.where(far, 0, log_square) / 2))
    distance = torch.where(far, log_square + 2 * math.log(2), near)
    geodesic: Tensor = torch.where(coincide, 0, distance) / curvature**0.5
    return geodesic


def mean_normalised(distances: Tensor) -> Tensor:
    """Divides distances by the mean of those that are not zero; all zero stays all zero."""
    count = (distances > 0).sum().clamp_min(1)
    mean = distances.sum() / count
    return distances / torch.where(mean == 0, 1, mean)


def _unit_arms(rows: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Returns unit vectors ``(vertices, B, D)`` from vertices to rows, and 1 / their lengths."""
    arms = rows - rows[part, None]
    inverse = _inverse(torch.linalg.vector_norm(arms, dim=2, keepdim=True))
    arms *= inverse
    return arms, inverse


def _inverse(length: Tensor) -> Tensor:
    """Returns 1 / length, and 0 with gradient 0 where length is 0."""
    empty = length == 0
    return torch.where(empty, 0, 1 / torch.where(empty, 1, length))


def _log_positive(value: Tensor, log: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns ``log(value)``, and -inf with gradient 0 where value is 0."""
    empty = value == 0
    return torch.where(empty, -torch.inf, log(torch.where(empty, 1, value)))


def _chunks(rows: Tensor) -> Iterator[slice]:
    """Cuts the batch so that a chunk's ``(anchors, B, max(B, D))`` keeps to the budget."""
    batch, width = rows.shape
    size = max(_FEWEST, _BUDGET // (batch * max(batch, width)))
    if size >= batch:
        # Without a range, one compiled graph holds for all batches that need one chunk.
        return iter((slice(None),))
    return (slice(start, start + size) for start in range(0, batch, size))
