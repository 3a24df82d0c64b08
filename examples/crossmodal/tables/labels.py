"""Accuracy over the number of labels, with every pair distilled: a job for each number."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from crossmodal.cli import parse, reported
from crossmodal.methods import ALONE
from crossmodal.runs.processes import concerns
from crossmodal.runs.session import Session
from crossmodal.runs.store import write_atomically
from crossmodal.tables import report
from crossmodal.tables.figures import drawing, palette
from crossmodal.tables.write import write

ALL = "all"
Found = Mapping[str, Sequence[report.Row]]  # rows by number of labels


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; the codes of ``train.py``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return reported(lambda: _run(given))


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="labels.py", allow_abbrev=False, add_help=False, exit_on_error=False
    )
    parser.add_argument("--labels", nargs="+", default=["100", "400", "1600", ALL])
    parser.add_argument("--out", type=Path)
    own, others = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(others):
        print("labels.py DATASET [--labels N|all ...] and every option of train.py, which has:\n")
    numbers = _numbers(own.labels)
    jobs = {}
    for number in numbers:
        more = [] if number == ALL else ["--labels", number]
        job = parse([*others, *more, "--out", "-"], kind="train")
        out = own.out or Path("runs") / f"labels-{job.entry.name}"
        jobs[number] = parse([*others, *more, "--out", str(out / number)], kind="train")
    console, found, failed, leads = Console(), {}, False, True
    for number, job in jobs.items():
        if not concerns(job.command):
            continue
        console.print(f"[bold]labels: {number}[/bold]")
        session = Session(job, console)
        runs = session.run()
        leads = session.leads and not session.helper
        if leads:
            write(session, runs, "train")
        found[number] = report.rows(runs)
        failed = failed or any("failed" in run for run in runs)
    if leads:
        body = f"{markdown(found, job.title)}\nMade by `python examples/labels.py "
        body += f"{shlex.join(arguments)}`.\n"
        write_atomically(out / "labels.md", lambda file: file.write_text(body))
        draw(found, len(session.views.poor), out / "labels.png", title=job.title)
        console.print(Markdown(body))
    return int(failed)


def _numbers(texts: Sequence[str]) -> list[str]:
    """Every number once, ascending, ``all`` last."""
    for text in texts:
        if text != ALL and not (text.isdecimal() and int(text) > 0):
            raise ValueError(f"--labels must be numbers such as 100, or all, got {text!r}")
    return sorted(dict.fromkeys(texts), key=lambda text: (text == ALL, int(text.strip(ALL) or 0)))


def markdown(found: Found, title: str) -> str:
    """A row a method and a column a number of labels."""
    methods = dict.fromkeys(row.method for rows in found.values() for row in rows)
    by = {number: {row.method: row for row in rows} for number, rows in found.items()}
    lines = [
        [method, *(row.accuracy if (row := rows.get(method)) else "" for rows in by.values())]
        for method in methods
    ]
    head = ["labels", *found]
    return report.table(f"{title}, by the number of labels", head, lines)


def draw(found: Found, whole: int, path: Path, *, title: str) -> None:
    """A line a method over the number of labels; dotted, what the lone student has with all."""
    methods = list(dict.fromkeys(row.method for rows in found.values() for row in rows))
    with drawing(path, (6.4, 3.6)) as figure:
        axes = figure.subplots()
        for method, colour in zip(methods, palette(len(methods)), strict=False):
            shown = [
                (whole if number == ALL else int(number), row)
                for number, rows in found.items()
                for row in rows
                if row.method == method and row.accuracies
            ]
            if not shown:
                continue
            counts, rows = zip(*shown, strict=True)
            means, errors = [row.mean for row in rows], [row.std or 0.0 for row in rows]
            colour = "#CC6677" if method == ALONE else colour
            axes.errorbar(counts, means, errors, marker="o", color=colour, capsize=3, label=method)
        lone = {row.method: row for row in found.get(ALL, [])}.get(ALONE)
        if lone is not None and lone.accuracies:
            axes.axhline(lone.mean, color="#CC6677", linestyle=":", linewidth=1)
        ticks = [whole if number == ALL else int(number) for number in found]
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set(xlabel="training images with a label", ylabel="accuracy, %")
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.legend(loc="lower right")
        figure.suptitle(title, fontsize=9)
