"""The papers' accuracies, from ``published.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_CONTENT = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
_DSKD = _CONTENT["dskd"]
TEACHER = "teacher"
NETWORKS: list[str] = _DSKD["blocks"][0]["networks"]
PAIRS: list[tuple[str, str]] = [tuple(block["networks"]) for block in _DSKD["blocks"]]
ABLATION: Mapping[str, float] = _DSKD["ablation"]  # ``all`` terms, and what is left without each
PROTOCOL: Mapping[str, Any] = _DSKD["protocol"]  # how DSKD trains, by a recipe's options
UNMENTIONED: Mapping[str, Any] = _DSKD["unmentioned"]  # likewise, without what it does not mention
NOISE: Mapping[str, float] = _DSKD["noise"]  # the fraction of the pixels that DSKD replaces
SEMBRIDGE: Mapping[str, Mapping[str, float]] = _CONTENT["sembridge"]  # by recipe and row


@dataclass(frozen=True)
class Column:
    """A data set with a teacher and a student, by our names, and the accuracies by row."""

    dataset: str
    paper: str  # the data set in the paper
    teacher: str
    student: str
    # With the teacher's on clean images as ``TEACHER``.
    accuracies: Mapping[str, float] = field(hash=False)

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.student}"

    @property
    def title(self) -> str:
        return f"{self.paper}, {self.teacher} → {self.student}"


@dataclass(frozen=True)
class Table:
    """One of DSKD's Tables 2-7."""

    name: str
    title: str
    rows: Mapping[str, str]  # the criterion of each row, as ``--criterion`` takes it
    columns: tuple[Column, ...]


def tables() -> dict[str, Table]:
    """DSKD's Tables 2-7 by name: ``table2`` and so on."""
    found = {}
    for name, datasets in _DSKD["contents"].items():
        rows, subject = _rows(name)
        made = [_column(name, dataset, *pair, rows) for dataset in datasets for pair in PAIRS]
        columns = tuple(column for column in made if column is not None)
        papers = " and ".join(dict.fromkeys(column.paper for column in columns))
        found[name] = Table(name, f"Table {name[5:]}: {papers}{subject}", rows, columns)
    return found


def _rows(table: str) -> tuple[Mapping[str, str], str]:
    """A table's rows, and what they are where they are not the methods one by one."""
    if table == "table6":
        terms = [name for name in ABLATION if name not in ("all", "SRM")]
        rows = {"all": "ds", "without-SRM": "[{type: SupervisionLoss, weight: 0}, ds]"}
        for left in terms:
            others = ", ".join(term for term in terms if term != left)
            rows[f"without-{left}"] = f"{{type: DSLoss, terms: [{others}]}}"
        return rows, ", each of DSLoss's terms left out"
    if table == "table7":
        return {name: summed(name) for name in _DSKD["sums"]}, ", sums of two methods"
    single = (name for name in columns(*NETWORKS)["CML"] if "+" not in name and name != TEACHER)
    return {name: name for name in single}, ""


def summed(name: str) -> str:
    """``nst+ds`` as a criterion's spec: ``[nst, ds]``."""
    return f"[{name.replace('+', ', ')}]" if "+" in name else name


def _column(
    table: str, dataset: str, teacher: str, student: str, rows: Mapping[str, str]
) -> Column | None:
    """The table's column; None where the paper does not have it."""
    found = column(dataset, teacher, student)
    if found is None or (table == "table6" and [teacher, student] != NETWORKS):
        return None
    paper, accuracies = found
    if table == "table6":
        accuracies = {row: ABLATION[row.removeprefix("without-")] for row in rows}
    if not accuracies.keys() >= rows.keys():
        return None
    shown = rows if table in ("table6", "table7") else [TEACHER, *rows]
    return Column(dataset, paper, teacher, student, {row: accuracies[row] for row in shown})


def columns(teacher: str, student: str) -> dict[str, dict[str, float]]:
    """DSKD's accuracies by the paper's data set and by method; empty for networks of no table."""
    found: dict[str, dict[str, float]] = {}
    for block in _DSKD["blocks"]:
        if block["networks"] != [teacher, student]:
            continue
        for table in block["tables"]:
            header, *lines = table.strip().splitlines()
            for line in lines:
                method, *values = line.split()
                for name, value in zip(header.split(), values, strict=True):
                    found.setdefault(name, {})[method] = float(value)
    return found


def column(dataset: str, teacher: str, student: str) -> tuple[str, Mapping[str, float]] | None:
    """The paper's name of a data set and its accuracies; None where ours is another experiment."""
    name, found = _DSKD["columns"].get(dataset), columns(teacher, student)
    return (name, found[name]) if name in found else None
