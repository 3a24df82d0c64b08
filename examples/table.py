"""Results as rows of a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from methods import ALONE
from store import Run


@dataclass(frozen=True)
class Row:
    """One method over its seeds; accuracies in percent, gain in points over the lone student."""

    method: str
    accuracies: tuple[float, ...]
    gain: float | None
    failures: tuple[str, ...] = ()  # the errors of the seeds that have no accuracy

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies) if self.accuracies else math.nan

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds (n - 1); None for a single seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def accuracy(self) -> str:
        """``mean ± std``, with a remark if seeds failed or all have the same number."""
        if not self.accuracies:
            return f"failed: {self.failures[0]}"
        text = f"{self.mean:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}")
        if self.std == 0 and self.mean < 100:
            text += " (the same for every seed: lost?)"
        total = len(self.accuracies) + len(self.failures)
        return text + (f" ({len(self.failures)} of {total} failed)" if self.failures else "")

    @property
    def gained(self) -> str:
        return "" if self.gain is None else f"{self.gain:+.2f}"


def rows(runs: Sequence[Run], measure: str = "accuracy") -> list[Row]:
    """One row a method, in the order of the runs."""
    found: dict[str, tuple[list[float], list[str]]] = {}
    for run in runs:
        accuracies, failures = found.setdefault(run["method"], ([], []))
        failures.append(run["failed"]) if "failed" in run else accuracies.append(run[measure])
    base = found.get(ALONE, ([], []))[0]
    made = []
    for name, (own, failures) in found.items():
        compared = base and own and name != ALONE
        gain = statistics.fmean(own) - statistics.fmean(base) if compared else None
        made.append(Row(name, tuple(own), gain, tuple(failures)))
    return made


def table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, all but its first column to the right."""
    made = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    full = ([*line, *[""] * (len(head) - len(line))] for line in made)
    return "\n".join([f"{title}:", "", *(f"| {' | '.join(line)} |" for line in full), ""])


def result_table(
    runs: Sequence[Run], *, title: str, more: Mapping[str, float], measure: str = "accuracy"
) -> str:
    """The result in Markdown; ``more`` are rows of one number below, the teacher's."""
    lines = [[r.method, r.accuracy, r.gained, str(len(r.accuracies))] for r in rows(runs, measure)]
    lines += [[f"*{name}*", f"*{value:.2f}*", "", "1"] for name, value in more.items()]
    return table(title, ("method", f"{measure} %", "gain", "seeds"), lines)
