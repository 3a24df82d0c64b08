"""What matches without pairs cost: the time of choosing again, and the way that is left."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crossmodal.methods.variants import VARIANTS
from crossmodal.tables import figures

Run = dict[str, Any]


def rematching_time(runs: Sequence[Run]) -> str:
    """The seconds of a re-matching, as a share of an epoch and of the whole training."""
    matched = [run for run in runs if run.get("trace", {}).get("rematching")]
    lines = []
    for planned in (False, True):
        found = [run for run in matched if (run["config"]["planner"] is not None) == planned]
        if not found:
            continue
        seconds, search = (
            statistics.fmean(value for run in found for value in run["trace"][kind].values())
            for kind in ("rematching", "searching")
        )
        spent = [sum(run["trace"]["rematching"].values()) / run["seconds"] for run in found]
        whole = statistics.fmean(spent)
        # An epoch without its re-matching, which is in the seconds.
        epoch = statistics.fmean(
            run["seconds"] * (1 - share) / (len(run["trace"]["transport"]) - 1)
            for run, share in zip(found, spent, strict=True)
        )
        name = "Planned re-matching" if planned else "Re-matching"
        parts = f"{1000 * search:.0f} ms the search, else the student's pass over its images"
        if {run["config"]["rematching"]["by"] for run in found} == {"epoch"}:
            parts = "by what the student predicted in training"
        in_use = statistics.fmean([*run["trace"]["in_use"].values()][-1] for run in found)
        lines.append(
            f"{name}: {1000 * seconds:.0f} ms ({parts}), {100 * seconds / epoch:.1f} % of an epoch "
            f"of {epoch:.2f} s; {100 * whole:.1f} % of the whole training. "
            f"Different teacher images chosen at the last one: {in_use:.0f}."
        )
    return " ".join(lines)


def draw_transport(runs: Sequence[Run], path: Path, *, title: str) -> None:
    """The paper's Fig. 2: what it costs to carry the teacher's features to the student's.

    Features are logits, each row centred: each network's own classifier takes its embedding to the
    one space that both share, so nothing is fitted and widths need not agree. The reference, which
    the setting does not have, is black.
    """
    names = {"transport": "Wasserstein distance", "matched": "distance of the matched pairs"}
    panels: dict[str, dict[str, list[tuple[Sequence[float], Sequence[float]]]]] = {}
    for kind, label in names.items():
        series = panels.setdefault(label, {})
        for run in runs:
            if costs := run.get("trace", {}).get(kind):
                series.setdefault(run["method"], []).append((range(len(costs)), costs))
    figures.draw_lines(
        panels, path, title=title, across="epochs done", sharey=True, yscale="log",
        black=VARIANTS["paired"].title.removeprefix("{}"),
    )  # fmt: skip
