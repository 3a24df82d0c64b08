"""How DSLoss's defaults were chosen: candidates compared on a validation split, never on test.

python examples/sweep.py cifar10 --data DIR --limit 5000 --amount 0.5 --teacher resnet20 \
    --student resnet8 --epochs 10 --teacher-epochs 15 --seeds 2

Takes ``train.py``'s options, and ``--group`` for a part of the candidates. Finished runs are kept
in ``<out>/results.json`` and skipped when the same command runs again.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from crossmodal import cli, engine, job, report
from crossmodal.methods import resolve
from crossmodal.store import Results, write_atomically

SEM_ONLY: Mapping[str, Any] = {"dcm_1": False, "dcm_2": False}
DCM_ONLY: Mapping[str, Any] = {"sem_1": False, "sem_2": False}
LINEAR: Mapping[str, Any] = {"projector": "linear", "center": True}


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
        f"SEM {weight:g}, linear, centred": ("ds", _sem(weight, **LINEAR))
        for weight in (1, 2, 10, 20)
    },
    "lambd": {
        f"SEM 5, linear, centred, lambd {lambd:g}": ("ds", _sem(5, **LINEAR, lambd=lambd))
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
        "DCM 0.2, align, sigma 2": ("ds", _dcm(0.2, cross_sign="align", sigma=2.0)),
        "DCM 0.2, align, flattened": ("ds", _dcm(0.2, cross_sign="align", pool="flatten")),
    },
    "both": {
        f"SEM 5, linear, centred + DCM {weight:g}, {sign}": (
            "ds",
            {**LINEAR, "gamma": (5.0, weight), "cross_sign": sign},
        )
        for sign, weights in {"separate": (0.02,), "align": (0.02, 0.1, 0.5)}.items()
        for weight in weights
    },
    "printed": {
        f"as printed, gamma {gamma:g}": ("ds", {"variant": "printed", "gamma": gamma})
        for gamma in (1e-3, 1e-2, 0.1)
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False)
    parser.add_argument("--group", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--seeds", default="2")
    options, rest = parser.parse_known_args()
    command = shlex.join(["python", "examples/sweep.py", *sys.argv[1:]])
    console = Console()
    wanted = cli.parse([*rest, "--seeds", options.seeds], command)
    out = Path("runs") / f"sweep-{wanted.dataset}" if "--out" not in rest else wanted.out
    wanted = replace(wanted, evaluate="val", out=out)
    train, held_out = job.load_splits(wanted)
    teacher, teacher_settings = job.trained_teacher(wanted, train, console)
    results = Results(wanted.out)
    header = {"command": command, "dataset": wanted.dataset}
    runs = []
    candidates = {k: v for group in options.group for k, v in GROUPS[group].items()}
    for label, (method, changes) in candidates.items():
        overrides = {method: changes} if changes else {}
        for seed in wanted.seeds:
            needed = teacher_settings if resolve(method).parts else None
            settings = job.student_settings(wanted, train, seed, needed) | {"options": changes}
            done = results.find(label, seed, settings)
            if done is None:
                config = replace(wanted.config, seed=seed)
                outcome = engine.distil(
                    method, wanted.student, teacher, train, config, options=overrides,
                    console=console,
                )  # fmt: skip
                accuracy = engine.evaluate(
                    outcome.model,
                    held_out,
                    modality="poor",
                    statistics=train.statistics,
                    device=config.device,
                )
                done = {
                    "method": label,
                    "seed": seed,
                    "accuracy": accuracy,
                    "terms": outcome.terms,
                    "config": settings,
                }
                results.add(done, header=header)
            console.print(f"{label} seed {seed}: {done['accuracy']:.2f} %")
            runs.append(done)
    rows = sorted(report.rows(runs), key=lambda row: -row.mean)
    title = f"{wanted.dataset}, validation accuracy on poor images, student {wanted.student}"
    text = report.markdown(rows, None, title=title, command=command)
    write_atomically(wanted.out / "results.md", lambda path: path.write_text(text))
    console.print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
