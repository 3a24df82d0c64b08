"""A job under way: its images, its networks, its runs, each stored as soon as it is finished."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property, partial
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from filelock import Timeout
from rich.console import Console
from torch import nn

import structkd
from crossmodal.data import NO_LABEL, Batches, Images, open_views
from crossmodal.methods import Setup
from crossmodal.recipes import Recipe
from crossmodal.runs import preflight
from crossmodal.runs.epochs import Epochs
from crossmodal.runs.job import Asked, Job
from crossmodal.runs.progress import Show
from crossmodal.runs.store import Checkpoint, Results, differing, key, lock, slug, write_atomically
from crossmodal.training import evaluation
from crossmodal.training.engine import Outcome, Training, accelerator_for, fit
from crossmodal.training.matching import (
    CAPACITY,
    EPSILON,
    Chooser,
    Galleries,
    new_matcher,
    outputs,
)
from crossmodal.training.steps import Distilled, Matching, Step, Supervised, fresh

Run = dict[str, Any]
HELPER = "CROSSMODAL_HELPER"  # set for the processes that --jobs starts
_POLL = 1.0  # seconds between two looks at runs that other processes have taken
# What a method may fail with; anything else is this program's own error.
_FAILURES = (ValueError, TypeError, RuntimeError, FloatingPointError)


class Session:
    """A job under way. Opening one reads the images; nothing is trained before ``run``.

    Attributes:
        job: what was asked for.
        views: its images.
        results: the results file.
        recipes: the job's, their precision settled.
        failed: errors of methods that do not fit these networks, by label.
    """

    def __init__(self, job: Job, console: Console) -> None:
        self.job, self.console = job, console
        self.helper = HELPER in os.environ
        preflight.check_device(job.device)
        preflight.check_extras(matched=job.matched)
        preflight.check_folder(job.out)
        state = PartialState(cpu=job.device == "cpu")
        self.leads, self._share = state.is_main_process, (state.process_index, state.num_processes)
        self.show = Show(console, job.out, board=job.board)
        self.show.quiet = not self.leads
        self.results = Results(job.out)
        views = open_views(job.entry, job.wanted)
        gigabytes = views.size / 1e9
        made = not job.recipes["student"].spoils_late
        self.views = views.loaded(made=made) if gigabytes <= job.memory else views
        if self.views is views:
            self.say(
                f"{gigabytes:.1f} GB of images are streamed by {job.workers} workers "
                f"(--memory {job.memory:g} GB)"
            )
        if not self.helper:
            for line in self.views.summary():
                self.say(line)
        self.failed: dict[str, str] = {}
        self._losses: dict[str, dict[str, Any]] = {}
        self._seconds: dict[str, float] = {}
        self._new = partial(fresh, job.models["teacher"], self.views.rich)
        self._student = partial(fresh, job.models["student"], self.views.poor)
        self._new(0), self._student(0)  # an unknown name is told now
        self.recipes = self._settled()
        self.teacher = self._new(self.recipes["teacher"].seed)

    def say(self, text: str) -> None:
        """A line on the console, from one process."""
        self.show.say(text)

    def run(self) -> list[Run]:
        """Train what is missing; the runs in the order of the rows and seeds, failed ones too."""
        items = [(asked, seed) for asked in self.job.asked for seed in self.job.seeds]
        for asked in self.job.asked:
            self._describe(asked)
        if self.job.resume:
            self._check_resume(items)
        missing = [item for item in items if self._stored(*item) is None]
        if missing and not self.helper:
            self._preflight(missing)
        self._train_shared()
        helpers = self._helpers(len(missing))
        self.show.runs = len(items)
        self._work(items)
        for helper in helpers:
            helper.wait()
        if self.leads and not self.helper:
            self.results.write(self.header)
        stored = (self._found(asked, seed) for asked, seed in items)
        return [run for run in stored if run is not None]

    # Settings: all that a result depends on.

    def settings(self, asked: Asked, seed: int) -> dict[str, Any]:
        """All that a student's result depends on; plain JSON values."""
        job, views, variant = self.job, self.views, asked.variant
        taught = variant.first != "none"
        found: dict[str, Any] = {
            "model": job.models["student"],
            "dataset": job.entry.name,
            "poor": views.poor.fingerprint,
            "held out": views.held_out_poor.fingerprint,
            "samples": len(views.poor),
            "evaluate": job.wanted.evaluate,
            "structkd": structkd.__version__,
            "teacher": f"{job.models['teacher']}-{key(self._teacher_settings)}" if taught else None,
            "training": replace(self.recipes["student"], seed=seed).settings,
            "loss": self._losses[asked.label],
        }
        if job.matched:
            found["variant"] = {k: v for k, v in asdict(variant).items() if k != "title"}
            found["planner"] = [EPSILON, CAPACITY] if variant.planned else None
            chosen = job.rematching.schedule.epochs(self.recipes["student"].epochs)
            found["rematching"] = (
                {"epochs": chosen, "by": job.rematching.by} if variant.dynamic else None
            )
            matched = variant.first == "semantic"
            found["matcher"] = key(self._matcher_settings) if matched else None
        return found

    @property
    def header(self) -> dict[str, Any]:
        """What stands above the runs in the results file."""
        teacher = {"model": self.job.models["teacher"], **self.facts}
        return {"command": self.job.command, "dataset": self.job.entry.name, "teacher": teacher}

    @cached_property
    def facts(self) -> dict[str, float]:
        """The teacher's accuracy on the rich images, and on the poor ones where it can see them."""
        views = self.views
        if self.job.matched:
            return {"rich": self._accuracy(self.teacher, views.held_out_rich, views.rich)}
        return {
            name: self._accuracy(self.teacher, images, views.rich)
            for name, images in (("clean", views.held_out_rich), ("poor", views.held_out_poor))
            if images.shape[0] == views.rich.shape[0]
        }

    def new_student(self) -> nn.Module:
        """A student to load weights into."""
        return self._student(0)

    def checkpoint(self, asked: Asked, seed: int) -> Checkpoint:
        """Where a student's weights lie, or would."""
        role = f"student-{asked.label}-seed{seed}"
        return Checkpoint(self.job.out, role, self.settings(asked, seed))

    @cached_property
    def _teacher_settings(self) -> dict[str, Any]:
        return {
            "model": self.job.models["teacher"],
            "dataset": self.job.entry.name,
            "images": self.views.rich.fingerprint,
            "training": self.recipes["teacher"].settings,
        }

    @cached_property
    def _matcher_settings(self) -> dict[str, Any]:
        pseudo = self.views.pseudo
        return {
            "model": self.job.models["matcher"],
            "dataset": self.job.entry.name,
            "rich": self.views.rich.fingerprint,
            "pseudo": None if pseudo is None else pseudo.fingerprint,
            "training": self.recipes["matcher"].settings,
        }

    # What is trained.

    def _batches(self, recipe: Recipe, **images: Any) -> Batches:
        return Batches(
            recipe,
            device=self._device,
            share=self._share,
            workers=self.job.workers,
            **images,
        )

    def _teacher_batches(self) -> Batches:
        rich = self.views.rich
        known = (rich.known() != NO_LABEL).nonzero()[:, 0]
        if len(known) < len(rich):
            rich = replace(rich.chosen(known), like=rich)
        return self._batches(self.recipes["teacher"], rich=rich)

    def _student_batches(self, asked: Asked, recipe: Recipe) -> Batches:
        views = self.views
        if asked.variant.first == "none":
            return self._batches(recipe, poor=views.poor)
        return self._batches(
            recipe, poor=views.poor, rich=self._taught_from(asked), together=views.paired
        )

    def _taught_from(self, asked: Asked) -> Images:
        """The images that the teacher shows to the students of a variant."""
        if asked.variant.first != "itself":
            return self.views.rich
        if self.views.originals is None:
            raise ValueError(
                f"{asked.label!r} needs the student's images in the rich modality, which this data "
                "set does not have; leave it out"
            )
        return self.views.originals

    def _step(self, asked: Asked, batches: Batches, recipe: Recipe) -> Step:
        """A student's step, newly drawn by the recipe's seed."""
        student = self._student(recipe.seed)
        if asked.variant.first == "none":
            return Supervised(student, "poor")
        setup = Setup(len(self.views.poor), recipe.batch_size)
        ids = None if self.views.paired else torch.arange(len(self.views.poor)) % len(batches.rich)
        example = batches.take(torch.arange(2), ids=ids)
        example = example.to(torch.device("cpu"), False)
        self.teacher.cpu()
        return Distilled(student, self.teacher, asked.plan, example, setup, recipe.seed)

    def _describe(self, asked: Asked) -> None:
        """Build a method's criterion once, for its options; remember it where it does not fit."""
        try:
            recipe = self.recipes["student"]
            step = self._step(asked, self._student_batches(asked, recipe), recipe)
            self._losses[asked.label] = asked.plan.described(step.criterion)
            _let_go(step)
        except _FAILURES as error:
            self.failed[asked.label] = _line(error)
            plan = asked.plan
            self._losses[asked.label] = {"supervision": plan.supervision, "plan": plan.name}

    @property
    def _device(self) -> torch.device:
        return PartialState().device

    def _settled(self) -> dict[str, Recipe]:
        job = self.job
        student = job.recipes["student"]

        def make(recipe: Recipe) -> tuple[Step, Any]:
            # The teacher's step is the longer one, and its network the one that most depends on it.
            batches = self._batches(recipe, rich=self.views.rich)
            size = min(recipe.batch_size, len(self.views.rich)) // self._share[1]
            return Supervised(self._new(0), "rich"), batches.take(torch.arange(size), epoch=0)

        name = f"{self._device.type}, {job.models['teacher']}, batch {student.batch_size}"
        settled, line = preflight.chosen_precision(
            student, job.out, name, make, job.device, self._agreed
        )
        if line and not self.helper:
            self.say(line)
        found = {}
        for role, recipe in job.recipes.items():
            if recipe.precision == "auto":
                even = recipe.batch_size % 2 == 0
                found[role] = replace(
                    recipe,
                    precision=settled.precision,
                    channels_last=recipe.channels_last or (settled.channels_last and even),
                )
            else:
                found[role] = recipe
        return found

    # Before training.

    def _preflight(self, missing: list[tuple[Asked, int]]) -> None:
        """A real step of every missing method; the failed ones are stored, the time is told."""
        rows = {asked.label: asked for asked, _ in missing}
        for label, asked in rows.items():
            if label not in self.failed:
                try:
                    self._seconds[label] = self._timed(asked)
                except _FAILURES as error:
                    self.failed[label] = _line(error)
        for asked, seed in missing:
            if (error := self.failed.get(asked.label)) is not None:
                self._store(self._blank(asked, seed) | {"failed": error, "error": "preflight"})
                self.say(f"{asked.label} seed {seed}: failed: {error}")
        networks = [self.teacher, self._student(0)]
        weights = sum(preflight.weight(network) for network in networks)
        # Two epochs with momentum and one being written, and the students that are kept.
        preflight.check_folder(self.job.out, 9.0 * weights + 1e6)
        total, epochs = 0.0, self.recipes["student"].epochs
        for asked, _ in missing:
            steps = len(self._student_batches(asked, self.recipes["student"]))
            total += self._seconds.get(asked.label, 0.0) * steps * epochs
        for role in self._shared:
            if not self._shared_checkpoint(role).path.exists():
                training = self._shared_training(role)
                batch = self._first(training.batches)
                seconds = preflight.timed(training.step, batch, training.recipe, self.job.device)
                total += seconds * len(training.batches) * training.recipe.epochs
        done = [item for item in missing if item[0].label not in self.failed]
        self.say(
            f"preflight: {len(rows) - len(set(rows) & set(self.failed))} of {len(rows)} methods fit"
            f"; {len(done)} students to train, about {preflight.duration(total / self.job.jobs)}"
        )

    def _timed(self, asked: Asked) -> float:
        recipe = self.recipes["student"]
        batches = self._student_batches(asked, recipe)
        step = self._step(asked, batches, recipe)
        seconds = preflight.timed(step, self._first(batches), recipe, self.job.device)
        _let_go(step)
        return seconds

    def _first(self, batches: Batches) -> Any:
        """A process's part of a whole batch."""
        size = min(batches.recipe.batch_size, len(self.views.poor)) // self._share[1]
        ids = None
        if batches.rich is not None and not self.views.paired:
            ids = torch.arange(len(self.views.poor)) % len(batches.rich)
        return batches.take(torch.arange(size), epoch=0, ids=ids)

    def _check_resume(self, items: list[tuple[Asked, int]]) -> None:
        kept = self.job.out / "epochs"
        others = list(kept.glob("*/settings.json"))
        if not others and not self.results.runs():
            raise ValueError(
                f"--resume: nothing was kept in {self.job.out}; fix: leave it out, or name the "
                "folder of the run that was cut off"
            )
        wanted = [self._shared_checkpoint("teacher"), *(self.checkpoint(*item) for item in items)]
        for checkpoint in wanted:
            role = slug(checkpoint.role)
            found = [path for path in others if path.parent.name.startswith(f"{role}-")]
            if found and not (kept / checkpoint.name).exists():
                difference = differing(json.loads(found[0].read_text()), checkpoint.settings)
                raise ValueError(
                    f"--resume: the epochs in {found[0].parent} were made with another "
                    f"{', '.join(difference)}; fix: give the same options, or leave --resume out"
                )

    # Teacher and matcher.

    @property
    def _shared(self) -> tuple[str, ...]:
        return ("teacher", "matcher") if self.job.matched else ("teacher",)

    def _shared_checkpoint(self, role: str) -> Checkpoint:
        settings = self._teacher_settings if role == "teacher" else self._matcher_settings
        return Checkpoint(self.job.out, role, settings)

    def _shared_training(self, role: str) -> Training:
        recipe, views = self.recipes[role], self.views
        if role == "teacher":
            step: Step = Supervised(self._new(recipe.seed), "rich")
            label = f"teacher {self.job.models['teacher']}"
            return Training(label, step, self._teacher_batches(), recipe)
        step = Matching(new_matcher(self.job.models["matcher"], views, recipe.seed))
        # Poor versions of the same images, each cropped apart.
        batches = self._batches(recipe, poor=views.pseudo, rich=views.rich, together=False)
        return Training("matcher", step, batches, recipe)

    def _train_shared(self) -> None:
        """The teacher, and the matcher where one is needed: from their checkpoints, or trained."""
        for role in self._shared:
            setattr(self, role, self._trained(role))
        if not self.helper:
            told = ", ".join(f"{value:.2f} % on {name}" for name, value in self.facts.items())
            self.say(f"teacher {self.job.models['teacher']}: {told} held-out images")

    def _trained(self, role: str) -> nn.Module:
        checkpoint, training = self._shared_checkpoint(role), self._shared_training(role)
        network = training.step.network
        with self._locked(checkpoint.name, f"another process trains the {role}"):
            if checkpoint.load_into(network):
                self.say(f"{role} read from {checkpoint.path}")
                return network
            outcome, epochs = self._fit(training, checkpoint)
            if self.leads:
                checkpoint.save(outcome.network, seconds=outcome.seconds)
                epochs.clear()
            PartialState().wait_for_everyone()
        self.say(f"{role} {checkpoint.settings['model']} trained in {outcome.seconds:.0f} s")
        return outcome.network

    @cached_property
    def galleries(self) -> Galleries:
        """The rich images as the matcher and the teacher see them."""
        return Galleries.of(self.matcher, self.teacher, self.views, self._device)

    # Students.

    def _work(self, items: list[tuple[Asked, int]]) -> None:
        """Train what no other process has taken, then wait for what they have."""
        left = list(enumerate(items, start=1))
        while left:
            begun = len(left)
            for number, (asked, seed) in list(left):
                self.show.run = number
                with self._taken(asked, seed) as what:
                    if what == "taken":
                        continue
                    left.remove((number, (asked, seed)))
                    if what == "mine":
                        self._student_run(asked, seed)
                    elif not self.helper and (asked.label, seed) not in self._again:
                        self.say(_told(self._found(asked, seed)) + " (finished before)")
            if self.helper and left:
                return
            if len(left) == begun:
                time.sleep(_POLL)

    @contextmanager
    def _taken(self, asked: Asked, seed: int) -> Iterator[str]:
        """``done``, ``mine`` while a lock is held on the run, or ``taken`` by another process."""
        held = lock(self.job.out, self.checkpoint(asked, seed).name)
        what = "done"
        if self.leads and self._stored(asked, seed) is None:
            try:
                held.acquire(timeout=0)
                # It may have been finished between the look and the lock.
                what = "mine" if self._stored(asked, seed) is None else "done"
            except Timeout:
                what = "taken"
        try:
            yield self._agreed(what)
        finally:
            held.release()

    def _student_run(self, asked: Asked, seed: int) -> None:
        """One student, trained and stored; one that fails is stored as failed."""
        checkpoint = self.checkpoint(asked, seed)
        run = self._blank(asked, seed)
        outcome = epochs = None
        try:
            outcome, epochs, more = self._distil(asked, seed, checkpoint)
            run |= more
        except _FAILURES as error:
            run |= {"failed": _line(error), "error": type(error).__name__}
            self.show.end()
        # The result first: where the disk is full the weights are the smaller loss.
        self._store(run)
        self.say(_told(run) + (f" ({run['seconds']:.0f} s)" if "seconds" in run else ""))
        if outcome is not None and epochs is not None and self.leads:
            if seed == self.job.seeds[0]:
                try:
                    checkpoint.save(outcome.network, seconds=outcome.seconds)
                except (OSError, RuntimeError) as error:  # torch's writer raises either
                    self.show.warn(f"weights: {checkpoint.path} could not be written: {error}")
            epochs.clear()
        PartialState().wait_for_everyone()

    def _distil(
        self, asked: Asked, seed: int, checkpoint: Checkpoint
    ) -> tuple[Outcome, Epochs, dict[str, Any]]:
        recipe, views = replace(self.recipes["student"], seed=seed), self.views
        batches = self._student_batches(asked, recipe)
        step = self._step(asked, batches, recipe)
        step.to(self._device)
        training = Training(f"{asked.label} seed {seed}", step, batches, recipe)
        chooser = None
        if self.job.matched and asked.variant.first != "none":
            logits, rich = self.galleries.teacher_logits, self._taught_from(asked)
            if rich is not views.rich:
                logits = outputs(self.teacher.to(self._device).eval(), rich, self._device)
            chooser = Chooser(
                asked.variant,
                step.network,
                views,
                self.galleries,
                logits,
                self.job.rematching,
                epochs=recipe.epochs,
                seed=seed,
                device=self._device,
            )
        training.choose = chooser
        outcome, epochs = self._fit(training, checkpoint)
        _let_go(step)
        more: dict[str, Any] = {
            "accuracy": self._accuracy(outcome.network, views.held_out_poor, views.poor),
            "loss": outcome.loss,
            "terms": outcome.terms,
            "train_accuracy": outcome.train_accuracy,
            "seconds": round(outcome.seconds, 2),
        }
        if chooser is not None:
            more["seconds"] = round(outcome.seconds - chooser.trace.watching, 2)
            chooser.watch()
        if self.job.matched:
            more["trace"] = asdict(chooser.trace) if chooser is not None else {}
        return outcome, epochs, more

    def _fit(self, training: Training, checkpoint: Checkpoint) -> tuple[Outcome, Epochs]:
        out = self.job.out
        epochs = Epochs(out / "epochs" / checkpoint.name, self.show.warn)
        training.keeper = epochs
        if self.leads:
            path, text = epochs.folder / "settings.json", json.dumps(checkpoint.settings)
            try:
                write_atomically(path, lambda file: file.write_text(text))
            except OSError as error:
                self.show.warn(f"{path} could not be written: {error}")
        self.show.keep(out / "history" / f"{checkpoint.name}.csv", checkpoint.name)
        accelerator = accelerator_for(training.recipe, self.job.device, compiled=self.job.compiled)
        outcome = fit(training, accelerator, self.show)
        self.show.end()
        return outcome, epochs

    def _accuracy(self, network: nn.Module, images: Images, like: Images) -> float:
        accelerator = Accelerator(cpu=self.job.device == "cpu")
        return evaluation.accuracy(network, images, like, accelerator, workers=self.job.workers)

    # What is stored.

    def _blank(self, asked: Asked, seed: int) -> Run:
        return {
            "method": asked.label,
            "seed": seed,
            "device": str(self._device),
            "config": self.settings(asked, seed),
        }

    def _store(self, run: Run) -> None:
        self._again.add((run["method"], run["seed"]))
        if self.leads:
            self.results.add(run, header=self.header if "failed" not in run else self._plain_header)

    @property
    def _plain_header(self) -> dict[str, Any]:
        """Before the teacher is trained nothing is known of it."""
        return {"command": self.job.command, "dataset": self.job.entry.name}

    def _found(self, asked: Asked, seed: int) -> Run | None:
        return self.results.find(asked.label, seed, self.settings(asked, seed))

    def _stored(self, asked: Asked, seed: int) -> Run | None:
        """The run, where it needs no training: it is finished, or would fail again."""
        if self.job.fresh and (asked.label, seed) not in self._again:
            return None
        run = self._found(asked, seed)
        if run is None or "failed" not in run:
            return run
        # Nothing is random: what diverged diverges again. Other errors may have been mended.
        lasting = run.get("error") in (None, "FloatingPointError") or self.helper
        return run if lasting or (asked.label, seed) in self._again else None

    @cached_property
    def _again(self) -> set[tuple[str, int]]:
        """Runs that this process has stored itself."""
        return set()

    # Between processes.

    def _agreed(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        (agreed,) = broadcast_object_list([value])
        return agreed

    @contextmanager
    def _locked(self, name: str, told: str) -> Iterator[None]:
        """Hold a lock for all processes of this training."""
        held = lock(self.job.out, name)
        if self.leads:
            try:
                held.acquire(timeout=0)
            except Timeout:
                self.say(f"{told}: waiting")
                held.acquire()
        PartialState().wait_for_everyone()
        try:
            yield
        finally:
            held.release()

    def _helpers(self, missing: int) -> list[subprocess.Popen[bytes]]:
        """The other processes of ``--jobs``: the same command, each takes the next free student."""
        count = min(self.job.jobs, missing) - 1
        if self.helper or count < 1:
            return []
        devices = torch.cuda.device_count() if self._device.type == "cuda" else 0
        threads = max((os.cpu_count() or 1) // (count + 1), 1)
        torch.set_num_threads(threads)
        found = []
        for number in range(1, count + 1):
            environment = {**os.environ, HELPER: "1", "OMP_NUM_THREADS": str(threads)}
            if devices:
                environment["CUDA_VISIBLE_DEVICES"] = str(number % devices)
            found.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
        return found


def _let_go(step: Step) -> None:
    """Take the hooks off both networks."""
    if isinstance(step, Distilled):
        step.distiller.detach()


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def _told(run: Run | None) -> str:
    if run is None:
        return "no result"
    outcome = f"failed: {run['failed']}" if "failed" in run else f"{run['accuracy']:.2f} %"
    return f"{run['method']} seed {run['seed']}: {outcome}"
