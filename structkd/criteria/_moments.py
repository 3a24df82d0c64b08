"""Second moments of paired columns from a few sums, which several processes can add up exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from structkd.distributed import sum_over_ranks

# The share of a variance that nothing can know: log(share + 0.01) stays finite.
UNKNOWABLE = 0.01


class Columns(NamedTuple):
    """A pair of matrices with a row for every channel and a column for every sample.

    Attributes:
        student: ``(C_s, N)``.
        teacher: ``(C_t, N)``.
        whole: Whether the student's whole covariance is wanted, or its diagonal.
        cut: Moments are taken of the first ``cut`` samples and of the others, each by itself;
            None for all together.
    """

    student: Tensor
    teacher: Tensor
    whole: bool = False
    cut: int | None = None


class Moments(NamedTuple):
    """Means, and second moments divided by N.

    Attributes:
        mean_s: ``(C_s,)``, about the mean of all samples, so 0 unless they were cut.
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
    pairs: Sequence[Columns], *, center: bool = True, gather: bool = False
) -> list[tuple[Moments, ...]]:
    """Returns the moments of every pair: one for all samples, or one for each half of them.

    Columns are first shifted by their mean. The sums that follow do not cancel in float32 then. To
    autograd the shift is a constant, which is exact: any shift gives the same moments. A channel
    whose deviations are the rounding of its mean has moments of 0.

    Args:
        pairs: As many as wanted; they share the collectives.
        center: Take moments about the mean, else about zero.
        gather: Over the samples of all processes, of which each may hold another number: one
            all-reduce of the means and one of the sums, and backward one of the sums' gradients.
    """
    levels: list[tuple[Tensor, Tensor]] = []
    if center:
        levels = _means(pairs, gather)
        pairs = [
            pair._replace(student=pair.student - mean_s, teacher=pair.teacher - mean_t)
            for pair, (mean_s, mean_t) in zip(pairs, levels, strict=True)
        ]
    halves = [_halves(pair) for pair in pairs]
    summed = iter(_total([_sums(half, center) for each in halves for half in each], gather))
    found = []
    for position, each in enumerate(halves):
        several = [_moments(*next(summed)) for _ in each]
        if center:
            several = [_without_rounding(value, *levels[position]) for value in several]
        found.append(tuple(several))
    return found


def error_and_variance(error: Tensor, teacher: Tensor, *, gather: bool) -> tuple[Tensor, Tensor]:
    """Returns the mean squared error of all elements, and every channel's variance ``(C,)``.

    As in :func:`moments`, channels are shifted by their mean first, and one whose deviations are
    the rounding of its mean has a variance of 0.

    Args:
        error: ``(B, C, H, W)``.
        teacher: ``(B, C, H, W)``, a constant.
        gather: Over the samples of all processes, of which each may hold another number: one
            all-reduce of the means and one of the sums, and backward one of the error's gradient.
    """
    channels = teacher.shape[1]
    count = teacher.new_full((1,), teacher.numel() // channels)
    ((count, level),) = _total([[count, teacher.sum(dim=(0, 2, 3))]], gather)
    level = level / count
    shifted = teacher - level[:, None, None]
    own = [shifted.square().sum(dim=(0, 2, 3)), shifted.sum(dim=(0, 2, 3))]
    ((wrong, second, first),) = _total([[error.square().sum(), *own]], gather)
    variance = (second / count - (first / count).square()).clamp_min(0)
    variance = torch.where(_is_rounding(variance, level), 0, variance)
    return wrong / (count[0] * channels), variance


def inverse_scale(square: Tensor, floor: float) -> Tensor:
    r"""Returns :math:`1 / \sqrt{v_i + floor \cdot mean_j v_j}`, and 0 for 1 / 0.

    Args:
        square: Variances, or squared lengths, ``(C,)``.
        floor: Bounds what a column with little variance is multiplied by, and so its gradient.
    """
    square = square + floor * square.mean()
    # Written so that NaN stays NaN: a comparison with it is false.
    empty = square <= 0
    return torch.where(empty, 0, 1 / torch.where(empty, 1, square).sqrt())


def _means(pairs: Sequence[Columns], gather: bool) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad():
        sums = [[_count(pair), pair.student.sum(1), pair.teacher.sum(1)] for pair in pairs]
        return [
            ((first / count)[:, None], (second / count)[:, None])
            for count, first, second in _total(sums, gather)
        ]


def _halves(pair: Columns) -> list[Columns]:
    x, t, whole, cut = pair
    if cut is None:
        return [pair]
    return [Columns(x[:, :cut], t[:, :cut], whole), Columns(x[:, cut:], t[:, cut:], whole)]


def _count(pair: Columns) -> Tensor:
    return pair.student.new_full((1,), pair.student.shape[1])


def _sums(pair: Columns, center: bool) -> list[Tensor]:
    x, t = pair.student, pair.teacher
    own, cross, first = _Products.apply(x, t, pair.whole)
    sums = [_count(pair), own, t.square().sum(dim=1), cross]
    return [*sums, first, t.sum(dim=1)] if center else sums


class _Products(torch.autograd.Function):
    """The student's sums, whose gradient is two matrix products in place of many passes.

    Autograd takes two products for ``x x^T`` alone and adds every sum's gradient up by itself,
    which costs more than the products where channels are few. The backward is differentiable.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, t)
        ctx.whole = whole
        own = x @ x.T if whole else x.square().sum(dim=1)
        return own, x @ t.T, x.sum(dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, t = ctx.saved_tensors
        own, cross, first = grads
        grad_s = torch.addmm(first[:, None], cross, t)
        if ctx.whole:
            grad_s = torch.addmm(grad_s, own + own.T, x)
        else:
            grad_s = torch.addcmul(grad_s, own[:, None], x, value=2)
        return grad_s, cross.T @ x if ctx.needs_input_grad[1] else None, None


def _total(sums: list[list[Tensor]], gather: bool) -> list[list[Tensor]]:
    """Adds sums up over the ranks, all in one message."""
    if not gather:
        return sums
    flat = [value for each in sums for value in each]
    packed = sum_over_ranks(torch.cat([value.flatten() for value in flat]))
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
        zeros = cross.new_zeros(cross.shape)
        return Moments(zeros[:, 0], zeros[0], own, square_t, cross)
    mean_s, mean_t = sum_s / count, sum_t / count
    outer = torch.outer(mean_s, mean_s) if own.dim() == 2 else mean_s.square()
    var_t = (square_t - mean_t.square()).clamp_min(0)
    return Moments(mean_s, mean_t, own - outer, var_t, cross - torch.outer(mean_s, mean_t))


def _without_rounding(found: Moments, level_s: Tensor, level_t: Tensor) -> Moments:
    mean_s, mean_t, spread_s, var_t, cross = found
    dead_s = _is_rounding(spread_s.diagonal() if spread_s.dim() == 2 else spread_s, level_s[:, 0])
    dead_t = _is_rounding(var_t, level_t[:, 0])
    both = dead_s[:, None] | dead_s if spread_s.dim() == 2 else dead_s
    return Moments(
        mean_s,
        mean_t,
        torch.where(both, 0, spread_s),
        torch.where(dead_t, 0, var_t),
        torch.where(dead_s[:, None] | dead_t, 0, cross),
    )


def _is_rounding(variance: Tensor, level: Tensor) -> Tensor:
    # What is left of a constant column is the rounding of its mean: some 5 eps for 10,000 rows.
    grain = 16 * torch.finfo(variance.dtype).eps * level.abs()
    return variance <= grain.square()
