"""The command line of ``data.py``: looks at images before anything is trained on them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from crossmodal.cli import Parser, reported
from data import Wanted
from data.check import check
from data.options import add_options, options
from crossmodal.near import did_you_mean
from crossmodal.recipes import data_sets


def main(arguments: Sequence[str] | None = None) -> int:
    """``check NAME --data DIR``; 0, 1 where an image cannot be used, 2 after one line on stderr."""
    given = sys.argv[1:] if arguments is None else arguments
    return reported(lambda: _checked(_parser().parse_args(given)))


def _checked(given: argparse.Namespace) -> int:
    known = data_sets(given.recipes)
    if given.dataset not in known:
        raise ValueError(
            f"unknown data set {given.dataset!r}; {did_you_mean(given.dataset, known)}known: "
            f"{', '.join(known)}"
        )
    entry = known[given.dataset]
    poor, own = options(given, entry)
    wanted = Wanted(
        given.data, given.download, poor=poor, amount=given.amount, pseudo=given.pseudo, options=own
    )
    found = check(entry, wanted)
    print("\n".join(found.lines))
    return int(found.bad > 0)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="data.py",
        allow_abbrev=False,
        description="Looks at images before anything is trained on them.",
    )
    add = parser.add_argument
    add("command", choices=("check",), metavar="check", help="read every image of a data set")
    add("dataset", metavar="NAME", help="a data set of recipes.toml")
    add_options(parser)
    add("--recipes", type=Path, metavar="FILE", help="a TOML file with data sets of your own")
    return parser
