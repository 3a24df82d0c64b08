"""Gathers over the process group whose gradient is the single-process one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Returns the number of processes, 1 where no process group is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """All-gather along the batch; its backward sums what every rank asks of a shard.

    ``DistributedDataParallel`` divides the summed parameter gradients by the world size. Every rank
    computes the same loss of the same gathered batch, so the sum over ranks is the world size times
    the wanted gradient, and the two cancel. Returning the local slice alone, as hand-written
    gathers do, leaves gradients too small by the world size.
    """

    @staticmethod
    def forward(ctx: Any, shard: Tensor) -> Tensor:
        shards = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
        dist.all_gather(shards, shard)
        return torch.cat(shards)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # all_reduce, not reduce_scatter: gloo has no reduce_scatter.
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def gather_batch(shard: Tensor) -> Tensor:
    """Concatenates a tensor's shards from all ranks along the batch, with exact gradients.

    Under ``DistributedDataParallel``, a loss of the gathered batch gives the model the gradient of
    the single-process run on the whole batch. Every rank must hold the same number of samples, as
    ``DistributedSampler`` gives; comparing sizes at every step would stall the device.

    Args:
        shard: This rank's part, ``(b, ...)``.

    Returns:
        The whole batch in rank order, ``(world_size * b, ...)``; ``shard`` itself where there is
        one process.

    Example:
        >>> gather_batch(torch.ones(2, 3)).shape  # no process group: nothing to gather
        torch.Size([2, 3])
    """
    if world_size() == 1:
        return shard
    gathered: Tensor = _Gather.apply(shard.contiguous())
    return gathered
