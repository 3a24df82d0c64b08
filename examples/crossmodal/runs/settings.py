"""All that a result depends on, as plain JSON values: other settings, another result."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import structkd
from crossmodal.data import Views
from crossmodal.recipes import Recipe
from crossmodal.runs.job import Asked, Job
from crossmodal.runs.store import Checkpoint, key
from crossmodal.training.matching import CAPACITY, EPSILON


@dataclass(frozen=True)
class Settings:
    """Those of a job's networks; ``losses`` has each method's description by label."""

    job: Job
    views: Views
    recipes: dict[str, Recipe]  # the job's, their precision settled
    losses: dict[str, dict[str, Any]] = field(default_factory=dict)

    @cached_property
    def teacher(self) -> dict[str, Any]:
        return self._of("teacher", images=self.views.rich.fingerprint)

    @cached_property
    def matcher(self) -> dict[str, Any]:
        pseudo = self.views.pseudo
        return self._of(
            "matcher",
            rich=self.views.rich.fingerprint,
            pseudo=None if pseudo is None else pseudo.fingerprint,
        )

    def _of(self, role: str, **images: str | None) -> dict[str, Any]:
        common = {"model": self.job.models[role], "dataset": self.job.entry.name}
        return {**common, **images, "training": self.recipes[role].settings}

    @property
    def common(self) -> dict[str, Any]:
        """What a job's students have in common: theirs without the method and the seed."""
        job, views = self.job, self.views
        return {
            "model": job.models["student"],
            "dataset": job.entry.name,
            "poor": views.poor.fingerprint,
            "held out": views.held_out_poor.fingerprint,
            "samples": len(views.poor),
            "evaluate": job.wanted.evaluate,
            "structkd": structkd.__version__,
            "teacher": f"{job.models['teacher']}-{key(self.teacher)}",
            "training": replace(self.recipes["student"], seed=0).settings,
        }

    def student(self, asked: Asked, seed: int) -> dict[str, Any]:
        job, variant, recipe = self.job, asked.variant, asked.recipe(self.recipes["student"], seed)
        found = self.common | {
            "training": recipe.settings,
            "loss": self.losses[asked.label],
        }
        if not asked.plan.taught:
            found["teacher"] = None
        if job.matched:
            again = {"epochs": job.rematching.schedule.epochs(recipe.epochs)}
            again["by"] = job.rematching.by
            found["variant"] = variant.settings
            found["planner"] = [EPSILON, CAPACITY] if variant.planned else None
            found["rematching"] = again if variant.dynamic else None
            found["matcher"] = key(self.matcher) if variant.first == "semantic" else None
            if asked.plan.bridged:
                pseudo = self.views.pseudo
                found["bridge"] = None if pseudo is None else pseudo.fingerprint
        return found

    def shared_checkpoint(self, role: str) -> Checkpoint:
        """Where the teacher's or the matcher's weights lie, or would."""
        return Checkpoint(self.job.out, role, getattr(self, role))

    def checkpoint(self, asked: Asked, seed: int) -> Checkpoint:
        """Where a student's do."""
        role = f"student-{asked.label}-seed{seed}"
        return Checkpoint(self.job.out, role, self.student(asked, seed))
