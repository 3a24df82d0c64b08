"""What matches without pairs cost: the time of choosing again, and the way that is left."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from crossmodal.methods.variants import VARIANTS
from crossmodal.tables import figures

Run = dict[str, Any]


def rematching_time(runs: Sequence[Run]) -> str:
    """The seconds of a re-matching, as a share of an epoch and of the whole training."""
    matched = [run for run in runs if run.get("trace", {}).get("rematching")]
    if not matched:
        return ""
    lines = []
    for planned in (False, True):
        found = [run for run in matched if (run["config"]["planner"] is not None) == planned]
        if not found:
            continue
        seconds, search = (
            statistics.fmean(value for run in found for value in run["trace"][kind].values())
            for kind in ("rematching", "searching")
        )
        # An epoch without its re-matching, which is in the seconds.
        epochs = [
            (run["seconds"] - sum(run["trace"]["rematching"].values()))
            / (len(run["trace"]["transport"]) - 1)
            for run in found
        ]
        epoch = statistics.fmean(epochs)
        whole = statistics.fmean(
            sum(run["trace"]["rematching"].values()) / run["seconds"] for run in found
        )
        name = "Planned re-matching" if planned else "Re-matching"
        if {run["config"]["rematching"]["by"] for run in found} == {"epoch"}:
            parts = "by what the student predicted in training"
        else:
            parts = f"{1000 * search:.0f} ms the search, else the student's pass over its images"
        in_use = statistics.fmean([*run["trace"]["in_use"].values()][-1] for run in found)
        lines.append(
            f"{name}: {1000 * seconds:.0f} ms ({parts}), {100 * seconds / epoch:.1f} % of an epoch "
            f"of {epoch:.2f} s; {100 * whole:.1f} % of the whole training. "
            f"Different teacher images chosen at the last one: {in_use:.0f}."
        )
    return " ".join(lines)


def costs(runs: Sequence[Run]) -> Mapping[str, Mapping[str, np.ndarray]]:
    """By method, ``transport`` and ``matched``, each (seeds, epochs + 1)."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for run in runs:
        if run.get("trace", {}).get("transport"):
            kinds = found.setdefault(run["method"], {"transport": [], "matched": []})
            for kind, values in kinds.items():
                values.append(run["trace"][kind])
    return {
        method: {kind: np.asarray(values) for kind, values in kinds.items()}
        for method, kinds in found.items()
    }


def draw_transport(
    methods: Mapping[str, Mapping[str, np.ndarray]], path: Path, *, title: str
) -> None:
    """The paper's Fig. 2: what it costs to carry the teacher's features to the student's.

    Features are logits, each row centred: each network's own classifier takes its embedding to the
    one space that both share, so nothing is fitted and widths need not agree. Left, the Wasserstein
    distance of the two sets; right, the root mean square distance of the pairs in use. Means over
    the seeds, with their range.
    """
    if not methods:
        return
    names = {"transport": "Wasserstein distance", "matched": "distance of the matched pairs"}
    with figures.drawing(path, (8.2, 3.8)) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (kind, label) in zip(panels, names.items(), strict=True):
            for number, (method, kinds) in enumerate(methods.items()):
                values = kinds[kind]
                epochs = np.arange(values.shape[1])
                # Black for what the setting does not have.
                paired = method.endswith(VARIANTS["paired"].title.removeprefix("{}"))
                colour = "black" if paired else figures.PALETTE[number % len(figures.PALETTE)]
                axes.plot(epochs, values.mean(0), color=colour, label=method, linewidth=1.3)
                axes.fill_between(
                    epochs, values.min(0), values.max(0), color=colour, alpha=0.08, linewidth=0
                )
            axes.set_title(label)
            axes.set_xlabel("epochs done")
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        panels[0].set_ylabel("between logits")
        figure.suptitle(title)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
