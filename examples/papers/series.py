"""Accuracy over the values of one option: a job a value, one table, one figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.markdown import Markdown

import segment
import train
import unpaired
from data.options import each_once
from methods import ALONE
from papers.figures import LONE, below, colours, drawing, wrapped
from papers.grid import each, opened, split
from papers.reports import title_of
from recipe import parsed
from store import slug, write_atomically
from table import Row, rows, table

ALL = "all"  # the labels
PLACE = "{}"  # where a value goes
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


@dataclass(frozen=True)
class Axis:
    """Any option along an axis, on a validation split: {} among the options is each value in turn.

    SemBridge's Fig. 5: axis mnist --unpaired --rows 'SemBridge as published' --values 0.1 0.2 0.4
    0.8 --weights 0.3 {} 0.003, or --matcher-temperature {}, or --rematch {} 30 5 4.
    """

    # What {} stands for, one after another.
    values: tuple[str, ...] = ()
    # Nothing is paired: a job of unpaired.py, whose options follow.
    unpaired: bool = False
    # A class for every pixel: a job of segment.py, whose options follow.
    pixels: bool = False


def labels(arguments: Sequence[str], command: str) -> int:
    own, others = split(Labels, arguments, "papers labels RECIPE")
    for text in own.labels or ("",):
        if text != ALL and not (text.isdecimal() and int(text) > 0):
            raise ValueError(f"--labels must be numbers such as 100, or all, got {text!r}")
    numbers = sorted(set(own.labels) - {ALL}, key=int) + [ALL] * (ALL in own.labels)
    if own.draws:
        each_once(own, "draws")
        if not own.pixels:
            raise ValueError("--draws is for --pixels; fix: leave it out")
    options = parsed(others, _kind(own), program="papers labels")
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
    return run("labels", values, command, across)


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
    return run("pseudo", values, command, "what makes the free pairs poor")


def axis(arguments: Sequence[str], command: str) -> int:
    own, others = split(Axis, arguments, "papers axis RECIPE")
    first = next((n for n, text in enumerate(others) if text.startswith("--")), len(others))
    given = [n for n, text in enumerate(others) if PLACE in text and n >= first]
    if not own.values or len(given) != 1:
        raise ValueError(
            f"an axis has --values and one {PLACE} among the options, where they go; got "
            f"{len(own.values)} values and {len(given)} {PLACE}; such as --values 0.1 0.4 "
            f"--weights 0.3 {PLACE} 0.003"
        )
    if any(text.startswith("--evaluate") for text in others):
        raise ValueError("--evaluate: an axis chooses settings, so it has val; fix: leave it out")
    (place,) = given
    start = max(n for n, text in enumerate(others[: place + 1]) if text.startswith("--"))
    ends = [n for n, text in enumerate(others) if n > start and text.startswith("--")]
    told = " ".join(others[start : min(ends, default=len(others))])
    values = {}
    for value in dict.fromkeys(own.values):
        filled = [text.replace(PLACE, value) for text in others]
        options = parsed(filled, _kind(own), program="papers axis")
        out = options.out or Path("runs") / f"axis-{options.recipe}"
        values[value] = [replace(options, evaluate="val", out=out)]
    across = told.removesuffix(f" {PLACE}")
    across = f"{PLACE} in {told}" if PLACE in across else across
    # A criterion that has the value in it is one row, not a row a value.
    return run(told.removeprefix("--"), values, command, across, same=others[place])


def _kind(own: Labels | Axis) -> Any:
    if own.pixels and own.unpaired:
        raise ValueError("--pixels needs pairs; fix: leave --unpaired out")
    return unpaired.Options if own.unpaired else segment.Options if own.pixels else train.Options


def run(
    name: str, values: Mapping[str, Sequence[Any]], command: str, across: str, same: str = ""
) -> int:
    """All values in one folder, so that they share what does not depend on the value.

    ``same`` is the name of a row that has the value in the place of ``{}``.
    """
    first = next(iter(values.values()))[0]
    kind = next(made for of, made in _SESSIONS.items() if isinstance(first, of))
    script = "gap" if name == "pseudo" else name
    out = first.out or Path("runs") / f"{script}-{first.recipe}"

    def made(options: Any) -> Any:
        return lambda: kind(replace(options, out=out), command)

    jobs = {}
    for value, several in values.items():
        for options in several:
            drawn = f", draw {options.seeds[0]}" if len(several) > 1 else ""
            jobs[f"{name}: {value}{drawn}"] = value, options
    sessions = opened({job: made(options) for job, (_, options) in jobs.items()})
    found: dict[str, list[Any]] = {}
    for job, session in each(sessions):
        value, _ = jobs[job]
        named = {same.replace(PLACE, value): same} if same else {}
        ran = ({**r, "method": named.get(r["method"], r["method"])} for r in session.run())
        found.setdefault(value, []).extend(ran)
        most, measure = len(session.views.poor), session.measure
    if session.leads and not session.helper:
        title, stem = title_of(session), slug(name.replace(PLACE, "X"))
        shown = {value: rows(runs, measure) for value, runs in found.items()}
        body = f"{markdown(name, shown, title)}\nMade by `{command}`.\n"
        write_atomically(out / f"{stem}.md", lambda file: file.write_text(body))
        draw(
            shown, numbers(list(shown), most), out / f"{stem}.png", title=title, across=across,
            measure=measure,
        )  # fmt: skip
        session.console.print(Markdown(body))
        session.show.say(f"table and figure: {out / stem}.md, .png")
    return int(any("failed" in run for runs in found.values() for run in runs))


def markdown(name: str, found: Found, title: str) -> str:
    """A row a method and a column a value."""
    methods = dict.fromkeys(row.method for some in found.values() for row in some)
    by = [{row.method: row for row in some} for some in found.values()]
    lines = [[m, *(some[m].accuracy if m in some else "" for some in by)] for m in methods]
    return table(f"{title}, by {name}", [name, *found], lines)


def numbers(values: Sequence[str], images: int) -> dict[str, float]:
    """The numbers that values are or end in, ``all`` being the images; empty where one has none."""
    try:
        found = [float(images if v == ALL else v.rpartition(":")[2]) for v in values]
    except ValueError:
        return {}
    return dict(zip(values, found, strict=True)) if len(set(found)) == len(values) else {}


def draw(
    found: Found, at: Mapping[str, float], path: Path, *, title: str, across: str,
    measure: str = "accuracy",
) -> None:  # fmt: skip
    """A line a method over the numbers ``at`` which values stand; points side by side without.

    Dotted is the lone student: with all labels, or where nothing of it depends on the value.
    """
    names = list(dict.fromkeys(row.method for some in found.values() for row in some))
    by = {value: {row.method: row for row in some if row.accuracies}
          for value, some in found.items()}  # fmt: skip
    lone = [some[ALONE] for value, some in by.items() if ALONE in some and (not at or value == ALL)]
    names = [name for name in names if at or name != ALONE]
    places = at or dict(zip(found, map(float, range(len(found))), strict=True))
    with drawing(path, (6.4, 3.6)) as figure:
        axes = figure.subplots()
        for number, (name, colour) in enumerate(zip(names, colours(names), strict=True)):
            shown = [(places[value], some[name]) for value, some in by.items() if name in some]
            if not shown:
                continue
            # Without numbers in between no line means anything, and points would hide each other.
            shift = 0.0 if at else (number - (len(names) - 1) / 2) * 0.6 / len(names)
            xs, some = zip(*shown, strict=True)
            axes.errorbar(
                [x + shift for x in xs], [row.mean for row in some],
                np.array([row.std for row in some], dtype=float),  # None, of one seed, is nan
                color=colour, capsize=3, label=name, marker="o", linestyle="-" if at else "none",
            )  # fmt: skip
        if lone:
            axes.axhline(lone[0].mean, color=LONE, linestyle=":", linewidth=1,
                         label=None if at else ALONE)  # fmt: skip
        xs = list(places.values())
        if at and min(xs) > 0 and max(xs) > 10 * min(xs):
            axes.set_xscale("log")
        ticks = [f"{x:,.0f}" if value == ALL or x >= 1000 else value for value, x in at.items()]
        axes.set_xticks(xs, ticks or list(found))
        axes.minorticks_off()
        axes.set(xlabel=across, ylabel=f"{measure}, %")
        axes.grid(color="#DDDDDD", linewidth=0.6, axis="both" if at else "y")
        axes.set_axisbelow(True)
        below(figure, axes)
        figure.suptitle(wrapped(title, 6.4), fontsize=9)
