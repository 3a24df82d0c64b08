"""The command lines of ``train.py`` and ``compare.py``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from crossmodal import comparison, job, outputs
from crossmodal.config import Config
from crossmodal.data import DATA_SETS, data_set
from crossmodal.registry import METHODS
from crossmodal.report import Row
from crossmodal.unpaired import recipes

TRAINED = ("alone", "kd", "ds")  # train.py's methods, where none are named

_T = TypeVar("_T")

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
    options = _parser(script, methods).parse_args(arguments)
    recipe = data_set(options.dataset).recipe
    device = device_of(options.device)

    def given(value: _T | None, default: _T) -> _T:
        return default if value is None else value

    common: dict[str, Any] = {
        "batch_size": given(options.batch_size, recipe.batch_size),
        "lr": given(options.lr, recipe.lr),
        "pad": recipe.pad,
        "flip": recipe.flip,
        "precision": options.precision,
        "device": device,
    }
    epochs = given(options.epochs, recipe.epochs)
    # A teacher of 300 epochs behind a student of 20 is nobody's wish: --epochs moves both.
    teacher_epochs = given(options.teacher_epochs, given(options.epochs, recipe.teacher_epochs))
    return job.Job(
        dataset=options.dataset,
        data_dir=options.data,
        download=options.download,
        limit=options.limit,
        amount=given(options.amount, recipe.amount),
        methods=_methods(options.method),
        seeds=seeds_of(options.seeds),
        teacher=options.teacher or recipe.teacher,
        student=options.student or recipe.student,
        teacher_config=Config(epochs=teacher_epochs, **common),
        config=Config(epochs=epochs, fresh_noise=options.fresh_noise, **common),
        evaluate=options.evaluate,
        out=options.out or Path("runs") / options.dataset,
        fresh=options.fresh,
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
    add("--data", type=Path, metavar="DIR", help="where the images lie; mnist needs none")
    add("--download", action="store_true", help="fetch the data set into --data")
    add(
        "--method",
        "--methods",
        nargs="+",
        default=list(methods),
        metavar="NAME",
        help=f"{', '.join(METHODS)}, or sums such as kd+ds (default: {' '.join(methods)})",
    )
    add("--teacher", metavar="NAME", help="a timm model, or one of ours such as resnet32x4")
    add("--student", metavar="NAME", help="likewise")
    add(
        "--amount",
        type=float,
        metavar="A",
        help="fraction of the pixels that noise replaces, 0 to 1",
    )
    add("--fresh-noise", action="store_true", help="new noise every epoch, not one fixed noisy set")
    add("--epochs", type=int, metavar="N", help="passes over the training images")
    add("--teacher-epochs", type=int, metavar="N", help="the teacher's (default: as --epochs)")
    add("--seeds", default="3", metavar="N|LIST", help="how many, or which as 0,1,2 (default: 3)")
    add("--limit", type=int, metavar="N", help="train on N images only, all classes in proportion")
    add("--batch-size", type=int, metavar="N", help="images a step")
    add("--lr", type=float, metavar="LR", help="learning rate at the start of the cosine")
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast")
    add(
        "--evaluate",
        choices=("test", "val"),
        default="test",
        help="val holds a tenth of train out, for choosing settings (default: test)",
    )
    add("--out", type=Path, metavar="DIR", help="for all that is written (default: runs/DATASET)")
    add("--fresh", action="store_true", help="train students again that are already finished")
    return parser


def _methods(given: Sequence[str]) -> tuple[str, ...]:
    names = [name.strip() for part in given for name in part.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--method names none; known: {', '.join(METHODS)}")
    return tuple(dict.fromkeys(names))


def seeds_of(given: str) -> tuple[int, ...]:
    """``--seeds``: a count, or a list."""
    try:
        numbers = [int(part) for part in given.split(",")]
    except ValueError:
        numbers = []
    seeds = tuple(range(numbers[0])) if len(numbers) == 1 else tuple(dict.fromkeys(numbers))
    if not seeds or min(seeds) < 0:
        raise ValueError(
            f"--seeds must be a count such as 3 or a list such as 0,1,2, got {given!r}"
        )
    return seeds


def device_of(name: str) -> str:
    """``--device``: ``auto`` resolved, others tried."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name!r} cannot be used: {reason}") from error
    return name


def _on_purpose(error: BaseException) -> bool:
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = str(trace.tb_frame.f_globals.get("__name__", ""))
    return module.split(".")[0] in _OURS
