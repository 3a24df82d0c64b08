"""Any cells of the DSKD paper's Tables 2-7, beside the published ones: a job for each column."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from crossmodal.cli import Parser, names, on_purpose, parse, place, reported
from crossmodal.near import looked_up
from crossmodal.recipes import data_sets
from crossmodal.runs.job import Job
from crossmodal.runs.processes import concerns
from crossmodal.runs.session import Session
from crossmodal.runs.store import lock, write_atomically
from crossmodal.tables import cells, comparison, published
from crossmodal.tables.protocol import differences
from crossmodal.tables.published import Column, Table
from crossmodal.tables.write import write

# What may be wrong with one column alone.
_LACKING = (ValueError, TypeError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; the codes of ``train.py``, and 1 where a column could not be run."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return reported(lambda: _run(given))


def _run(arguments: list[str]) -> int:
    parser = _parser()
    own, others = parser.parse_known_args(arguments)
    known, console = published.tables(), Console()
    if own.help or not (own.table or own.list):
        parser.print_help()
        return 0 if own.help else 2
    chosen = [looked_up("table", own.table, known)] if own.table else list(known.values())
    if own.list:
        for table in chosen:
            console.print(Markdown(comparison.listed(table)))
        return 0
    (table,) = chosen
    columns = _columns(table, own.column)
    listed = names("--rows", own.rows or list(table.rows), table.rows)
    methods = [looked_up(f"row of {table.name}", name, table.rows) for name in listed]
    out = own.out or Path("runs") / "reproduce"
    jobs = {column: _job(column, columns, methods, own, others, out) for column in columns}
    command = shlex.join(["python", "examples/reproduce.py", *arguments])
    return _work(table, jobs, out, command, console)


def _work(
    table: Table, jobs: Mapping[Column, Job], out: Path, command: str, console: Console
) -> int:
    """Run the columns one after another, and write the table after each."""
    lacking: dict[str, str] = {}
    failed = leads = False
    body = ""
    for column, job in jobs.items():
        if not concerns(job.command):
            continue
        console.print(f"[bold]{table.name}: {column.title}[/bold]", highlight=False)
        try:
            session = Session(job, console)
            leads = session.leads and not session.helper
            failed = _column(session, column, out) or failed
        except _LACKING as error:
            if not on_purpose(error):
                raise
            lacking[column.name] = str(error)
            console.print(f"{column.name} cannot be run: {error}", highlight=False)
        finally:  # Ctrl-C leaves the table of what it has
            if leads:
                body = _put(table, list(jobs), lacking, out, command)
    if len(lacking) == len(jobs):
        told = "; ".join(dict.fromkeys(lacking.values()))
        raise ValueError(f"no column of {table.name} can be run: {told}")
    if leads:
        console.print(Markdown(body))
        console.print(f"table and figure: {out / table.name}.md, .png", highlight=False)
    return int(failed or bool(lacking))


def _column(session: Session, column: Column, out: Path) -> bool:
    """One column's job; whether any of its runs failed."""
    leads = session.leads and not session.helper
    told = differences(session.job, session.settings.recipes, session.views, column)

    def record() -> None:
        if leads:
            teacher = session.facts.get("clean")
            cells.record(out, column, session.settings.common, told, teacher)

    record()
    try:
        runs = session.run()
    finally:
        record()
    if leads:
        write(session, runs, "compare")
    return any("failed" in run for run in runs)


def _put(
    table: Table, asked: Sequence[Column], lacking: Mapping[str, str], out: Path, command: str
) -> str:
    """Write the table and its figure of all that lies in the folder, whoever has trained it."""
    name = f"{table.name}.md"
    with lock(out, name):
        found = [(column, cells.stored(out, table, column)) for column in table.columns]
        shown = [(column, own) for column, own in found if column in asked or own is not None]
        body = comparison.markdown(table, shown, lacking) + f"\nLast written by `{command}`.\n"
        write_atomically(out / name, lambda file: file.write_text(body))
        drawn = [own for _, own in shown if own is not None and own.rows]
        if drawn:
            comparison.draw(table, drawn, out / f"{table.name}.png")
    return body


def _columns(table: Table, wanted: Sequence[str] | None) -> list[Column]:
    """The columns of these names, data sets or students, in the table's order."""
    by: dict[str, list[Column]] = {column.name: [column] for column in table.columns}
    for column in table.columns:
        for name in (column.dataset, column.student):
            by.setdefault(name, []).append(column)
    texts = names("--column", wanted, by) if wanted else list(by)
    found = [looked_up(f"column of {table.name}", name, by) for name in texts]
    return [column for column in table.columns if any(column in some for some in found)]


def _job(
    column: Column, columns: Sequence[Column], methods: Sequence[str], own: argparse.Namespace,
    others: Sequence[str], out: Path,
) -> Job:  # fmt: skip
    """The job of ``compare.py`` for a column; whatever is given goes before the column's own."""
    taken = [text for text in others if text.partition("=")[0] in ("--method", "--methods")]
    if taken:
        raise ValueError(f"{taken[0]} is not for reproduce.py: a table has rows; fix: --rows")
    more: list[str] = []
    if own.data is not None:
        inner = own.data.expanduser() / column.dataset
        more += ["--data", str(inner if inner.is_dir() else own.data)]
    # For one data set of two; where it is for none, the job refuses it.
    known = data_sets()
    takers = {c.dataset for c in columns if "classes" in known[c.dataset].options}
    if own.classes is not None and (column.dataset in takers or not takers):
        more += ["--classes", own.classes]
    networks = ["--teacher", column.teacher, "--student", column.student]
    own_out = ["--out", str(cells.folder(out, column))]
    return parse(
        [column.dataset, *more, *networks, "--method", *methods, *own_out, *others], kind="compare"
    )


def _parser() -> Parser:
    parser = Parser(
        prog="reproduce.py",
        usage="%(prog)s TABLE [options] [any option of train.py]",
        allow_abbrev=False,
        add_help=False,
        description="Cells of the DSKD paper's Tables 2-7, beside the published ones.",
        epilog="The same command again skips what is finished and goes on with what was cut off. "
        "Options of train.py (--epochs, --seeds, --limit, ...) go to every column.",
    )
    add = parser.add_argument
    add("table", nargs="?", metavar="TABLE", help=f"one of {', '.join(published.tables())}")
    add("--list", action="store_true", help="print columns, rows and published numbers")
    told = "columns, by name (cifar10-resnet8x4), data set or student (default: all)"
    add("--column", "--columns", nargs="+", metavar="NAME", help=told)
    add("--rows", "--row", nargs="+", metavar="NAME", help="rows by name (default: all)")
    told = "where the images lie, or the folders DIR/<data set> that hold them"
    add("--data", type=Path, metavar="DIR", help=told)
    add("--classes", metavar="FILE", help="the classes of imagenet100, an id a line")
    add("--out", type=place, metavar="DIR", help="for all that is written (runs/reproduce)")
    add("-h", "--help", action="store_true", help="print this; train.py --help has the others")
    return parser
