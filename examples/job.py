"""A job trains the missing students of a table and stores each as soon as it is finished.

A :class:`Job` looks up what is stored, tries a step of every row, estimates how long the table
takes, shares the work among processes, stores, and prints the table. Its subclass ``train.Session``
decides what is trained, and on which data.
"""

from __future__ import annotations

import inspect
import os
import shlex
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.markdown import Markdown
from torch import nn

import structkd
from progress import Show
from recipe import parsed
from store import (
    HELPER,
    Checkpoint,
    Epochs,
    Run,
    Store,
    agreed,
    code_digest,
    first_line,
    held,
    helpers,
    write_atomically,
)
from table import result_table

_HERE = Path(__file__).resolve().parent
_WORDED = (ValueError, TypeError, RuntimeError, FloatingPointError)  # say enough by themselves
_ENDED_LONG = 24 * 3600  # seconds of training that are not begun without --yes


class Job(ABC):
    """Rows times seeds of one table, in the folder ``--out``.

    Making one opens its images and tries its networks; nothing is trained before :meth:`run`.
    """

    title = "accuracy on poor images"
    measure = "accuracy"  # what a run is judged by, in percent

    def __init__(
        self, options: Any, command: str = "", console: Console | None = None, **given: Any
    ) -> None:
        options.check()
        self.options, self.command, self.console = options, command, console or Console()
        self.helper = HELPER in os.environ  # one of the processes that --jobs started
        _check_device(options.device)
        self.out = options.out or Path("runs") / options.recipe
        state = PartialState(cpu=options.device == "cpu")
        self.leads = state.is_main_process
        if options.precision == "fp16" and state.device.type == "cpu":
            raise ValueError("--precision fp16 needs a GPU; fix: --precision bf16 or fp32")
        self.store = Store(self.out, self.measure)
        self.show = Show(self.console, self.out, board=options.tensorboard, quiet=not self.leads)
        self.facts: dict[str, float] = {}  # the trained teacher's measures
        self._mine: set[tuple[str, int]] = set()  # what this process stored itself
        self.methods: list[Any] = self.rows()
        self.open(**given)

    # What a subclass says.

    @abstractmethod
    def rows(self) -> list[Any]:
        """The methods, each with a ``label``."""

    @abstractmethod
    def open(self, **given: Any) -> None:
        """Open the images, where they are not given, and reject options that cannot work."""

    @abstractmethod
    def teacher_training(self) -> Any:
        """A teacher's training, newly drawn."""

    @abstractmethod
    def student_training(self, method: Any, seed: int) -> Any:
        """A student's training, newly drawn, with the teacher that was trained."""

    @abstractmethod
    def fit(self, training: Any, keeper: Epochs | None) -> nn.Module:
        """Train, from the last epoch that was kept; returns the network to measure."""

    @abstractmethod
    def evaluated(self, student: nn.Module) -> dict[str, Any]:
        """A student on the held-out poor images: ``measure``, and what else its run keeps."""

    @abstractmethod
    def teacher_evaluated(self, teacher: nn.Module) -> dict[str, float]:
        """The teacher's measure on each modality that it can see, by name."""

    @property
    @abstractmethod
    def held_out(self) -> int:
        """How many images a student is evaluated on; it is part of the estimated time."""

    @abstractmethod
    def settings(self, role: str) -> dict[str, Any]:
        """All that the weights of a role depend on, as plain values that identify the result."""

    @abstractmethod
    def student_settings(self, method: Any, seed: int) -> dict[str, Any]:
        """The same of one student."""

    @abstractmethod
    def facts_of(self, role: str) -> dict[str, Any]:
        """What a user of a network needs beside its weights; ``predict.py`` reads it."""

    def teacher_checkpoint(self) -> Checkpoint:
        return Checkpoint(self.out, "teacher", self.settings("teacher"))

    def student_checkpoint(self, method: Any, seed: int) -> Checkpoint:
        role = f"student-{method.label}-seed{seed}"
        return Checkpoint(self.out, role, self.student_settings(method, seed))

    def code(self, role: str) -> str:
        """A digest of the code that a result depends on: of the loop, its data, and the library."""
        files = {Path(inspect.getfile(kind)).resolve() for kind in type(self).__mro__[:-2]}
        loop = [*sorted(files - {Path(__file__).resolve()})]
        loop += [_HERE / name for name in ("data", "models", "methods.py")]
        return code_digest(*loop, *([] if role == "teacher" else [Path(structkd.__file__).parent]))

    # The job.

    def run(self) -> list[Run]:
        """Train what is missing; returns all runs by row and seed, failed ones included."""
        items, missing = self.items, self.missing()
        if missing and not self.helper:
            self.preflight(missing)
        if all("failed" in (self._stored(*item) or {}) for item in items):
            raise ValueError(f"no row can be trained: {self._found(*items[0])['failed']}")
        self.train_shared()
        others = helpers(0 if self.helper else min(self.options.jobs, len(missing)) - 1)
        self.show.runs = len(items)
        try:
            self._work(items)
        except BaseException:  # no process is left to report their progress
            for other in others:
                other.terminate()
            raise
        finally:
            for other in others:
                other.wait()
        if self.leads and not self.helper:
            self.store.write(self._header)
        return [run for run in (self._found(*item) for item in items) if run is not None]

    @property
    def items(self) -> list[tuple[Any, int]]:
        """Every row with every seed."""
        return [(method, seed) for method in self.methods for seed in self.options.seeds]

    def missing(self) -> list[tuple[Any, int]]:
        """Those that are to be trained."""
        return [item for item in self.items if self._stored(*item) is None]

    def preflight(self, missing: list[tuple[Any, int]]) -> float:
        """Try a step of every missing row: stores failures, returns the estimated seconds."""
        self.show.say("preflight: trying a few steps of every row")
        total = 0.0
        for method in {method.label: method for method, _ in missing}.values():
            seeds = [seed for other, seed in missing if other.label == method.label]
            try:
                total += len(seeds) * self.estimated(self.student_training(method, seeds[0]))
            except OSError:  # of the images, and of every row
                raise
            except Exception as error:
                for seed in seeds:
                    failed = {"failed": _failure(error), "error": "preflight"}
                    self._store(method, seed, failed)
                    self.show.say(f"{method.label} seed {seed}: failed: {failed['failed']}")
        total /= self.options.jobs
        for training in self._shared_missing():
            total += self.estimated(training)
        left = sum(not self._failed(*item) for item in missing)
        told = f"preflight: {left} students to train, about {timedelta(seconds=round(total))}"
        self.show.say(told)
        if total > _ENDED_LONG and not self.options.yes:
            raise ValueError(f"{told}, more than a day; fix: --yes, fewer --epochs, or a GPU")
        return total

    def _shared_missing(self) -> list[Any]:
        return [] if self.teacher_checkpoint().path.exists() else [self.teacher_training()]

    def estimated(self, training: Any) -> float:
        """Seconds of a training, from a few steps of it and a batch of its evaluation."""
        device, options, clock = PartialState().device, training.options, time.perf_counter
        model, seconds, started = training.model.to(device).train(), [], clock()
        batch = training.batches.first()
        reading = clock() - started
        workers = options.workers if training.batches.streamed else 0
        for _ in range(3):
            started = clock()
            _, terms = training.loss(model, batch, 1.0)
            sum(terms.values()).backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(clock() - started)

        def beside(own: float) -> float:  # workers read while the network works
            return max(own, reading / workers) if workers else own + reading

        total = beside(min(seconds[1:])) * len(training.batches) * options.epochs
        if not isinstance(training.network, structkd.SemanticMatcher):  # which is not evaluated
            images = batch.rich if batch.poor is None else batch.poor
            with torch.no_grad():
                started = clock()
                training.network.eval()(images).cpu()
            each = beside(clock() - started) / len(images)
            # The teacher looks at either side.
            total += each * self.held_out * (2 if batch.poor is None else 1)
        if isinstance(model, structkd.Distiller):
            model.detach()
        return total

    def train_shared(self) -> None:
        """The teacher: from its checkpoint, or trained; its measures."""
        self.teacher = self.train_teacher()
        self.facts = self.teacher_evaluated(self.teacher)
        if not self.helper:
            told = ", ".join(f"{value:.2f} % on {name}" for name, value in self.facts.items())
            self.show.say(f"teacher {self.options.teacher}: {told}")

    def train_teacher(self) -> nn.Module:
        return self._shared(self.teacher_checkpoint(), self.teacher_training, "teacher")

    def _shared(self, checkpoint: Checkpoint, make: Callable[[], Any], role: str) -> nn.Module:
        """A network that all students share: read, or trained by the one process that holds it."""
        training, keeper = make(), self._keeper(checkpoint)
        told = f"another process trains the {role}: waiting"
        with held(self.out, checkpoint.name, waiting=lambda: self.show.say(told)):
            if checkpoint.load_into(training.network) is not None:
                self.show.say(f"{role} read from {checkpoint.path}")
                self._clear(keeper)
                return training.network
            network = self._fitted(training, checkpoint, keeper)
            facts = {}
            if role == "teacher":
                facts = self.facts_of(role) | {self.measure: self.teacher_evaluated(network)}
            if self.leads:
                checkpoint.save(network, **facts)
            self._clear(keeper)
            PartialState().wait_for_everyone()
        self.show.say(f"{role} {checkpoint.settings['model']} trained in {training.seconds:.0f} s")
        return network

    def _keeper(self, checkpoint: Checkpoint) -> Epochs:
        return Epochs(self.out / "epochs" / checkpoint.name, checkpoint.settings, self.show.warn)

    def _clear(self, keeper: Epochs) -> None:
        """Delete the epochs of what is stored: also later, where a kill came before it."""
        if self.leads:
            keeper.clear()

    def _fitted(self, training: Any, checkpoint: Checkpoint, keeper: Epochs) -> nn.Module:
        self.show.keep(self.out / "history" / f"{checkpoint.name}.csv", checkpoint.name)
        try:
            return self.fit(training, keeper)
        finally:
            self.show.end()  # a bar that is cut off keeps the cursor

    def _work(self, items: list[tuple[Any, int]]) -> None:
        """Train what no other process has taken, then wait for what they have."""
        left = dict(enumerate(items, start=1))
        while left:
            begun = len(left)
            for number, item in list(left.items()):
                self.show.run = number
                if agreed(self._stored(*item) is None):
                    with held(self.out, self.student_checkpoint(*item).name) as mine:
                        if not mine:
                            continue
                        # It may have been finished between the look and the lock.
                        if agreed(self._stored(*item) is None):
                            self.train_student(*item)
                del left[number]
                method, seed = item
                if not self.helper and (method.label, seed) not in self._mine:
                    self.show.say(f"{self._told(self._found(*item))} (finished before)")
                    if not self._failed(*item):
                        self._clear(self._keeper(self.student_checkpoint(*item)))
            if self.helper and left:
                return
            if len(left) == begun:
                time.sleep(1.0)

    def train_student(self, method: Any, seed: int) -> Run:
        """One student, trained and stored; one that fails is stored as failed."""
        checkpoint, network, run = self.student_checkpoint(method, seed), None, {}
        keeper = self._keeper(checkpoint)
        try:
            training = self.student_training(method, seed)
            network = self._fitted(training, checkpoint, keeper)
            if isinstance(training.model, structkd.Distiller):
                training.model.detach()
            run = self.result(training, network)
        except OSError:
            raise
        except Exception as error:
            network, run = None, {"failed": _failure(error), "error": type(error).__name__}
        # The weights first: a kill in between must not leave a result whose weights are never made.
        # Where the disk is full they are the smaller loss: the result then has their room.
        if network is not None and self.leads and seed == self.options.seeds[0]:
            try:
                facts = self.facts_of("student") | {self.measure: run[self.measure]}
                checkpoint.save(network, **facts)
            except OSError as error:
                self.show.warn(f"weights: {error}")
        run = self._store(method, seed, run)
        self.show.say(self._told(run) + (f" ({run['seconds']:.0f} s)" if "seconds" in run else ""))
        if network is not None:
            self._clear(keeper)
        PartialState().wait_for_everyone()
        return run

    def result(self, training: Any, network: nn.Module) -> Run:
        """What is stored of a student that is trained."""
        last = training.history[-1]
        known = ("epoch", "lr", "loss", "accuracy", "seconds", "images_per_second")
        run = {
            "loss": last["loss"],
            "terms": {name: value for name, value in last.items() if name not in known},
            "train_accuracy": last.get("accuracy"),
            "seconds": round(training.seconds, 2),
        }
        return self.evaluated(network) | run

    # What is stored.

    @property
    def _header(self) -> dict[str, Any]:
        teacher = {"model": self.options.teacher, **self.facts}
        return {"command": self.command, "dataset": self.options.recipe, "teacher": teacher}

    def _store(self, method: Any, seed: int, found: Run) -> Run:
        config, device = self.student_settings(method, seed), str(PartialState().device)
        run = {"method": method.label, "seed": seed, "device": device, "config": config, **found}
        self._mine.add((method.label, seed))
        if self.leads:
            self.store.write(self._header, run)
        return run

    def _found(self, method: Any, seed: int) -> Run | None:
        return self.store.find(method.label, seed, self.student_settings(method, seed))

    def _failed(self, method: Any, seed: int) -> bool:
        return "failed" in (self._found(method, seed) or {})

    def _stored(self, method: Any, seed: int) -> Run | None:
        """The stored run, if it needs no training: it is finished, or would fail again."""
        mine = (method.label, seed) in self._mine
        if self.options.fresh and not mine:
            return None
        run = self._found(method, seed)
        if run is None:
            config = self.student_settings(method, seed)
            if not self.helper and self.store.by_other_code(method.label, seed, config):
                self.show.once(f"{method.label} seed {seed}: its result was made by other code, so "
                               "it is trained again")  # fmt: skip
            return None
        if "failed" not in run or mine or self.helper:
            return run
        # Nothing is random, so a divergence would repeat. The cause of another error may be gone.
        return run if run.get("error") in (None, "FloatingPointError") else None

    def _told(self, run: Run | None) -> str:
        """A run in a few words."""
        if run is None:
            return "no result"
        failed = "failed" in run
        outcome = f"failed: {run['failed']}" if failed else f"{run[self.measure]:.2f} %"
        return f"{run['method']} seed {run['seed']}: {outcome}"

    def report(self, runs: Sequence[Run]) -> None:
        """Prints the table, and writes it to ``results.md``."""
        options = self.options
        title = f"{options.recipe}, {self.title}, student {options.student}"
        more = {f"teacher {options.teacher}, {name}": value for name, value in self.facts.items()}
        body = result_table(runs, title=title, more=more, measure=self.measure)
        self.console.print(Markdown(body))
        text = f"{body}\nMade by `{self.command}`.\n"
        write_atomically(self.out / "results.md", lambda file: file.write_text(text))
        kept = [self.student_checkpoint(one, options.seeds[0]).path for one in self.methods]
        if kept and kept[-1].exists():
            use = f"python examples/predict.py {kept[-1]} IMAGE"
            self.show.say(f"students: {self.out}; {use}")


def _failure(error: Exception) -> str:
    """What a row failed by; an error that does not say enough is told with its place."""
    told = first_line(error)
    if isinstance(error, _WORDED):
        return told
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {told} ({Path(place.filename).name}, line {place.lineno})"


def _check_device(name: str) -> None:
    if name == "auto":
        return
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name!r} cannot be used: {first_line(error)}") from error
    if torch.device(name).type != "cpu":
        os.environ["ACCELERATE_TORCH_DEVICE"] = name


def main(kind: type, job: type[Job], arguments: Sequence[str] | None = None, like: str = "") -> int:
    """Run a command. Returns 0, 1 if a row failed, 2 after one line on stderr, 130 for Ctrl-C.

    ``kind`` are the script's options, ``like`` its recipe where none is typed.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)

    def run() -> int:
        options = parsed(given, kind, like)
        command = shlex.join(["python", f"examples/{Path(sys.argv[0]).name}", *given])
        made = job(options, command)
        runs = made.run()
        if made.leads and not made.helper:
            made.report(runs)
        return int(any("failed" in run for run in runs))

    return reported(run)


def reported(action: Callable[[], int], *, trains: bool = True) -> int:
    """Run a command; an expected error becomes one line on stderr and the code 2.

    Of one that ``trains`` it is told that the same command resumes.
    """
    try:
        return action()
    except KeyboardInterrupt:
        more = "; the same command resumes from the last epoch" if trains else ""
        print(f"stopped{more}", file=sys.stderr)
        return 130
    except OSError as error:
        more = "; finished students are kept, and the same command resumes" if trains else ""
        line = f"{error}{more}"
    except (ValueError, TypeError, FloatingPointError) as error:
        *_, last = traceback.walk_tb(error.__traceback__)
        place = Path(last[0].f_code.co_filename).resolve()
        if not any(place.is_relative_to(room) for room in (_HERE, Path(structkd.__file__).parent)):
            raise
        line = str(error)
    print(f"error: {line}", file=sys.stderr)
    return 2
