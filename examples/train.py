"""Distil a rich modality into a poor one: ``python examples/train.py mnist --criterion alone kd``.

A whole training in one file, meant to be copied: a teacher on rich images, a lone student on poor
ones, students with criteria. Images come from ``data/``, networks from timm and ``models/``.
``job.py`` runs the rows and seeds of a table, and ``store.py`` keeps finished results.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn

import job
import models
import structkd
from data import APART, Batch, Batches, Images, Views, open_views
from data import Options as DataOptions
from data.images import NO_LABEL
from data.options import ImageOptions, at_least, each_once
from job import reported
from methods import MEAN_TEACHER, METHODS, Method
from progress import Running, Show, collapsed, shown
from recipe import parsed, recipe
from store import Epochs, first_line
from structkd.diagnostics import filter_collapse
from table import Row, result_table, rows, table

__all__ = [
    "METHODS", "Method", "Options", "Row", "Session", "evaluate", "fit", "parsed", "recipe",
    "reported", "result_table", "rows", "table",
]  # fmt: skip
_DECAY, _SURE = 0.99, 0.9  # of the mean teacher's average; the least probability that is believed
_CRITERION_SEED = 1_000_000  # apart from the students', so that these start alike in all rows


@dataclass(frozen=True)
class LoopOptions(ImageOptions):
    """Options of a training, whatever it trains on."""

    # Rows of the table: alone, mean teacher (for --labels), a name of methods.yaml, a criterion of
    # structkd, FILE.py:CLASS, or YAML such as '{type: KDLoss, temperature: 2}'; '[kd, DSLoss]' is a
    # sum.
    criterion: tuple[str, ...] = ("alone", "kd", "dense")
    # Network of the teacher: a timm name, or one of models/.
    teacher: str = "resnet32x4"
    # Network of the students.
    student: str = "resnet8x4"
    # Each row is trained once a seed, from its own initial weights; the first one's are kept.
    seeds: tuple[int, ...] = (0, 1, 2)
    # Passes over the training images.
    epochs: int = 100
    # Passes of the teacher; --epochs by default.
    teacher_epochs: int | None = None
    # Largest learning rate; it falls along a cosine.
    lr: float = 0.05
    # Optimizer.
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    # Weight decay of the network and of the criterion's heads.
    weight_decay: float = 5e-4
    # How gradients are clipped: none, agc:0.1 (at a share of each filter's norm), norm:1, value:1.
    clip: str = "agc:0.1"
    # Let the criterion's weight fall to 0 along a cosine.
    falling: bool = False
    # With --labels, the least share of a student's batch that has labels.
    labelled: float = 1 / 3
    # Decay of the moving average of the weights that is evaluated; 0 for none.
    ema: float = 0.0
    # Precision of autocast.
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    # auto, cpu, cuda, ...
    device: str = "auto"
    # How many students train side by side.
    jobs: int = 1
    # Folder for all that is written; runs/RECIPE by default.
    out: Path | None = None
    # Train finished students again.
    fresh: bool = False
    # Write TensorBoard files.
    tensorboard: bool = False
    # Start even if the table takes longer than a day.
    yes: bool = False

    def check(self) -> None:
        """Raise for values that no training can have."""
        super().check()
        at_least(self, epochs=1, jobs=1, weight_decay=0)
        if not self.lr > 0:
            raise ValueError(f"--lr must be positive, got {self.lr}")
        for name, most in {"ema": 0.999999, "labelled": 1.0}.items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"--{name} must lie in [0, {most:g}], got {getattr(self, name)}")
        if not self.seeds or min(self.seeds) < 0:
            raise ValueError(f"--seeds must be whole numbers of at least 0, got {self.seeds}")
        each_once(self, "criterion", "seeds")
        if self.jobs > 1 and self.fresh:
            raise ValueError("--fresh trains one student after another; fix: --jobs 1")
        mode, _, size = self.clip.partition(":")
        value = float(size) if size.replace(".", "", 1).isdigit() else 0.0
        if mode not in ("none", "agc", "norm", "value") or (mode != "none" and not value > 0):
            raise ValueError(f"--clip must be none, agc:0.1, norm:1 or value:1, got {self.clip!r}")


@dataclass(frozen=True)
class Options(DataOptions, LoopOptions):
    """Options of a training; a recipe is a YAML file of the same names."""

    @classmethod
    def adapted(cls, values: dict[str, Any]) -> dict[str, Any]:
        """A recipe's values as this kind of job has them."""
        if values.get("reader") in APART:
            name = values["recipe"]
            raise ValueError(f"{name} has no pairs; fix: python examples/unpaired.py {name}")
        return values


# The loop.


@dataclass
class Training:
    """One network's training: what is trained, on which batches, and how its loss is made."""

    label: str
    model: nn.Module  # all that has parameters to train
    network: nn.Module  # the part of it that is evaluated and stored
    batches: Any  # data.Batches, or another with its methods
    options: LoopOptions
    loss: Callable[[nn.Module, Batch, float], tuple[Tensor | None, dict[str, Tensor]]]
    choose: Any = None  # without pairs: which teacher image stands beside each student image
    history: list[dict[str, float]] = field(default_factory=list)  # a row an epoch

    @property
    def seconds(self) -> float:
        return sum(row["seconds"] for row in self.history)


def supervised(modality: str, labels: float = 1.0) -> Callable[..., Any]:
    """The loss of a network that learns from labels alone, with their weight."""

    def loss(model: nn.Module, batch: Batch, share: float) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(getattr(batch, modality))
        return logits, {"CE": labels * cross_entropy(logits, batch.target)}

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


class MeanTeacher(nn.Module):
    """A student beside its moving average, whose confident answers are labels where there are none.

    Tarvainen & Valpola (NeurIPS 2017), with FixMatch's least confidence.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.average = copy.deepcopy(network).requires_grad_(False)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and targets: the average's answers, where it is confident, for missing ones."""
        self._follow()
        self.average.train()  # both see one batch's statistics
        with torch.no_grad():
            sure, told = self.average(x).softmax(1).max(1)
        told = torch.where(sure > _SURE, told, NO_LABEL)
        missing = (target == NO_LABEL).view(len(target), -1).all(1)
        missing = missing.view(-1, *[1] * (target.dim() - 1))
        return self.network(x), torch.where(missing, told, NO_LABEL)

    @torch.no_grad()
    def _follow(self) -> None:
        for mean, value in zip(self.average.parameters(), self.network.parameters(), strict=True):
            mean.lerp_(value, 1 - _DECAY)


def mean_teacher(model: nn.Module, batch: Batch, share: float) -> tuple[Tensor, dict[str, Tensor]]:
    logits, told = model(batch.poor, batch.target)
    return logits, {
        "CE": cross_entropy(logits, batch.target),
        "MT": share * cross_entropy(logits, told),
    }


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The mean over the labelled rows of all processes; 0 if no row has a label."""
    features = structkd.Features(logits=logits if logits.dtype == torch.float64 else logits.float())
    return structkd.SupervisionLoss(gather=True)(features, structkd.Features(), target)


def fit(training: Training, show: Show, keeper: Epochs | None = None) -> nn.Module:
    """Train, from the last epoch that was kept; returns the network to evaluate.

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

    # Yours to change: the optimizer and its learning rate.
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
            if training.choose is not None and training.choose.observes and output is not None:
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
        # Early in a training one class is usual, so the warning comes from half way on, once.
        if epoch + 1 in (max(options.epochs // 2, min(5, options.epochs)), options.epochs):
            looks = {"class": running.one_class()}
            looks["filters"] = collapsed(began, filter_collapse(network))
            for kind, text in looks.items():
                if text is not None and kind not in warned:
                    warned.add(kind)
                    show.warn(f"{training.label}, epoch {epoch + 1}: {text}")
    show.end()
    return network if ema is None else ema.module


def here(options: Any) -> dict[str, Any]:
    """Where this process's batches go, and which part of each is its own."""
    state = PartialState(cpu=options.device == "cpu")
    share = (state.process_index, state.num_processes)
    return {"device": state.device, "share": share, "workers": options.workers}


@torch.no_grad()
def evaluate(network: nn.Module, images: Images, like: Images, options: Options) -> float:
    """Accuracy in percent; ``like`` are the images whose mean and deviation the network knows."""
    state = PartialState(cpu=options.device == "cpu")
    network.to(state.device).eval()
    correct = torch.zeros((), dtype=torch.int64, device=state.device)
    batches = Batches(options, poor=replace(images, like=like, targets=None), **here(options))
    for batch in batches.still():
        correct += (network(batch.poor).argmax(1) == batch.target).sum()
    return 100.0 * int(Accelerator(cpu=options.device == "cpu").reduce(correct)) / len(images)


class Session(job.Job):
    """The teacher and the students of one recipe."""

    options: Options
    read = (
        "epochs", "batch_size", "lr", "optimizer", "weight_decay", "clip", "ema", "precision",
        "pad", "flip", "crop",
    )  # fmt: skip
    """Options that weights depend on, besides those that choose the images."""

    resized = "--size N"
    """The option that brings images to another size."""

    def rows(self) -> list[Any]:
        return [Method.of(text) for text in self.options.criterion]

    def open(self, views: Views | None = None) -> None:
        self.views = views or self.opened()
        for line in [] if self.helper else self.views.summary():
            self.show.say(line)
        for role, images in (("teacher", self.views.rich), ("student", self.views.poor)):
            self._check_network(role, images)

    def opened(self) -> Views:
        """The images, in memory where they fit."""
        return open_views(self.options).held(self.options)

    def network(self, role: str, seed: int) -> nn.Module:
        """A new network of a role, its weights drawn by the seed."""
        torch.manual_seed(seed)
        images = self.views.poor if role == "student" else self.views.rich
        return models.create(
            getattr(self.options, role), num_classes=len(images.classes), in_chans=images.shape[0]
        )

    def batches(self, options: Options, **images: Any) -> Batches:
        return Batches(options, **here(options), **images)

    @property
    def held_out(self) -> int:
        return len(self.views.held_out_poor)

    def evaluated(self, student: nn.Module) -> dict[str, Any]:
        views = self.views
        found = evaluate(student, views.held_out_poor, views.poor, self.options)
        return {self.measure: found}

    def teacher_evaluated(self, teacher: nn.Module) -> dict[str, float]:
        views, found = self.views, {}
        sides = {"clean images": views.held_out_rich, "poor images": views.held_out_poor}
        for name, images in sides.items():
            if images.shape[0] == views.rich.shape[0]:  # the bands that the teacher can see
                found[name] = evaluate(teacher, images, views.rich, self.options)
        return found

    def fit(self, training: Training, keeper: Epochs | None) -> nn.Module:
        return fit(training, self.show, keeper)

    def teacher_training(self) -> Training:
        options = replace(
            self.options, epochs=self.options.teacher_epochs or self.options.epochs, falling=False
        )
        network = self.network("teacher", 0)
        batches = self.batches(options, rich=self.views.rich, labelled=1.0)
        label = f"teacher {options.teacher}"
        return Training(label, network, network, batches, options, supervised("rich"))

    def student_training(self, method: Any, seed: int) -> Training:
        options, network = self.options, self.network("student", seed)
        label, views = f"{method.label} seed {seed}", self.views
        if method.label == MEAN_TEACHER:
            batches = self.batches(options, poor=views.poor, labelled=options.labelled, seed=seed)
            return Training(label, MeanTeacher(network), network, batches, options, mean_teacher)
        if not method.parts:  # an image without a label has nothing for it
            batches = self.batches(options, poor=views.poor, labelled=1.0, seed=seed)
            loss = supervised("poor", method.labels)
            return Training(label, network, network, batches, options, loss)
        batches = self.batches(
            options, poor=views.poor, rich=views.rich, labelled=options.labelled, seed=seed
        )
        model = self._distiller(method, network, batches, seed)
        return Training(label, model, network, batches, options, distilled(method.labels))

    def stages(self, method: Method, network: nn.Module) -> list[str]:
        """The layers that the criteria read."""
        return method.stages(models.stage_names(network))

    def _distiller(
        self, method: Method, network: nn.Module, batches: Any, seed: int
    ) -> structkd.Distiller:
        teacher = getattr(self, "teacher", None) or self.network("teacher", 0)
        example, size = batches.first(2), self.options.batch_size
        names = [self.stages(method, one) for one in (network, teacher)]
        samples = max(len(self.views.poor), len(self.views.rich))
        data = {"samples": samples, "batch_size": min(size, samples)}
        data["negatives"] = min(16384, samples)
        torch.manual_seed(_CRITERION_SEED + seed)
        return structkd.Distiller(
            network, teacher.cpu(), method.build(min(map(len, names)), data),
            example=(example.poor.cpu(), example.rich.cpu()),
            layers={"intermediate": names[0]}, teacher_layers={"intermediate": names[1]},
        )  # fmt: skip

    def settings(self, role: str, **own: Any) -> dict[str, Any]:
        options = self.options
        found = {name: getattr(options, name) for name in self.read}
        if role == "teacher":
            found["epochs"] = options.teacher_epochs or options.epochs
        images = self.views.rich if role == "teacher" else self.views.poor
        return {
            "model": getattr(options, role),
            "recipe": options.recipe,
            "images": images.fingerprint,
            "training": found,
            "code": self.code(role),
            **own,
        }

    def student_settings(self, method: Any, seed: int) -> dict[str, Any]:
        options, taught = self.options, bool(method.parts)
        teacher = self.teacher_checkpoint()
        mean = method.label == MEAN_TEACHER
        return self.settings(
            "student",
            teacher=teacher.name if taught else None,
            loss={MEAN_TEACHER: [_DECAY, _SURE]} if mean else method.described,
            seed=seed,
            falling=options.falling and taught,
            labelled=options.labelled if (taught or mean) and options.labels is not None else None,
            held_out=self.views.held_out_poor.fingerprint,
            evaluate=options.evaluate,
        )

    def facts_of(self, role: str) -> dict[str, Any]:
        images = self.views.rich if role == "teacher" else self.views.poor
        mean, std = images.statistics
        return {
            "network": getattr(self.options, role),
            "arguments": {"num_classes": len(images.classes), "in_chans": images.shape[0]},
            "classes": list(images.classes),
            "bands": images.shape[0],
            "size": list(images.shape[1:]),
            "margin": images.read.margin if getattr(images.read, "size", 0) else 1.0,
            "mean": mean.tolist(),
            "std": std.tolist(),
            "modality": "clean" if role == "teacher" else self.views.poverty,
            "trained": self.command,
        }

    def _check_network(self, role: str, images: Images) -> None:
        shape = self.seen(images)
        try:
            network = self.network(role, 0).eval()
        except ValueError as error:
            raise ValueError(f"--{role}: {error}") from error
        try:
            with torch.no_grad():
                network(torch.zeros(1, *shape))
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"--{role} {getattr(self.options, role)} does not take images of "
                f"{'x'.join(map(str, shape))} ({first_line(error)}); fix: another network, "
                f"or {self.resized}"
            ) from error

    def seen(self, images: Images) -> tuple[int, ...]:
        """The shape of an image in training."""
        return images.shape


def main(arguments: Sequence[str] | None = None) -> int:
    return job.main(Options, Session, arguments)


if __name__ == "__main__":
    sys.exit(main())
