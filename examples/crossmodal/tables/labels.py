"""Accuracy over the number of labels, with every pair distilled: a job for each number."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from crossmodal.cli import reported
from crossmodal.tables.series import Axis, own_options, run

ALL = "all"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; the codes of ``train.py``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return reported(lambda: _run(given))


def _run(arguments: list[str]) -> int:
    parser = own_options("labels.py")
    parser.add_argument("--labels", nargs="+", default=["100", "400", "1600", ALL])
    own, others = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(others):
        print("labels.py DATASET [--labels N|all ...] and every option of train.py, which has:\n")
    return run(axis(own.labels), others, own.out, arguments)


def axis(texts: Sequence[str]) -> Axis:
    """Every number once, ascending, ``all`` last.

    Raises:
        ValueError: a text is neither a number nor ``all``.
    """
    for text in texts:
        if text != ALL and not (text.isdecimal() and int(text) > 0):
            raise ValueError(f"--labels must be numbers such as 100, or all, got {text!r}")
    told = sorted(dict.fromkeys(texts), key=lambda text: (text == ALL, int(text.strip(ALL) or 0)))
    values = {text: [] if text == ALL else ["--labels", text] for text in told}
    label = "training images with a label"
    return Axis("labels", "labels", values, label, logarithmic=True, whole=ALL)
