"""What the processes of one training, and those of one folder, agree on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import Timeout

from crossmodal.runs.store import lock

HELPER = "CROSSMODAL_HELPER"  # set for the processes that --jobs starts, to the job's command


def agreed(value: Any) -> Any:
    """The first process's value, in all of them."""
    (found,) = broadcast_object_list([value])
    return found


@contextmanager
def held(folder: Path, name: str, *, waiting: Callable[[], object] | None = None) -> Iterator[bool]:
    """Hold a lock for all processes of this training; tells whether it is held.

    Where somebody else has it, ``waiting`` is called and it is waited for; without, it is not held.
    """
    ours, mine = lock(folder, name), True
    if PartialState().is_main_process:
        try:
            ours.acquire(timeout=0)
        except Timeout:
            mine = waiting is not None
            if waiting is not None:
                waiting()
                ours.acquire()
    try:
        yield agreed(mine)
    finally:
        ours.release()


def concerns(command: str) -> bool:
    """Whether this process works on a job: a helper only on the one that it was started for."""
    return os.environ.get(HELPER, command) == command


def helpers(count: int, command: str) -> list[subprocess.Popen[bytes]]:
    """So many more processes of this very script; each takes the job's next free student."""
    if count < 1:
        return []
    devices = torch.cuda.device_count() if PartialState().device.type == "cuda" else 0
    threads = max((os.cpu_count() or 1) // (count + 1), 1)
    torch.set_num_threads(threads)
    found = []
    for number in range(1, count + 1):
        environment = {**os.environ, HELPER: command, "OMP_NUM_THREADS": str(threads)}
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = str(number % devices)
        found.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
    return found
