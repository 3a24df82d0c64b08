"""The command line of the unpaired jobs, reached through ``train.py``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from crossmodal.cli import device_of, seeds_of
from crossmodal.config import Config
from crossmodal.data import DATA_SETS
from crossmodal.unpaired import job, outputs, recipes, scenes, views
from crossmodal.unpaired.variants import VARIANTS, Weights

_T = TypeVar("_T")


def run(arguments: Sequence[str]) -> None:
    """Train what is missing, print the table, write results and figures."""
    console = Console()
    session, runs = job.run(parse(arguments), console)
    outputs.write(session, runs, console)


def parse(arguments: Sequence[str]) -> job.UnpairedJob:
    """Turn command-line arguments into a job; the recipe fills what is not given."""
    options = _parser().parse_args(arguments)
    if options.job in recipes.SCENES:
        return _scenes(options, arguments)
    return _embedded(options, arguments)


def _embedded(options: argparse.Namespace, arguments: Sequence[str]) -> job.UnpairedJob:
    dataset = options.job.removeprefix(recipes.PREFIX)
    recipe, matcher = DATA_SETS[dataset].recipe, recipes.matcher_recipe(dataset)
    if options.rgb_bands is not None:
        raise ValueError(f"--rgb-bands is for {', '.join(recipes.SCENES)}, not for {options.job}")
    images = _images(options, pad=recipe.pad, flip=recipe.flip)
    schedule = {
        **images,
        "batch_size": _given(options.batch_size, recipe.batch_size),
        "lr": _given(options.lr, recipe.lr),
    }
    # Half the images: twice the passes make as many steps.
    epochs = _given(options.epochs, 2 * recipe.epochs)
    return job.UnpairedJob(
        open=partial(
            views.open_embedded,
            dataset,
            options.poor or "noisy",
            amount=_given(options.amount, recipe.amount),
            data_dir=options.data,
            download=options.download,
            limit=options.limit,
            evaluate=options.evaluate,
        ),
        variants=_variants(options.variant, VARIANTS),
        teacher=options.teacher or recipe.teacher,
        student=options.student or recipe.student,
        matcher=options.matcher or matcher.encoder,
        teacher_config=Config(epochs=_epochs(options, 2 * recipe.teacher_epochs), **schedule),
        config=Config(epochs=epochs, **schedule),
        matcher_config=recipes.matcher_config(
            _given(options.matcher_epochs, _given(options.epochs, matcher.epochs)), **images
        ),
        schedule=recipes.scaled(recipes.SCENES["s2s_eu"].rematch, epochs),
        **_common(options, arguments),
    )


def _scenes(options: argparse.Namespace, arguments: Sequence[str]) -> job.UnpairedJob:
    recipe = recipes.SCENES[options.job]
    if options.amount is not None or options.poor is not None or options.download:
        raise ValueError(
            f"--amount, --poor and --download are for {recipes.PREFIX}...: {options.job} has a "
            "poor modality of its own"
        )
    images = _images(options, pad=0, flip=True)
    schedule = {
        **images,
        "batch_size": _given(options.batch_size, recipe.batch_size),
        "lr": _given(options.lr, recipe.lr),
        "weight_decay": 0.0,
        "kind": "adam",
    }
    epochs = _given(options.epochs, recipe.epochs)
    return job.UnpairedJob(
        open=partial(
            scenes.open_scenes,
            options.job,
            options.data,
            bands=recipe.bands,
            rgb=tuple(options.rgb_bands or recipe.rgb),
            limit=options.limit,
            evaluate=options.evaluate,
        ),
        # Only images that were made poor have rich originals to pair them with.
        variants=_variants(options.variant, [name for name in VARIANTS if name != "paired"]),
        teacher=options.teacher or recipe.teacher,
        student=options.student or recipe.student,
        matcher=options.matcher or recipe.matcher,
        teacher_config=recipes.AdamConfig(epochs=_epochs(options, recipe.epochs), **schedule),
        config=recipes.AdamConfig(epochs=epochs, **schedule),
        matcher_config=recipes.matcher_config(
            _given(options.matcher_epochs, _given(options.epochs, recipe.matcher_epochs)), **images
        ),
        schedule=recipes.scaled(recipe.rematch, epochs),
        **_common(options, arguments),
    )


def _common(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    return {
        "name": options.job,
        "seeds": seeds_of(options.seeds),
        "criterion": options.criterion,
        "weights": Weights(*options.weights),
        "out": options.out or Path("runs") / options.job,
        "fresh": options.fresh,
        "command": shlex.join(["python", "examples/train.py", *arguments]),
    }


def _images(options: argparse.Namespace, **augmentation: Any) -> dict[str, Any]:
    device = device_of(options.device)
    return {**augmentation, "precision": options.precision, "device": device}


def _epochs(options: argparse.Namespace, default: int) -> int:
    """The teacher's: --epochs moves both."""
    epochs: int = _given(options.teacher_epochs, _given(options.epochs, default))
    return epochs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a matcher and a teacher on rich images, and students on poor images of "
        "other samples, by each variant of SemBridge.",
        epilog="What is not given comes from the recipe. Finished runs are kept and skipped when "
        "the same command runs again.",
    )
    add = parser.add_argument
    weights = Weights()
    add("job", metavar="JOB", help=f"one of {', '.join(recipes.names())}")
    add("--data", type=Path, metavar="DIR", help="where the images lie; unpaired-mnist needs none")
    add("--download", action="store_true", help="fetch the data set into --data")
    add(
        "--variant",
        "--variants",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(VARIANTS)} (default: all)",
    )
    add("--criterion", default="kd", metavar="NAME", help="any of train.py's methods (default: kd)")
    add(
        "--weights",
        nargs=3,
        type=float,
        metavar=("TASK", "KD", "SKA"),
        default=[weights.task, weights.kd, weights.ska],
        help="of the student's loss (default: 0.3 0.4 0.003, as published)",
    )
    add("--poor", choices=views.POORS, help="the poor modality (default: noisy)")
    add(
        "--rgb-bands",
        nargs=3,
        type=int,
        metavar=("R", "G", "B"),
        help="positions of red, green and blue among the bands, from 0",
    )
    add("--amount", type=float, metavar="A", help="fraction of the pixels that noise replaces")
    add("--teacher", metavar="NAME", help="a timm model, or one of ours such as resnet32x4")
    add("--student", metavar="NAME", help="likewise")
    add("--matcher", metavar="NAME", help="likewise; of both the matcher's encoders")
    add("--epochs", type=int, metavar="N", help="passes over the student's images")
    add("--teacher-epochs", type=int, metavar="N", help="the teacher's (default: as --epochs)")
    add("--matcher-epochs", type=int, metavar="N", help="the matcher's (default: as --epochs)")
    add("--seeds", default="3", metavar="N|LIST", help="how many, or which as 0,1,2 (default: 3)")
    add("--limit", type=int, metavar="N", help="N training images only, before they are halved")
    add("--batch-size", type=int, metavar="N", help="images a step")
    add("--lr", type=float, metavar="LR", help="learning rate at the start of the cosine")
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast")
    add("--evaluate", choices=("test", "val"), default="test", help="val is a tenth of train")
    add("--out", type=Path, metavar="DIR", help="for all that is written (default: runs/JOB)")
    add("--fresh", action="store_true", help="train students again that are already finished")
    return parser


def _variants(given: Sequence[str] | None, known: Iterable[str]) -> tuple[str, ...]:
    if given is None:
        return tuple(known)
    names = [name.strip() for part in given for name in part.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--variant names none; known: {', '.join(known)}")
    return tuple(dict.fromkeys(names))


def _given(value: _T | None, default: _T) -> _T:
    return default if value is None else value
