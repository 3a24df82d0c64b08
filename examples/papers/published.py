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
OURS, PRINTED = "ds", "ds_printed"  # the paper's "Ours": with measured options, and as printed
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
    """A table's rows, and what they are where they are not the methods one by one.

    What has the paper's own method in it stands twice, as measured and as printed.
    """
    if table == "table6":
        rows = {**_ablation(OURS, "DSLoss"), **_ablation(PRINTED, "DSLoss, variant: printed")}
        return rows, ", each of DSLoss's terms left out"
    names = _DSKD["sums"]
    if table != "table7":
        names = (n for n in columns(*NETWORKS)["CML"] if "+" not in n and n != TEACHER)
    both = {n: None for name in names for n in (name, _as_printed(name))}
    return {n: summed(n) for n in both}, ", sums of two methods" if table == "table7" else ""


def _ablation(method: str, kind: str) -> dict[str, str]:
    rows = {"all": method, "without-SRM": f"[{{type: SupervisionLoss, weight: 0}}, {method}]"}
    terms = [name for name in ABLATION if name not in ("all", "SRM")]
    for left in terms:
        others = ", ".join(term for term in terms if term != left)
        rows[f"without-{left}"] = f"{{type: {kind}, terms: [{others}]}}"
    return rows if method == OURS else {f"printed-{name}": text for name, text in rows.items()}


def _as_printed(row: str) -> str:
    return "+".join(PRINTED if part == OURS else part for part in row.split("+"))


def of_paper(row: str) -> str:
    """The paper's row that one of ours stands beside: it has its own method once."""
    plain = row.removeprefix("printed-").removeprefix("without-")
    return "+".join(OURS if part == PRINTED else part for part in plain.split("+"))


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
        accuracies = ABLATION
    shown = rows if table in ("table6", "table7") else [TEACHER, *rows]
    if any(of_paper(row) not in accuracies for row in shown):
        return None
    return Column(dataset, paper, teacher, student, {n: accuracies[of_paper(n)] for n in shown})


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
