"""Second moments of paired columns from a few sums, which several processes can add up exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from structkd.criteria._sums import Level, Sums, samples, stacked
from structkd.distributed import sum_over_ranks

# The share of a variance that nothing can know: log(share + 0.01) stays finite.
UNKNOWABLE = 0.01


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
    levels = _means(pairs, gather) if center else [None] * len(pairs)
    sums = [_sums(pair, level) for pair, level in zip(pairs, levels, strict=True)]
    summed = iter(_total([half for halves in sums for half in halves], gather))
    found = []
    for halves, level in zip(sums, levels, strict=True):
        several = [_moments(*next(summed)) for _ in halves]
        if level is not None:
            several = [_without_rounding(value, *level) for value in several]
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


def _means(pairs: Sequence[Columns], gather: bool) -> list[Level | None]:
    with torch.no_grad():
        sums = [
            [_count(x, samples(x)), *(side.sum(tuple(range(1, side.dim()))) for side in (x, t))]
            for x, t, _, _ in pairs
        ]
        return [(first / count, second / count) for count, first, second in _total(sums, gather)]


def _count(side: Tensor, number: int) -> Tensor:
    return side.new_full((1,), number)


def _sums(pair: Columns, level: Level | None) -> list[list[Tensor]]:
    """Returns the sums of all samples, or of each half."""
    x, t, whole, cut = pair
    flat = Sums.apply(*stacked(x, t, level), level is not None, whole, cut)
    counts = [samples(x)] if cut is None else [cut, samples(x) - cut]
    each = len(flat) // len(counts)
    return [
        [_count(x, count), *flat[position * each : (position + 1) * each]]
        for position, count in enumerate(counts)
    ]


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
    dead_s = _is_rounding(spread_s.diagonal() if spread_s.dim() == 2 else spread_s, level_s)
    dead_t = _is_rounding(var_t, level_t)
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
