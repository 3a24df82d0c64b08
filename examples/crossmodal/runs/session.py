"""A job under way: its images, its networks, its runs, each stored as soon as it is finished."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, replace
from datetime import timedelta
from functools import cached_property
from typing import Any

from accelerate import Accelerator, PartialState
from rich.console import Console
from torch import nn

from crossmodal.data import Images, open_views
from crossmodal.errors import first_line
from crossmodal.runs import preflight
from crossmodal.runs.epochs import Epochs
from crossmodal.runs.job import Asked, Job
from crossmodal.runs.processes import HELPER, agreed, held, helpers
from crossmodal.runs.progress import Show
from crossmodal.runs.settings import Settings
from crossmodal.runs.store import Checkpoint, Results
from crossmodal.runs.takeover import taken, taken_history, taken_run
from crossmodal.runs.trainings import Trainings, let_go
from crossmodal.training import evaluation
from crossmodal.training.engine import Outcome, Training, accelerator_for, fit
from crossmodal.training.matching import Galleries

Run = dict[str, Any]
_POLL = 1.0  # seconds between two looks at runs that other processes have taken
# What a method may fail with; anything else is this program's own error.
_FAILURES = (ValueError, TypeError, RuntimeError, FloatingPointError)


class Session:
    """A job under way. Opening one reads the images; nothing is trained before ``run``."""

    def __init__(self, job: Job, console: Console) -> None:
        self.job, self.console = job, console
        self.helper = HELPER in os.environ
        preflight.check_device(job.device)
        preflight.check_extras(matched=job.matched)
        preflight.check_folder(job.out)
        self.leads = PartialState(cpu=job.device == "cpu").is_main_process
        self.show = Show(console, job.out, board=job.tensorboard, quiet=not self.leads)
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
        self.trainings = Trainings(job, self.views, job.recipes)
        for role, images in (("teacher", self.views.rich), ("student", self.views.poor)):
            network = self.trainings.network(role, 0)  # an unknown name is told now
            preflight.check_network(role, job.models[role], network, images)
        recipes, line = preflight.settled(self.trainings)
        if line and not self.helper:
            self.say(line)
        self.trainings = replace(self.trainings, recipes=recipes)
        self.settings = Settings(job, self.views, recipes)
        self.teacher = self.trainings.network("teacher", recipes["teacher"].seed)
        self.facts: dict[str, float] = {}  # the trained teacher's accuracies
        self.failed: dict[str, str] = {}  # methods that do not fit these networks
        self._again: set[tuple[str, int]] = set()  # runs that this process has stored itself

    def say(self, text: str) -> None:
        """A line on the console, from one process."""
        self.show.say(text)

    def new_student(self) -> nn.Module:
        """A student to load weights into."""
        return self.trainings.network("student", 0)

    def run(self) -> list[Run]:
        """Train what is missing; the runs in the order of the rows and seeds, failed ones too."""
        items = [(asked, seed) for asked in self.job.asked for seed in self.job.seeds]
        for asked in self.job.asked:
            self._describe(asked)
        missing = [item for item in items if self._stored(*item) is None]
        if self.job.resume and not self.helper:
            wanted = [self.settings.shared_checkpoint("teacher")]
            wanted += [self.settings.checkpoint(*item) for item in missing]
            preflight.check_resume(self.results, wanted)
        if missing and self.job.near and not self.job.fresh and not self.helper:
            self._take_over(missing)
            missing = [item for item in missing if self._stored(*item) is None]
        if missing and not self.helper:
            self._preflight(missing)
        if all(asked.label in self.failed for asked in self.job.asked):
            told = "; ".join(f"{label}: {error}" for label, error in self.failed.items())
            raise ValueError(f"no method can be trained, so no teacher is: {told}")
        self._train_shared()
        count = 0 if self.helper else min(self.job.jobs, len(missing)) - 1
        others = helpers(count, self.job.command)
        self.show.runs = len(items)
        try:
            self._work(items)
        except BaseException:  # nobody is left who would tell of what they do
            for other in others:
                other.terminate()
            raise
        finally:
            for other in others:
                other.wait()
        if self.leads and not self.helper:
            self.results.write(self._header)
        stored = (self._found(asked, seed) for asked, seed in items)
        return [run for run in stored if run is not None]

    # Before training.

    def _describe(self, asked: Asked) -> None:
        """Build a method's criterion once, for its options; remember it where it does not fit."""
        self.trainings.taught_from(asked)  # what the data lack is refused, not stored as failed
        try:
            training = self.trainings.student(asked, 0, self.teacher)
            described = asked.plan.described(training.step.criterion)
            let_go(training)
        except _FAILURES as error:
            self.failed[asked.label] = first_line(error)
            described = {"supervision": asked.plan.supervision, "plan": asked.plan.name}
        self.settings.losses[asked.label] = described

    def _preflight(self, missing: list[tuple[Asked, int]]) -> None:
        """A real step of every missing method; the failed ones are stored, the time is told."""
        rows = {asked.label: asked for asked, _ in missing}
        seconds = dict.fromkeys(rows, 0.0)
        for label in [label for label in rows if label not in self.failed]:
            try:
                training = self.trainings.student(rows[label], 0, self.teacher)
                seconds[label] = preflight.estimated(training, self.job.device)
                let_go(training)
            except _FAILURES as error:
                self.failed[label] = first_line(error)
        for asked, seed in missing:
            if (error := self.failed.get(asked.label)) is not None:
                self._store(self._blank(asked, seed) | {"failed": error, "error": "preflight"})
                self.say(f"{asked.label} seed {seed}: failed: {error}")
        networks = nn.ModuleList([self.teacher, self.new_student()])
        weights = sum(value.nbytes for value in networks.state_dict().values())
        # Two epochs with momentum and one being written, and the students that are kept.
        preflight.check_folder(self.job.out, 9.0 * weights + 1e6)
        left = [asked.label for asked, _ in missing if asked.label not in self.failed]
        total = sum(seconds[label] for label in left)
        for role in self._shared:
            kept = self.settings.shared_checkpoint(role)
            places = (replace(kept, folder=folder).path for folder in (kept.folder, *self.job.near))
            if not any(place.exists() for place in places):
                total += preflight.estimated(self.trainings.shared(role), self.job.device)
        time_left = timedelta(seconds=round(total / self.job.jobs))
        self.say(
            f"preflight: {len(rows.keys() - self.failed.keys())} of {len(rows)} methods fit; "
            f"{len(left)} students to train, about {time_left}"
        )

    # Teacher and matcher.

    @property
    def _shared(self) -> tuple[str, ...]:
        matched = any(asked.variant.matched for asked in self.job.asked)
        return ("teacher", "matcher") if self.job.matched and matched else ("teacher",)

    def _train_shared(self) -> None:
        """The teacher, and the matcher where one is needed: from their checkpoints, or trained."""
        for role in self._shared:
            setattr(self, role, self._trained(role))
        views = self.views
        sets = {"clean": views.held_out_rich, "poor": views.held_out_poor}
        if self.job.matched:
            sets = {"rich": views.held_out_rich}
        self.facts = {
            name: self._accuracy(self.teacher, images, views.rich)
            for name, images in sets.items()
            if images.shape[0] == views.rich.shape[0]  # the bands that the teacher can see
        }
        if not self.helper:
            told = ", ".join(f"{value:.2f} % on {name}" for name, value in self.facts.items())
            self.say(f"teacher {self.job.models['teacher']}: {told} held-out images")

    def _trained(self, role: str) -> nn.Module:
        checkpoint, training = self.settings.shared_checkpoint(role), self.trainings.shared(role)
        told = f"another process trains the {role}: waiting"
        with held(self.job.out, checkpoint.name, waiting=lambda: self.say(told)):
            if checkpoint.load_into(training.step.network):
                self.say(f"{role} read from {checkpoint.path}")
                return training.step.network
            if (path := taken(checkpoint, self.job.near, training.step.network)) is not None:
                if self.leads:
                    checkpoint.save(training.step.network)
                    taken_history(checkpoint, path.parent)
                PartialState().wait_for_everyone()
                self.say(f"{role} taken over from {path}")
                return training.step.network
            outcome = self._fit(training, checkpoint)
            if self.leads:
                checkpoint.save(outcome.network)
                training.keeper.clear()
            PartialState().wait_for_everyone()
        self.say(f"{role} {checkpoint.settings['model']} trained in {outcome.seconds:.0f} s")
        return outcome.network

    @cached_property
    def galleries(self) -> Galleries:
        """The rich images as the matcher and the teacher see them."""
        return Galleries.of(self.matcher, self.teacher, self.views, PartialState().device)

    # Students.

    def _take_over(self, missing: list[tuple[Asked, int]]) -> None:
        """Store what a folder near this one has finished of the very same settings."""
        for asked, seed in missing:
            checkpoint = self.settings.checkpoint(asked, seed)
            with held(self.job.out, checkpoint.name) as mine:
                if not mine:
                    continue
                wanted = asked.label, seed, checkpoint.settings
                folder, run = agreed(taken_run(self.job.near, *wanted))
                if run is None:
                    continue
                if self.leads:
                    student = self.new_student()
                    kept = seed == self.job.seeds[0]
                    if kept and taken(checkpoint, [folder], student) is not None:
                        checkpoint.save(student)
                    taken_history(checkpoint, folder)
                    self.results.write(self._header, run)
                PartialState().wait_for_everyone()
                self.say(f"{asked.label} seed {seed}: taken over from {folder}")

    def _work(self, items: list[tuple[Asked, int]]) -> None:
        """Train what no other process has taken, then wait for what they have."""
        left = dict(enumerate(items, start=1))
        while left:
            begun = len(left)
            for number, (asked, seed) in list(left.items()):
                self.show.run = number
                if agreed(self._stored(asked, seed) is None):
                    with held(self.job.out, self.settings.checkpoint(asked, seed).name) as mine:
                        if not mine:
                            continue
                        # It may have been finished between the look and the lock.
                        if agreed(self._stored(asked, seed) is None):
                            self._student(asked, seed)
                del left[number]
                if not self.helper and (asked.label, seed) not in self._again:
                    self.say(_told(self._found(asked, seed)) + " (finished before)")
            if self.helper and left:
                return
            if len(left) == begun:
                time.sleep(_POLL)

    def _student(self, asked: Asked, seed: int) -> None:
        """One student, trained and stored; one that fails is stored as failed."""
        checkpoint, run = self.settings.checkpoint(asked, seed), self._blank(asked, seed)
        outcome = None
        try:
            training = self.trainings.student(asked, seed, self.teacher)
            outcome = self._distil(asked, training, checkpoint, run)
        except _FAILURES as error:
            run |= {"failed": first_line(error), "error": type(error).__name__}
            self.show.end()
        # The result first: where the disk is full the weights are the smaller loss.
        self._store(run)
        self.say(_told(run) + (f" ({run['seconds']:.0f} s)" if "seconds" in run else ""))
        if outcome is not None and self.leads:
            if seed == self.job.seeds[0]:
                try:
                    checkpoint.save(outcome.network)
                except OSError as error:
                    self.show.warn(f"weights: {checkpoint.path} could not be written: {error}")
            training.keeper.clear()
        PartialState().wait_for_everyone()

    def _distil(self, asked: Asked, training: Training, where: Checkpoint, run: Run) -> Outcome:
        training.step.to(PartialState().device)
        if self.job.matched:
            run["trace"] = {}
            if asked.variant.matched:
                training.choose = self.trainings.chooser(asked, training, self.galleries)
        outcome = self._fit(training, where)
        let_go(training)
        run |= {
            "accuracy": self._accuracy(outcome.network, self.views.held_out_poor, self.views.poor),
            "loss": outcome.loss,
            "terms": outcome.terms,
            "train_accuracy": outcome.train_accuracy,
            "seconds": round(outcome.seconds, 2),
        }
        if (chooser := training.choose) is not None:
            run["seconds"] = round(outcome.seconds - chooser.trace.watching, 2)
            chooser.watch()
            run["trace"] = asdict(chooser.trace)
        return outcome

    def _fit(self, training: Training, checkpoint: Checkpoint) -> Outcome:
        out = self.job.out
        place = out / "epochs" / checkpoint.name
        training.keeper = Epochs(place, self.show.warn, checkpoint.settings)
        self.show.keep(out / "history" / f"{checkpoint.name}.csv", checkpoint.name)
        accelerator = accelerator_for(training.recipe, self.job.device, compiled=self.job.compile)
        outcome = fit(training, accelerator, self.show)
        self.show.end()
        return outcome

    def _accuracy(self, network: nn.Module, images: Images, like: Images) -> float:
        accelerator = Accelerator(cpu=self.job.device == "cpu")
        return evaluation.accuracy(network, images, like, accelerator, workers=self.job.workers)

    # What is stored.

    @property
    def _header(self) -> dict[str, Any]:
        teacher = {"model": self.job.models["teacher"], **self.facts}
        return {"command": self.job.command, "dataset": self.job.entry.name, "teacher": teacher}

    def _blank(self, asked: Asked, seed: int) -> Run:
        settings, device = self.settings.student(asked, seed), str(PartialState().device)
        return {"method": asked.label, "seed": seed, "device": device, "config": settings}

    def _store(self, run: Run) -> None:
        self._again.add((run["method"], run["seed"]))
        if self.leads:
            self.results.write(self._header, run)

    def _found(self, asked: Asked, seed: int) -> Run | None:
        return self.results.find(asked.label, seed, self.settings.student(asked, seed))

    def _stored(self, asked: Asked, seed: int) -> Run | None:
        """The run, where it needs no training: it is finished, or would fail again."""
        again = (asked.label, seed) in self._again
        if self.job.fresh and not again:
            return None
        run = self._found(asked, seed)
        if run is None or "failed" not in run or again or self.helper:
            return run
        # Nothing is random: what diverged diverges again. Other errors may have been mended.
        return run if run.get("error") in (None, "FloatingPointError") else None


def _told(run: Run | None) -> str:
    if run is None:
        return "no result"
    outcome = f"failed: {run['failed']}" if "failed" in run else f"{run['accuracy']:.2f} %"
    return f"{run['method']} seed {run['seed']}: {outcome}"
