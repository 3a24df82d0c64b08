"""What training shows: running means of the loss terms, and a bar."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from torch import Tensor


class RunningMeans:
    """Means of named scalars, kept on their device until read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    @torch.no_grad()
    def add(self, values: dict[str, Tensor]) -> None:
        """Take in one step's scalars."""
        for name, value in values.items():
            value = value.float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def read(self) -> dict[str, float]:
        """The means so far; waits for the device once."""
        sums = torch.stack(list(self._sums.values())).tolist()
        return {name: total / self._count for name, total in zip(self._sums, sums, strict=True)}


def shown(means: dict[str, float]) -> str:
    """Names and values on one line."""
    return "  ".join(f"{name} {value:.3g}" for name, value in means.items())


def progress_bar(console: Console | None) -> Progress:
    """A bar with room for ``terms``; none without a console, or where output is piped."""
    # The terms wrap where the terminal is narrow; nothing gives way to them.
    return Progress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=10)),
        BarColumn(bar_width=10, table_column=Column(no_wrap=True, min_width=10)),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True, min_width=5)),
        TextColumn("{task.fields[terms]}", table_column=Column(no_wrap=False)),
        console=console,
        transient=True,
        # Piped output would get an empty line for every bar.
        disable=console is None or not console.is_terminal,
    )
