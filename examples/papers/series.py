"""Accuracy over the values of one option: a job a value, one table, one figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.markdown import Markdown

import train
import unpaired
from methods import ALONE
from papers.figures import LONE, drawing, palette
from papers.grid import each, opened, split
from papers.reports import title_of
from recipe import parsed
from store import write_atomically
from table import Row, rows, table

ALL = "all"  # the labels
Found = Mapping[str, Sequence[Row]]  # rows by value


@dataclass(frozen=True)
class Labels:
    """Accuracy over the number of training images that have a label, with every pair distilled."""

    # Numbers of labels, or all.
    labels: tuple[str, ...] = ("100", "400", "1600", ALL)
    # Nothing is paired: a job of unpaired.py, whose options follow.
    unpaired: bool = False


@dataclass(frozen=True)
class Gap:
    """How far free pairs may be from the student's images: accuracy over what makes them poor."""

    # What makes the teacher's images poor, such as noise:0.3 noise:0.7.
    pseudo: tuple[str, ...] = ()


def labels(arguments: Sequence[str], command: str) -> int:
    own, others = split(Labels, arguments, "papers labels RECIPE")
    for text in own.labels or ("",):
        if text != ALL and not (text.isdecimal() and int(text) > 0):
            raise ValueError(f"--labels must be numbers such as 100, or all, got {text!r}")
    numbers = sorted(set(own.labels) - {ALL}, key=int) + [ALL] * (ALL in own.labels)
    kind = unpaired.Options if own.unpaired else train.Options
    options = parsed(others, kind, program="papers labels")
    values = {text: replace(options, labels=None if text == ALL else int(text)) for text in numbers}
    return _run("labels", values, command, "training images with a label")


def gap(arguments: Sequence[str], command: str) -> int:
    own, others = split(Gap, arguments, "papers gap RECIPE")
    options = parsed(others, unpaired.Options, program="papers gap")
    if not own.pseudo:
        raise ValueError(
            "--pseudo names what makes the free pairs poor, such as noise:0.3 noise:0.7"
        )
    if options.rows == unpaired.Options.rows:  # the others have no such pairs
        options = replace(options, rows=options.rows[:3])
    values = {kind: replace(options, pseudo=kind) for kind in dict.fromkeys(own.pseudo)}
    return _run("pseudo", values, command, "what makes the free pairs poor")


def _run(name: str, values: Mapping[str, Any], command: str, across: str) -> int:
    """All values in one folder, so that they share what does not depend on the value."""
    first = next(iter(values.values()))
    kind = unpaired.Session if isinstance(first, unpaired.Options) else train.Session
    script = "gap" if name == "pseudo" else name
    out = first.out or Path("runs") / f"{script}-{first.recipe}"

    def made(options: Any) -> Any:
        return lambda: kind(replace(options, out=out), command)

    sessions = opened({f"{name}: {value}": made(options) for value, options in values.items()})
    found, failed = {}, False
    for job, session in each(sessions):
        value, runs = job.partition(": ")[2], session.run()
        found[value] = rows(runs)
        failed = failed or any("failed" in run for run in runs)
        most = len(session.views.poor)
    if session.leads and not session.helper:
        title = title_of(session)
        body = f"{markdown(name, found, title)}\nMade by `{command}`.\n"
        write_atomically(out / f"{name}.md", lambda file: file.write_text(body))
        logarithmic = name == "labels"
        at = places(list(found), most)
        draw(found, at, out / f"{name}.png", title=title, across=across, logarithmic=logarithmic)
        session.console.print(Markdown(body))
        session.show.say(f"table and figure: {out / name}.md, .png")
    return int(failed)


def places(values: Sequence[str], images: int) -> dict[str, float]:
    """Where values stand: at their numbers, or side by side where some are none; ``all`` last."""
    try:
        found = [float(images if v == ALL else v.rpartition(":")[2]) for v in values]
    except ValueError:
        found = []
    if len(set(found)) < len(values):
        found = [float(place) for place in range(len(values))]
    return dict(zip(values, found, strict=True))


def markdown(name: str, found: Found, title: str) -> str:
    """A row a method and a column a value."""
    methods = dict.fromkeys(row.method for some in found.values() for row in some)
    by = [{row.method: row for row in some} for some in found.values()]
    lines = [[m, *(some[m].accuracy if m in some else "" for some in by)] for m in methods]
    return table(f"{title}, by {name}", [name, *found], lines)


def draw(
    found: Found, at: Mapping[str, float], path: Path, *, title: str, across: str, logarithmic: bool
) -> None:
    """A line a method over the values; dotted, what the lone student has with all labels."""
    methods = list(dict.fromkeys(row.method for some in found.values() for row in some))
    with drawing(path, (6.4, 3.6)) as figure:
        axes = figure.subplots()
        for method, colour in zip(methods, palette(len(methods)), strict=False):
            shown = [
                (at[value], row)
                for value, some in found.items()
                for row in some
                if row.method == method and row.accuracies
            ]
            if not shown:
                continue
            xs, some = zip(*shown, strict=True)
            means, errors = [row.mean for row in some], [row.std or 0.0 for row in some]
            colour = LONE if method == ALONE else colour
            axes.errorbar(xs, means, errors, marker="o", color=colour, capsize=3, label=method)
        lone = {row.method: row for row in found.get(ALL, [])}.get(ALONE)
        if lone is not None and lone.accuracies:
            axes.axhline(lone.mean, color=LONE, linestyle=":", linewidth=1)
        if logarithmic:
            axes.set_xscale("log")
        axes.set_xticks(
            list(at.values()), [f"{x:,.0f}" if logarithmic else v for v, x in at.items()]
        )
        axes.minorticks_off()
        axes.set(xlabel=across, ylabel="accuracy, %")
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.legend(loc="best")
        figure.suptitle(title, fontsize=9)
