"""Results as rows of a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crossmodal.methods import ALONE


@dataclass(frozen=True)
class Row:
    """One method over its seeds; accuracies in percent, gain in points over the lone student.

    ``failures`` holds the errors of the seeds that have no accuracy; the rest speaks of the others.
    """

    method: str
    accuracies: tuple[float, ...]
    gain: float | None
    failures: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies) if self.accuracies else math.nan

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds (n - 1); None for a single seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def accuracy(self) -> str:
        """``mean ± std``, or the mean of a single seed; failed seeds are told."""
        if not self.accuracies:
            return f"failed: {self.failure}"
        shown = f"{self.mean:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}")
        total = len(self.accuracies) + len(self.failures)
        return shown + (f" ({len(self.failures)} of {total} failed)" if self.failures else "")

    @property
    def failure(self) -> str:
        """What went wrong with the first seed that failed, without its numbers and the fix."""
        first = self.failures[0] if self.failures else ""
        return first.partition(": ")[2].partition(" (")[0] or first

    @property
    def gained(self) -> str:
        return "" if self.gain is None else f"{self.gain:+.2f}"


def rows(runs: Sequence[dict[str, Any]]) -> list[Row]:
    """One row a method, in the order of the runs; a run with ``failed`` has no accuracy."""
    found: dict[str, tuple[list[float], list[str]]] = {}
    for run in runs:
        accuracies, failures = found.setdefault(run["method"], ([], []))
        if "failed" in run:
            failures.append(run["failed"])
        else:
            accuracies.append(run["accuracy"])
    base, _ = found.get(ALONE, ([], []))
    made = []
    for method, (accuracies, failures) in found.items():
        compared = base and accuracies and method != ALONE
        gain = statistics.fmean(accuracies) - statistics.fmean(base) if compared else None
        made.append(Row(method, tuple(accuracies), gain, tuple(failures)))
    return made


def markdown(methods: Sequence[Row], *, title: str, more: Sequence[tuple[str, float]] = ()) -> str:
    """The result in Markdown; ``more`` are rows of one number below, the teacher's."""
    lines = [(r.method, r.accuracy, r.gained, str(len(r.accuracies))) for r in methods]
    lines += [(f"*{name}*", f"*{accuracy:.2f}*", "", "1") for name, accuracy in more]
    return table(title, ("method", "accuracy %", "gain", "seeds"), lines)


def table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, all but its first column to the right; empty cells where a row has less."""
    made = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    full = ([*line, *[""] * (len(head) - len(line))] for line in made)
    shown = (f"| {' | '.join(line)} |".replace("|  |", "| |") for line in full)
    return "\n".join([f"{title}:", "", *shown, ""])
