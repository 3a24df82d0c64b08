"""Cells of the DSKD paper's Tables 2-7, beside the published ones: a job for each column.

A data set with its teacher has one folder, so that the columns of all its students, in all tables,
share the teacher and whatever is finished. ``columns.json`` there has the settings that a column
was last asked with; a table shows the results of these, whoever made them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

import train
from methods import Method
from papers import published, reports
from papers.figures import Panel, draw_accuracy
from papers.grid import each, opened, split
from papers.published import TEACHER, Column, Table
from recipe import near, parsed, recipe
from store import Store, key, lock, write_atomically, write_json
from table import Row, rows, table

_COLUMNS = "columns.json"
_NOT_RUN = "—"
_ROLES = ("teacher", "student")
_LEARNED = ("epochs", "teacher_epochs", "batch_size", "lr", "optimizer", "weight_decay", "clip",
            "falling", "ema", "precision", "crop", "pad", "flip", "size", "bands")  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Cells of one of the DSKD paper's tables, beside the published ones."""

    # Print columns, rows and published numbers.
    list: bool = False
    # Columns by name (cifar10-resnet8x4), data set or student; all by default.
    columns: tuple[str, ...] = ()
    # Rows by name; all by default.
    rows: tuple[str, ...] = ()
    # Where the images lie, or the folders DIR/<data set> that hold them.
    data: Path | None = None
    # The classes of imagenet100, an id a line.
    classes: Path | None = None
    # The paper's own settings over the recipe's: 300 epochs, no clipping, fp32.
    protocol: bool = False
    # Folder for all that is written.
    out: Path = Path("runs/reproduce")


@dataclass(frozen=True)
class Cells:
    """A column of ours, of the settings that it was last asked with."""

    column: Column
    rows: Mapping[str, Row]  # by the table's rows, those that were run
    teacher: float | None  # its accuracy on clean images
    differences: Sequence[str]  # from the published settings, a line each

    def difference(self, name: str) -> float | None:
        """Ours minus the published accuracy, in points; None where ours is missing."""
        row = self.rows.get(name)
        ours = self.teacher if name == TEACHER else row.mean if row and row.accuracies else None
        return None if ours is None else ours - self.column.accuracies[name]


def run(name: str, arguments: Sequence[str], command: str) -> int:
    """A table's columns one after another; 1 where a row failed or a column could not be run."""
    own, others = split(Options, arguments, f"papers {name}")
    chosen, console = published.tables()[name], Console()
    if own.list:
        print(listed(chosen))
        return 0
    columns = chosen_columns(chosen, own.columns)
    methods = [chosen.rows[_known(f"row of {name}", row, chosen.rows)]
               for row in own.rows or chosen.rows]  # fmt: skip
    if any(text.partition("=")[0] == "--criterion" for text in others):
        raise ValueError(f"--criterion: a table has rows, {', '.join(chosen.rows)}; fix: --rows")
    views: dict[str, Any] = {}

    def made(column: Column) -> Any:
        def make() -> train.Session:
            options = _options(column, columns, methods, own, others, name)
            found = train.Session(options, command, console, views=views.get(column.dataset))
            views[column.dataset] = found.views
            return found

        return make

    lacking: dict[str, str] = {}
    by = {column.name: column for column in columns}
    sessions = opened({column.name: made(column) for column in columns}, lacking)
    views.clear()
    for missing, reason in lacking.items():
        console.print(f"{missing} cannot be run: {reason}", highlight=False, soft_wrap=True)
    if len(lacking) == len(columns):
        told = "; ".join(dict.fromkeys(lacking.values()))
        raise ValueError(f"no column of {name} can be run: {told}")
    failed, body = False, ""
    for part, session in each(sessions):
        leads = session.leads and not session.helper
        try:
            _record(session, by[part], own.out) if leads else None
            compared = lambda runs, session=session: reports.compared(session, runs)  # noqa: E731
            failed = bool(reports.finish(session, "compare", compared, part)) or failed
        except (ValueError, FloatingPointError) as error:
            lacking[part] = str(error)
            console.print(f"{part} cannot be run: {error}", highlight=False, soft_wrap=True)
        finally:  # Ctrl-C leaves the table of what it has
            if leads:
                _record(session, by[part], own.out)
                body = _put(chosen, columns, lacking, own.out, command)
    if body:
        console.print(Markdown(body))
        console.print(f"table and figure: {own.out / name}.md, .png", highlight=False)
    return int(failed or bool(lacking))


def _known(kind: str, name: str, known: Iterable[str]) -> str:
    known = list(known)
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}; {near(name, known)}known: {', '.join(known)}")
    return name


def chosen_columns(table: Table, wanted: Sequence[str]) -> list[Column]:
    """The columns of these names, data sets or students, in the table's order."""
    names = [name for c in table.columns for name in (c.name, c.dataset, c.student)]
    for name in wanted:
        _known(f"column of {table.name}", name, dict.fromkeys(names))
    return [c for c in table.columns if not wanted or {c.name, c.dataset, c.student} & {*wanted}]


def _options(
    column: Column, columns: Sequence[Column], methods: Sequence[str], own: Options,
    others: Sequence[str], name: str,
) -> train.Options:  # fmt: skip
    """A column's job; whatever is given goes before the column's own."""
    more = ["--teacher", column.teacher, "--student", column.student]
    if own.data is not None:
        inner = own.data.expanduser() / column.dataset
        more += ["--data", str(inner if inner.is_dir() else own.data)]
    # Where it is for none of the data sets, the reader refuses it.
    takers = {c.dataset for c in columns} & {"imagenet100"}
    if own.classes is not None and (column.dataset in takers or not takers):
        more += ["--classes", str(own.classes)]
    if own.protocol:  # what is typed still comes over it, and the table tells
        stated = published.PROTOCOL | published.UNMENTIONED
        flags = {f"--no-{k}" if v is False else f"--{k}": v for k, v in stated.items()}
        for flag, value in flags.items():
            more += [flag.replace("_", "-")] + ([] if isinstance(value, bool) else [f"{value}"])
    options = parsed([column.dataset, *more, *others], train.Options, program=f"papers {name}")
    return replace(options, criterion=tuple(methods), out=_folder(own.out, column))


# What a folder holds of a column.


def _folder(out: Path, column: Column) -> Path:
    return out / f"{column.dataset}-{column.teacher}"


def _record(session: train.Session, column: Column, out: Path) -> None:
    """Remember what a column was asked with: what its students have in common, in words too.

    Without the teacher's accuracy, that of the same settings stays where it is known.
    """
    settings = session.student_settings(Method.of("kd"), 0)
    common = {name: value for name, value in settings.items() if name not in ("loss", "seed")}
    told, place = differences(session.options, column), _folder(out, column)
    record(place, column, common, told, session.facts.get("clean images"))


def record(
    place: Path, column: Column, common: Mapping[str, Any], told: Sequence[str],
    teacher: float | None,
) -> None:  # fmt: skip
    with lock(place, _COLUMNS):
        records = _records(place)
        old = records.get(column.name)
        if teacher is None and old is not None and key(old["common"]) == key(dict(common)):
            teacher = old["teacher"]
        entry = {"common": dict(common), "differences": [*told], "teacher": teacher}
        write_json(place / _COLUMNS, records | {column.name: entry})


def stored(out: Path, table: Table, column: Column) -> Cells | None:
    """A column's cells as they lie in the folder; None where it was never asked for."""
    place = _folder(out, column)
    entry = _records(place).get(column.name)
    if entry is None:
        return None
    runs, wanted, found = Store(place).runs(), entry["common"], {}
    for name, text in table.rows.items():
        method = Method.of(text)
        own = [
            run
            for run in runs
            if run["method"] == method.label
            and _common(run["config"], wanted) == key(wanted)
            and key(run["config"]["loss"]) == key(method.described)
        ]
        if own:
            (found[name],) = rows(sorted(own, key=lambda run: run["seed"]))
    return Cells(column, found, entry["teacher"], entry["differences"])


def _common(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What a run has in common with the others of its job, as a key."""
    own = {name: value for name, value in config.items() if name not in ("loss", "seed")}
    if own["teacher"] is None:  # the lone student has none, and nothing of it falls
        own |= {name: wanted[name] for name in ("teacher", "falling", "labelled")}
    return key(own)


def _records(place: Path) -> dict[str, Any]:
    path = place / _COLUMNS
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except ValueError as error:
        told = f"{path} is damaged ({error}); fix: move it away and run again"
        raise ValueError(told) from error


def differences(options: train.Options, column: Column) -> list[str]:
    """A line for each setting that is not the paper's, or of which it says nothing."""
    own = recipe(column.dataset, train.Options)
    told = [
        f"{role} `{getattr(options, role)}`, published `{getattr(column, role)}`"
        for role in _ROLES
        if getattr(options, role) != getattr(column, role)
    ]
    if options.evaluate == "val":
        told.append("accuracy on a tenth of the training images, held out, not on the test set")
    if options.limit is not None:
        told.append(f"{options.limit} training images only")
    if options.labels is not None:
        told.append(f"{options.labels} training images have labels, published all")
    noise = published.NOISE.get(column.dataset)
    if noise is not None and options.view != f"noise:{noise:g}":
        told.append(f"poor images by `{options.view}`, published `noise:{noise:g}`")
    for name in _LEARNED:
        value, known = getattr(options, name), published.PROTOCOL | published.UNMENTIONED
        wanted = known.get(name.removeprefix("teacher_"), getattr(own, name))
        if value == wanted or (name == "teacher_epochs" and value is None):
            continue
        line = f"`{name}` {_text(value)}"
        if name.removeprefix("teacher_") in published.PROTOCOL:
            told.append(f"{line}, published {_text(wanted)}")
        elif name in published.UNMENTIONED:
            told.append(f"{line}, of which the paper says nothing")
        else:
            told.append(f"{line}; the recipe has {_text(wanted)}, the paper says nothing of it")
    return told


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


# The table.


def listed(chosen: Table) -> str:
    """The table as published, with the names that ``--columns`` and ``--rows`` take."""
    made = [f"# {chosen.title}\n"]
    for (_, teacher), group in groupby(chosen.columns, lambda c: (c.dataset, c.teacher)):
        columns = list(group)
        lines = [
            [name, *(f"{column.accuracies[name]:.2f}" for column in columns)]
            for name in columns[0].accuracies
        ]
        title = f"{columns[0].paper}, teacher {teacher}"
        made.append(table(title, ["row", *(c.name for c in columns)], lines))
    made += [f"- {name}: `{text}`" for name, text in chosen.rows.items() if name != text]
    return "\n".join(made)


def _put(
    chosen: Table, asked: Sequence[Column], lacking: Mapping[str, str], out: Path, command: str
) -> str:
    """Write the table and its figure of all that lies in the folder, whoever has trained it."""
    with lock(out, f"{chosen.name}.md"):
        found = [(column, stored(out, chosen, column)) for column in chosen.columns]
        shown = [(column, own) for column, own in found if column in asked or own is not None]
        body = markdown(chosen, shown, lacking) + f"\nLast written by `{command}`.\n"
        write_atomically(out / f"{chosen.name}.md", lambda file: file.write_text(body))
        drawn = [own for _, own in shown if own is not None and own.rows]
        if drawn:
            panels = [_panel(chosen, own) for own in drawn]
            draw_accuracy(panels, out / f"{chosen.name}.png", title=chosen.title)
    return body


def markdown(
    chosen: Table, found: Sequence[tuple[Column, Cells | None]], lacking: Mapping[str, str]
) -> str:
    """A section a column: what differs from the published settings, then ours and theirs."""
    stated = published.PROTOCOL
    text = (
        f"# {chosen.title}\n\nAccuracy on poor images in percent: ours, mean ± standard deviation "
        f"over the seeds; published, {stated['epochs']} epochs of {stated['optimizer'].upper()} "
        f"from a learning rate of {stated['lr']:g}, of how many seeds the paper does not say; and "
        "ours minus published. The criteria are those of `methods.yaml`: `ds` has the defaults "
        "that `docs/choices.md` explains, `ds_printed` the equations as printed; both stand beside "
        "the paper's one number."
    )
    if any(column.dataset in published.NOISE for column in chosen.columns):
        text += " The noise is a fraction of the pixels that are replaced."
    for column, cells in found:
        text += f"\n\n## {column.title}\n\n"
        if column.name in lacking:
            text += f"Not run: {lacking[column.name]}\n\n"
        if cells is not None:
            lines = ["What differs from the published protocol:", ""]
            lines += [f"- {line}" for line in cells.differences]
            plain = ["By the published protocol, as far as the paper states it."]
            text += "\n".join(lines if cells.differences else plain) + "\n\n"
        lines = [_line(chosen, column, cells, name) for name in column.accuracies]
        head = ["row", "ours %", "seeds", "published %", "difference"]
        text += table(f"`{column.name}`", head, lines)
        for name, row in {} if cells is None else cells.rows.items():
            text += f"\n- {name} failed: {row.failures[0]}" if row.failures else ""
    return text + "\n"


def _line(chosen: Table, column: Column, cells: Cells | None, name: str) -> list[str]:
    """A row's cells; a dash where ours was not run."""
    ours, seeds = _NOT_RUN, _NOT_RUN
    if name == TEACHER and cells is not None and cells.teacher is not None:
        ours, seeds = f"{cells.teacher:.2f}", "1"
    elif cells is not None and (row := cells.rows.get(name)) is not None:
        ours, seeds = row.accuracy, str(len(row.accuracies))
    difference = None if cells is None else cells.difference(name)
    told = "teacher, clean images" if name == TEACHER else name
    if chosen.rows.get(name, name) != name:
        told += f" (`{chosen.rows[name]}`)"
    off = _NOT_RUN if difference is None else f"{difference:+.2f}"
    return [told, ours, seeds, f"{column.accuracies[name]:.2f}", off]


def _panel(chosen: Table, cells: Cells) -> Panel:
    column, theirs, caption = cells.column, cells.column.accuracies, ""
    if TEACHER in theirs and cells.teacher is not None:
        caption = f"teacher {cells.teacher:.2f}, published {theirs[TEACHER]:.2f}"
    ours = {name: cells.rows.get(name) for name in chosen.rows}
    title = f"{column.paper}\n{column.teacher} → {column.student}"
    return Panel(ours, theirs, title, caption)
