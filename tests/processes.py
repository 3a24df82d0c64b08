"""A group of gloo processes for tests."""

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


def start(worker: Callable[..., None], folder: Path, world: int, *args: object) -> None:
    """Runs ``worker(rank, *args)`` in every process of a new group."""
    rendezvous = f"file://{folder / 'rendezvous'}"
    mp.get_context("forkserver").set_forkserver_preload(PRELOADED)
    mp.start_processes(
        _process, (world, worker, rendezvous, args), nprocs=world, start_method="forkserver"
    )


def _process(
    rank: int, world: int, worker: Callable[..., None], rendezvous: str, args: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
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
