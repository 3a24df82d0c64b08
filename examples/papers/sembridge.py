"""SemBridge's own claims: its table, its Fig. 1(b) and 2, and the matches to look at."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import unpaired
from methods import ALONE
from papers import figures, published, series
from papers.grid import split
from papers.reports import finish, teacher_of, title_of
from recipe import parsed
from store import Run, write_atomically
from table import result_table

PUBLISHED, RANDOM = "SemBridge as published", "random in class"
_COSTS = {  # of transport.csv, by their names in a trace
    "transport": "Wasserstein, logits", "matched": "matched, logits",
    "transport_features": "Wasserstein, features", "matched_features": "matched, features",
}  # fmt: skip


@dataclass(frozen=True)
class Plugin:
    """SemBridge's Fig. 1(b): each method at random in the class, and within SemBridge."""

    # kd is the published one, T = 4 at weight 1; the others have their weights of methods.yaml. All
    # are times the second of --weights.
    criteria: tuple[str, ...] = ("kd", "dkd", "rkd", "lskd", "ctkd", "logits", "vpr")


def sembridge(arguments: Sequence[str], command: str) -> int:
    rows = [name for name, row in unpaired.ROWS.items() if not row.made]
    options = _options(arguments, "sembridge", rows)
    session = unpaired.Session(options, command)

    def body(found: Sequence[Run]) -> str:
        told = "cost of transport from the teacher's {} to the student's"
        for kind, suffix in (("logits", ""), ("features", "-features")):
            title = f"{options.recipe}: {told.format(kind)}"
            path = session.out / f"transport{suffix}.png"
            figures.draw_transport(found, path, title=title, suffix=suffix.replace("-", "_"))
        traces = [run for run in found if "trace" in run]
        _write_costs(traces, session.out / "transport.csv")
        text = result_table(found, title=title_of(session), more=teacher_of(session))
        printed = published.SEMBRIDGE.get(options.recipe, {})
        theirs = ", ".join(f"{row} {value:.1f}" for row, value in printed.items())
        notes = [f"The paper, ResNet-34 to ResNet-34, its own split: {theirs}." if theirs else ""]
        if session.quality:
            notes.append(f"The {session.described}.")
        if traces:
            _draw_matches(session, traces)
        if traces and not any(run["trace"]["transport_features"] for run in traces):
            notes.append(
                "The teacher's features and the student's have different widths, so that there is "
                "no distance between them; networks of one width have a transport-features.png."
            )
        notes.append(rematching_time(found))
        return text + "".join(f"\n{note}\n" for note in notes if note)

    return finish(session, "sembridge", body)


def plugin(arguments: Sequence[str], command: str) -> int:
    own, others = split(Plugin, arguments, "papers plugin RECIPE")
    if not own.criteria or any(text.partition("=")[0] == "--criterion" for text in others):
        raise ValueError("--criterion: plugin takes one or more in turn; fix: --criteria kd dkd")
    options = _options(others, "plugin", (ALONE, RANDOM, PUBLISHED))
    named = {name: (unpaired.Options.criterion if name == "kd" else (name,))
             for name in own.criteria}  # fmt: skip
    values = {name: [replace(options, criterion=spec)] for name, spec in named.items()}
    return series.run("criterion", values, command, "criterion over the matches")


def _options(arguments: Sequence[str], name: str, rows: Sequence[str]) -> unpaired.Options:
    """The options, in the folder that both commands share, and these rows where none are named."""
    options = parsed(arguments, unpaired.Options, program=f"papers {name}")
    if options.rows == unpaired.Options.rows:
        kept = (n for n in rows if not (options.apart and unpaired.ROWS[n].first == "itself"))
        options = replace(options, rows=tuple(kept))
    return replace(options, out=options.out or Path("runs") / options.recipe)


def _write_costs(runs: Sequence[Run], path: Path) -> None:
    """A line an epoch of every student; empty where a cost has no number."""

    def write(file: Path) -> None:
        with file.open("w", newline="") as opened:
            lines = csv.writer(opened)
            lines.writerow(["row", "seed", "epochs done", *_COSTS.values()])
            for run in runs:
                costs = [run["trace"][name] for name in _COSTS]
                for epoch in range(max(map(len, costs))):
                    cells = [cost[epoch] if cost else "" for cost in costs]
                    lines.writerow([run["method"], run["seed"], epoch, *cells])

    write_atomically(path, write)


def _draw_matches(session: unpaired.Session, runs: Sequence[Mapping[str, Any]]) -> None:
    """One student: of the published row, else of one that chooses again, else of any."""
    views = session.views
    run = max(runs, key=lambda run: (run["method"] == PUBLISHED, len(run["trace"]["given"])))
    lines = {"student's": views.poor.chosen(torch.tensor(run["trace"]["students"]))}
    for epoch, ids in run["trace"]["given"].items():
        told = f"chosen after\nepoch {epoch}" if int(epoch) else "given at first"
        lines[told] = views.rich.chosen(torch.tensor(ids))
    title = (
        f"{session.options.recipe}, {run['method']}, seed {run['seed']}: the student's images, and "
        "the teacher images that they were given"
    )
    figures.draw_matches(lines, session.options.rgb, session.out / "matches.png", title=title)


def rematching_time(runs: Sequence[Run]) -> str:
    """The seconds of a re-matching, as a share of an epoch and of the whole training."""
    lines = []
    for planned in (False, True):
        found = [
            run
            for run in runs
            if run.get("trace", {}).get("rematching")
            and run["config"]["loss"]["row"]["planned"] == planned
        ]
        if not found:
            continue
        traces = [run["trace"] for run in found]
        seconds = statistics.fmean(s for trace in traces for s in trace["rematching"].values())
        spent = [sum(run["trace"]["rematching"].values()) for run in found]
        whole = statistics.fmean(s / run["seconds"] for s, run in zip(spent, found, strict=True))
        epoch = statistics.fmean(  # without its re-matching, which is in the seconds
            (run["seconds"] - s) / (len(run["trace"]["transport"]) - 1)
            for s, run in zip(spent, found, strict=True)
        )
        in_use = statistics.fmean([*trace["in_use"].values()][-1] for trace in traces)
        lines.append(
            f"{'Planned re-matching' if planned else 'Re-matching'}: {1000 * seconds:.0f} ms, "
            f"{100 * seconds / epoch:.1f} % of an epoch of {epoch:.2f} s; {100 * whole:.1f} % of "
            f"the whole training. Different teacher images chosen at the last one: {in_use:.0f}."
        )
    return " ".join(lines)
