"""The unpaired job: matcher, teacher, then students by variant and seed, each stored at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

import structkd
from crossmodal import engine, evaluation
from crossmodal.config import Config, Outcome
from crossmodal.data import ImagePairs
from crossmodal.job import trained, trained_teacher, training_settings
from crossmodal.methods import Plan
from crossmodal.store import Checkpoint, Results, key
from crossmodal.unpaired import matching, training, variants
from crossmodal.unpaired.training import Rematching, Trace
from crossmodal.unpaired.variants import Variant, Weights
from crossmodal.unpaired.views import Unpaired
from structkd.matching.semantic import SemanticMatcher


@dataclass(frozen=True)
class UnpairedJob:
    """Everything that one call asks for.

    Attributes:
        name: of the job, for titles and settings.
        open: reads the images.
        variants: names of ``variants.VARIANTS``.
        seeds: of the students; the first one's checkpoints are kept.
        criterion: any criterion or sum of the registry.
        weights: of the student's loss.
        teacher, student, matcher: model names; the matcher's two encoders have one.
        teacher_config, config, matcher_config: how to train them.
        rematching: when students choose again, and by what.
        out: folder for checkpoints, results and figures.
        fresh: train students again that ``results.json`` already has.
        command: the command line, for the record.
    """

    name: str
    open: Callable[[], Unpaired]
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    criterion: str
    weights: Weights
    teacher: str
    student: str
    matcher: str
    teacher_config: Config
    config: Config
    matcher_config: Config
    rematching: Rematching
    out: Path
    fresh: bool = False
    command: str = ""


class Session:
    """An unpaired job under way. Opening one reads the images and trains matcher and teacher."""

    def __init__(self, job: UnpairedJob, console: Console) -> None:
        self.job, self.console = job, console
        self.results = Results(job.out)
        self.views = views = job.open()
        console.print(
            f"{job.name}: {len(views.rich)} rich images for the teacher, {len(views.poor)} poor "
            f"ones ({views.poverty}) for the student, none in both"
        )
        self.matcher, self._matcher_settings = self._trained_matcher()
        self.teacher, self._teacher_settings = trained_teacher(
            job.teacher, job.name, views.rich, job.teacher_config, job.out, console
        )
        self._losses: dict[str, dict[str, Any]] = {}

    @cached_property
    def galleries(self) -> matching.Galleries:
        """The rich images as the matcher and the teacher see them."""
        return matching.galleries(self.matcher, self.teacher, self.views, self.job.config.device)

    @cached_property
    def teacher_accuracy(self) -> float:
        """In percent, on held-out rich images."""
        return self._accuracy(self.teacher, self.views.held_out_rich, self.views.rich)

    def run_student(self, name: str, seed: int, *, keep: bool = False) -> dict[str, Any]:
        """One student: from the results file if these settings are there, else trained and stored.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        job = self.job
        variant = variants.variant(name)
        plan = variants.plan(variant, job.criterion, job.weights)
        settings = self.settings(name, seed)
        checkpoint = Checkpoint(job.out, f"student-{name}-{job.criterion}-seed{seed}", settings)
        done = self.results.find(plan.name, seed, settings)
        if done is not None and not job.fresh and (not keep or checkpoint.path.exists()):
            self.console.print(f"{_line(done)} (finished before)")
            return done
        outcome, trace = self._distil(variant, plan, replace(job.config, seed=seed))
        if keep:
            checkpoint.save(outcome.model)
        done = {
            "method": plan.name,
            "seed": seed,
            "device": job.config.device,
            "config": settings,
            "accuracy": self._accuracy(outcome.model, self.views.held_out_poor, self.views.poor),
            "loss": outcome.loss,
            "terms": outcome.terms,
            "train_accuracy": outcome.train_accuracy,
            "seconds": round(outcome.seconds, 2),
            "trace": asdict(trace),
        }
        self.results.add(done, header=self.header)
        self.console.print(f"{_line(done)} ({done['seconds']:.0f} s)")
        return done

    def settings(self, name: str, seed: int) -> dict[str, Any]:
        """All that a student's result depends on; plain JSON values."""
        job, views, variant = self.job, self.views, variants.variant(name)
        taught = variant.first != "none"
        return {
            "model": job.student,
            **self._data,
            "held out": views.held_out_poor.fingerprint,
            "structkd": structkd.__version__,
            "variant": {k: v for k, v in asdict(variant).items() if k != "title"},
            "planner": [matching.EPSILON, matching.CAPACITY] if variant.planned else None,
            "rematching": self._rematching if variant.dynamic else None,
            "teacher": f"{job.teacher}-{key(self._teacher_settings)}" if taught else None,
            "matcher": key(self._matcher_settings) if variant.first == "semantic" else None,
            "training": training_settings(replace(job.config, seed=seed)),
            "loss": self._loss(variant),
        }

    @property
    def header(self) -> dict[str, Any]:
        """What stands above the runs in the results file."""
        job = self.job
        teacher = {"model": job.teacher, "rich": self.teacher_accuracy}
        return {"command": job.command, "dataset": job.name, "teacher": teacher}

    @property
    def _rematching(self) -> dict[str, Any]:
        rematching = self.job.rematching
        return {"epochs": rematching.schedule.epochs(self.job.config.epochs), "by": rematching.by}

    @property
    def _data(self) -> dict[str, Any]:
        views = self.views
        return {
            "dataset": self.job.name,
            "rich": views.rich.fingerprint,
            "poor": views.poor.fingerprint,
        }

    def _loss(self, variant: Variant) -> dict[str, Any]:
        job, views = self.job, self.views
        plan = variants.plan(variant, job.criterion, job.weights)
        if plan.name not in self._losses:
            self._losses[plan.name] = {
                "weights": [method.weight for _, method in plan.parts],
                **engine.describe_plan(
                    plan,
                    engine.fresh_model(job.student, views.poor, job.config),
                    self.teacher,
                    training.example(views, job.config),
                    training.setup(views, job.config),
                    job.config,
                ),
            }
        return self._losses[plan.name]

    def _distil(self, variant: Variant, plan: Plan, config: Config) -> tuple[Outcome, Trace]:
        views = self.views
        model = engine.fresh_model(self.job.student, views.poor, config)
        if variant.first == "none":
            outcome = training.alone(plan, model, views, config, self.console)
            return outcome, Trace()
        return training.distil(
            variant,
            plan,
            model,
            self.teacher,
            views,
            self.galleries,
            self.job.rematching,
            config,
            self.console,
        )

    def _trained_matcher(self) -> tuple[SemanticMatcher, dict[str, Any]]:
        job, views = self.job, self.views
        matcher = matching.new_matcher(job.matcher, views, job.matcher_config)
        settings = {
            "model": job.matcher,
            **self._data,
            "pseudo": views.pseudo.fingerprint,
            "training": training_settings(job.matcher_config),
        }

        def train() -> Outcome:
            return matching.train_matcher(matcher, views, job.matcher_config, self.console)

        trained("matcher", settings, matcher, train, job.out, self.console)  # in place, either way
        return matcher, settings

    def _accuracy(self, model: nn.Module, pairs: ImagePairs, trained_on: ImagePairs) -> float:
        return evaluation.evaluate(
            model,
            pairs,
            modality="poor",
            statistics=trained_on.statistics,
            device=self.job.config.device,
        )


def run(job: UnpairedJob, console: Console) -> tuple[Session, list[dict[str, Any]]]:
    """Train what is missing; the runs in the order of the variants and seeds."""
    for name in job.variants:
        variants.plan(variants.variant(name), job.criterion, job.weights)
    session = Session(job, console)
    console.print(f"teacher {job.teacher}: {session.teacher_accuracy:.2f} % on rich test images")
    for name in job.variants:
        session.settings(name, job.seeds[0])  # what does not fit fails here
    runs = [
        session.run_student(name, seed, keep=seed == job.seeds[0])
        for name in job.variants
        for seed in job.seeds
    ]
    session.results.write(session.header)
    return session, runs


def _line(run: dict[str, Any]) -> str:
    return f"{run['method']} seed {run['seed']}: {run['accuracy']:.2f} %"
