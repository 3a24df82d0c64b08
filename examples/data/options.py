"""What the command line says of images, for every script that reads them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from data.poverty import EXAMPLES
from crossmodal.recipes import DataSet

# An option of the same name stands in the entries of the data sets that have it.
_OWN = ("rich", "size", "classes", "test_fraction")


def add_options(parser: Any) -> None:
    """Where images lie, and what is done with them."""
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="where the images lie; the digits need none")
    add("--download", action="store_true", help="fetch the data set into --data")
    poor = f"what makes one modality poor: {EXAMPLES}; for pairs, the poor side's folder"
    add("--poor", metavar="KIND|DIR", help=poor)
    add("--amount", type=float, metavar="A", help="fraction that plain noise replaces")
    told = "without pairs, what makes the teacher's images poor for a bridge (as --poor)"
    add("--pseudo", default="", metavar="KIND", help=told)
    add("--rich", metavar="DIR", help="the rich side's folder, for pairs")
    add("--size", type=int, metavar="N", help="bring images to NxN, their middle kept")
    add("--classes", metavar="FILE", help="the classes of imagenet100, an id a line")
    told = "of the images, for testing; only where a folder has no test (0.2)"
    add("--test-fraction", type=float, metavar="F", help=told)


def options(given: argparse.Namespace, entry: DataSet) -> tuple[str, dict[str, Any]]:
    """What makes images poor, and the options of the data set's reader.

    Raises:
        ValueError: an option is not one of this data set's.
    """
    found = {name: getattr(given, name) for name in _OWN if getattr(given, name) is not None}
    poor = given.poor or ""
    if poor and "poor" in entry.options:
        found["poor"], poor = poor, ""
    for name in found:
        if name not in entry.options:
            known = ", ".join(f"--{key.replace('_', '-')}" for key in entry.options)
            raise ValueError(
                f"--{name.replace('_', '-')} is not for {entry.name}, which has "
                f"{known or 'no options of its own'}"
            )
    if given.amount is not None and not entry.scenes:
        kinds = [poor or entry.poor, *filter(None, [given.pseudo])]
        # A number behind the kind goes before the amount.
        if not any(kind.rstrip(":") in ("noise", "noisy") for kind in kinds):
            raise ValueError(
                "--amount has no effect here: it is the amount of plain noise, and --poor is "
                f"{' and '.join(kinds)}; fix: leave it out, or write noise:{given.amount:g}"
            )
    if found.get("size", 1) < 1:
        raise ValueError(f"--size must be at least 1, got {found['size']}")
    return poor, found
