"""Training: a teacher on clean images, students that only ever see poor ones."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from crossmodal import models
from crossmodal.batches import Batch, Batches
from crossmodal.config import Config, Outcome
from crossmodal.data import ImagePairs
from crossmodal.methods import Options, Plan, described, resolve
from crossmodal.progress import RunningMeans, progress_bar, shown
from crossmodal.registry import Setup
from crossmodal.stages import stages
from structkd import FeatureCapture, Features
from structkd.criteria.base import Criterion

Step = Callable[[Batch], tuple[Tensor | None, dict[str, Tensor]]]
Observe = Callable[[Batch, Tensor], None]

_SHOW_EVERY = 20  # steps between two looks at the running means: each look waits for the device
_CRITERION_SEED = (
    1_000_000  # apart from the students' seeds, so that these start alike in all methods
)


class Passes(Protocol):
    """What training reads: batches of one epoch at every pass, a new pass every epoch."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


def train_teacher(
    name: str, pairs: ImagePairs, config: Config, *, console: Console | None = None
) -> Outcome:
    """Train a network on the clean images with cross-entropy alone."""
    model = fresh_model(name, pairs, config)

    def step(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(batch.clean)
        return logits, {"CE": F.cross_entropy(logits.float(), batch.target)}

    return minimise(f"teacher {name}", model, None, step, _batches(pairs, config), config, console)


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
    model = fresh_model(student, pairs, config)
    return follow(
        plan,
        model,
        teacher,
        _batches(pairs, config),
        _example(pairs, config),
        _setup(pairs, config),
        config,
        console=console,
    )


def follow(
    plan: Plan,
    model: nn.Module,
    teacher: nn.Module | None,
    batches: Passes,
    example: Batch,
    setup: Setup,
    config: Config,
    *,
    observe: Observe | None = None,
    console: Console | None = None,
) -> Outcome:
    """Train a given student by a plan on any batches: ``distil`` where those are not pairs.

    ``batch.poor`` goes to the student and ``batch.clean`` to the teacher.

    Args:
        plan: the criterion and the weight of the cross-entropy.
        model: the student, on ``config.device``.
        teacher: the trained teacher; None only where the plan has no parts.
        batches: a new pass every epoch.
        example: a batch to build the criterion from.
        setup: what the criterion is told of the data.
        config: the schedule.
        observe: called at every distilling step with the batch and the student's logits, detached.
        console: where the progress bar goes; None for none.
    """
    label = f"{plan.name} seed {config.seed}"
    with ExitStack() as hooks:
        if teacher is None or not plan.parts:

            def alone(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
                logits = model(batch.poor)
                return logits, {"CE": plan.supervision * F.cross_entropy(logits, batch.target)}

            return minimise(label, model, None, alone, batches, config, console)

        teacher.to(config.device).eval().requires_grad_(False)
        student_capture = hooks.enter_context(_capture(model, plan))
        teacher_capture = hooks.enter_context(_capture(teacher, plan))
        criterion = _criterion(plan, student_capture, teacher_capture, example, setup, config)

        def step(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            with torch.no_grad():
                feats_t = teacher_capture(batch.clean).replace(index=batch.index)
            feats_s = student_capture(batch.poor).replace(index=batch.index)
            logits = _logits(feats_s)
            if observe is not None:
                observe(batch, logits.detach())
            terms = {"CE": plan.supervision * F.cross_entropy(logits.float(), batch.target)}
            return logits, terms | criterion.terms(feats_s, feats_t, batch.target)

        return minimise(label, model, criterion, step, batches, config, console)


def describe(
    plan: Plan, student: str, teacher: nn.Module, pairs: ImagePairs, config: Config
) -> dict[str, Any]:
    """What a method minimises, down to every option of its criterion; plain JSON values.

    The criterion is built to read its defaults: a default that changes changes the description.

    Raises:
        ValueError: the criterion does not fit these networks.
    """
    model = fresh_model(student, pairs, config)
    return describe_plan(
        plan, model, teacher, _example(pairs, config), _setup(pairs, config), config
    )


def describe_plan(
    plan: Plan, model: nn.Module, teacher: nn.Module, example: Batch, setup: Setup, config: Config
) -> dict[str, Any]:
    """``describe`` for what ``follow`` is given."""
    if not plan.parts:
        return {"supervision": plan.supervision}
    teacher.to(config.device).eval()
    with _capture(model, plan) as student_capture, _capture(teacher, plan) as teacher_capture:
        criterion = _criterion(plan, student_capture, teacher_capture, example, setup, config)
    return {"supervision": plan.supervision, **described(criterion)}


def fresh_model(name: str, pairs: ImagePairs, config: Config) -> nn.Module:
    """A network of that name for these images, its weights drawn by ``config.seed``."""
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


def _example(pairs: ImagePairs, config: Config) -> Batch:
    return next(iter(Batches(pairs, 2, statistics=pairs.statistics, device=config.device)))


def _setup(pairs: ImagePairs, config: Config) -> Setup:
    return Setup(len(pairs.classes), len(pairs), min(config.batch_size, len(pairs)))


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
    example: Batch,
    setup: Setup,
    config: Config,
) -> Criterion:
    """Build the criterion from an example batch; evaluation mode leaves batch statistics alone."""
    student.module.eval()
    with torch.no_grad():
        feats_s, feats_t = student(example.poor), teacher(example.clean)
    torch.manual_seed(_CRITERION_SEED + config.seed)
    criterion = plan.build(feats_s, feats_t, setup)
    if criterion is None:
        raise ValueError(f"method {plan.name!r} has no criterion")
    return criterion.to(config.device)


def minimise(
    label: str,
    model: nn.Module,
    criterion: Criterion | None,
    step: Step,
    batches: Passes,
    config: Config,
    console: Console | None,
) -> Outcome:
    """Minimise ``step``'s summed terms by the schedule; returns the last epoch's means."""
    heads = [] if criterion is None else list(criterion.parameters())
    optimizer = config.optimizer([*model.parameters(), *heads])
    total = config.epochs * len(batches)
    scheduler = config.scheduler(optimizer, total)
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
                running.add({"loss": loss, **terms, **_hits(logits, batch)})
                if number % _SHOW_EVERY == 0 or number == len(batches):
                    means = running.read()
                    text = f"epoch {epoch}/{config.epochs}  lr {lr:.4f}  {shown(means)}"
                    progress.update(bar, completed=(epoch - 1) * len(batches) + number, terms=text)
            if not math.isfinite(means["loss"]):
                raise FloatingPointError(
                    f"{label}: the loss of epoch {epoch} is not finite ({shown(means)}); "
                    "fix: a smaller --lr, or --precision fp32"
                )
            if criterion is not None:
                criterion.step_epoch()
    seconds = time.perf_counter() - started
    total_loss, accuracy = means.pop("loss"), means.pop("accuracy", math.nan)
    return Outcome(model, total_loss, means, accuracy, seconds)


def _hits(logits: Tensor | None, batch: Batch) -> dict[str, Tensor]:
    """The accuracy in percent, where there are logits to tell it."""
    if logits is None:
        return {}
    return {"accuracy": 100 * (logits.detach().argmax(1) == batch.target).float().mean()}
