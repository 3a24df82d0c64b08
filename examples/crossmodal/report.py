"""Results as tables: on the terminal and in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

BASELINE = "alone"


@dataclass(frozen=True)
class Row:
    """One method over its seeds; accuracies in percent, gain in points over the lone student."""

    method: str
    accuracies: tuple[float, ...]
    gain: float | None

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds (n - 1); None for a single seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def accuracy(self) -> str:
        """``mean ± std``, or the mean of a single seed."""
        return f"{self.mean:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}")

    @property
    def gained(self) -> str:
        """The gain with its sign; empty for the lone student and where that was not run."""
        return "" if self.gain is None else f"{self.gain:+.2f}"


@dataclass(frozen=True)
class Teacher:
    """The teacher's accuracy in percent on the clean and on the poor images."""

    model: str
    clean: float
    poor: float


def rows(runs: Sequence[dict[str, Any]]) -> list[Row]:
    """One row a method, in the order of the runs."""
    by_method: dict[str, list[float]] = {}
    for run in runs:
        by_method.setdefault(run["method"], []).append(run["accuracy"])
    base = statistics.fmean(by_method[BASELINE]) if BASELINE in by_method else None
    return [
        Row(
            method,
            tuple(accuracies),
            None if base is None or method == BASELINE else statistics.fmean(accuracies) - base,
        )
        for method, accuracies in by_method.items()
    ]


def table(methods: Sequence[Row], teacher: Teacher | None, *, title: str) -> Table:
    """The result as a rich table; the best mean is bold."""
    result = Table(title=title, title_justify="left", show_footer=False)
    result.add_column("method")
    result.add_column("accuracy %", justify="right")
    result.add_column("gain", justify="right")
    result.add_column("seeds", justify="right")
    best = max(row.mean for row in methods)
    for row in methods:
        style = "bold" if row.mean == best and len(methods) > 1 else ""
        result.add_row(row.method, row.accuracy, row.gained, str(len(row.accuracies)), style=style)
    if teacher is not None:
        result.add_section()
        for modality, accuracy in (("clean", teacher.clean), ("poor", teacher.poor)):
            name = f"teacher {teacher.model}, {modality} images"
            result.add_row(name, f"{accuracy:.2f}", "", "1", style="dim")
    return result


def markdown(methods: Sequence[Row], teacher: Teacher | None, *, title: str, command: str) -> str:
    """The same table in Markdown, with the command that made it."""
    lines = [
        f"{title}:",
        "",
        "| method | accuracy % | gain | seeds |",
        "|---|---:|---:|---:|",
        *(f"| {r.method} | {r.accuracy} | {r.gained} | {len(r.accuracies)} |" for r in methods),
    ]
    if teacher is not None:
        lines += [
            f"| *teacher {teacher.model}, clean images* | *{teacher.clean:.2f}* | | 1 |",
            f"| *teacher {teacher.model}, poor images* | *{teacher.poor:.2f}* | | 1 |",
        ]
    return "\n".join([*lines, "", f"Made by `{command}`.", ""])
