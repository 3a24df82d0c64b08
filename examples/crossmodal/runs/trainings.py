"""What each network of a job is trained on, and what is minimised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from crossmodal.data import Batches, Images, MixedBatches, Views
from crossmodal.methods import Setup
from crossmodal.recipes import Recipe
from crossmodal.runs.job import Asked, Job
from crossmodal.training.engine import Training
from crossmodal.training.matching import Chooser, Galleries, new_matcher, outputs
from crossmodal.training.steps import Distilled, Matching, Step, Supervised, fresh


@dataclass(frozen=True)
class Trainings:
    """The trainings of a job, each newly drawn by its recipe's seed."""

    job: Job
    views: Views
    recipes: Mapping[str, Recipe]

    def network(self, role: str, seed: int) -> nn.Module:
        images = self.views.poor if role == "student" else self.views.rich
        return fresh(self.job.models[role], images, seed)

    def shared(self, role: str) -> Training:
        recipe, views = self.recipes[role], self.views
        if role == "matcher":
            step: Step = Matching(new_matcher(self.job.models[role], views, recipe.seed))
            # Poor versions of the same images, each cropped apart.
            batches = self._batches(recipe, poor=views.pseudo, rich=views.rich, together=False)
            return Training(role, step, batches, recipe)
        step = Supervised(self.network(role, recipe.seed), "rich")
        batches = self._batches(recipe, rich=views.rich, labelled=1.0)
        return Training(f"{role} {self.job.models[role]}", step, batches, recipe)

    def student(self, asked: Asked, seed: int, teacher: nn.Module) -> Training:
        """A student's; without pairs its chooser is still to come."""
        recipe, poor = asked.recipe(self.recipes["student"], seed), self.views.poor
        network, label = self.network("student", seed), f"{asked.label} seed {seed}"
        rich = self.taught_from(asked) if asked.variant.matched else None
        both = {"poor": poor, "rich": rich, "together": self.views.paired}
        # An own image without a label has nothing to learn from where there are no pairs.
        labelled = recipe.labelled if asked.plan.taught and not asked.plan.bridged else 1.0
        batches: Batches | MixedBatches = self._batches(recipe, **both, labelled=labelled)
        if asked.plan.bridged:
            pseudo = self.views.pseudo
            pairs = self._batches(recipe, poor=pseudo, rich=self.views.rich, together=True)
            batches = MixedBatches.of(batches, pairs)
        if not asked.plan.taught:
            return Training(label, Supervised(network, "poor"), batches, recipe)
        example = batches.first(2).to(torch.device("cpu"), False)
        samples = len(poor) if self.views.paired else max(len(poor), len(self.views.rich))
        setup = Setup(samples, recipe.batch_size)
        step = Distilled(network, teacher.cpu(), asked.plan, example, setup, seed)
        return Training(label, step, batches, recipe)

    def chooser(self, asked: Asked, training: Training, galleries: Galleries) -> Chooser:
        """Names the teacher images of a student without pairs."""
        device, logits = PartialState().device, galleries.teacher_logits
        if (rich := self.taught_from(asked)) is not self.views.rich:
            logits = outputs(galleries.teacher.to(device), rich, device)
        variant, network, job = asked.variant, training.step.network, self.job
        matches = galleries, logits, job.rematching
        return Chooser(variant, network, self.views, *matches, training.recipe, device)

    def _batches(self, recipe: Recipe, **images: Any) -> Batches:
        state = PartialState()
        share = (state.process_index, state.num_processes)
        workers = self.job.workers
        return Batches(recipe, device=state.device, share=share, workers=workers, **images)

    def taught_from(self, asked: Asked) -> Images:
        """The images that the teacher shows to the students of a variant."""
        if asked.variant.first != "itself":
            return self.views.rich
        if self.views.originals is None:
            needed = f"{asked.label!r} needs the student's images in the rich modality"
            raise ValueError(f"{needed}, which this data set does not have; leave it out")
        return self.views.originals


def let_go(training: Training) -> None:
    if isinstance(training.step, Distilled):
        training.step.distiller.detach()
