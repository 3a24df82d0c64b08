"""The main job: one teacher, students by method and seed, each finished run stored at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

import structkd
from crossmodal import engine, evaluation, report
from crossmodal.config import Config, Outcome
from crossmodal.data import ImagePairs, load
from crossmodal.methods import resolve
from crossmodal.store import Checkpoint, Results, key

_NO_PART_OF_A_RESULT = ("device",)


@dataclass(frozen=True)
class Job:
    """Everything that one call of a script asks for.

    Attributes:
        dataset, data_dir, download, limit, amount: as ``data.load`` takes them.
        methods: names for ``methods.resolve``.
        seeds: of the students; the first one's checkpoints are kept for the figures.
        teacher, student: model names.
        teacher_config, config: how to train them; the job sets the students' seeds.
        evaluate: ``test`` (training on all of train), or ``val`` (training on the rest of it).
        out: folder for checkpoints, results and figures.
        fresh: train students again that ``results.json`` already has.
        keep_going: store a student whose loss stops being finite as failed, and go on.
        command: the command line, for the record.
    """

    dataset: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    teacher: str
    student: str
    teacher_config: Config
    config: Config
    amount: float
    out: Path
    data_dir: Path | None = None
    download: bool = False
    limit: int | None = None
    evaluate: str = "test"
    fresh: bool = False
    keep_going: bool = False
    command: str = ""


class Session:
    """A job under way: its images, its trained teacher, its results file.

    Opening one reads the images and the results and trains the teacher if no checkpoint has it.

    Attributes:
        job: what was asked for.
        train, held_out: the images to train on and to evaluate on.
        teacher: the trained teacher.
    """

    def __init__(self, job: Job, console: Console) -> None:
        self.job, self.console = job, console
        self.train, self.held_out = _load_splits(job)
        self._results = Results(job.out)
        self.teacher, self._teacher_settings = trained_teacher(
            job.teacher, job.dataset, self.train, job.teacher_config, job.out, console
        )
        self._losses: dict[str, dict[str, Any]] = {}

    @cached_property
    def facts(self) -> report.Teacher:
        """The teacher's accuracy on both modalities."""
        clean, poor = (self._accuracy(self.teacher, modality) for modality in ("clean", "poor"))
        return report.Teacher(self.job.teacher, clean, poor)

    def run_student(
        self,
        method: str,
        seed: int,
        *,
        options: Mapping[str, Any] | None = None,
        label: str | None = None,
        keep: bool = False,
    ) -> dict[str, Any]:
        """One student: from the results file if these settings are there, else trained and stored.

        Args:
            method: a name for ``methods.resolve``.
            seed: of the student.
            options: keywords of the criterion, for a method that is no sum.
            label: what the run is called in the results; the method's name by default.
            keep: keep the student's weights in a checkpoint.

        Returns:
            The stored run. One with ``failed`` in it has no accuracy: only with ``job.keep_going``.

        Raises:
            FloatingPointError: the loss is not finite, and the job is not to keep going.
        """
        job, label = self.job, label or method
        settings = self.settings(method, seed, options)
        checkpoint = self.checkpoint(label, seed, settings)
        done = self._results.find(label, seed, settings)
        if done is not None and not job.fresh and self._whole(done, checkpoint if keep else None):
            self.console.print(f"{label} seed {seed}: {_outcome(done)} (finished before)")
            return done
        done = {"method": label, "seed": seed, "device": job.config.device, "config": settings}
        try:
            done |= self._distil(method, seed, options, checkpoint if keep else None)
        except FloatingPointError as error:
            if not job.keep_going:
                raise
            done["failed"] = str(error)
        self._results.add(done, header=self.header)
        took = f" ({done['seconds']:.0f} s)" if "seconds" in done else ""
        self.console.print(f"{label} seed {seed}: {_outcome(done)}{took}")
        return done

    def _whole(self, run: dict[str, Any], checkpoint: Checkpoint | None) -> bool:
        """Whether a stored run is all that this job wants of it."""
        if "failed" in run:  # nothing is random: it would fail again
            return self.job.keep_going
        return checkpoint is None or checkpoint.path.exists()

    def settings(
        self, method: str, seed: int, options: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """All that a student's result depends on; plain JSON values."""
        job, train = self.job, self.train
        return {
            "model": job.student,
            "dataset": job.dataset,
            "images": train.fingerprint,
            "amount": train.amount,
            "samples": len(train),
            "evaluate": job.evaluate,
            "structkd": structkd.__version__,
            "teacher": self._teacher_key(method),
            "training": training_settings(replace(job.config, seed=seed)),
            "loss": self._loss(method, options),
        }

    def checkpoint(self, label: str, seed: int, settings: dict[str, Any]) -> Checkpoint:
        """Where a student's weights lie, or would."""
        return Checkpoint(self.job.out, f"student-{label}-seed{seed}", settings)

    @property
    def header(self) -> dict[str, Any]:
        """What stands above the runs in the results file."""
        job = self.job
        return {"command": job.command, "dataset": job.dataset, "teacher": asdict(self.facts)}

    def close(self) -> None:
        """Write the results with this call's header, also where nothing was trained."""
        self._results.write(self.header)

    def _teacher_key(self, method: str) -> str | None:
        if not resolve(method).parts:
            return None
        return f"{self.job.teacher}-{key(self._teacher_settings)}"

    def _loss(self, method: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
        plan = resolve(method, {method: options} if options else None)
        known = f"{plan.name} {sorted((options or {}).items())}"
        if known not in self._losses:
            job = self.job
            self._losses[known] = engine.describe(
                plan, job.student, self.teacher, self.train, job.config
            )
        return self._losses[known]

    def _distil(
        self,
        method: str,
        seed: int,
        options: Mapping[str, Any] | None,
        checkpoint: Checkpoint | None,
    ) -> dict[str, Any]:
        job = self.job
        outcome = engine.distil(
            method,
            job.student,
            self.teacher,
            self.train,
            replace(job.config, seed=seed),
            options={method: options} if options else None,
            console=self.console,
        )
        if checkpoint is not None:
            checkpoint.save(outcome.model)
        return {
            "accuracy": self._accuracy(outcome.model, "poor"),
            "loss": outcome.loss,
            "terms": outcome.terms,
            "train_accuracy": outcome.train_accuracy,
            "seconds": round(outcome.seconds, 2),
        }

    def _accuracy(self, model: nn.Module, modality: evaluation.Modality) -> float:
        return evaluation.evaluate(
            model,
            self.held_out,
            modality=modality,
            statistics=self.train.statistics,
            device=self.job.config.device,
        )


def run(job: Job, console: Console) -> tuple[Session, list[report.Row]]:
    """Train the teacher and the students that are missing; one row a method, in their order."""
    names = list(dict.fromkeys(resolve(name).name for name in job.methods))
    session = Session(job, console)
    facts = session.facts
    console.print(
        f"teacher {job.teacher}: {facts.clean:.2f} % on clean images, {facts.poor:.2f} % on poor"
    )
    for name in names:
        session.settings(name, job.seeds[0])  # what does not fit these networks fails here
    runs = [
        session.run_student(name, seed, keep=seed == job.seeds[0])
        for name in names
        for seed in job.seeds
    ]
    session.close()
    return session, report.rows(runs)


def _load_splits(job: Job) -> tuple[ImagePairs, ImagePairs]:
    train, held_out = (
        load(
            job.dataset,
            data_dir=job.data_dir,
            split=split,
            amount=job.amount,
            limit=job.limit,
            download=job.download,
        )
        for split in ("fit" if job.evaluate == "val" else "train", job.evaluate)
    )
    return train, held_out


def trained_teacher(
    name: str, dataset: str, images: ImagePairs, config: Config, out: Path, console: Console
) -> tuple[nn.Module, dict[str, Any]]:
    """A network for the clean images, trained or read, with the settings it depends on."""
    settings = {
        "model": name,
        "dataset": dataset,
        "images": images.fingerprint,
        "training": training_settings(config),
    }
    model = engine.fresh_model(name, images, config)

    def train() -> Outcome:
        return engine.train_teacher(name, images, config, console=console)

    return trained("teacher", settings, model, train, out, console), settings


def trained(
    role: str,
    settings: dict[str, Any],
    model: nn.Module,
    train: Callable[[], Outcome],
    out: Path,
    console: Console,
) -> nn.Module:
    """``model`` with the weights of its checkpoint in ``out``, or what ``train`` gives, saved."""
    checkpoint = Checkpoint(out, role, settings)
    if checkpoint.load_into(model):
        console.print(f"{role} read from {checkpoint.path}")
        return model
    outcome = train()
    checkpoint.save(outcome.model, seconds=outcome.seconds)
    console.print(f"{role} {settings['model']} trained in {outcome.seconds:.0f} s")
    return outcome.model


def training_settings(config: Config) -> dict[str, Any]:
    """The part of a schedule that a result depends on."""
    return {k: v for k, v in asdict(config).items() if k not in _NO_PART_OF_A_RESULT}


def _outcome(run: dict[str, Any]) -> str:
    return f"failed: {run['failed']}" if "failed" in run else f"{run['accuracy']:.2f} %"
