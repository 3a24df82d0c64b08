"""The papers' accuracies, from ``published.toml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crossmodal.recipes import tomllib

_CONTENT = tomllib.loads(Path(__file__).with_name("published.toml").read_text())
TEACHER = "teacher"


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
    rows: Mapping[str, str]  # the method of each row, as :func:`crossmodal.methods.resolve` reads
    columns: tuple[Column, ...]


def tables() -> dict[str, Table]:
    """DSKD's Tables 2-7 by name: ``table2`` and so on."""
    found = {}
    for name, datasets in _CONTENT["dskd"]["contents"].items():
        rows, subject = _rows(name)
        made = tuple(
            column
            for dataset in datasets
            for pair in pairs()
            if (column := _column(name, dataset, *pair, rows)) is not None
        )
        papers = " and ".join(dict.fromkeys(column.paper for column in made))
        found[name] = Table(name, f"Table {name[5:]}: {papers}{subject}", rows, made)
    return found


def _rows(table: str) -> tuple[Mapping[str, str], str]:
    """A table's rows, and what they are where they are not the methods one by one."""
    if table == "table6":
        terms = [name for name in ablation() if name not in ("all", "SRM")]
        left = {t: ",".join(other for other in terms if other != t) for t in terms}
        rows = {"all": "ds", "without-SRM": "ds:supervision=0"}
        rows |= {f"without-{term}": f"ds:terms=[{others}]" for term, others in left.items()}
        return rows, ", each of DSLoss's terms left out"
    if table == "table7":
        return {name: name for name in _CONTENT["dskd"]["sums"]}, ", sums of two methods"
    single = (name for name in columns()["CML"] if "+" not in name and name != TEACHER)
    return {name: name for name in single}, ""


def _column(
    table: str, dataset: str, teacher: str, student: str, rows: Mapping[str, str]
) -> Column | None:
    """The table's column; None where the paper does not have it."""
    found = column(dataset, teacher, student)
    if found is None:
        return None
    paper, accuracies = found
    if table == "table6":
        if [teacher, student] != networks():
            return None
        accuracies = {row: ablation()[row.removeprefix("without-")] for row in rows}
    if not accuracies.keys() >= rows.keys():
        return None
    shown = rows if table in ("table6", "table7") else [TEACHER, *rows]
    return Column(dataset, paper, teacher, student, {row: accuracies[row] for row in shown})


def columns(teacher: str = "", student: str = "") -> dict[str, dict[str, float]]:
    """DSKD's accuracies by the paper's data set and by method; sums as ours are, ``nst+ds``.

    Args:
        teacher, student: of :func:`pairs`; without them the paper's first pair. Empty for others.
    """
    wanted = [teacher, student] if teacher or student else networks()
    found: dict[str, dict[str, float]] = {}
    for block in _blocks():
        if block["networks"] != wanted:
            continue
        for table in block["tables"]:
            header, *lines = table.strip().splitlines()
            names = header.split()
            for line in lines:
                method, *values = line.split()
                for name, value in zip(names, values, strict=True):
                    found.setdefault(name, {})[method] = float(value)
    return found


def pairs() -> list[tuple[str, str]]:
    """DSKD's teachers and students, in the order of its tables."""
    return [(block["networks"][0], block["networks"][1]) for block in _blocks()]


def networks() -> list[str]:
    return list(_CONTENT["dskd"]["networks"])


def ablation() -> dict[str, float]:
    """DSKD's Table 6: ``all`` terms, and what is left without each, by the terms' names."""
    return dict(_CONTENT["dskd"]["ablation"])


def column(dataset: str, teacher: str, student: str) -> tuple[str, Mapping[str, float]] | None:
    """The paper's name of a data set and its accuracies; None where ours is another experiment."""
    name = _CONTENT["dskd"]["columns"].get(dataset)
    found = columns(teacher, student)
    return (name, found[name]) if name in found else None


def protocol() -> Mapping[str, Any]:
    """How DSKD trains, by a recipe's fields."""
    return dict(_CONTENT["dskd"]["protocol"])


def unmentioned() -> Mapping[str, Any]:
    """A recipe's fields without what DSKD does not mention."""
    return dict(_CONTENT["dskd"]["unmentioned"])


def noise(dataset: str) -> float | None:
    """The fraction of the pixels that DSKD replaces; None for two sensors."""
    return _CONTENT["dskd"]["noise"].get(dataset)


def sembridge(job: str) -> Mapping[str, float]:
    """SemBridge's accuracies of a job by variant; empty where the paper has not got it."""
    return dict(_CONTENT["sembridge"].get(job, {}))


def _blocks() -> list[Mapping[str, Any]]:
    return [_CONTENT["dskd"], *_CONTENT["dskd"]["others"]]
