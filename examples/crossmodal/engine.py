"""Training: a teacher on clean images, students that only ever see poor ones."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from crossmodal import models
from crossmodal.batches import Batch, Batches
from crossmodal.data import ImagePairs, Statistics
from crossmodal.methods import Options, Plan, Setup, resolve, stages
from crossmodal.progress import RunningMeans, progress_bar, shown
from structkd import FeatureCapture, Features
from structkd.criteria.base import Criterion

Modality = Literal["clean", "poor"]
Step = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]

_SHOW_EVERY = 20  # steps between two looks at the running means: each look waits for the device
_CRITERION_SEED = (
    1_000_000  # apart from the students' seeds, so that these start alike in all methods
)


@dataclass(frozen=True)
class Config:
    """How one network is trained.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step.
        lr: learning rate at the start; it falls along a cosine to ``final_lr``, step by step.
        final_lr: learning rate at the end.
        momentum: of SGD.
        weight_decay: of SGD, on the network and the criterion's heads.
        seed: of the initial weights, the order of the batches and their crops.
        pad: border for random crops, in pixels.
        flip: mirror half of the training images.
        fresh_noise: draw the noise anew at every pass.
        precision: ``fp32`` or ``bf16`` (autocast).
        device: where to train; no part of what a result depends on.
    """

    epochs: int
    batch_size: int = 64
    lr: float = 0.05
    final_lr: float = 1e-6
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0
    pad: int = 4
    flip: bool = True
    fresh_noise: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be fp32 or bf16, got {self.precision!r}")


@dataclass(frozen=True)
class Outcome:
    """A trained network, the seconds it took, and the last epoch's means over its steps.

    Attributes:
        model: the network, hooks removed.
        loss: what was minimised, the sum of ``terms``.
        terms: the loss's parts by name, weights included.
        train_accuracy: in percent, on the augmented images while training.
        seconds: of training.
    """

    model: nn.Module
    loss: float
    terms: dict[str, float]
    train_accuracy: float
    seconds: float


def train_teacher(
    name: str, pairs: ImagePairs, config: Config, *, console: Console | None = None
) -> Outcome:
    """Train a network on the clean images with cross-entropy alone."""
    model = _fresh_model(name, pairs, config)

    def step(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(batch.clean)
        return logits, {"CE": F.cross_entropy(logits.float(), batch.target)}

    return _train(f"teacher {name}", model, None, step, _batches(pairs, config), config, console)


def distil(
    method: str,
    student: str,
    teacher: nn.Module | None,
    pairs: ImagePairs,
    config: Config,
    *,
    options: Options | None = None,
    console: Console | None = None,
) -> Outcome:
    """Train a student on the poor images, with a frozen teacher that sees the clean ones.

    loss = supervision * CE(student, labels) + criterion(student's features, teacher's features)

    Args:
        method: a name that ``methods.resolve`` knows.
        student: a model name.
        teacher: the trained teacher; None only where the method has no criterion.
        pairs: the training images. The teacher must have been trained with the same statistics.
        config: the schedule; ``config.seed`` gives all methods the same start and the same batches.
        options: overrides for the criteria, see ``methods.resolve``.
        console: where the progress bar goes; None for none.

    Raises:
        ValueError: an unknown method or model, or no teacher for a method that needs one.
        FloatingPointError: an epoch's loss is not finite; names the epoch and the terms.
    """
    plan = resolve(method, options)
    if plan.parts and teacher is None:
        raise ValueError(f"method {method!r} needs a teacher, got None")
    model = _fresh_model(student, pairs, config)
    batches = _batches(pairs, config)
    label = f"{plan.name} seed {config.seed}"
    with ExitStack() as hooks:
        if teacher is None or not plan.parts:

            def alone(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
                logits = model(batch.poor)
                return logits, {"CE": plan.supervision * F.cross_entropy(logits, batch.target)}

            return _train(label, model, None, alone, batches, config, console)

        teacher.to(config.device).eval().requires_grad_(False)
        student_capture = hooks.enter_context(_capture(model, plan))
        teacher_capture = hooks.enter_context(_capture(teacher, plan))
        criterion = _criterion(plan, student_capture, teacher_capture, pairs, config)

        def step(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            with torch.no_grad():
                feats_t = teacher_capture(batch.clean).replace(index=batch.index)
            feats_s = student_capture(batch.poor).replace(index=batch.index)
            logits = _logits(feats_s)
            terms = {"CE": plan.supervision * F.cross_entropy(logits.float(), batch.target)}
            return logits, terms | criterion.terms(feats_s, feats_t, batch.target)

        return _train(label, model, criterion, step, batches, config, console)


def evaluate(
    model: nn.Module,
    pairs: ImagePairs,
    *,
    modality: Modality,
    statistics: Statistics,
    device: str = "cpu",
) -> float:
    """Accuracy in percent on one modality; ``statistics`` are those of the training images."""
    model.to(device).eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    with torch.no_grad():
        for batch in Batches(pairs, 256, statistics=statistics, device=device):
            images = batch.clean if modality == "clean" else batch.poor
            correct += (model(images).argmax(1) == batch.target).sum()
    return 100.0 * int(correct) / len(pairs)


def capture_features(
    model: nn.Module,
    pairs: ImagePairs,
    *,
    modality: Modality,
    statistics: Statistics,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Embeddings (N, D) and the mean-pooled last stage but one (N, C) of all images, on the CPU."""
    model.to(device).eval()
    names = stages(models.stage_names(model), "one")
    embeddings, pooled = [], []
    with FeatureCapture(model, intermediate=names) as capture, torch.no_grad():
        for batch in Batches(pairs, 256, statistics=statistics, device=device):
            feats = capture(batch.clean if modality == "clean" else batch.poor)
            if feats.embedding is None:
                raise ValueError(f"{type(model).__name__} has no classifier to read embeddings at")
            embeddings.append(feats.embedding.cpu())
            (stage,) = feats.intermediate
            pooled.append(stage.mean((2, 3) if stage.ndim == 4 else 1).cpu())
    return torch.cat(embeddings), torch.cat(pooled)


def _fresh_model(name: str, pairs: ImagePairs, config: Config) -> nn.Module:
    torch.manual_seed(config.seed)
    in_chans = pairs.clean.shape[1]
    model = models.create(name, num_classes=len(pairs.classes), in_chans=in_chans)
    return models.on_device(model, config.device)


def _batches(pairs: ImagePairs, config: Config) -> Batches:
    return Batches(
        pairs,
        config.batch_size,
        statistics=pairs.statistics,
        shuffle=True,
        pad=config.pad,
        flip=config.flip,
        fresh_noise=config.fresh_noise,
        seed=config.seed,
        device=config.device,
    )


def _capture(model: nn.Module, plan: Plan) -> FeatureCapture:
    return FeatureCapture(model, intermediate=stages(models.stage_names(model), plan.layers))


def _logits(feats: Features) -> Tensor:
    if feats.logits is None:
        raise ValueError("the student gave no logits (B, classes); use a classification model")
    return feats.logits


def _criterion(
    plan: Plan,
    student: FeatureCapture,
    teacher: FeatureCapture,
    pairs: ImagePairs,
    config: Config,
) -> Criterion:
    """Build the criterion from an example batch; evaluation mode leaves batch statistics alone."""
    example = next(iter(Batches(pairs, 2, statistics=pairs.statistics, device=config.device)))
    student.module.eval()
    with torch.no_grad():
        feats_s, feats_t = student(example.poor), teacher(example.clean)
    torch.manual_seed(_CRITERION_SEED + config.seed)
    steps = config.epochs * max(len(pairs) // config.batch_size, 1)
    criterion = plan.build(feats_s, feats_t, Setup(len(pairs.classes), len(pairs), steps))
    if criterion is None:
        raise ValueError(f"method {plan.name!r} has no criterion")
    return criterion.to(config.device)


def _train(
    label: str,
    model: nn.Module,
    criterion: Criterion | None,
    step: Step,
    batches: Batches,
    config: Config,
    console: Console | None,
) -> Outcome:
    """SGD with a cosine schedule over ``step``'s summed terms; returns the last epoch's means."""
    heads = [] if criterion is None else list(criterion.parameters())
    optimizer = torch.optim.SGD(
        [*model.parameters(), *heads],
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    total = config.epochs * len(batches)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total, config.final_lr)
    autocast = torch.autocast(
        torch.device(config.device).type, torch.bfloat16, enabled=config.precision == "bf16"
    )
    started = time.perf_counter()
    means: dict[str, float] = {}
    with progress_bar(console) as progress:
        bar = progress.add_task(label, total=total, terms="")
        for epoch in range(1, config.epochs + 1):
            model.train()
            if criterion is not None:
                criterion.train()
            running = RunningMeans()
            for number, batch in enumerate(batches, start=1):
                with autocast:
                    logits, terms = step(batch)
                loss = torch.stack([term.float() for term in terms.values()]).sum()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                lr = optimizer.param_groups[0]["lr"]
                optimizer.step()
                scheduler.step()
                hits = (logits.detach().argmax(1) == batch.target).float().mean()
                running.add({"loss": loss, **terms, "accuracy": 100 * hits})
                if number % _SHOW_EVERY == 0 or number == len(batches):
                    means = running.read()
                    text = f"epoch {epoch}/{config.epochs}  lr {lr:.4f}  {shown(means)}"
                    progress.update(bar, completed=(epoch - 1) * len(batches) + number, terms=text)
            if not math.isfinite(means["loss"]):
                raise FloatingPointError(
                    f"{label}: the loss of epoch {epoch} is not finite ({shown(means)}); "
                    "fix: a smaller --lr, or --precision fp32"
                )
    seconds = time.perf_counter() - started
    total_loss, accuracy = means.pop("loss"), means.pop("accuracy")
    return Outcome(model, total_loss, means, accuracy, seconds)
