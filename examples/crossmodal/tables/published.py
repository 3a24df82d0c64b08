"""The papers' accuracies, from ``published.toml``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from crossmodal.recipes import tomllib

_CONTENT = tomllib.loads(Path(__file__).with_name("published.toml").read_text())


def columns() -> dict[str, dict[str, float]]:
    """DSKD's accuracies by the paper's data set and by method; sums as ours are, ``nst+ds``."""
    found: dict[str, dict[str, float]] = {}
    for table in _CONTENT["dskd"]["tables"]:
        header, *lines = table.strip().splitlines()
        names = header.split()
        for line in lines:
            method, *values = line.split()
            for name, value in zip(names, values, strict=True):
                found.setdefault(name, {})[method] = float(value)
    return found


def networks() -> list[str]:
    return list(_CONTENT["dskd"]["networks"])


def column(dataset: str, teacher: str, student: str) -> tuple[str, Mapping[str, float]] | None:
    """The paper's name of a data set and its accuracies; None where ours is another experiment."""
    name = _CONTENT["dskd"]["columns"].get(dataset)
    if name is None or [teacher, student] != networks():
        return None
    return name, columns()[name]


def sembridge(job: str) -> Mapping[str, float]:
    """SemBridge's accuracies of a job by variant; empty where the paper has not got it."""
    return dict(_CONTENT["sembridge"].get(job, {}))
