"""What one call of a script asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from crossmodal.data import Wanted
from crossmodal.methods import Plan
from crossmodal.methods.variants import Variant
from crossmodal.recipes import DataSet, Recipe
from crossmodal.training.matching import Rematching


@dataclass(frozen=True)
class Asked:
    """One row of the table: its name, what is minimised, and which teacher images stand beside."""

    label: str
    plan: Plan
    variant: Variant


@dataclass(frozen=True)
class Job:
    """Everything that one call asks for.

    Attributes:
        entry: the data set, or the unpaired job.
        wanted: which images of it.
        asked: the rows of the table.
        seeds: of the students; the first one's checkpoints are kept for the figures.
        models, recipes: of teacher, student and matcher.
        rematching: when students without pairs choose again, and by what.
        out: folder for all that is written.
        device: ``auto``, ``cpu``, ``cuda``, ...
        memory: gigabytes of images that may be held; more are streamed.
        workers: processes that read streamed images.
        jobs: processes that train students side by side.
        compiled: whether steps are compiled.
        board: whether TensorBoard files are written.
        fresh: train students again that ``results.json`` already has.
        resume: refuse to start anew.
        command: the command line, for the record.
    """

    entry: DataSet
    wanted: Wanted
    asked: tuple[Asked, ...]
    seeds: tuple[int, ...]
    models: Mapping[str, str]
    recipes: Mapping[str, Recipe]
    rematching: Rematching
    out: Path
    device: str = "auto"
    memory: float = 4.0
    workers: int = 2
    jobs: int = 1
    compiled: bool = False
    board: bool = False
    fresh: bool = False
    resume: bool = False
    command: str = ""

    @property
    def matched(self) -> bool:
        """Whether teacher images are chosen, as there are no pairs."""
        return self.entry.matched

    @property
    def title(self) -> str:
        """What a table's numbers are."""
        held_out = "validation" if self.wanted.evaluate == "val" else "test"
        return (
            f"{self.entry.name}, {held_out} accuracy on poor images, student "
            f"{self.models['student']}"
        )
