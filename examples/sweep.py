"""How DSLoss's defaults were chosen: candidates compared on a validation split, never on test.

python examples/sweep.py cifar10 --data DIR --limit 5000 --amount 0.5 --teacher resnet20 \
    --student resnet8 --epochs 10 --teacher-epochs 15 --seeds 2

Takes ``train.py``'s options, and ``--group`` for a part of the candidates. Finished runs are kept
in ``<out>/results.json`` and skipped when the same command runs again.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from crossmodal import cli, report
from crossmodal.job import Session
from crossmodal.store import write_atomically

SEM_ONLY: Mapping[str, Any] = {"terms": ["SEM-1", "SEM-2"]}
DCM_ONLY: Mapping[str, Any] = {"terms": ["DCM-1", "DCM-2"]}
LINEAR: Mapping[str, Any] = {"projector": "linear", "center": True}
MLP: Mapping[str, Any] = {"projector": "mlp", "projector_dim": 512, "center": True}


def _sem(weight: float, **options: Any) -> dict[str, Any]:
    return {**SEM_ONLY, "gamma": (weight, 0.0), **options}


def _dcm(weight: float, **options: Any) -> dict[str, Any]:
    return {**DCM_ONLY, "gamma": (0.0, weight), **options}


# gamma is given for SEM / d and for DCM; every other option is DSLoss's.
GROUPS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "baselines": {"alone": ("alone", {}), "kd": ("kd", {})},
    "projector": {
        "SEM 5, MLP": ("ds", _sem(5, projector="mlp", projector_dim=512, center=False)),
        "SEM 5, MLP, centred": ("ds", _sem(5, projector="mlp", projector_dim=512, center=True)),
        "SEM 5, MLP, centred, teacher's trained": (
            "ds",
            _sem(5, projector="mlp", projector_dim=512, center=True, train_teacher_projector=True),
        ),
        "SEM 5, linear": ("ds", _sem(5, projector="linear", center=False)),
        "SEM 5, linear, centred": ("ds", _sem(5, **LINEAR)),
        "SEM 5, no projector, centred": ("ds", _sem(5, projector="none", center=True)),
    },
    "gamma": {
        f"SEM {weight:g}, {name}, centred": ("ds", _sem(weight, **kind))
        for weight in (5, 2, 20, 50)
        for name, kind in {"MLP": MLP, "linear": LINEAR}.items()
    },
    "weight": {
        f"default, gamma ({weight:g}, 0.02)": ("ds", {"gamma": (weight, 0.02)})
        for weight in (5.0, 2.0, 1.0, 0.5)
    },
    "lambd": {
        f"SEM 5, MLP, centred, lambd {lambd:g}": ("ds", _sem(5, **MLP, lambd=lambd))
        for lambd in (0.0, 5e-2, 0.5)
    },
    "dcm": {
        **{
            f"DCM {weight:g}, {sign}": ("ds", _dcm(weight, cross_sign=sign))
            for sign, weights in {"separate": (0.02, 0.2), "align": (0.02, 0.2, 1.0)}.items()
            for weight in weights
        },
        "DCM 0.2, align, median, raw": (
            "ds",
            _dcm(0.2, cross_sign="align", sigma="median", normalize=False),
        ),
        "DCM 0.2, align, flattened": ("ds", _dcm(0.2, cross_sign="align", pool="flatten")),
    },
    "both": {
        f"SEM 5, {name}, centred + DCM {weight:g}, {sign}": (
            "ds",
            {**kind, "gamma": (5.0, weight), "cross_sign": sign},
        )
        for name, kind in {"linear": LINEAR, "MLP": MLP}.items()
        for sign, weights in {"align": (0.02, 0.1, 0.5), "separate": (0.02,)}.items()
        for weight in weights
    },
    "printed": {
        f"as printed, gamma {gamma:g}": ("ds", {"variant": "printed", "gamma": gamma})
        for gamma in (1e-3, 1e-2)
    },
}


def main() -> int:
    """Train what is missing of the candidates; print and write them, the best first."""
    return cli.reported(_sweep)


def _sweep() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False)
    parser.add_argument("--group", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--seeds", default="2")
    options, rest = parser.parse_known_args()
    console = Console()
    wanted = cli.parse([*rest, "--seeds", options.seeds])
    wanted = replace(
        wanted,
        evaluate="val",
        out=wanted.out if "--out" in rest else Path("runs") / f"sweep-{wanted.dataset}",
        keep_going=True,
        command=shlex.join(["python", "examples/sweep.py", *sys.argv[1:]]),
    )
    session = Session(wanted, console)
    candidates = {k: v for group in options.group for k, v in GROUPS[group].items()}
    rows = report.rows(
        [
            session.run_student(method, seed, options=changes, label=label)
            for label, (method, changes) in candidates.items()
            for seed in wanted.seeds
        ]
    )
    rows.sort(key=lambda row: -row.mean if row.accuracies else math.inf)
    title = f"{wanted.dataset}, validation accuracy on poor images, student {wanted.student}"
    text = report.markdown(rows, None, title=title, command=wanted.command)
    write_atomically(wanted.out / "results.md", lambda path: path.write_text(text))
    console.print(text)


if __name__ == "__main__":
    sys.exit(main())
