"""Rows scaled to unit length, and means over rows that may be few or none."""

from __future__ import annotations

import torch
from torch import Tensor

from structkd.distributed import sum_over_ranks

# What is shorter has no direction that could be told from rounding.
_SHORTEST = 1e-12


def unit(values: Tensor, dim: int = 1) -> Tensor:
    """Scales vectors along ``dim`` to unit length; one shorter than 1e-12 becomes 0, gradient 0.

    ``torch.nn.functional.normalize`` gives the same values, but a gradient of 1e12 times what
    comes in where a vector is zero.
    """
    length = torch.linalg.vector_norm(values, dim=dim, keepdim=True)
    # Written so that NaN stays NaN: a comparison with it is false.
    empty = length < _SHORTEST
    return torch.where(empty, 0, values / torch.where(empty, 1, length))


def mean_of_rows(values: Tensor) -> Tensor:
    """Returns the mean of ``(B,)`` values, and 0 where this process has no row at all.

    torch's mean of nothing is NaN, and so is its product with a gradient of 0.
    """
    return values.mean() if len(values) else values.sum()


def labelled_mean(values: Tensor, labelled: Tensor, *, gather: bool) -> Tensor:
    """Returns the mean of ``(B,)`` values over rows that have a label, 0 where none has.

    Args:
        values: One number a row; those of rows without a label do not count.
        labelled: Which rows have a label, ``(B,)`` bool.
        gather: Take the mean over the labelled rows of all processes. A mean of the ranks' means,
            which is what ``DistributedDataParallel`` makes of them otherwise, gives the few labels
            of one rank as much weight as the many of another.
    """
    kept = torch.where(labelled, values, 0).sum()
    return mean_of_sums(kept, labelled.sum(), gather=gather)


def mean_of_sums(total: Tensor, count: Tensor, *, gather: bool) -> Tensor:
    """Returns a sum divided by how many it is of, both of all processes under ``gather``."""
    both = torch.stack([total, count.to(total.dtype)])
    total, count = (sum_over_ranks(both) if gather else both).unbind()
    return total / count.clamp_min(1)
