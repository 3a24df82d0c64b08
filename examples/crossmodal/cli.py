"""The command lines of ``train.py`` and ``compare.py``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from crossmodal import comparison, job, options, outputs
from crossmodal.config import Config
from crossmodal.data import DATA_SETS
from crossmodal.options import given
from crossmodal.registry import METHODS
from crossmodal.report import Row
from crossmodal.unpaired import recipes

TRAINED = ("alone", "kd", "ds")  # train.py's methods, where none are named

# Where an error raised on purpose comes from; one from elsewhere keeps its traceback.
_OURS = ("crossmodal", "structkd")


def main(arguments: Sequence[str] | None = None) -> int:
    """``train.py``: returns 0, or 2 after one line on stderr for input that cannot work."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if set(given) & set(recipes.names()):
        from crossmodal.unpaired import cli as unpaired  # it reads its options with this module

        return reported(lambda: unpaired.run(given))
    return _run("train.py", TRAINED, outputs.write, given)


def compare(arguments: Sequence[str] | None = None) -> int:
    """``compare.py``: the same job over all methods, with the paper's column in its table."""
    return _run("compare.py", comparison.EVERYTHING, comparison.write, arguments, keep_going=True)


def reported(action: Callable[[], object]) -> int:
    """Run a script's action; returns 0, or 2 after one line for an error raised on purpose."""
    try:
        action()
    except (ValueError, TypeError, FloatingPointError) as error:
        if not _on_purpose(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(
    script: str,
    methods: Sequence[str],
    write: Callable[[job.Session, list[Row], Console], None],
    arguments: Sequence[str] | None,
    *,
    keep_going: bool = False,
) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)

    def action() -> None:
        console = Console()
        wanted = replace(parse(given, script=script, methods=methods), keep_going=keep_going)
        session, rows = job.run(wanted, console)
        write(session, rows, console)

    return reported(action)


def parse(
    arguments: Sequence[str], *, script: str = "train.py", methods: Sequence[str] = TRAINED
) -> job.Job:
    """Turn command-line arguments into a job; the data set's recipe fills what is not given."""
    wanted = _parser(script, methods).parse_args(arguments)
    if wanted.dataset not in DATA_SETS:
        unpaired = recipes.names() if script == "train.py" else []
        hint = options.did_you_mean(wanted.dataset, [*DATA_SETS, *unpaired])
        text = f"unknown data set {wanted.dataset!r}; {hint}known: {', '.join(DATA_SETS)}"
        raise ValueError(text + (f"; without pairs: {', '.join(unpaired)}" if unpaired else ""))
    recipe = DATA_SETS[wanted.dataset].recipe
    common: dict[str, Any] = {
        "batch_size": given(wanted.batch_size, recipe.batch_size),
        "lr": given(wanted.lr, recipe.lr),
        "warmup": given(wanted.warmup, recipe.warmup),
        "pad": recipe.pad,
        "flip": recipe.flip,
        "precision": wanted.precision,
        "device": options.device(wanted.device),
    }
    epochs = given(wanted.epochs, recipe.epochs)
    teacher_epochs = given(wanted.teacher_epochs, given(wanted.epochs, recipe.teacher_epochs))
    return job.Job(
        dataset=wanted.dataset,
        data_dir=wanted.data,
        download=wanted.download,
        limit=wanted.limit,
        amount=given(wanted.amount, recipe.amount),
        methods=options.names("--method", wanted.method, METHODS),
        seeds=options.seeds(wanted.seeds),
        teacher=wanted.teacher or recipe.teacher,
        student=wanted.student or recipe.student,
        teacher_config=Config(epochs=teacher_epochs, **common),
        config=Config(epochs=epochs, fresh_noise=wanted.fresh_noise, **common),
        evaluate=wanted.evaluate,
        out=wanted.out or Path("runs") / wanted.dataset,
        fresh=wanted.fresh,
        command=shlex.join(["python", f"examples/{script}", *arguments]),
    )


def _parser(script: str, methods: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=script,
        description="Train a teacher on clean images, and students on noisy ones by each method.",
        epilog="What is not given comes from the data set's recipe. Finished runs are kept and "
        "skipped when the same command runs again. train.py also has jobs without pairs, with "
        f"options of their own (NAME --help): {', '.join(recipes.names())}.",
    )
    add = parser.add_argument
    add("dataset", metavar="DATASET", help=f"one of {', '.join(DATA_SETS)}")
    add(
        "--method",
        "--methods",
        nargs="+",
        default=list(methods),
        metavar="NAME",
        help=f"{', '.join(METHODS)}, or sums such as kd+ds (default: {' '.join(methods)})",
    )
    add("--fresh-noise", action="store_true", help="new noise every epoch, not one fixed noisy set")
    options.add_common(parser, folder="runs/DATASET")
    return parser


def _on_purpose(error: BaseException) -> bool:
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = str(trace.tb_frame.f_globals.get("__name__", ""))
    return module.split(".")[0] in _OURS
