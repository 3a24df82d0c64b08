"""Accuracy over the gap between the student's images and the free pairs: a job for each gap."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from crossmodal.cli import reported
from crossmodal.methods import ALONE
from crossmodal.methods.variants import BRIDGES
from crossmodal.tables.series import Axis, own_options, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; the codes of ``train.py``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return reported(lambda: _run(given))


def _run(arguments: list[str]) -> int:
    parser = own_options("gap.py")
    parser.add_argument("--pseudo", nargs="+", metavar="KIND")
    parser.add_argument("--variant", "--variants", nargs="+", default=[])
    own, others = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(others):
        print("gap.py DATASET --pseudo KIND [KIND ...] and every option of train.py, which has:\n")
    elif not own.pseudo:
        raise ValueError(
            "--pseudo names what makes the free pairs poor, such as noise:0.3 noise:0.7"
        )
    rows = own.variant or [ALONE, *BRIDGES]
    return run(axis(own.pseudo or []), [*others, "--variant", *rows], own.out, arguments)


def axis(kinds: Sequence[str]) -> Axis:
    """Every kind once, in the order given."""
    values = {kind: ["--pseudo", kind] for kind in dict.fromkeys(kinds)} or {"": []}
    return Axis("gap", "pseudo", values, "what makes the free pairs poor")
