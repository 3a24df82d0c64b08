"""The loop: epochs of steps on whatever devices there are, kept after every one of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from timm.utils import ModelEmaV3
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn

from crossmodal.data import NO_LABEL, Batch, Batches
from crossmodal.recipes import Recipe
from crossmodal.training.steps import Step

_SHOW_EVERY = 20  # steps between two looks at the running means: each look waits for the device
_ONE_CLASS = 0.95  # of an epoch's predictions, where the class itself is far from that


class Reporter(Protocol):
    """What hears of a training under way."""

    def begin(self, label: str, epochs: int, steps: int, done: int) -> None: ...
    def step(self, number: int, means: Callable[[], dict[str, float]]) -> None: ...
    def epoch(self, history: list[dict[str, float]]) -> None: ...
    def warn(self, text: str) -> None: ...


class Choose(Protocol):
    """Names every student's teacher image before an epoch, and remembers what it goes by."""

    def __call__(self, epoch: int) -> Tensor | None: ...
    def observe(self, index: Tensor, logits: Tensor) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    wants_logits: bool


class Keeper(Protocol):
    """Keeps a training's epochs so that it can go on after it was cut off."""

    def save(self, accelerator: Accelerator, epoch: int, extra: dict[str, Any]) -> None: ...
    def resume(self, accelerator: Accelerator) -> dict[str, Any] | None: ...


@dataclass
class Training:
    """One network's training.

    Attributes:
        label: what progress calls it.
        step: what is minimised.
        batches: its images.
        recipe: the schedule.
        choose: which teacher image stands beside each student image; None for its own.
        keeper: where epochs are kept; None keeps none.
    """

    label: str
    step: Step
    batches: Batches
    recipe: Recipe
    choose: Choose | None = None
    keeper: Keeper | None = None


@dataclass
class Outcome:
    """A trained network, the seconds it took, and the last epoch's means over its steps.

    Attributes:
        network: the network, or the moving average of it.
        loss: what was minimised, the sum of ``terms``.
        terms: the loss's parts by name, weights included.
        train_accuracy: in percent, on the augmented images while training; NaN without logits.
        seconds: of training, over all its parts where it was cut off.
        history: one row an epoch.
    """

    network: nn.Module
    loss: float
    terms: dict[str, float]
    train_accuracy: float
    seconds: float
    history: list[dict[str, float]] = field(default_factory=list)


def accelerator_for(recipe: Recipe, device: str = "auto", *, compiled: bool = False) -> Accelerator:
    """Accelerate with a recipe's precision; one process may ask for another precision later."""
    torch.set_float32_matmul_precision("high")
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision={"fp32": "no"}.get(recipe.precision, recipe.precision),
        gradient_accumulation_steps=recipe.accumulate,
        cpu=device == "cpu",
        step_scheduler_with_optimizer=False,
        dynamo_backend="inductor" if compiled else None,
        # What is equal on all ranks is left out by the criteria themselves.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=True)],
    )


def fit(training: Training, accelerator: Accelerator, reporter: Reporter) -> Outcome:
    """Minimise the step's summed terms by the schedule, from the last epoch that was kept.

    Raises:
        FloatingPointError: an epoch's loss is not finite; names the epoch and the terms.
    """
    step, recipe, batches = training.step, training.recipe, training.batches
    device = accelerator.device
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    step.to(device, memory_format=layout)
    if accelerator.num_processes > 1 and device.type == "cuda":
        step = nn.SyncBatchNorm.convert_sync_batchnorm(step)
    ema = ModelEmaV3(step.network, decay=recipe.ema) if recipe.ema else None
    optimizer = recipe.optimized(step.parameters())
    wrapped, optimizer = accelerator.prepare(step, optimizer)
    updates = len(batches) // recipe.accumulate or 1
    schedule = recipe.scheduled(optimizer, recipe.epochs * updates)
    clip = recipe.clipping()
    history: list[dict[str, float]] = []
    kept = None if training.keeper is None else training.keeper.resume(accelerator)
    if kept is not None:
        history = kept["history"]
        if ema is not None:
            ema.module.load_state_dict(kept["ema"])
        if training.choose is not None:
            training.choose.load_state_dict(kept["choose"])
    reporter.begin(training.label, recipe.epochs, len(batches), len(history))
    for epoch in range(len(history), recipe.epochs):
        started = time.perf_counter()
        ids = None if training.choose is None else training.choose(epoch)
        wrapped.train()
        running = _Running(device)
        for number, batch in enumerate(batches.epoch(epoch, ids)):
            with accelerator.accumulate(wrapped):
                done = epoch * updates + number // recipe.accumulate
                schedule.step_update(done)
                if recipe.falling:
                    step.fall(done / (recipe.epochs * updates))
                logits, terms = wrapped(batch)
                loss = torch.stack([term.float() for term in terms.values()]).sum()
                accelerator.backward(_exact(terms, loss))
                if clip is not None and accelerator.sync_gradients:
                    accelerator.unscale_gradients(optimizer)
                    dispatch_clip_grad(step.network.parameters(), clip[1], mode=clip[0])
                optimizer.step()
                optimizer.zero_grad()
                if ema is not None and accelerator.sync_gradients:
                    ema.update(step.network)
            running.add({"loss": loss, **terms}, logits, batch)
            if training.choose is not None and training.choose.wants_logits and logits is not None:
                seen = accelerator.gather((batch.index, logits.detach()))
                training.choose.observe(*seen)
            if number % _SHOW_EVERY == 0:
                reporter.step(number + 1, running.means)
        means = running.means(accelerator)
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"{training.label}: the loss of epoch {epoch + 1} is not finite ({shown(means)}); "
                "fix: a smaller --lr, --clip agc:0.1, or --precision fp32"
            )
        if (told := running.one_class()) is not None:
            reporter.warn(f"{training.label}, epoch {epoch + 1}: {told}")
        if step.criterion is not None:
            step.criterion.step_epoch()
        seconds = time.perf_counter() - started
        images = len(batches) * recipe.batch_size
        lr = optimizer.param_groups[0]["lr"]
        row = {"epoch": epoch + 1, "lr": lr, **means, "seconds": seconds}
        history.append({**row, "images_per_second": images / seconds})
        if training.keeper is not None:
            extra: dict[str, Any] = {"history": history}
            if ema is not None:
                extra["ema"] = ema.module.state_dict()
            if training.choose is not None:
                extra["choose"] = training.choose.state_dict()
            training.keeper.save(accelerator, epoch + 1, extra)
        reporter.epoch(history)
    accelerator.free_memory()
    network = step.network if ema is None else ema.module
    last = dict(history[-1])
    terms_of = {
        k: v
        for k, v in last.items()
        if k not in ("epoch", "lr", "loss", "accuracy", "seconds", "images_per_second")
    }
    total = sum(row["seconds"] for row in history)
    accuracy = last.get("accuracy", math.nan)
    return Outcome(network, last["loss"], terms_of, accuracy, total, history)


def shown(means: dict[str, float]) -> str:
    """Names and values on one line."""
    return "  ".join(f"{name} {value:.3g}" for name, value in means.items())


def _exact(terms: dict[str, Tensor], loss: Tensor) -> Tensor:
    """The loss in float64 where the terms are; float32 otherwise, whatever autocast gave."""
    if any(term.dtype == torch.float64 for term in terms.values()):
        return torch.stack([term.double() for term in terms.values()]).sum()
    return loss


class _Running:
    """Means of an epoch's scalars and its predictions, kept on their device until read."""

    def __init__(self, device: torch.device) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._hits = torch.zeros(2, device=device)  # right, labelled
        self._classes: Tensor | None = None  # predicted, true

    @torch.no_grad()
    def add(self, values: dict[str, Tensor], logits: Tensor | None, batch: Batch) -> None:
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1
        if logits is None:
            return
        predicted, known = logits.argmax(1), batch.target != NO_LABEL
        self._hits += torch.stack([((predicted == batch.target) & known).sum(), known.sum()])
        classes = logits.shape[1]
        if self._classes is None:
            self._classes = torch.zeros(2, classes, device=logits.device)
        for row, labels in enumerate((predicted, batch.target[known])):
            self._classes[row] += torch.bincount(labels, minlength=classes)[:classes]

    def means(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """The means so far, over all processes where their accelerator is given."""
        names = list(self._sums)
        numbers, hits = torch.stack([self._sums[name] for name in names]) / self._count, self._hits
        if accelerator is not None:
            numbers = accelerator.reduce(numbers, "mean")
            hits = accelerator.reduce(hits.clone())
        right, labelled = hits.tolist()
        found = dict(zip(names, numbers.tolist(), strict=True))
        return found | ({"accuracy": 100 * right / labelled} if labelled else {})

    def one_class(self) -> str | None:
        """What to say where nearly everything was called one class."""
        if self._classes is None or self._classes.shape[1] < 2:
            return None
        predicted, true = (row / row.sum().clamp_min(1) for row in self._classes.cpu())
        label = int(predicted.argmax())
        if predicted[label] < _ONE_CLASS or true[label] > _ONE_CLASS - 0.05:
            return None
        return (
            f"{100 * float(predicted[label]):.0f} % of the images are called class {label}, which "
            f"{100 * float(true[label]):.0f} % of them are: the training may be lost"
        )
