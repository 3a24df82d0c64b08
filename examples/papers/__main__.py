"""The papers' tables, grids and formulas: ``python examples/papers table3 --data DIR``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from job import reported
from papers import geometry, motivation, published, reports, sembridge, series, surgery, tables
from recipe import near

COMMANDS: dict[str, tuple[str, Callable[[Sequence[str], str], int]]] = {
    **{name: (f"{table.title}, beside the published numbers", partial(tables.run, name))
       for name, table in published.tables().items()},
    "compare": ("RECIPE: all methods, in the shape of DSKD's Table 2", reports.compare),
    "ablation": ("RECIPE: DSLoss without each of its terms, the rows of DSKD's Table 6",
                 reports.ablation),
    "sweep": ("RECIPE: candidates for defaults on a validation split", reports.sweep),
    "labels": ("RECIPE: accuracy over the number of labels", series.labels),
    "gap": ("RECIPE: accuracy over what makes the free pairs poor", series.gap),
    "axis": ("RECIPE: accuracy over one option, on a validation split", series.axis),
    "sembridge": ("RECIPE: nothing paired, SemBridge's rows, transport cost and matches",
                  sembridge.sembridge),
    "plugin": ("RECIPE: methods at random in the class and within SemBridge", sembridge.plugin),
    "surgery": ("RECIPE: rules that keep distillation's gradient from harming the labels'",
                surgery.surgery),
    "figures": ("RECIPE: samples, curves, self-similarity and t-SNE of trained students",
                reports.drawn),
    "motivation": ("RECIPE: five classifiers on either modality, dimensional structure in numbers",
                   motivation.motivation),
    "geometry": ("BOXES.csv: where a camera looks for what a radar sees, DSKD's Eq. 13-16",
                 geometry.command),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """0, 1 where a row failed or a column could not be run, 2 after one line on stderr."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    return reported(lambda: _run(given))


def _run(given: list[str]) -> int:
    name, *others = given or ["--help"]
    if name in ("-h", "--help"):
        print("usage: papers COMMAND [options], and every option of train.py\n")
        print("\n".join(f"  {name:10} {told}" for name, (told, _) in COMMANDS.items()))
        print("\npapers COMMAND --help has a command's own options, papers --list all tables.")
        return 0 if given else 2
    if name == "--list":
        print("\n\n".join(tables.listed(table) for table in published.tables().values()))
        return 0
    if name not in COMMANDS:
        hint = near(name, COMMANDS)
        raise ValueError(f"unknown command {name!r}; {hint}known: {', '.join(COMMANDS)}")
    return COMMANDS[name][1](others, shlex.join(["python", "examples/papers", *given]))


if __name__ == "__main__":
    sys.exit(main())
