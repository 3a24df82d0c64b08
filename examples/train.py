"""Distil a rich modality into a poor one: ``python examples/train.py mnist --criterion alone kd``.

A whole training in one file, meant to be copied: a teacher on rich images, a lone student on poor
ones, students with criteria, a table. Images come from ``data/``, networks from timm and
``models/``; ``store.py`` keeps what is finished, ``progress.py`` shows what is not.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
import yaml
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from rich.console import Console
from rich.markdown import Markdown
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn

import models
import structkd
from data import Batch, Batches, Images, Views, open_views
from data import Options as DataOptions
from methods import METHODS, Method, near
from progress import Running, Show, collapsed, shown
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
)  # fmt: skip
from structkd.diagnostics import filter_collapse
from table import Row, result_table, rows, table

__all__ = ["METHODS", "Method", "Options", "Row", "Session", "evaluate", "fit", "rows", "table"]
HERE = Path(__file__).resolve().parent
_CRITERION_SEED = 1_000_000  # apart from the students', so that these start alike in all rows
_FAILURES = (ValueError, TypeError, RuntimeError, FloatingPointError)  # of one row, not of the job
_ENDED_LONG = 24 * 3600  # seconds of training that are not begun without --yes


@dataclass(frozen=True)
class Options(DataOptions):
    """Options of a training; a recipe is a YAML file of the same names."""

    # Rows of the table: alone, a name of methods.yaml, a criterion of structkd, FILE.py:CLASS, or
    # YAML such as '{type: KDLoss, temperature: 2}'; '[kd, DSLoss]' is a sum.
    criterion: tuple[str, ...] = ("alone", "kd", "dense")
    # Network of the teacher: a timm name, or one of models/.
    teacher: str = "resnet32x4"
    # Network of the students.
    student: str = "resnet8x4"
    # Students of a row, each from its own initial weights; the first one's weights are kept.
    seeds: tuple[int, ...] = (0, 1, 2)
    # Passes over the training images.
    epochs: int = 100
    # Passes of the teacher, where it has its own number.
    teacher_epochs: int | None = None
    # Images a step, over all processes.
    batch_size: int = 64
    # Largest learning rate; it falls along a cosine.
    lr: float = 0.05
    # What takes the steps.
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    # On the network and the criterion's heads.
    weight_decay: float = 5e-4
    # Of gradients: none, agc:0.1 (a share of each filter's own norm), norm:1 or value:1.
    clip: str = "agc:0.1"
    # Let the criterion's weight fall to 0 along a cosine.
    falling: bool = False
    # Least share of a student's batch that has labels, under --labels.
    labelled: float = 1 / 3
    # Decay of the moving average of the weights that is evaluated; 0 for none.
    ema: float = 0.0
    # Autocast.
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    # auto, cpu, cuda, ...
    device: str = "auto"
    # Students that train side by side.
    jobs: int = 1
    # Folder for all that is written; runs/RECIPE by default.
    out: Path | None = None
    # Train again what is already finished.
    fresh: bool = False
    # Write TensorBoard files.
    tensorboard: bool = False
    # Begin what takes longer than a day.
    yes: bool = False

    def check(self) -> None:
        super().check()
        for name, least in {"epochs": 1, "batch_size": 1, "jobs": 1, "weight_decay": 0}.items():
            if not getattr(self, name) >= least:
                told = f"--{name.replace('_', '-')} must be at least {least}"
                raise ValueError(f"{told}, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"--lr must be positive, got {self.lr}")
        for name in ("ema", "labelled"):
            if not 0 <= getattr(self, name) <= (1 if name == "labelled" else 0.999999):
                raise ValueError(f"--{name} must lie in [0, 1), got {getattr(self, name)}")
        if not self.seeds or min(self.seeds) < 0:
            raise ValueError(f"--seeds must be whole numbers of at least 0, got {self.seeds}")
        if self.jobs > 1 and self.fresh:
            raise ValueError("--fresh trains one student after another; fix: --jobs 1")
        mode, _, size = self.clip.partition(":")
        value = float(size) if size.replace(".", "", 1).isdigit() else 0.0
        if mode not in ("none", "agc", "norm", "value") or (mode != "none" and not value > 0):
            raise ValueError(f"--clip must be none, agc:0.1, norm:1 or value:1, got {self.clip!r}")

    @classmethod
    def adapted(cls, values: dict[str, Any]) -> dict[str, Any]:
        """A recipe's values as this kind of job has them."""
        if values.get("reader") in ("scenes", "folders"):
            raise ValueError(
                f"{values['recipe']} has no pairs; fix: python examples/unpaired.py "
                f"{values['recipe']}"
            )
        return values


def parsed(arguments: Sequence[str], kind: type[Options] = Options) -> Options:
    """``RECIPE --option ...``: a recipe's options, and those that are given over them."""
    if not arguments or arguments[0].startswith("-"):
        known = ", ".join(sorted(file.stem for file in (HERE / "recipes").glob("*.yaml")))
        head = f"RECIPE comes first: a YAML file of your own, or one of\n{known}"
        if arguments and arguments[0] in ("-h", "--help"):
            print(head + "\n")
            tyro.cli(kind, args=["--help"], prog=f"{Path(sys.argv[0]).name} RECIPE")
        raise ValueError(head.replace("\n", " "))
    return tyro.cli(
        kind,
        args=list(arguments[1:]),
        default=recipe(arguments[0], kind),
        prog=f"{Path(sys.argv[0]).name} {arguments[0]}",
    )


def recipe(name: str, kind: type[Options] = Options, **changes: Any) -> Options:
    """The options of a recipe: a name of ``recipes/``, or a YAML file; ``like`` begins with one."""
    file = Path(name) if name.endswith((".yaml", ".yml")) else HERE / "recipes" / f"{name}.yaml"
    if not file.exists():
        known = sorted(file.stem for file in (HERE / "recipes").glob("*.yaml"))
        raise ValueError(f"unknown recipe {name!r}; {near(name, known)}known: {', '.join(known)}")
    values: dict[str, Any] = {"recipe": file.stem}
    while file:
        try:
            content = dict(yaml.safe_load(file.read_text()) or {})
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            told = first_line(error)
            raise ValueError(f"recipe {file} cannot be read: {told}") from error
        like = content.pop("like", None)
        values = {**content, **values}
        file = file.with_name(f"{like}.yaml") if like else None
    values = kind.adapted(values) | changes
    types = {one.name: one for one in dataclasses.fields(kind)}
    for option, value in values.items():
        if option not in types:
            raise ValueError(
                f"recipe {name} has an unknown option {option!r}; "
                f"{near(option, types)}known: {', '.join(types)}"
            )
        default = types[option].default
        if isinstance(default, tuple) or isinstance(value, list):
            texts = [v if isinstance(v, str | int) else yaml.safe_dump(v, default_flow_style=True)
                     for v in (value if isinstance(value, list | tuple) else [value])]  # fmt: skip
            values[option] = tuple(v.strip() if isinstance(v, str) else v for v in texts)
        elif isinstance(default, float):
            try:
                values[option] = float(value)  # YAML reads 1e-3 as a text
            except (TypeError, ValueError) as error:
                told = f"recipe {name}: {option} must be a number like {default!r}, got {value!r}"
                raise ValueError(told) from error
        elif "Path" in str(types[option].type) and value is not None:
            values[option] = Path(value).expanduser()
        elif not isinstance(value, type(default)) and default is not None:
            raise ValueError(f"recipe {name}: {option} must be like {default!r}, got {value!r}")
    return kind(**values)


# The loop.


@dataclass
class Training:
    """One network's training: what is trained, on which batches, and how its loss is made."""

    label: str
    model: nn.Module  # all that has parameters to train
    network: nn.Module  # the part of it that is evaluated and stored
    batches: Any  # data.Batches or data.MixedBatches
    options: Options
    loss: Callable[[nn.Module, Batch, float], tuple[Tensor | None, dict[str, Tensor]]]
    choose: Any = None  # without pairs: which teacher image stands beside each student image
    history: list[dict[str, float]] = field(default_factory=list)  # a row an epoch

    @property
    def seconds(self) -> float:
        return sum(row["seconds"] for row in self.history)


def supervised(modality: str) -> Callable[..., Any]:
    """The loss of a network that learns from labels alone."""

    def loss(model: nn.Module, batch: Batch, share: float) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(getattr(batch, modality))
        return logits, {"CE": cross_entropy(logits, batch.target)}

    return loss


def distilled(labels: float) -> Callable[..., Any]:
    """The loss of a Distiller: the labels' with its weight, and the criterion's terms."""

    def loss(model: nn.Module, batch: Batch, share: float) -> tuple[Tensor, dict[str, Tensor]]:
        logits, terms = model(
            batch.poor, batch.target, x_teacher=batch.rich, paired=batch.paired, index=batch.index
        )
        task = {"CE": labels * cross_entropy(logits, batch.target)}
        return logits, task | {name: share * term for name, term in terms.items()}

    return loss


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The mean over the rows with a label, of all processes; 0 where no row has one."""
    features = structkd.Features(logits=logits if logits.dtype == torch.float64 else logits.float())
    return structkd.SupervisionLoss(gather=True)(features, structkd.Features(), target)


def fit(training: Training, show: Show, keeper: Epochs | None = None) -> nn.Module:
    """Train, from the last epoch that was kept; the network to evaluate.

    Raises:
        FloatingPointError: An epoch's loss is not finite; names the epoch and the terms.
    """
    options, batches, network = training.options, training.batches, training.network
    torch.set_float32_matmul_precision("high")
    AcceleratorState._reset_state()  # another training may have had another precision
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(options.precision, options.precision),
        cpu=options.device == "cpu",
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=True)],
    )
    model = training.model.to(accelerator.device)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ema = ModelEmaV3(network, decay=options.ema) if options.ema else None
    steps = options.epochs * len(batches)

    # Yours to change: what takes the steps, and how long they are.
    optimizer = create_optimizer_v2(
        model, {"sgd": "momentum"}.get(options.optimizer, options.optimizer), options.lr,
        options.weight_decay, momentum=0.9, filter_bias_and_bn=False,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-6)

    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(
        *(part for part in (schedule, ema, training.choose) if part is not None)
    )
    clip, _, size = options.clip.partition(":")
    began = filter_collapse(network)  # before an epoch that was kept takes its place
    warned: set[str] = set()
    history = [] if keeper is None else keeper.resume(accelerator)
    training.history = history
    show.begin(training.label, options.epochs, len(batches), len(history))
    for epoch in range(len(history), options.epochs):
        started = time.perf_counter()
        ids = None if training.choose is None else training.choose(epoch)
        model.train()
        running = Running(batches.classes)
        for number, batch in enumerate(batches.epoch(epoch, ids)):
            done = epoch * len(batches) + number
            share = structkd.falling(done, steps) if options.falling else 1.0

            output, terms = training.loss(model, batch, share)
            loss = sum(terms.values())
            accelerator.backward(loss)
            if clip != "none":
                accelerator.unscale_gradients(optimizer)
                dispatch_clip_grad(network.parameters(), float(size), mode=clip)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

            if ema is not None:
                ema.update(network)
            running.add(terms, output, batch.target)
            if training.choose is not None and output is not None:
                training.choose.observe(*accelerator.gather((batch.index, output.detach())))
            if number % 20 == 0:  # each look waits for the device
                show.step(number + 1, running.means)
        means = running.means(accelerator)
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"{training.label}: the loss of epoch {epoch + 1} is not finite ({shown(means)}); "
                "fix: a smaller --lr, --clip agc:0.1, or --precision fp32"
            )
        if hasattr(training.model, "step_epoch"):
            training.model.step_epoch()
        seconds = time.perf_counter() - started
        row = {"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"], **means}
        row |= {"seconds": seconds, "images_per_second": len(batches) * batches.size / seconds}
        history.append(row)
        if keeper is not None:
            keeper.save(accelerator, history)
        show.epoch(history)
        # Early in a training one class is usual: from half way on it is told, once.
        if epoch + 1 in (max(options.epochs // 2, min(5, options.epochs)), options.epochs):
            looks = {"class": running.one_class()}
            looks["filters"] = collapsed(began, filter_collapse(network))
            for kind, text in looks.items():
                if text is not None and kind not in warned:
                    warned.add(kind)
                    show.warn(f"{training.label}, epoch {epoch + 1}: {text}")
    show.end()
    return network if ema is None else ema.module


@torch.no_grad()
def evaluate(network: nn.Module, images: Images, like: Images, options: Options) -> float:
    """Accuracy in percent; ``like`` are the images whose mean and deviation the network knows."""
    state = PartialState(cpu=options.device == "cpu")
    network.to(state.device).eval()
    correct = torch.zeros((), dtype=torch.int64, device=state.device)
    batches = Batches(
        options, poor=replace(images, like=like, targets=None), device=state.device,
        share=(state.process_index, state.num_processes), workers=options.workers,
    )  # fmt: skip
    for batch in batches.still():
        correct += (network(batch.poor).argmax(1) == batch.target).sum()
    return 100.0 * int(Accelerator(cpu=options.device == "cpu").reduce(correct)) / len(images)


# A job: what is missing of its table is trained, each student stored as soon as it is finished.


class Session:
    """A job. Opening one reads images and checks networks; nothing is trained before ``run``."""

    title = "accuracy on poor images"

    def __init__(self, options: Options, command: str = "", console: Console | None = None) -> None:
        options.check()
        self.options, self.command, self.console = options, command, console or Console()
        self.helper = HELPER in os.environ
        _check_device(options.device)
        self.out = options.out or Path("runs") / options.recipe
        state = PartialState(cpu=options.device == "cpu")
        self.leads = state.is_main_process
        if options.precision == "fp16" and state.device.type == "cpu":
            raise ValueError("--precision fp16 needs a GPU; fix: --precision bf16 or fp32")
        self.store = Store(self.out)
        self.show = Show(self.console, self.out, board=options.tensorboard, quiet=not self.leads)
        self.methods = self._rows()
        self.views = self._views()
        for line in [] if self.helper else self.views.summary():
            self.show.say(line)
        for role, images in (("teacher", self.views.rich), ("student", self.views.poor)):
            self._check_network(role, images)
        self.facts: dict[str, float] = {}  # the trained teacher's accuracies
        self._mine: set[tuple[str, int]] = set()  # what this process stored itself

    def _rows(self) -> list[Any]:
        return [Method.of(text) for text in self.options.criterion]

    def _views(self) -> Views:
        return open_views(self.options).held(self.options)

    def network(self, role: str, seed: int) -> nn.Module:
        """A new network of a role, its weights drawn by the seed."""
        torch.manual_seed(seed)
        images = self.views.poor if role == "student" else self.views.rich
        return models.create(
            getattr(self.options, role), num_classes=len(images.classes), in_chans=images.shape[0]
        )

    def _batches(self, options: Options, **images: Any) -> Batches:
        state = PartialState()
        share = (state.process_index, state.num_processes)
        return Batches(options, device=state.device, share=share, workers=options.workers, **images)

    def teacher_training(self) -> Training:
        options = replace(
            self.options, epochs=self.options.teacher_epochs or self.options.epochs, falling=False
        )
        network = self.network("teacher", 0)
        batches = self._batches(options, rich=self.views.rich, labelled=1.0)
        label = f"teacher {options.teacher}"
        return Training(label, network, network, batches, options, supervised("rich"))

    def student_training(self, method: Any, seed: int) -> Training:
        """A student's, newly drawn; the teacher is the one that is there."""
        options, network = self.options, self.network("student", seed)
        label, views = f"{method.label} seed {seed}", self.views
        if not method.parts:  # an image without a label has nothing for it
            batches = self._batches(options, poor=views.poor, labelled=1.0, seed=seed)
            return Training(label, network, network, batches, options, supervised("poor"))
        batches = self._batches(
            options, poor=views.poor, rich=views.rich, labelled=options.labelled, seed=seed
        )
        model = self._distiller(method, network, batches, seed)
        return Training(label, model, network, batches, options, distilled(method.labels))

    def _distiller(
        self, method: Method, network: nn.Module, batches: Any, seed: int
    ) -> structkd.Distiller:
        teacher = getattr(self, "teacher", None) or self.network("teacher", 0)
        example, size = batches.first(2), self.options.batch_size
        names = [method.stages(models.stage_names(net)) for net in (network, teacher)]
        samples = max(len(self.views.poor), len(self.views.rich))
        data = {"samples": samples, "batch_size": min(size, samples)}
        data["negatives"] = min(16384, samples)
        torch.manual_seed(_CRITERION_SEED + seed)
        return structkd.Distiller(
            network, teacher.cpu(), method.build(min(map(len, names)), data),
            example=(example.poor.cpu(), example.rich.cpu()),
            layers={"intermediate": names[0]}, teacher_layers={"intermediate": names[1]},
        )  # fmt: skip

    # What a result depends on.

    def settings(self, role: str, **own: Any) -> dict[str, Any]:
        """All that a network's weights depend on, as plain values: others make another result."""
        names = "epochs batch_size lr optimizer weight_decay clip ema precision pad flip crop"
        options = self.options
        found = {name: getattr(options, name) for name in names.split()}
        if role == "teacher":
            found["epochs"] = options.teacher_epochs or options.epochs
        images = self.views.rich if role == "teacher" else self.views.poor
        return {
            "model": getattr(options, role),
            "recipe": options.recipe,
            "images": images.fingerprint,
            "training": found,
            "code": self._code(role),
            **own,
        }

    def _code(self, role: str) -> str:
        loop = [
            Path(__file__).resolve(),
            *(HERE / name for name in ("data", "models", "methods.py")),
        ]
        loop += [] if type(self) is Session else [Path(inspect.getfile(type(self))).resolve()]
        library = [] if role == "teacher" else [Path(structkd.__file__).parent]
        return code_digest(*loop, *library)

    def teacher_checkpoint(self) -> Checkpoint:
        return Checkpoint(self.out, "teacher", self.settings("teacher"))

    def student_settings(self, method: Any, seed: int) -> dict[str, Any]:
        options, taught = self.options, bool(method.parts)
        teacher = self.teacher_checkpoint()
        return self.settings(
            "student",
            teacher=teacher.name if taught else None,
            loss=method.described,
            seed=seed,
            falling=options.falling and taught,
            labelled=options.labelled if taught and options.labels is not None else None,
            held_out=self.views.held_out_poor.fingerprint,
            evaluate=options.evaluate,
        )

    def student_checkpoint(self, method: Any, seed: int) -> Checkpoint:
        role = f"student-{method.label}-seed{seed}"
        return Checkpoint(self.out, role, self.student_settings(method, seed))

    def facts_of(self, role: str) -> dict[str, Any]:
        """What a user of a network needs beside its weights; ``predict.py`` reads it."""
        images = self.views.rich if role == "teacher" else self.views.poor
        mean, std = images.statistics
        return {
            "network": getattr(self.options, role),
            "arguments": {"num_classes": len(images.classes), "in_chans": images.shape[0]},
            "classes": list(images.classes),
            "bands": images.shape[0],
            "size": list(images.shape[1:]),
            "mean": mean.tolist(),
            "std": std.tolist(),
            "modality": "clean" if role == "teacher" else self.views.poverty,
            "trained": self.command,
        }

    # The job.

    def run(self) -> list[Run]:
        """Train what is missing; the runs in the order of the rows and seeds, failed ones too."""
        items = [(method, seed) for method in self.methods for seed in self.options.seeds]
        missing = [item for item in items if self._stored(*item) is None]
        if missing and not self.helper:
            self._preflight(missing)
        if all(self._failed(*item) for item in items):
            raise ValueError(f"no row can be trained: {self._found(*items[0])['failed']}")
        self.train_shared()
        others = helpers(0 if self.helper else min(self.options.jobs, len(missing)) - 1)
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
            self.store.write(self._header)
        return [run for run in (self._found(*item) for item in items) if run is not None]

    def _preflight(self, missing: list[tuple[Any, int]]) -> None:
        """A step of every missing row, and a look at test images: failures and the time."""
        total = 0.0
        for method in {method.label: method for method, _ in missing}.values():
            seeds = [seed for other, seed in missing if other.label == method.label]
            try:
                total += len(seeds) * self._estimated(self.student_training(method, seeds[0]))
            except _FAILURES as error:
                for seed in seeds:
                    failed = {"failed": first_line(error), "error": "preflight"}
                    self._store(method, seed, failed)
                    self.show.say(f"{method.label} seed {seed}: failed: {failed['failed']}")
        total /= self.options.jobs
        for training in self._shared_missing():
            total += self._estimated(training)
        left = sum(not self._failed(*item) for item in missing)
        told = f"preflight: {left} students to train, about {timedelta(seconds=round(total))}"
        self.show.say(told)
        if total > _ENDED_LONG and not self.options.yes:
            raise ValueError(f"{told}, more than a day; fix: --yes, fewer --epochs, or a GPU")

    def _shared_missing(self) -> list[Training]:
        return [] if self.teacher_checkpoint().path.exists() else [self.teacher_training()]

    def _estimated(self, training: Training) -> float:
        """Seconds of a training, from a few steps of it and a batch of its evaluation."""
        device, options, clock = PartialState().device, training.options, time.perf_counter
        model, seconds, started = training.model.to(device).train(), [], clock()
        batch = training.batches.first()
        reading = clock() - started
        workers = options.workers if self.views.rich.pixels is None else 0
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
        if not isinstance(training.network, structkd.SemanticMatcher):
            images = batch.rich if batch.poor is None else batch.poor
            held_out = len(self.views.held_out_poor)
            if batch.poor is None:  # the teacher looks at either side
                held_out += len(self.views.held_out_rich)
            with torch.no_grad():
                started = clock()
                training.network.eval()(images).cpu()
            total += beside(clock() - started) / len(images) * held_out
        if isinstance(model, structkd.Distiller):
            model.detach()
        return total

    def train_shared(self) -> None:
        """The teacher: from its checkpoint, or trained; its accuracies."""
        self.teacher = self.train_teacher()
        views = self.views
        for name, images in (("clean", views.held_out_rich), ("poor", views.held_out_poor)):
            if images.shape[0] == views.rich.shape[0]:  # the bands that the teacher can see
                self.facts[name] = evaluate(self.teacher, images, views.rich, self.options)
        if not self.helper:
            told = ", ".join(f"{value:.2f} % on {name}" for name, value in self.facts.items())
            self.show.say(f"teacher {self.options.teacher}: {told} held-out images")

    def train_teacher(self) -> nn.Module:
        return self._shared(self.teacher_checkpoint(), self.teacher_training, "teacher")

    def _shared(self, checkpoint: Checkpoint, make: Callable[[], Training], role: str) -> nn.Module:
        """A network that all students share: read, or trained by the one process that holds it."""
        training = make()
        told = f"another process trains the {role}: waiting"
        with held(self.out, checkpoint.name, waiting=lambda: self.show.say(told)):
            if checkpoint.load_into(training.network) is not None:
                self.show.say(f"{role} read from {checkpoint.path}")
                return training.network
            network, keeper = self._fit(training, checkpoint)
            if self.leads:
                checkpoint.save(network, **(self.facts_of(role) if role == "teacher" else {}))
                keeper.clear()
            PartialState().wait_for_everyone()
        self.show.say(f"{role} {checkpoint.settings['model']} trained in {training.seconds:.0f} s")
        return network

    def _fit(self, training: Training, checkpoint: Checkpoint) -> tuple[nn.Module, Epochs]:
        keeper = Epochs(self.out / "epochs" / checkpoint.name, checkpoint.settings, self.show.warn)
        self.show.keep(self.out / "history" / f"{checkpoint.name}.csv", checkpoint.name)
        try:
            return fit(training, self.show, keeper), keeper
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
                    self.show.say(f"{told(self._found(*item))} (finished before)")
            if self.helper and left:
                return
            if len(left) == begun:
                time.sleep(1.0)

    def train_student(self, method: Any, seed: int) -> Run:
        """One student, trained and stored; one that fails is stored as failed."""
        checkpoint, network, run = self.student_checkpoint(method, seed), None, {}
        try:
            training = self.student_training(method, seed)
            network, keeper = self._fit(training, checkpoint)
            if isinstance(training.model, structkd.Distiller):
                training.model.detach()
            run = self._result(training, network)
        except _FAILURES as error:
            run = {"failed": first_line(error), "error": type(error).__name__}
        # The result first: where the disk is full the weights are the smaller loss.
        run = self._store(method, seed, run)
        self.show.say(told(run) + (f" ({run['seconds']:.0f} s)" if "seconds" in run else ""))
        if network is not None and self.leads:
            if seed == self.options.seeds[0]:
                try:
                    checkpoint.save(network, accuracy=run["accuracy"], **self.facts_of("student"))
                except OSError as error:
                    self.show.warn(f"weights: {checkpoint.path} could not be written: {error}")
            keeper.clear()
        PartialState().wait_for_everyone()
        return run

    def _result(self, training: Training, network: nn.Module) -> Run:
        views, last = self.views, training.history[-1]
        known = ("epoch", "lr", "loss", "accuracy", "seconds", "images_per_second")
        return {
            "accuracy": evaluate(network, views.held_out_poor, views.poor, self.options),
            "loss": last["loss"],
            "terms": {k: v for k, v in last.items() if k not in known},
            "train_accuracy": last.get("accuracy", math.nan),
            "seconds": round(training.seconds, 2),
        }

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
        """The run, where it needs no training: it is finished, or would fail again."""
        mine = (method.label, seed) in self._mine
        if self.options.fresh and not mine:
            return None
        run = self._found(method, seed)
        if run is None:
            config = self.student_settings(method, seed)
            if not self.helper and self.store.by_other_code(method.label, seed, config):
                self.show.once(f"{method.label} seed {seed}: its result is by other code, it is "
                               "trained again")  # fmt: skip
            return None
        if "failed" not in run or mine or self.helper:
            return run
        # Nothing is random: what diverged diverges again. Other errors may have been mended.
        return run if run.get("error") in (None, "FloatingPointError") else None

    def _check_network(self, role: str, images: Images) -> None:
        try:
            with torch.no_grad():
                self.network(role, 0).eval()(torch.zeros(1, *images.shape))
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"--{role} {getattr(self.options, role)} does not take images of "
                f"{'x'.join(map(str, images.shape))} ({first_line(error)}); fix: another network, "
                "or --size N"
            ) from error


def _check_device(name: str) -> None:
    if name == "auto":
        return
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name!r} cannot be used: {first_line(error)}") from error
    if torch.device(name).type != "cpu":
        os.environ["ACCELERATE_TORCH_DEVICE"] = name


def told(run: Run | None) -> str:
    """A run in a few words."""
    if run is None:
        return "no result"
    outcome = f"failed: {run['failed']}" if "failed" in run else f"{run['accuracy']:.2f} %"
    return f"{run['method']} seed {run['seed']}: {outcome}"


def report(session: Session, runs: Sequence[Run]) -> None:
    """Prints the table, and writes it to ``results.md``."""
    options = session.options
    title = f"{options.recipe}, {session.title}, student {options.student}"
    model = options.teacher
    more = {f"teacher {model}, {name} images": value for name, value in session.facts.items()}
    body = result_table(runs, title=title, more=more)
    session.console.print(Markdown(body))
    text = f"{body}\nMade by `{session.command}`.\n"
    write_atomically(session.out / "results.md", lambda file: file.write_text(text))
    kept = [session.student_checkpoint(m, options.seeds[0]).path for m in session.methods]
    if kept and kept[-1].exists():
        session.show.say(f"students: {session.out}; python examples/predict.py {kept[-1]} IMAGE")


def main(arguments: Sequence[str] | None = None, kind: Any = Options, session: Any = None) -> int:
    """Run a command: 0, 1 where a row failed, 2 after one line on stderr, 130 for Ctrl-C."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    return reported(lambda: _run(given, kind, session or Session))


def _run(given: Sequence[str], kind: Any, session: Any) -> int:
    options = parsed(given, kind)
    command = shlex.join(["python", f"examples/{Path(sys.argv[0]).name}", *given])
    job = session(options, command)
    runs = job.run()
    if job.leads and not job.helper:
        report(job, runs)
    return int(any("failed" in run for run in runs))


def reported(action: Callable[[], int]) -> int:
    """Run a command; an error raised on purpose becomes one line on stderr and the code 2."""
    try:
        return action()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last epoch", file=sys.stderr)
        return 130
    except OSError as error:
        line = f"{error}; what is finished is kept, the same command goes on"
    except (ValueError, TypeError, FloatingPointError) as error:
        *_, last = traceback.walk_tb(error.__traceback__)
        place = Path(last[0].f_code.co_filename).resolve()
        if not any(place.is_relative_to(room) for room in (HERE, Path(structkd.__file__).parent)):
            raise
        line = str(error)
    print(f"error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
