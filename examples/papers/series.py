"""Accuracy over the values of one option: a job a value, one table, one figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.markdown import Markdown

import segment
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
_SESSIONS = {
    unpaired.Options: unpaired.Session,
    segment.Options: segment.Session,
    train.Options: train.Session,
}


@dataclass(frozen=True)
class Labels:
    """Accuracy over the number of training images that have a label, with every pair distilled."""

    # Numbers of labels, or all.
    labels: tuple[str, ...] = ("100", "400", "1600", ALL)
    # Nothing is paired: a job of unpaired.py, whose options follow.
    unpaired: bool = False
    # A class for every pixel: a job of segment.py, whose options follow.
    pixels: bool = False
    # Of pixels: each of these numbers draws other labelled scenes, with a teacher of their own, and
    # is the students' seed.
    draws: tuple[int, ...] = ()


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
    if own.draws and not own.pixels:
        raise ValueError("--draws is for --pixels; fix: leave it out")
    if own.pixels and own.unpaired:
        raise ValueError("--pixels needs pairs; fix: leave --unpaired out")
    kind = unpaired.Options if own.unpaired else segment.Options if own.pixels else train.Options
    options = parsed(others, kind, program="papers labels")
    values = {}
    for text in numbers:
        some = replace(options, labels=None if text == ALL else int(text))
        values[text] = [some]
        if own.draws:
            chosen = [{"draw": n} if text != ALL else {} for n in own.draws]
            values[text] = [
                replace(some, seeds=(n,), **draw) for n, draw in zip(own.draws, chosen, strict=True)
            ]
    across = "training scenes with a mask" if own.pixels else "training images with a label"
    return _run("labels", values, command, across)


def gap(arguments: Sequence[str], command: str) -> int:
    own, others = split(Gap, arguments, "papers gap RECIPE")
    options = parsed(others, unpaired.Options, program="papers gap")
    if not own.pseudo:
        raise ValueError(
            "--pseudo names what makes the free pairs poor, such as noise:0.3 noise:0.7"
        )
    if options.rows == unpaired.Options.rows:  # the others have no such pairs
        options = replace(options, rows=options.rows[:3])
    values = {kind: [replace(options, pseudo=kind)] for kind in dict.fromkeys(own.pseudo)}
    return _run("pseudo", values, command, "what makes the free pairs poor")


def _run(name: str, values: Mapping[str, Sequence[Any]], command: str, across: str) -> int:
    """All values in one folder, so that they share what does not depend on the value."""
    first = next(iter(values.values()))[0]
    kind = next(made for of, made in _SESSIONS.items() if isinstance(first, of))
    script = "gap" if name == "pseudo" else name
    out = first.out or Path("runs") / f"{script}-{first.recipe}"

    def made(options: Any) -> Any:
        return lambda: kind(replace(options, out=out), command)

    jobs = {
        f"{name}: {value}" + (f", draw {number}" if len(several) > 1 else ""): (value, options)
        for value, several in values.items()
        for number, options in enumerate(several)
    }
    sessions = opened({job: made(options) for job, (_, options) in jobs.items()})
    found: dict[str, list[Any]] = {}
    for job, session in each(sessions):
        found.setdefault(jobs[job][0], []).extend(session.run())
        most, measure = len(session.views.poor), session.measure
    if session.leads and not session.helper:
        title = title_of(session)
        shown = {value: rows(runs, measure) for value, runs in found.items()}
        body = f"{markdown(name, shown, title)}\nMade by `{command}`.\n"
        write_atomically(out / f"{name}.md", lambda file: file.write_text(body))
        draw(
            shown, places(list(shown), most), out / f"{name}.png", title=title, across=across,
            measure=measure, logarithmic=name == "labels",
        )  # fmt: skip
        session.console.print(Markdown(body))
        session.show.say(f"table and figure: {out / name}.md, .png")
    return int(any("failed" in run for runs in found.values() for run in runs))


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
    found: Found,
    at: Mapping[str, float],
    path: Path,
    *,
    title: str,
    across: str,
    logarithmic: bool,
    measure: str = "accuracy",
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
        axes.set(xlabel=across, ylabel=f"{measure}, %")
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.legend(loc="best")
        figure.suptitle(title, fontsize=9)
