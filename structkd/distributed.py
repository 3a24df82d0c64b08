"""Several processes: gathers with exact gradients, and what a loop without DDP needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from structkd._devices import sent


def world_size() -> int:
    """Returns the number of processes, 1 where no process group is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns this process's rank, 0 where no process group is initialised."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    """All-gather along the batch; its backward sums the gradients of all ranks for a shard.

    ``DistributedDataParallel`` divides the summed parameter gradients by the world size. Every rank
    computes the same loss of the same gathered batch, so the sum over ranks is the world size times
    the wanted gradient, and the two cancel. Returning the local slice alone, as hand-written
    gathers do, leaves gradients too small by the world size.
    """

    @staticmethod
    def forward(ctx: Any, shard: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        # A collective moves equal shapes: shorter shards are filled up and cut again.
        longest = max(sizes)
        padding = (0, 0) * (shard.dim() - 1) + (0, longest - shard.shape[0])
        padded = F.pad(shard, padding) if shard.shape[0] < longest else shard.contiguous()
        shards = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(shards, padded)
        return torch.cat([part[:size] for part, size in zip(shards, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # all_reduce, not reduce_scatter: gloo has no reduce_scatter.
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return torch.split(total, ctx.sizes)[dist.get_rank()], None


class _Sum(torch.autograd.Function):
    """All-reduce by summing, whose backward sums too, as :class:`_Gather` does."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


@dataclass(frozen=True)
class Shards:
    """How many rows of a batch every process holds, and how to gather and sum over all of them.

    Criteria that need the whole batch get one. With a single process ``gather`` and ``sum`` return
    their argument.

    Attributes:
        sizes: The number of rows of every rank, in rank order.
        rank: This process's place among them.

    Example:
        >>> alone = Shards.alone(4)
        >>> alone.total, alone.sum(torch.ones(2))
        (4, tensor([1., 1.]))
    """

    sizes: tuple[int, ...]
    rank: int = 0

    @classmethod
    def alone(cls, count: int) -> Shards:
        """Returns the shards of a process that exchanges nothing."""
        return cls((count,))

    @classmethod
    def ask(cls, count: int, device: torch.device) -> Shards:
        """Asks all ranks how many rows they hold; all of them must call it.

        On the CPU the ranks may hold different numbers. On an accelerator reading the numbers would
        stall the stream at every step. There they must agree, and the device's own assertion fails
        if they do not.

        Args:
            count: This rank's number of rows.
            device: Where the rows are.
        """
        world = world_size()
        if world == 1:
            return cls.alone(count)
        together = _all_counts(count, device)
        if device.type == "cpu":
            return cls(tuple(together.tolist()), rank())
        torch._assert_async(
            (together == count).all(),
            "the ranks hold different numbers of samples, which gather=True cannot take on an "
            "accelerator: use DistributedSampler(drop_last=True) and drop_last=True in the "
            "DataLoader",
        )
        return cls((count,) * world, rank())

    @classmethod
    def read(cls, count: int, device: torch.device) -> Shards:
        """Asks all ranks as :meth:`ask` does, and waits for numbers that may differ."""
        if world_size() == 1:
            return cls.alone(count)
        return cls(tuple(_all_counts(count, device).tolist()), rank())

    @property
    def total(self) -> int:
        """The rows of all processes."""
        return sum(self.sizes)

    @property
    def own(self) -> int:
        """The rows of this process."""
        return self.sizes[self.rank]

    @property
    def before(self) -> int:
        """The rows of the ranks before this one."""
        return sum(self.sizes[: self.rank])

    def gather(self, shard: Tensor) -> Tensor:
        """Returns the rows of all processes, with exact gradients; see :func:`gather_batch`."""
        return gather_batch(shard, self.sizes) if len(self.sizes) > 1 else shard

    def sum(self, value: Tensor) -> Tensor:
        """Returns a tensor's sum over the processes; see :func:`sum_over_ranks`."""
        return sum_over_ranks(value) if len(self.sizes) > 1 else value


def _all_counts(count: int, device: torch.device) -> Tensor:
    """Returns the counts of all ranks, ``(world,)``."""
    own = sent(torch.tensor([count]), device)
    found = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(found, own)
    return torch.cat(found)


def gather_batch(shard: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """Concatenates a tensor's shards from all ranks along the batch, with exact gradients.

    Under ``DistributedDataParallel``, a loss of the gathered batch gives the model the gradient of
    the single-process run on the whole batch. On the CPU the ranks may hold different numbers of
    samples; on an accelerator they must agree, see :meth:`Shards.ask`.

    Args:
        shard: This rank's part, ``(b, ...)``.
        sizes: The rows of every rank, where they are known: it spares asking.

    Returns:
        The whole batch in rank order; ``shard`` itself where there is one process.

    Example:
        >>> gather_batch(torch.ones(2, 3)).shape  # no process group: nothing to gather
        torch.Size([2, 3])
    """
    if world_size() == 1:
        return shard
    if sizes is None:
        sizes = Shards.ask(shard.shape[0], shard.device).sizes
    gathered: Tensor = _Gather.apply(shard, list(sizes))
    return gathered


def sum_over_ranks(value: Tensor) -> Tensor:
    """Returns the sum of a tensor over all ranks, with the gradient of the single-process run.

    As with :func:`gather_batch`, ``DistributedDataParallel``'s mean over the ranks is taken into
    account: every rank goes on to compute the same loss from the sum.

    Args:
        value: Of one shape on all ranks.

    Example:
        >>> sum_over_ranks(torch.ones(2))
        tensor([1., 1.])
    """
    if world_size() == 1:
        return value
    total: Tensor = _Sum.apply(value)
    return total


@torch.no_grad()
def broadcast_state(module: nn.Module) -> None:
    """Gives every rank the parameters and buffers that rank 0 has.

    For a training loop without ``DistributedDataParallel``: call it once, before the optimizer is
    made, on everything that trains (a :class:`structkd.Distiller`, or student and criterion). Where
    there is one process it does nothing.

    Args:
        module: A module of the same structure on all ranks.

    Raises:
        RuntimeError: If a parameter has no shape yet.

    Example:
        >>> broadcast_state(nn.Linear(2, 2))
    """
    if world_size() == 1:
        return
    if any(is_lazy(tensor) for tensor in [*module.parameters(), *module.buffers()]):
        raise RuntimeError(
            f"{type(module).__name__} has parameters without a shape yet, to which every process "
            "would give other values: make the Distiller with example=x, or call it once under "
            "torch.no_grad() before"
        )
    for tensor in [*module.parameters(), *module.buffers()]:
        value = tensor.detach().contiguous()
        dist.broadcast(value, 0)
        tensor.copy_(value)


@torch.no_grad()
def average_gradients(parameters: nn.Module | Iterable[nn.Parameter]) -> None:
    """Averages gradients over the ranks, as ``DistributedDataParallel`` does.

    For a training loop without it: call it between ``backward()`` and ``optimizer.step()``, on all
    ranks. A parameter without a gradient here counts as zero where another rank has one. Where
    there is one process it does nothing.

    Args:
        parameters: What trains, or a module whose parameters do, in the same order on all ranks.

    Example:
        >>> average_gradients(nn.Linear(2, 2))
    """
    if world_size() == 1:
        return
    if isinstance(parameters, nn.Module):
        parameters = parameters.parameters()
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        return
    # One message for all that share a dtype and a device, not one a parameter.
    groups: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in trained:
        groups.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for (dtype, device), members in groups.items():
        given = torch.tensor([p.grad is not None for p in members], dtype=dtype, device=device)
        flat = torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in members]
            + [given]
        )
        dist.all_reduce(flat)
        *means, anywhere = torch.split(flat, [*(p.numel() for p in members), len(members)])
        for parameter, mean, has in zip(members, means, anywhere.tolist(), strict=True):
            # A parameter without a gradient on any rank keeps none, so an optimizer skips it.
            if has:
                parameter.grad = (mean / world_size()).view_as(parameter)
