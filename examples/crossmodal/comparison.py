"""All methods side by side, in the shape of the DSKD paper's Table 2, its column beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from crossmodal import figures, outputs, published, report
from crossmodal.job import Job, Session
from crossmodal.registry import METHODS, Family
from crossmodal.store import write_atomically

# The paper's rows, then those that it does not have, each in its family.
EVERYTHING = (
    *("alone", "kd", "alkd", "dkd", "lskd", "ctkd", "logits"),
    *("fitnets", "at", "afkd", "nst", "vid", "crd", "semckd"),
    *("rkd", "fsp", "cc", "vpr", "ds", "kd+ds"),
)
_FAMILIES: Mapping[Family | None, str] = {
    "logits": "on logits",
    "features": "on features",
    "relations": "on relations",
    "structure": "on structure (the paper's)",
    None: "sums",
}


def write(session: Session, rows: Sequence[report.Row], console: Console) -> None:
    """Print the comparison; write results.md and accuracy.png."""
    job, facts = session.job, session.facts
    name, printed = published.column(job.dataset)
    ordered = [row for family in ("baseline", *_FAMILIES) for row in rows if _family(row) == family]
    title = outputs.heading(job)
    console.print(_table(ordered, facts, name, printed, title))
    text = _markdown(ordered, job, facts, name, printed, title)
    write_atomically(job.out / "results.md", lambda path: path.write_text(text))
    figures.draw_accuracy(ordered, facts, job.out / "accuracy.png", title=title)
    console.print(_caveat(job, name))
    console.print(f"results, table and figure: {job.out}")


def _family(row: report.Row) -> str | None:
    method = METHODS.get(row.method)
    return None if method is None else method.family


def _title(method: str) -> str:
    return "+".join(METHODS[part].title for part in method.split("+"))


def _ours(row: report.Row) -> str:
    return row.accuracy + ("" if row.gain is None else f" ({_arrow(row.gain)})")


def _theirs(method: str, printed: Mapping[str, float]) -> str:
    # Table 7 has each sum once; nothing depends on the order of its parts.
    accuracy = next(
        (printed[key] for key in printed if set(key.split("+")) == set(method.split("+"))), None
    )
    if accuracy is None:
        return ""
    if method == report.BASELINE:
        return f"{accuracy:.2f}"
    return f"{accuracy:.2f} ({_arrow(accuracy - printed[report.BASELINE])})"


def _arrow(gain: float) -> str:
    return f"{'↓' if gain < 0 else '↑'}{abs(gain):.2f}"


def _caveat(job: Job, name: str) -> str:
    same = (job.teacher, job.student) == ("resnet32x4", "resnet8x4")
    networks = "the same networks" if same else f"{job.teacher} -> {job.student}"
    return (
        f"The paper's column is {name}, {published.NETWORKS}, 300 epochs. Ours is {job.dataset}, "
        f"{networks}, {job.config.epochs} epochs: compare the order of the methods and the sizes "
        "of the gains, not the accuracies."
    )


def _sections(rows: Sequence[report.Row]) -> list[tuple[str, list[report.Row]]]:
    """Families that have rows, in the paper's order."""
    found = [
        (heading, [row for row in rows if _family(row) == family])
        for family, heading in _FAMILIES.items()
    ]
    return [(heading, members) for heading, members in found if members]


def _table(
    rows: Sequence[report.Row],
    facts: report.Teacher,
    name: str,
    printed: Mapping[str, float],
    title: str,
) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    table.add_column("accuracy % (gain)", justify="right")
    table.add_column("seeds", justify="right")
    table.add_column(f"paper, {name}", justify="right")
    table.add_row("Baseline-T", f"{facts.clean:.2f}", "1", f"{printed['teacher']:.2f}")
    for row in rows:
        if row.method == report.BASELINE:
            table.add_row(*_cells(row, printed))
    best = max((row.mean for row in rows if row.accuracies), default=0.0)
    for heading, members in _sections(rows):
        table.add_section()
        table.add_row(heading, "", "", "", style="dim italic")
        for row in members:
            table.add_row(*_cells(row, printed), style="bold" if row.mean == best else "")
    return table


def _markdown(
    rows: Sequence[report.Row],
    job: Job,
    facts: report.Teacher,
    name: str,
    printed: Mapping[str, float],
    title: str,
) -> str:
    lines = [
        f"{title}:",
        "",
        f"| method | accuracy % (gain) | seeds | paper, {name} |",
        "|---|---:|---:|---:|",
        f"| Baseline-T, clean images | {facts.clean:.2f} | 1 | {printed['teacher']:.2f} |",
        f"| Baseline-T, poor images | {facts.poor:.2f} | 1 | |",
    ]
    lines += [_line(row, printed) for row in rows if row.method == report.BASELINE]
    for heading, members in _sections(rows):
        lines += [f"| *{heading}* | | | |", *(_line(row, printed) for row in members)]
    failures = [f"- {row.method}: {failure}" for row in rows for failure in row.failures]
    if failures:
        lines += ["", "Failed:", "", *failures]
    return "\n".join([*lines, "", _caveat(job, name), "", f"Made by `{job.command}`.", ""])


def _cells(row: report.Row, printed: Mapping[str, float]) -> tuple[str, str, str, str]:
    seeds = str(len(row.accuracies))
    return _title(row.method), _ours(row), seeds, _theirs(row.method, printed)


def _line(row: report.Row, printed: Mapping[str, float]) -> str:
    return f"| {' | '.join(_cells(row, printed))} |"
