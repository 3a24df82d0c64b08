"""The papers' accuracies, from ``published.toml``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crossmodal.recipes import tomllib

_CONTENT = tomllib.loads(Path(__file__).with_name("published.toml").read_text())


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


def sembridge(job: str) -> Mapping[str, float]:
    """SemBridge's accuracies of a job by variant; empty where the paper has not got it."""
    return dict(_CONTENT["sembridge"].get(job, {}))


def _blocks() -> list[Mapping[str, Any]]:
    return [_CONTENT["dskd"], *_CONTENT["dskd"]["others"]]
