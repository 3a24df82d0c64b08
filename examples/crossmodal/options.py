"""What all command lines of the examples share: options, and how their texts are read."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

_T = TypeVar("_T")


def add_common(parser: argparse.ArgumentParser, *, folder: str) -> None:
    """Add the options of every job to its own; ``folder`` names the default output in the help."""
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="where the images lie; the digits need none")
    add("--download", action="store_true", help="fetch the data set into --data")
    add("--teacher", metavar="NAME", help="a timm model, or one of ours such as resnet32x4")
    add("--student", metavar="NAME", help="likewise")
    add("--amount", type=float, metavar="A", help="fraction of the pixels that noise replaces")
    add("--epochs", type=int, metavar="N", help="passes over the student's images")
    # A teacher of 300 epochs behind a student of 20 is nobody's wish: --epochs moves both.
    add("--teacher-epochs", type=int, metavar="N", help="the teacher's (default: as --epochs)")
    add("--seeds", default="3", metavar="N|LIST", help="how many, or which as 0,1,2 (default: 3)")
    add("--limit", type=int, metavar="N", help="N training images only, all classes in proportion")
    add("--batch-size", type=int, metavar="N", help="images a step")
    add("--lr", type=float, metavar="LR", help="the largest learning rate")
    add("--warmup", type=float, metavar="P", help="share of the training over which it first rises")
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast")
    add(
        "--evaluate",
        choices=("test", "val"),
        default="test",
        help="val holds a tenth of train out, for choosing settings (default: test)",
    )
    add("--out", type=Path, metavar="DIR", help=f"for all that is written (default: {folder})")
    add("--fresh", action="store_true", help="train students again that are already finished")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for an error about a name that is not known; empty where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def given(value: _T | None, default: _T) -> _T:
    """What was given, or the recipe's."""
    return default if value is None else value


def names(option: str, texts: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    """A list of names, by spaces or commas, each once."""
    found = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    if not found:
        raise ValueError(f"{option} names none; known: {', '.join(known)}")
    return tuple(dict.fromkeys(found))


def seeds(text: str) -> tuple[int, ...]:
    """``--seeds``: a count, or a list."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    found = tuple(range(numbers[0])) if len(numbers) == 1 else tuple(dict.fromkeys(numbers))
    if not found or min(found) < 0:
        raise ValueError(f"--seeds must be a count such as 3 or a list such as 0,1,2, got {text!r}")
    return found


def device(name: str) -> str:
    """``--device``: ``auto`` resolved, others tried."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name!r} cannot be used: {reason}") from error
    return name
