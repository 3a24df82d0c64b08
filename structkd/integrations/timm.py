"""A distillation task for timm's training loop, and a launcher for its unmodified script.

``python -m structkd.integrations.timm [--distill SPEC.yaml] train.py ARGUMENTS`` runs timm's own
``train.py`` with :class:`DistillationTask` in the place of timm's ``FeatureDistillationTask``.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from structkd._checks import describe, near
from structkd.integrations._timm_task import DistillationTask, TrainableDistiller

__all__ = ["DistillationTask", "TrainableDistiller", "main", "read_spec", "swapped_in"]

# Entries of a YAML file: keywords of the task that timm's script does not pass itself.
SPEC_KEYS = (
    "distill",
    "layers",
    "teacher_layers",
    "teacher_pretrained_path",
    "teacher_pretrained_cfg_overlay",
)


def read_spec(path: str | Path) -> dict[str, Any]:
    """Reads the task's options from a YAML file.

    The file holds a criterion (``type: DSLoss``), a list of criteria, or a mapping of any of
    ``distill`` (one of these), ``layers``, ``teacher_layers``, ``teacher_pretrained_path`` and
    ``teacher_pretrained_cfg_overlay``.

    Args:
        path: The file.

    Raises:
        ValueError: If the file is missing or no such YAML (near names of a wrong key are listed).
    """
    import yaml  # type: ignore[import-untyped]

    if not Path(path).is_file():
        raise ValueError(f"--distill {str(path)!r} is no file")
    try:
        found = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"--distill {str(path)!r} is no YAML: {error}") from error
    if isinstance(found, str | list) or (isinstance(found, dict) and "type" in found):
        return {"distill": found}
    if not isinstance(found, dict) or "distill" not in found:
        raise ValueError(
            f"--distill {str(path)!r} must hold a criterion ('type: DSLoss'), a list of them, or a "
            f"mapping with the entry 'distill', got {describe(found)}"
        )
    for key in found:
        if key not in SPEC_KEYS:
            raise ValueError(
                f"--distill {str(path)!r} has no entry {key!r}; {near(key, SPEC_KEYS)}"
            )
    return found


@contextmanager
def swapped_in(options: Mapping[str, Any]) -> Iterator[None]:
    """Puts :class:`DistillationTask` in the place of timm's task, for scripts that import it.

    Args:
        options: Keywords of the task besides those that the script passes.
    """
    import timm.task  # the task's module raises if it is missing

    class Chosen(DistillationTask):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, **options})

    kept = dict(vars(timm.task))
    base = timm.task.TrainingTask
    for name, value in kept.items():
        # A script that makes another task would train without the distillation asked for.
        if isinstance(value, type) and issubclass(value, base) and value is not base:
            setattr(timm.task, name, _refused(value))
    timm.task.FeatureDistillationTask = Chosen
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(timm.task, name, value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a script of timm's with the task swapped in; the command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m structkd.integrations.timm",
        description="Runs timm's unmodified train.py with structkd's criteria. The script needs "
        "--kd-model-name TEACHER --kd-distill-type feature among its own arguments.",
    )
    parser.add_argument("--distill", metavar="SPEC.yaml", help="criteria; DSLoss by default")
    parser.add_argument(
        "--falling",
        action="store_true",
        help="let the weight of what is distilled fall to 0 over the script's --epochs",
    )
    parser.add_argument("script", help="the path of timm's train.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own arguments")
    given = parser.parse_args(arguments)
    try:
        options = {} if given.distill is None else read_spec(given.distill)
        if given.falling:
            options["falling_epochs"] = _epochs(given.arguments)
        if not Path(given.script).is_file():
            raise ValueError(
                f"{given.script!r} is no file: timm's wheel has no train.py, take it from "
                "https://github.com/huggingface/pytorch-image-models"
            )
    except ValueError as error:
        parser.error(str(error))
    kept = sys.argv
    sys.argv = [given.script, *given.arguments]
    try:
        with swapped_in(options):
            runpy.run_path(given.script, run_name="__main__")
    finally:
        sys.argv = kept


def _epochs(arguments: Sequence[str]) -> int:
    """Returns the ``--epochs`` among the arguments of timm's script.

    Raises:
        ValueError: If there is no such argument.
    """
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--epochs", type=int)
    found, _ = reader.parse_known_args(list(arguments))
    if found.epochs is None:
        raise ValueError(
            "--falling needs the length of the training: add --epochs N to the script's "
            "own arguments"
        )
    return int(found.epochs)


def _refused(task: type) -> type:
    def refuse(self: object, *args: object, **kwargs: object) -> None:
        raise ValueError(
            f"the script makes a {task.__name__}, which would train without structkd's criteria: "
            "pass it --kd-model-name TEACHER --kd-distill-type feature"
        )

    return type(task.__name__, (task,), {"__init__": refuse})


if __name__ == "__main__":
    main()
