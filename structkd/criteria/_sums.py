"""The sums behind a pair's second moments, with one product forward and one backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Level = tuple[Tensor, Tensor]  # the means of student and teacher, (C_s,) and (C_t,)


def samples(side: Tensor) -> int:
    """How many lie behind each row of ``(C, ...)``."""
    return side[0].numel()


class Sums(torch.autograd.Function):
    """The sums of one pair, from one buffer that holds its shifted columns, student over teacher.

    One matrix product gives the student's square and the cross products, and one gives the whole
    gradient. Autograd, left alone, would take four and add every sum's gradient up by itself,
    which costs more than the products where channels are few. The backward is differentiable.
    """

    @staticmethod
    def forward(
        own: Tensor, other: Tensor, columns: Tensor, centred: bool, whole: bool, cut: int | None
    ) -> tuple[Tensor, ...]:
        width = len(own)
        found = []
        for part in _halves(columns, cut):
            own, other = part[:width], part[width:]
            if whole:
                square, cross = torch.split(own @ part.T, [width, len(other)], dim=1)
            else:
                square, cross = _squares(own), own @ other.T
            found += [square, _squares(other), cross]
            if centred:
                found += [own.sum(dim=1), other.sum(dim=1)]
        return tuple(found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *sides, ctx.centred, ctx.whole, ctx.cut = inputs
        ctx.save_for_backward(*sides)  # which share their memory

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        own_columns, other_columns, columns = ctx.saved_tensors
        width = len(own_columns)
        if torch.is_grad_enabled():  # the gradient's own gradient is wanted
            columns = torch.cat([own_columns, other_columns])
        each = 5 if ctx.centred else 3
        grads_s, grads_t = [], []
        for position, part in enumerate(_halves(columns, ctx.cut)):
            own, square_t, cross, *first = grads[position * each : (position + 1) * each]
            first_s, first_t = first or (own.new_zeros(1), own.new_zeros(1))
            if ctx.whole:
                weights = torch.cat([own + own.T, cross], dim=1)
                grads_s.append(_product(weights, part, first_s))
            else:
                grad = _product(cross, part[width:], first_s)
                grads_s.append(torch.addcmul(grad, own[:, None], part[:width], value=2))
            if ctx.needs_input_grad[1]:
                grad = _product(cross.T, part[:width], first_t)
                grads_t.append(torch.addcmul(grad, square_t[:, None], part[width:], value=2))
        grad_s = _joined(grads_s) if ctx.needs_input_grad[0] else None
        grad_t = _joined(grads_t) if ctx.needs_input_grad[1] else None
        return grad_s, grad_t, None, None, None, None


def stacked(x: Tensor, t: Tensor, level: Level | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns both sides, shifted, and the buffer ``(C_s + C_t, N)`` that they lie in."""
    if torch.compiler.is_compiling():  # which makes one pass of it by itself
        own, other = _shifted(x, level and level[0]), _shifted(t, level and level[1])
        return own, other, torch.cat([own, other]).detach()
    both: tuple[Tensor, Tensor, Tensor] = _Stacked.apply(x, t, level)
    return both


class _Stacked(torch.autograd.Function):
    """Copies both sides into one buffer, shifted, so that nothing holds on to the maps themselves.

    In memory the buffer lies by sample where the student's map does.
    """

    @staticmethod
    def forward(x: Tensor, t: Tensor, level: Level | None) -> tuple[Tensor, Tensor, Tensor]:
        size = (len(x) + len(t), samples(x))
        by_sample = x.stride(0) == 1 and len(x) > 1
        columns = x.new_empty(size[::-1]).T if by_sample else x.new_empty(size)
        own, other = columns[: len(x)], columns[len(x) :]
        for rows, side, shift in zip((own, other), (x, t), level or (None, None), strict=True):
            place = rows.view(side.shape)
            if shift is None:
                place.copy_(side)
            else:
                torch.sub(side, shift.view(-1, *[1] * (side.dim() - 1)), out=place)
        return own, other, columns

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        x, t, _ = inputs
        _, other, columns = output
        ctx.shapes = x.shape, t.shape
        # A gradient of zeros as large as the teacher's map would be made otherwise.
        constants = (columns,) if ctx.needs_input_grad[1] else (other, columns)
        ctx.mark_non_differentiable(*constants)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(grads[:2], ctx.shapes, ctx.needs_input_grad[:2], strict=True)
        return *(grad.view(shape) if needed else None for grad, shape, needed in pairs), None


def _shifted(side: Tensor, mean: Tensor | None) -> Tensor:
    return side.flatten(1) if mean is None else side.flatten(1) - mean[:, None]


def _halves(columns: Tensor, cut: int | None) -> tuple[Tensor, ...]:
    return (columns,) if cut is None else (columns[:, :cut], columns[:, cut:])


def _squares(columns: Tensor) -> Tensor:
    # A norm needs no copy, but is slow across rows of memory.
    if columns.stride(0) == 1:
        return columns.square().sum(dim=1)
    norm: Tensor = torch.linalg.vector_norm(columns, dim=1)
    return norm.square()


def _product(weights: Tensor, columns: Tensor, first: Tensor) -> Tensor:
    """Returns ``weights @ columns + first[:, None]`` in the memory order of ``columns``."""
    if columns.stride(0) == 1:
        return torch.addmm(first, columns.T, weights.T).T
    return torch.addmm(first[:, None], weights, columns)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
