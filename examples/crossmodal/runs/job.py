"""What one call of a script asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from crossmodal.data import Wanted
from crossmodal.methods import Plan
from crossmodal.methods.variants import PAIRS, Variant
from crossmodal.recipes import DataSet, Recipe
from crossmodal.training.matching import Rematching


@dataclass(frozen=True)
class Asked:
    """One row of the table: its name, what is minimised, and which teacher images stand beside."""

    label: str
    plan: Plan
    variant: Variant

    @property
    def falls(self) -> bool:
        """Whether ``falling`` is for it: over pairs, true or free; published matches are not."""
        return self.plan.taught and (self.plan.bridged or self.variant == PAIRS)

    def recipe(self, students: Recipe, seed: int) -> Recipe:
        """The students' recipe for this row; what it does not read is no setting of its result."""
        return replace(students, seed=seed, falling=students.falling and self.falls)


@dataclass(frozen=True)
class Job:
    entry: DataSet  # the data set, or the unpaired job
    wanted: Wanted  # which images of it
    asked: tuple[Asked, ...]  # the rows of the table
    seeds: tuple[int, ...]  # of the students; the first one's weights are kept
    models: Mapping[str, str]  # of teacher, student and matcher, as are the recipes
    recipes: Mapping[str, Recipe]
    rematching: Rematching  # when students without pairs choose again, and by what
    out: Path  # for all that is written
    command: str  # the command line, for the record
    device: str  # auto, cpu, cuda, ...
    memory: float  # gigabytes of images that may be held; more are streamed
    workers: int  # processes that read streamed images
    jobs: int  # processes that train students side by side
    compile: bool
    tensorboard: bool
    fresh: bool  # train students again that results.json already has
    resume: bool  # refuse to start anew
    near: tuple[Path, ...]  # folders whose finished networks and runs are taken over

    @property
    def matched(self) -> bool:
        """Whether teacher images are chosen, as there are no pairs."""
        return self.entry.matched

    @property
    def title(self) -> str:
        held_out = "validation" if self.wanted.evaluate == "val" else "test"
        told = f"{self.entry.name}, {held_out} accuracy on poor images"
        return f"{told}, student {self.models['student']}"
