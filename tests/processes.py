"""A group of processes for tests: nccl where each has a card of its own, gloo otherwise."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What a server imports once, so that no process of any group has to. A server runs no threads:
# what it forks is as fresh as what is spawned.
PRELOADED = ["structkd", "torch._dynamo", "timm", "pytest"]


def start(
    worker: Callable[..., None], folder: Path, world: int, *args: object, device: str = "cpu"
) -> None:
    """Runs ``worker(rank, *args)`` in every process of a new group.

    Tensors of all of them lie on ``device``; processes on CUDA share the cards in turns.
    """
    rendezvous = f"file://{folder / 'rendezvous'}"
    mp.get_context("forkserver").set_forkserver_preload(PRELOADED)
    mp.start_processes(
        _process, (world, worker, rendezvous, device, args), nprocs=world, start_method="forkserver"
    )


def _process(
    rank: int,
    world: int,
    worker: Callable[..., None],
    rendezvous: str,
    device: str,
    args: tuple[object, ...],
) -> None:
    torch.set_num_threads(1)
    cards = torch.cuda.device_count() if device == "cuda" else 0
    if cards:
        torch.cuda.set_device(rank % cards)
    dist.init_process_group(
        "nccl" if cards >= world else "gloo",
        init_method=rendezvous,
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=120),
    )
    worker(rank, *args)
    dist.barrier()
    dist.destroy_process_group()
    # Gloo's threads may outlive Python's shutdown, which then aborts a process whose work is done.
    os._exit(0)
