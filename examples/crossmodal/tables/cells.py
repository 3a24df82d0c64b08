"""What a folder holds of a published table's columns: runs, and the settings they were asked with.

A data set with its teacher has one folder, so that the columns of all its students, in all tables,
share the teacher and whatever is finished.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossmodal.methods import resolve
from crossmodal.runs.store import Results, key, lock, write_json
from crossmodal.tables import report
from crossmodal.tables.published import TEACHER, Column, Table

_FILE = "columns.json"


@dataclass(frozen=True)
class Cells:
    """A column of ours, of the settings that it was last asked with."""

    column: Column
    rows: Mapping[str, report.Row]  # by the table's rows, those that were run
    teacher: float | None  # its accuracy on clean images
    differences: Sequence[str]  # from the published settings, a line each

    def difference(self, name: str) -> float | None:
        """Ours minus the published accuracy, in points; None where ours is missing."""
        ours = self.teacher if name == TEACHER else self._mean(name)
        return None if ours is None else ours - self.column.accuracies[name]

    def _mean(self, name: str) -> float | None:
        row = self.rows.get(name)
        return row.mean if row is not None and row.accuracies else None


def folder(out: Path, column: Column) -> Path:
    return out / f"{column.dataset}-{column.teacher}"


def record(
    out: Path, column: Column, common: Mapping[str, Any], differences: Sequence[str],
    teacher: float | None = None,
) -> None:  # fmt: skip
    """Remember what a column was asked with: what its students have in common, in words too.

    Without the teacher's accuracy, that of the same settings stays where it is known.
    """
    place = folder(out, column)
    with lock(place, _FILE):
        records = _records(place)
        old = records.get(column.name)
        if teacher is None and old is not None and key(old["common"]) == key(dict(common)):
            teacher = old["teacher"]
        entry = {"common": dict(common), "differences": list(differences), "teacher": teacher}
        write_json(place / _FILE, records | {column.name: entry})


def stored(out: Path, table: Table, column: Column) -> Cells | None:
    """A column's cells as they lie in the folder; None where it was never asked for."""
    place = folder(out, column)
    entry = _records(place).get(column.name)
    if entry is None:
        return None
    # The last one of a method and seed, where the method itself has changed since.
    runs = {
        (run["method"], run["seed"]): run
        for run in Results(place).runs()
        if _common(run["config"], entry["common"]) == key(entry["common"])
    }
    by = {row.method: row for row in report.rows([runs[name] for name in sorted(runs)])}
    labels = {name: resolve(method).name for name, method in table.rows.items()}
    rows = {name: by[label] for name, label in labels.items() if label in by}
    return Cells(column, rows, entry["teacher"], entry["differences"])


def _common(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What a run has in common with the others of its job, as a key."""
    own = {name: value for name, value in config.items() if name != "loss"}
    own["training"] = {k: v for k, v in config["training"].items() if k != "seed"}
    if config["teacher"] is None:  # the lone student has none, and nothing of it falls
        own["teacher"] = wanted["teacher"]
        own["training"] |= {k: v for k, v in wanted["training"].items() if k == "falling"}
    return key(own)


def _records(place: Path) -> dict[str, Any]:
    path = place / _FILE
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        told = f"{path} is damaged ({error}); fix: move it away and run again"
        raise ValueError(told) from error
