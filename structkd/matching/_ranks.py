"""Work that the processes of a group share: what they gather, and how they fail together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from structkd.distributed import world_size
from structkd.matching._store import by_class

ResultT = TypeVar("ResultT")


def rank() -> int:
    """Returns this process's place in the group, 0 where there is none."""
    return dist.get_rank() if world_size() > 1 else 0


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenates the rows of all ranks in rank order; a rank may have any number, none too.

    Every rank must call it, with one dtype and one width. The result is on the CPU.
    """
    if world_size() == 1:
        return rows.cpu()
    # NCCL gathers on the GPU alone.
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    rows = rows.to(device)
    count = torch.tensor([len(rows)], device=device)
    counts = [torch.empty_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    most = max(int(number) for number in counts)
    if not most:
        return rows.cpu()
    # Collectives want one shape: shorter shares are padded, and cut again.
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    shares = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(shares, padded)
    return torch.cat(
        [share[: int(number)] for share, number in zip(shares, counts, strict=True)]
    ).cpu()


def together(work: Callable[[], ResultT]) -> ResultT:
    """Runs a rank's part; where one rank's fails, all ranks raise, so that none waits for ever.

    Raises:
        RuntimeError: Where another rank failed; that rank raises its own error.
    """
    error: Exception | None = None
    try:
        result = work()
    except Exception as raised:
        error = raised
    failed = gather_rows(torch.tensor([error is not None])).nonzero()[:, 0].tolist()
    if error is not None:
        raise error
    if failed:
        raise RuntimeError(f"matching failed on rank(s) {failed}, whose own error says why")
    return result


def share_of_classes(labels: Tensor) -> Tensor:
    """Returns the positions of this rank's whole classes, in order.

    Every rank holds the same ``labels (N,)``. The largest class goes first, each to the rank that
    has the fewest members so far.
    """
    loads = [0] * world_size()
    own = [torch.empty(0, dtype=torch.int64)]
    for _, members in sorted(by_class(labels), key=lambda part: (-len(part[1]), part[0])):
        least = loads.index(min(loads))
        loads[least] += len(members)
        if least == rank():
            own.append(members)
    return torch.cat(own).sort().values
