"""The command line of the unpaired jobs, reached through ``train.py``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from crossmodal import options
from crossmodal.config import Config
from crossmodal.data import DATA_SETS
from crossmodal.options import given
from crossmodal.unpaired import job, outputs, recipes, scenes, training, views
from crossmodal.unpaired.variants import VARIANTS, Weights
from structkd.matching.dataset import RematchSchedule


def run(arguments: Sequence[str]) -> None:
    """Train what is missing, print the table, write results and figures."""
    console = Console()
    session, runs = job.run(parse(arguments), console)
    outputs.write(session, runs, console)


def parse(arguments: Sequence[str]) -> job.UnpairedJob:
    """Turn command-line arguments into a job; the recipe fills what is not given."""
    wanted = _parser().parse_args(arguments)
    if wanted.job in recipes.SCENES:
        return _scenes(wanted, arguments)
    return _embedded(wanted, arguments)


def _embedded(wanted: argparse.Namespace, arguments: Sequence[str]) -> job.UnpairedJob:
    dataset = wanted.job.removeprefix(recipes.PREFIX)
    recipe, matcher = DATA_SETS[dataset].recipe, recipes.matcher_recipe(dataset)
    if wanted.rgb_bands is not None:
        raise ValueError(f"--rgb-bands is for {', '.join(recipes.SCENES)}, not for {wanted.job}")
    images = _images(wanted, pad=recipe.pad, flip=recipe.flip)
    schedule = {
        **images,
        "batch_size": given(wanted.batch_size, recipe.batch_size),
        "lr": given(wanted.lr, recipe.lr),
        "warmup": given(wanted.warmup, recipe.warmup),
    }
    # Half the images: twice the passes make as many steps.
    epochs = given(wanted.epochs, 2 * recipe.epochs)
    return job.UnpairedJob(
        open=partial(
            views.open_embedded,
            dataset,
            wanted.poor or "noisy",
            amount=given(wanted.amount, recipe.amount),
            data_dir=wanted.data,
            download=wanted.download,
            limit=wanted.limit,
            evaluate=wanted.evaluate,
        ),
        variants=_variants(wanted.variant, list(VARIANTS)),
        teacher=wanted.teacher or recipe.teacher,
        student=wanted.student or recipe.student,
        matcher=wanted.matcher or matcher.encoder,
        teacher_config=Config(epochs=_epochs(wanted, 2 * recipe.teacher_epochs), **schedule),
        config=Config(epochs=epochs, **schedule),
        matcher_config=recipes.matcher_config(
            given(wanted.matcher_epochs, given(wanted.epochs, matcher.epochs)), **images
        ),
        rematching=_rematching(wanted, recipes.SCENES["s2s_eu"].rematch, epochs),
        **_common(wanted, arguments),
    )


def _scenes(wanted: argparse.Namespace, arguments: Sequence[str]) -> job.UnpairedJob:
    recipe = recipes.SCENES[wanted.job]
    if wanted.amount is not None or wanted.poor is not None or wanted.download:
        raise ValueError(
            f"--amount, --poor and --download are for {recipes.PREFIX}...: {wanted.job} has a "
            "poor modality of its own"
        )
    images = _images(wanted, pad=0, flip=True)
    schedule = {
        **images,
        "batch_size": given(wanted.batch_size, recipe.batch_size),
        "lr": given(wanted.lr, recipe.lr),
        "warmup": given(wanted.warmup, 0.0),
        "weight_decay": 0.0,
        "kind": "adam",
    }
    epochs = given(wanted.epochs, recipe.epochs)
    return job.UnpairedJob(
        open=partial(
            scenes.open_scenes,
            wanted.job,
            wanted.data,
            bands=recipe.bands,
            rgb=tuple(wanted.rgb_bands or recipe.rgb),
            limit=wanted.limit,
            evaluate=wanted.evaluate,
        ),
        # Only images that were made poor have rich originals to pair them with.
        variants=_variants(wanted.variant, [name for name in VARIANTS if name != "paired"]),
        teacher=wanted.teacher or recipe.teacher,
        student=wanted.student or recipe.student,
        matcher=wanted.matcher or recipe.matcher,
        teacher_config=recipes.AdamConfig(epochs=_epochs(wanted, recipe.epochs), **schedule),
        config=recipes.AdamConfig(epochs=epochs, **schedule),
        matcher_config=recipes.matcher_config(
            given(wanted.matcher_epochs, given(wanted.epochs, recipe.matcher_epochs)), **images
        ),
        rematching=_rematching(wanted, recipe.rematch, epochs),
        **_common(wanted, arguments),
    )


def _common(wanted: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    return {
        "name": wanted.job,
        "seeds": options.seeds(wanted.seeds),
        "criterion": wanted.criterion,
        "weights": Weights(*wanted.weights),
        "out": wanted.out or Path("runs") / wanted.job,
        "fresh": wanted.fresh,
        "command": shlex.join(["python", "examples/train.py", *arguments]),
    }


def _rematching(
    wanted: argparse.Namespace, published: RematchSchedule, epochs: int
) -> training.Rematching:
    return training.Rematching(recipes.scaled(published, epochs), wanted.rematch_by)


def _variants(given: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    return tuple(known) if given is None else options.names("--variant", given, known)


def _images(wanted: argparse.Namespace, **augmentation: Any) -> dict[str, Any]:
    device = options.device(wanted.device)
    return {**augmentation, "precision": wanted.precision, "device": device}


def _epochs(wanted: argparse.Namespace, default: int) -> int:
    """The teacher's: --epochs moves both."""
    epochs: int = given(wanted.teacher_epochs, given(wanted.epochs, default))
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
    add("--matcher", metavar="NAME", help="a model as of --teacher; both the matcher's encoders")
    add("--matcher-epochs", type=int, metavar="N", help="the matcher's (default: as --epochs)")
    add(
        "--rematch-by",
        choices=training.BYS,
        default=training.BYS[0],
        help="what DynM goes by: the student's predictions in training (epoch), which cost nothing,"
        " or a pass of its own over its images (default: epoch)",
    )
    options.add_common(parser, folder="runs/JOB")
    return parser
