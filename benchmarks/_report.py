"""What all benchmarks share: the machine's line, the clock and the table."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def machine() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    try:
        import faiss

        version = faiss.__version__
    except ImportError:
        version = "none"
    return (
        f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s); "
        f"Python {platform.python_version()}, torch {torch.__version__}, FAISS {version}"
    )


def set_threads(count: int) -> None:
    torch.set_num_threads(count)
    try:
        import faiss
    except ImportError:
        return
    faiss.omp_set_num_threads(count)


def best_time(function: Callable[[], object], repeat: int) -> float:
    """Returns the least of ``repeat`` times in seconds, after one call to warm up."""
    function()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"
