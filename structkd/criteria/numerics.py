"""Divisions, norms and means that are safe where there is nothing, each of them once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structkd.distributed import Shards

# What is shorter has no direction that could be told from rounding.
_SHORTEST = 1e-12
# What is left of a constant column is the rounding of its mean: some 5 eps for 10,000 rows.
_ROUNDING = 16
FORMS = ("auto", "matrix", "gram")


def inverse(values: Tensor) -> Tensor:
    """Returns ``1 / values``, and 0 with a gradient of 0 where a value is 0 or below.

    NaN stays NaN.
    """
    # Written so that NaN stays NaN: a comparison with it is false.
    empty = values <= 0
    return values.masked_fill(empty, 1).reciprocal().masked_fill(empty, 0)


def inverse_scale(square: Tensor, floor: float) -> Tensor:
    r"""Returns :math:`1 / \sqrt{v_i + floor \cdot mean_j v_j}`, and 0 for 1 / 0.

    Args:
        square: Variances, or squared lengths, ``(C,)``.
        floor: Bounds what a column with little variance is multiplied by, and so its gradient.
    """
    square = square + floor * square.mean()
    empty = square <= 0
    return square.masked_fill(empty, 1).rsqrt().masked_fill(empty, 0)


def unit(values: Tensor, dim: int = 1) -> Tensor:
    """Scales vectors along ``dim`` to unit length; one shorter than 1e-12 becomes 0, gradient 0.

    ``torch.nn.functional.normalize`` gives the same values, but a gradient of 1e12 times what
    comes in where a vector is zero.
    """
    length = torch.linalg.vector_norm(values, dim=dim, keepdim=True)
    empty = length < _SHORTEST
    scaled: Tensor = values / length.masked_fill(empty, 1)
    return scaled.masked_fill(empty, 0)


def is_rounding(deviation: Tensor, level: Tensor) -> Tensor:
    """Tells where deviations from a mean are no more than the rounding of that mean.

    Args:
        deviation: Standard deviations, or lengths of centred columns, in the dtype of the data.
        level: The mean, or the length before centring, that was taken off.
    """
    return deviation <= _ROUNDING * torch.finfo(deviation.dtype).eps * level.abs()


def seen_empty(*masks: Tensor) -> bool:
    """Tells whether masks are seen to hold nowhere, which spares the passes that heed them.

    It looks on the CPU only: on an accelerator that would stall the stream.
    """
    if masks[0].device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not any(bool(mask.any()) for mask in masks)


def mean_of_rows(values: Tensor) -> Tensor:
    """Returns the mean of values of rows, and 0 where this process has no row at all.

    torch's mean of nothing is NaN, and so is its product with a gradient of 0.
    """
    return values.mean() if values.numel() else values.sum()


def labelled_mean(values: Tensor, labelled: Tensor, shards: Shards) -> Tensor:
    """Returns the mean of values of rows over those that have a label, 0 where none has.

    Args:
        values: One number a row; those of rows without a label do not count.
        labelled: Which rows have a label, a bool for each.
        shards: As in :func:`mean_of_sum`.
    """
    return mean_of_sum(torch.where(labelled, values, 0).sum(), labelled.count_nonzero(), shards)


def mean_of_sum(total: Tensor, count: Tensor, shards: Shards) -> Tensor:
    """Returns the mean of ``count`` values from their sum, 0 where there is none.

    Args:
        total: Sum of this process's values, a scalar.
        count: How many they are, a scalar.
        shards: The mean is over the values of all its processes. A mean of the ranks' means, which
            is what ``DistributedDataParallel`` makes of them otherwise, gives the few labels of one
            rank as much weight as the many of another.
    """
    if len(shards.sizes) > 1:
        total, count = shards.sum(torch.stack([total, count.to(total.dtype)])).unbind()
    return total / count.clamp_min(1)


def takes_gram(form: str, embedding: Tensor, crossover: int, rows: int | None = None) -> bool:
    """Tells whether one of ``FORMS`` means the Gram form for embeddings ``(B, d)``.

    Args:
        form: ``auto`` takes the cheaper one.
        embedding: Of the batch and the width in question.
        rows: B, where these are a part of the batch only.
        crossover: The ``d / B`` from which the Gram form was measured to be the cheaper one, on a
            CPU. It is above 1 because the Gram form computes in float64.
    """
    if form != "auto":
        return form == "gram"
    batch, width = embedding.shape
    # Apple's GPUs have no float64, which the Gram form needs.
    return width > crossover * (batch if rows is None else rows) and embedding.device.type != "mps"


def cross_product_energy(left: Tensor, right: Tensor) -> Tensor:
    """Returns ``||left^T right||_F^2 = <left left^T, right right^T>_F`` for ``(B, d)`` inputs.

    In float64 inputs the two Gram matrices are ``B x B`` and ``d x d`` is never built.
    """
    return (left @ left.T * (right @ right.T)).sum()


def parted(square: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a square matrix's diagonal, and the sum of squares off it."""
    diagonal, energy = _Parted.apply(square)
    return diagonal, energy


class _Parted(torch.autograd.Function):
    """Its gradient is one pass; autograd would fill a matrix for every view and add them up."""

    @staticmethod
    def forward(square: Tensor) -> tuple[Tensor, Tensor]:
        # Row by row: one norm of all in float32 would lose digits.
        rows = torch.linalg.vector_norm(off_diagonal(square), dim=1)
        return square.diagonal().clone(), rows.square().sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, diagonal: Tensor, energy: Tensor) -> Tensor:
        (square,) = ctx.saved_tensors
        gradient: Tensor = square * (2 * energy)
        gradient.diagonal().copy_(diagonal)
        return gradient


def off_diagonal(square: Tensor) -> Tensor:
    """Returns the off-diagonal elements of a square matrix as ``(d - 1, d)``, without a mask."""
    width = square.shape[0]
    return square.flatten()[1:].view(width - 1, width + 1)[:, :-1] if width > 1 else square[:0]
