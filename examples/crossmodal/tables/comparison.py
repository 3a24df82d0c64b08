"""A published table and ours beside it, as Markdown and as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from crossmodal.tables import published, report
from crossmodal.tables.cells import Cells
from crossmodal.tables.figures import drawing
from crossmodal.tables.published import TEACHER, Column, Table

_NOT_RUN = "—"
_OURS, _PUBLISHED, _LINK = "#332288", "#CC6677", "#BBBBBB"
_ACROSS = 3  # panels side by side


def listed(table: Table) -> str:
    """The table as published, with the names that ``--column`` and ``--rows`` take."""
    parts = [f"# {table.title}\n"]
    for (_, teacher), group in groupby(table.columns, lambda c: (c.dataset, c.teacher)):
        columns = list(group)
        lines = [
            [name, *(f"{column.accuracies[name]:.2f}" for column in columns)]
            for name in columns[0].accuracies
        ]
        title = f"{columns[0].paper}, teacher {teacher}"
        parts.append(report.table(title, ["row", *(c.name for c in columns)], lines))
    if any(name != method for name, method in table.rows.items()):
        parts += [f"- {name}: `{method}`" for name, method in table.rows.items()]
    return "\n".join(parts)


def markdown(
    table: Table,
    found: Sequence[tuple[Column, Cells | None]],
    lacking: Mapping[str, str] | None = None,
) -> str:
    """A section a column: what differs from the published settings, then ours and theirs.

    Args:
        table: The published one.
        found: Its columns with what there is of ours.
        lacking: Why a column could not be run, by its name.
    """
    stated = published.protocol()
    text = (
        f"# {table.title}\n\nAccuracy on poor images in percent: ours, mean ± standard deviation "
        f"over the seeds; published, {stated['epochs']} epochs of {stated['optimizer'].upper()} "
        "from a learning rate "
        f"of {stated['lr']:g}, of how many seeds the paper does not say; and ours minus "
        "published. The criteria are those of `methods.toml`: `ds` has the defaults that "
        "`docs/choices.md` explains, not the equations as printed.\n"
    )
    if any(published.noise(column.dataset) for column in table.columns):
        text = text.rstrip() + " The noise is a fraction of the pixels that are replaced.\n"
    for column, cells in found:
        text += f"\n## {column.title}\n\n"
        if (reason := (lacking or {}).get(column.name)) is not None:
            text += f"Not run: {reason}\n\n"
        if cells is not None:
            text += _differs(cells.differences) + "\n"
        lines = [_line(table, column, cells, name) for name in column.accuracies]
        head = ["row", "ours %", "seeds", "published %", "difference"]
        text += report.table(f"`{column.name}`", head, lines)
        if cells is not None:
            failures = {name: row.failures for name, row in cells.rows.items() if row.failures}
            text += "".join(f"\n- {name} failed: {some[0]}" for name, some in failures.items())
            text += "\n" if failures else ""
    return text


def _differs(lines: Sequence[str]) -> str:
    if not lines:
        return "By the published protocol, as far as the paper states it.\n"
    return "\n".join(
        ["What differs from the published protocol:", "", *(f"- {x}" for x in lines), ""]
    )


def _line(table: Table, column: Column, cells: Cells | None, name: str) -> list[str]:
    """A row's cells; a dash where ours was not run."""
    ours, seeds = _NOT_RUN, _NOT_RUN
    if name == TEACHER and cells is not None and cells.teacher is not None:
        ours, seeds = f"{cells.teacher:.2f}", "1"
    elif cells is not None and (row := cells.rows.get(name)) is not None:
        ours, seeds = row.accuracy, str(len(row.accuracies))
    difference = None if cells is None else cells.difference(name)
    told = "teacher, clean images" if name == TEACHER else name
    if table.rows.get(name, name) != name:
        told += f" (`{table.rows[name]}`)"
    off = _NOT_RUN if difference is None else f"{difference:+.2f}"
    return [told, ours, seeds, f"{column.accuracies[name]:.2f}", off]


def draw(table: Table, found: Sequence[Cells], path: Path) -> None:
    """A panel a column: every row with our mean and spread, and the published number beside it."""
    across = min(len(found), _ACROSS)
    down = -(-len(found) // across)
    inches = (max(1.4 + 2.3 * across, 6.4), 0.8 + down * (1.0 + 0.22 * len(table.rows)))
    with drawing(path, inches) as figure:
        panels = figure.subplots(down, across, sharey=True, squeeze=False)
        for axes, cells in zip(panels.flat, found, strict=False):
            _panel(axes, table, cells)
        for axes in panels.flat[len(found) :]:
            axes.set_visible(False)
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        figure.suptitle(table.title, fontsize=9)


def _panel(axes: Any, table: Table, cells: Cells) -> None:
    names, theirs = list(table.rows), cells.column.accuracies
    ran = {place: row for place, n in enumerate(names) if (row := cells.rows.get(n)) is not None}
    done = {place: row for place, row in ran.items() if row.accuracies}
    for place, row in done.items():
        axes.plot([row.mean, theirs[names[place]]], [place, place], color=_LINK, linewidth=1)
    axes.errorbar(
        [row.mean for row in done.values()], list(done), fmt="o", markersize=4, color=_OURS,
        xerr=[row.std or 0.0 for row in done.values()], capsize=2, label="ours, mean ± std",
    )  # fmt: skip
    axes.scatter(
        [theirs[name] for name in names], range(len(names)), marker="D", s=18, zorder=3,
        facecolors="white", edgecolors=_PUBLISHED, label="published",
    )  # fmt: skip
    for place in ran.keys() - done.keys():
        axes.text(0.02, place, "failed", transform=axes.get_yaxis_transform(), va="center")
    caption = "accuracy, %"
    if TEACHER in theirs and cells.teacher is not None:
        caption += f"\nteacher {cells.teacher:.2f}, published {theirs[TEACHER]:.2f}"
    column = cells.column
    axes.set_title(f"{column.paper}\n{column.teacher} → {column.student}", fontsize=8)
    axes.set_xlabel(caption, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), names)
    axes.margins(x=0.1)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
