"""Second moments of paired columns from a few sums, which several processes can add up exactly.

One buffer holds both sides' shifted columns, so that one matrix product gives all sums of a pair
and another one the whole gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from structkd.criteria.numerics import is_rounding, seen_empty
from structkd.distributed import Shards

_Level = tuple[Tensor, Tensor]  # the means of student and teacher, (C_s,) and (C_t,)

# The share of a variance that nothing can know: log(share + 0.01) stays finite.
UNKNOWABLE = 0.01
# Positions from which a product for every map takes no longer than one for all of them.
_WORTH = 64


class Columns(NamedTuple):
    """A pair of arrays with a row for every channel and N samples behind it, in any dimensions.

    Attributes:
        student: ``(C_s, ...)``.
        teacher: ``(C_t, ...)``.
        whole: Whether the student's whole covariance is wanted, or its diagonal.
        cut: Moments are taken of the first ``cut`` samples and of the others, each by itself;
            None for all together.
    """

    student: Tensor
    teacher: Tensor
    whole: bool = False
    cut: int | None = None


def by_channel(features: Tensor) -> Tensor:
    """Returns ``(C, B, H W)`` of ``(B, C, H, W)``, a view where positions lie evenly in memory."""
    return features.transpose(0, 1).flatten(2)


class Moments(NamedTuple):
    """Means, and second moments divided by N.

    Attributes:
        mean_s: ``(C_s,)``, about the mean of all samples, so taken for 0 unless they were cut.
        mean_t: ``(C_t,)``, likewise.
        spread_s: The student's covariance ``(C_s, C_s)``, or its diagonal ``(C_s,)``.
        var_t: ``(C_t,)``.
        cross: ``(C_s, C_t)``.
    """

    mean_s: Tensor
    mean_t: Tensor
    spread_s: Tensor
    var_t: Tensor
    cross: Tensor


def moments(
    pairs: Sequence[Columns], shards: Shards, *, center: bool = True
) -> list[tuple[Moments, ...]]:
    """Returns the moments of every pair: one for all samples, or one for each half of them.

    Columns are first shifted by their mean. The sums that follow do not cancel in float32 then. To
    autograd the shift is a constant, which is exact: any shift gives the same moments. A channel
    whose deviations are the rounding of its mean has moments of 0.

    Args:
        pairs: As many as wanted; they share the collectives.
        shards: The moments are over the samples of all its processes, of which each may hold
            another number: one all-reduce of the means and one of the sums, and backward one of the
            sums' gradients.
        center: Take moments about the mean, else about zero.
    """
    levels = _means(pairs, shards) if center else [None] * len(pairs)
    sums = [_sums(pair, level) for pair, level in zip(pairs, levels, strict=True)]
    summed = iter(_total([half for halves in sums for half in halves], shards))
    found = []
    for halves, level in zip(sums, levels, strict=True):
        several = [_moments(*next(summed)) for _ in halves]
        if level is not None:
            several = [_without_rounding(value, *level) for value in several]
        found.append(tuple(several))
    return found


def log_error(
    error: Tensor, teacher: Tensor, shards: Shards, counted: Tensor | None = None
) -> Tensor:
    """Returns the logarithm of the mean squared error's share of the teacher's variance, + 0.01.

    The variance is the mean of the channels' that count. As in :func:`moments`, channels are
    shifted by their mean first, and one whose deviations are the rounding of its mean has a
    variance of 0. Where all have, the share counts as 1, without a gradient; where nothing counts,
    the result is 0.

    Args:
        error: ``(B, C, H, W)``.
        teacher: ``(B, C, H, W)``, a constant.
        shards: Over the samples of all its processes, of which each may hold another number: one
            all-reduce of the means and one of the sums, and backward one of the error's gradient.
        counted: Which elements count, ``(B, C, H, W)`` bool; all by default.
    """
    samples = (0, 2, 3)
    if counted is None:
        count = teacher.new_full((teacher.shape[1],), teacher.numel() // teacher.shape[1])
    else:
        count = counted.sum(dim=samples).to(teacher.dtype)
        error, teacher = torch.where(counted, error, 0), torch.where(counted, teacher, 0)
    ((count, level),) = _total([[count, teacher.sum(dim=samples)]], shards)
    number = count.clamp_min(1)
    level = level / number
    shifted = teacher - level[:, None, None]
    if counted is not None:
        shifted = torch.where(counted, shifted, 0)
    own = [shifted.square().sum(dim=samples), shifted.sum(dim=samples)]
    ((wrong, second, first),) = _total([[error.square().sum(), *own]], shards)
    variances = (second / number - (first / number).square()).clamp_min(0)
    variance = torch.where(is_rounding(variances.sqrt(), level), 0, variances).sum()
    variance = variance / (count > 0).sum().clamp_min(1)
    share = wrong / count.sum().clamp_min(1)
    # Written so that NaN stays NaN: a comparison with it is false, and 0 times it is NaN.
    constant = variance <= 0
    share = torch.where(constant, 1 + 0 * share, share)
    variance = torch.where(constant, 1, variance)
    # No quotient, which would leave float32 where the variance nearly does.
    found = torch.log(share + UNKNOWABLE * variance) - torch.log(variance)
    return torch.where(count.sum() > 0, found, 0)


def _means(pairs: Sequence[Columns], shards: Shards) -> list[_Level | None]:
    with torch.no_grad():
        sums = [[_count(x, _samples(x)), _sum(x), _sum(t)] for x, t, _, _ in pairs]
        return [(first / count, second / count) for count, first, second in _total(sums, shards)]


def _sum(side: Tensor) -> Tensor:
    # Position by position first: torch takes four times as long for both dimensions at once.
    return side if side.dim() == 1 else _sum(side.sum(dim=-1))


def _count(side: Tensor, number: int) -> Tensor:
    return side.new_full((1,), number)


def _sums(pair: Columns, level: _Level | None) -> list[list[Tensor]]:
    """Returns the sums of all samples, or of each half."""
    x, t, whole, cut = pair
    flat = _Sums.apply(*_stacked(x, t, level), level is not None, whole, cut)
    counts = [_samples(x)] if cut is None else [cut, _samples(x) - cut]
    each = len(flat) // len(counts)
    return [
        [_count(x, count), *flat[position * each : (position + 1) * each]]
        for position, count in enumerate(counts)
    ]


def _total(sums: list[list[Tensor]], shards: Shards) -> list[list[Tensor]]:
    """Adds sums up over the ranks, all in one message."""
    if len(shards.sizes) == 1:
        return sums
    flat = [value for each in sums for value in each]
    packed = shards.sum(torch.cat([value.flatten() for value in flat]))
    shares = iter(torch.split(packed, [value.numel() for value in flat]))
    return [[next(shares).view(value.shape) for value in each] for each in sums]


def _moments(
    count: Tensor,
    own: Tensor,
    square_t: Tensor,
    cross: Tensor,
    sum_s: Tensor | None = None,
    sum_t: Tensor | None = None,
) -> Moments:
    own, square_t, cross = own / count, square_t / count, cross / count
    if sum_s is None or sum_t is None:
        zeros = [cross.new_zeros(width) for width in cross.shape]
        return Moments(zeros[0], zeros[1], own, square_t, cross)
    mean_s, mean_t = sum_s / count, sum_t / count
    outer = torch.outer(mean_s, mean_s) if own.dim() == 2 else mean_s.square()
    var_t = (square_t - mean_t.square()).clamp_min(0)
    return Moments(mean_s, mean_t, own - outer, var_t, cross - torch.outer(mean_s, mean_t))


def _without_rounding(found: Moments, level_s: Tensor, level_t: Tensor) -> Moments:
    mean_s, mean_t, spread_s, var_t, cross = found
    var_s = spread_s.diagonal() if spread_s.dim() == 2 else spread_s
    # Of a half, the square of its mean was taken off too, whose rounding is larger.
    dead_s = is_rounding(var_s.clamp_min(0).sqrt(), level_s) | is_rounding(var_s, mean_s.square())
    dead_t = is_rounding(var_t.sqrt(), level_t) | is_rounding(var_t, mean_t.square())
    if seen_empty(dead_s, dead_t):
        return Moments(mean_s, mean_t, spread_s, var_t, cross)
    both = dead_s[:, None] | dead_s if spread_s.dim() == 2 else dead_s
    return Moments(
        mean_s,
        mean_t,
        spread_s.masked_fill(both, 0),
        var_t.masked_fill(dead_t, 0),
        cross.masked_fill(dead_s[:, None] | dead_t, 0),
    )


def _samples(side: Tensor) -> int:
    """How many lie behind each row of ``(C, ...)``."""
    return side[0].numel()


class _Sums(torch.autograd.Function):
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
            part = part.flatten(1)
            own, other = part[:width], part[width:]
            if whole:
                square, cross = torch.split(own @ part.T, [width, len(other)], dim=1)
            else:
                square, cross = _squares(own), own @ other.T
            found += [square, _squares(other), cross]
            if centred and cut is not None:
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
            if ctx.centred and ctx.cut is None:  # whose shift goes with them
                mean = _along(columns.flatten(1).mean(dim=1), columns)
                columns = columns - mean + mean.detach()
        each = 5 if ctx.centred and ctx.cut is not None else 3
        grads_s, grads_t = [], []
        for position, part in enumerate(_halves(columns, ctx.cut)):
            own, square_t, cross, *first = grads[position * each : (position + 1) * each]
            first_s, first_t = first or (None, None)
            if ctx.whole:
                grad = _product(torch.cat([own + own.T, cross], dim=1), part, first_s)
            else:
                grad = _product(cross, part[width:], first_s)
                grad.addcmul_(_along(own, part), part[:width], value=2)
            grads_s.append(grad)
            if ctx.needs_input_grad[1]:
                grad = _product(cross.T, part[:width], first_t)
                grads_t.append(grad.addcmul_(_along(square_t, part), part[width:], value=2))
        grad_s = _joined(grads_s, own_columns) if ctx.needs_input_grad[0] else None
        grad_t = _joined(grads_t, other_columns) if ctx.needs_input_grad[1] else None
        return grad_s, grad_t, None, None, None, None


def _stacked(x: Tensor, t: Tensor, level: _Level | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns both sides, shifted, and the buffer ``(C_s + C_t, ...)`` that they lie in."""
    if torch.compiler.is_compiling():  # which makes one pass of it by itself
        own, other = (
            side if level is None else side - _along(level[position], side)
            for position, side in enumerate((x, t))
        )
        return own, other, torch.cat([own, other]).detach()
    both: tuple[Tensor, Tensor, Tensor] = _Stacked.apply(x, t, level)
    return both


class _Stacked(torch.autograd.Function):
    """Copies both sides into one buffer, shifted, so that nothing holds on to the maps themselves.

    In memory the buffer lies by sample where the student's map does.
    """

    @staticmethod
    def forward(x: Tensor, t: Tensor, level: _Level | None) -> tuple[Tensor, Tensor, Tensor]:
        behind, width = x.shape[1:], len(x) + len(t)
        if x.stride(0) == 1 and len(x) > 1:
            columns = x.new_empty(*behind, width).movedim(-1, 0)
        else:
            columns = x.new_empty(width, *behind)
        own, other = columns[: len(x)], columns[len(x) :]
        for place, side, shift in zip((own, other), (x, t), level or (None, None), strict=True):
            if shift is None:
                place.copy_(side)
            else:
                torch.sub(side, _along(shift, side), out=place)
        return own, other, columns

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        _, other, columns = output
        # Nor is a gradient of zeros made for them, as large as the maps are.
        constants = (columns,) if ctx.needs_input_grad[1] else (other, columns)
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *grads[:2], None


def _along(values: Tensor, columns: Tensor) -> Tensor:
    """Views a number for every row of ``(C, ...)`` so that it meets all samples behind the row."""
    return values.view(-1, *[1] * (columns.dim() - 1))


def _halves(columns: Tensor, cut: int | None) -> tuple[Tensor, ...]:
    if cut is None:
        return (columns,)
    flat = columns.flatten(1)
    return flat[:, :cut], flat[:, cut:]


def _squares(columns: Tensor) -> Tensor:
    # A norm needs no copy, but is slow across rows of memory.
    if columns.stride(0) == 1:
        return columns.square().sum(dim=1)
    norm: Tensor = torch.linalg.vector_norm(columns, dim=1)
    return norm.square()


def _product(weights: Tensor, columns: Tensor, first: Tensor | None) -> Tensor:
    """Returns ``weights @ columns + first`` over the rows of ``(C, ...)``.

    In memory it lies as the columns do, or as maps ``(B, C, H W)`` where each is worth a product of
    its own: whoever reads it next need not copy it.
    """
    if columns.stride(0) == 1:
        product = (columns.movedim(0, -1) @ weights.T).movedim(-1, 0)
    elif columns.dim() == 3 and columns.shape[2] >= _WORTH:
        maps = columns.transpose(0, 1)
        product = torch.bmm(weights.expand(len(maps), -1, -1), maps).transpose(0, 1)
    else:
        product = (weights @ columns.flatten(1)).view(len(weights), *columns.shape[1:])
    return product if first is None else product.add_(first[:, None])


def _joined(parts: list[Tensor], columns: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1).view(columns.shape)
