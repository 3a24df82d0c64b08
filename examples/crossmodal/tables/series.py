"""A job a value of one option: a table with a column a value, and accuracy over the values."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from crossmodal.cli import Parser, parse, place
from crossmodal.data import open_views
from crossmodal.methods import ALONE
from crossmodal.runs.job import Job
from crossmodal.runs.processes import HELPER, concerns
from crossmodal.runs.session import Session
from crossmodal.runs.store import RESULTS, write_atomically
from crossmodal.tables import report
from crossmodal.tables.figures import LONE, drawing, palette
from crossmodal.tables.write import write

Found = Mapping[str, Sequence[report.Row]]  # rows by value


@dataclass(frozen=True)
class Axis:
    """The option that differs from job to job."""

    script: str  # for the record: labels
    name: str  # of files and of the first column
    values: Mapping[str, Sequence[str]]  # options of train.py by what a value is called
    label: str  # of the figure's axis
    logarithmic: bool = False
    # The value whose lone student is drawn as a dotted line; its place is the number of images.
    whole: str = ""

    def places(self, images: int) -> dict[str, float]:
        """Where the values stand: at their numbers, or side by side where some are none."""
        try:
            places = [
                float(images if value == self.whole else value.rpartition(":")[2])
                for value in self.values
            ]
        except ValueError:
            places = []
        if len(set(places)) < len(self.values):
            places = [float(place) for place in range(len(self.values))]
        return dict(zip(self.values, places, strict=True))


def own_options(script: str) -> argparse.ArgumentParser:
    """A parser of a script's own options, with ``--out``; the others are for ``train.py``'s."""
    parser = Parser(prog=script, allow_abbrev=False, add_help=False)
    parser.add_argument("--out", type=place)
    return parser


def run(axis: Axis, others: Sequence[str], out: Path | None, command: Sequence[str]) -> int:
    """Run the jobs, each in a folder of its own; 1 where a method failed.

    A job takes over what the folders beside its own have finished of the very settings, such as a
    teacher and lone students that do not depend on the value.
    """
    jobs = {}
    for value, more in axis.values.items():
        job = parse([*others, *more, "--out", "-"], kind="train")
        folder = out or Path("runs") / f"{axis.script}-{job.entry.name}"
        own = str(folder / value.replace(":", "-"))
        jobs[value] = parse([*others, *more, "--out", own], kind="train")
    if HELPER not in os.environ:
        _check(list(jobs.values()))
    begun = [value for value, job in jobs.items() if _begun(job)]
    console, found, failed, leads = Console(), {}, False, True
    for value, job in jobs.items():
        if not concerns(job.command):
            continue
        console.print(f"[bold]{axis.name}: {value}[/bold]")
        others_there = sorted(path.parent for path in folder.glob(f"*/{RESULTS}"))
        near = tuple(path for path in others_there if path != job.out)
        # Where some value was begun, the others may be new.
        resume = job.resume and (value in begun or not begun)
        session = Session(replace(job, near=near, resume=resume), console)
        runs = session.run()
        leads = session.leads and not session.helper
        if leads:
            write(session, runs, "train")
        found[value] = report.rows(runs)
        failed = failed or any("failed" in run for run in runs)
    if leads:
        body = f"{markdown(axis, found, job.title)}\nMade by `python examples/{axis.script}.py "
        body += f"{shlex.join(command)}`.\n"
        write_atomically(folder / f"{axis.name}.md", lambda file: file.write_text(body))
        places = axis.places(len(session.views.poor))
        draw(axis, found, places, folder / f"{axis.name}.png", title=job.title)
        console.print(Markdown(body))
    return int(failed)


def _check(jobs: Sequence[Job]) -> None:
    """Open every job's images before the first is trained: a wrong value is refused at once."""
    for job in jobs:
        views = open_views(job.entry, job.wanted)
        for images in filter(None, (views.poor, views.pseudo)):
            _ = images.shape  # reads one, and makes it poor


def _begun(job: Job) -> bool:
    return any((job.out / name).exists() for name in (RESULTS, "epochs"))


def markdown(axis: Axis, found: Found, title: str) -> str:
    """A row a method and a column a value."""
    methods = dict.fromkeys(row.method for rows in found.values() for row in rows)
    by = {value: {row.method: row for row in rows} for value, rows in found.items()}
    lines = [
        [method, *(row.accuracy if (row := rows.get(method)) else "" for rows in by.values())]
        for method in methods
    ]
    return report.table(f"{title}, by {axis.name}", [axis.name, *found], lines)


def draw(axis: Axis, found: Found, places: Mapping[str, float], path: Path, *, title: str) -> None:
    """A line a method over the values; dotted, what the lone student has at the whole."""
    methods = list(dict.fromkeys(row.method for rows in found.values() for row in rows))
    with drawing(path, (6.4, 3.6)) as figure:
        axes = figure.subplots()
        for method, colour in zip(methods, palette(len(methods)), strict=False):
            shown = [
                (places[value], row)
                for value, rows in found.items()
                for row in rows
                if row.method == method and row.accuracies
            ]
            if not shown:
                continue
            at, rows = zip(*shown, strict=True)
            means, errors = [row.mean for row in rows], [row.std or 0.0 for row in rows]
            colour = LONE if method == ALONE else colour
            axes.errorbar(at, means, errors, marker="o", color=colour, capsize=3, label=method)
        lone = {row.method: row for row in found.get(axis.whole, [])}.get(ALONE)
        if lone is not None and lone.accuracies:
            axes.axhline(lone.mean, color=LONE, linestyle=":", linewidth=1)
        if axis.logarithmic:
            axes.set_xscale("log")
        told = [f"{places[v]:,.0f}" if axis.logarithmic else v for v in found]
        axes.set_xticks([places[value] for value in found], told)
        axes.minorticks_off()
        axes.set(xlabel=axis.label, ylabel="accuracy, %")
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.legend(loc="best")
        figure.suptitle(title, fontsize=9)
