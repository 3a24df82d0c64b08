"""The loop: epochs of steps on whatever devices there are, kept after every one of them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from timm.utils import ModelEmaV3
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn

from crossmodal.data import NO_LABEL, Batches, MixedBatches
from crossmodal.recipes import Recipe
from crossmodal.runs.epochs import Epochs
from crossmodal.runs.progress import Show, shown
from crossmodal.training.matching import Chooser
from crossmodal.training.steps import LABELS, Step, wide
from structkd import falling
from structkd.diagnostics import FilterDirections, filter_collapse

_SHOW_EVERY = 20  # steps between two looks at the running means: each look waits for the device
_ONE_CLASS = 0.95  # of an epoch's predictions, where the class itself is far from that
_FAR, _ALIKE = 4.0, 0.8  # times the first filters' norm and effective rank: a layer is lost
_FACTS = ("epoch", "lr", "loss", "accuracy", "seconds", "images_per_second")


@dataclass
class Training:
    """One network's training."""

    label: str  # what progress calls it
    step: Step  # what is minimised
    batches: Batches | MixedBatches
    recipe: Recipe
    choose: Chooser | None = None  # which teacher image stands beside each student image
    keeper: Epochs | None = None  # where epochs are kept


@dataclass
class Outcome:
    """A trained network, or the moving average of it, and one row of numbers an epoch."""

    network: nn.Module
    history: list[dict[str, float]]

    @property
    def loss(self) -> float:
        return self.history[-1]["loss"]

    @property
    def terms(self) -> dict[str, float]:
        """The last epoch's loss by its parts, weights included."""
        return {k: v for k, v in self.history[-1].items() if k not in _FACTS}

    @property
    def train_accuracy(self) -> float:
        """In percent, on the augmented images of the last epoch; NaN without logits."""
        return self.history[-1].get("accuracy", math.nan)

    @property
    def seconds(self) -> float:
        return sum(row["seconds"] for row in self.history)


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


def fit(training: Training, accelerator: Accelerator, reporter: Show) -> Outcome:
    """Minimise the step's summed terms by the schedule, from the last epoch that was kept.

    Raises:
        FloatingPointError: an epoch's loss is not finite; names the epoch and the terms.
    """
    step, recipe, batches = training.step, training.recipe, training.batches
    device = accelerator.device
    step.to(device, memory_format=recipe.layout)
    if accelerator.num_processes > 1 and device.type == "cuda":
        step = nn.SyncBatchNorm.convert_sync_batchnorm(step)
    ema = ModelEmaV3(step.network, decay=recipe.ema) if recipe.ema else None
    optimizer = recipe.optimized(step.parameters())
    wrapped, optimizer = accelerator.prepare(step, optimizer)
    updates = len(batches) // recipe.accumulate or 1
    schedule = recipe.scheduled(optimizer, recipe.epochs * updates)
    clip = recipe.clipping()
    began = filter_collapse(step.network)  # before an epoch that was kept takes its place
    more = [part for part in (ema, training.choose) if part is not None]
    accelerator.register_for_checkpointing(*more)
    history = [] if training.keeper is None else training.keeper.resume(accelerator)
    reporter.begin(training.label, recipe.epochs, len(batches), len(history))
    for epoch in range(len(history), recipe.epochs):
        started = time.perf_counter()
        ids = None if training.choose is None else training.choose(epoch)
        wrapped.train()
        running = _Running()
        for number, batch in enumerate(batches.epoch(epoch, ids)):
            with accelerator.accumulate(wrapped):
                done = epoch * updates + number // recipe.accumulate
                schedule.step_update(done)
                logits, terms = wrapped(batch)
                weight = falling(done, recipe.epochs * updates) if recipe.falling else 1.0
                parts = torch.stack(
                    [wide(v) if k == LABELS else weight * wide(v) for k, v in terms.items()]
                )
                accelerator.backward(parts.sum())
                if clip is not None and accelerator.sync_gradients:
                    accelerator.unscale_gradients(optimizer)
                    dispatch_clip_grad(step.network.parameters(), clip[1], mode=clip[0])
                optimizer.step()
                optimizer.zero_grad()
                if ema is not None and accelerator.sync_gradients:
                    ema.update(step.network)
            running.add(terms, parts, logits, batch.target)
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
        if (told := _collapsed(began, filter_collapse(step.network))) is not None:
            reporter.warn(f"{training.label}, epoch {epoch + 1}: {told}")
        if step.criterion is not None:
            step.criterion.step_epoch()
        row = {"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"], **means}
        row["seconds"] = time.perf_counter() - started
        row["images_per_second"] = len(batches) * recipe.batch_size / row["seconds"]
        history.append(row)
        if training.keeper is not None:
            training.keeper.save(accelerator, history)
        reporter.epoch(history)
    if device.type != "cpu":  # where no memory is held, collecting what is left takes long
        accelerator.free_memory()
    return Outcome(step.network if ema is None else ema.module, history)


def _collapsed(
    began: Mapping[str, FilterDirections], now: Mapping[str, FilterDirections]
) -> str | None:
    """What to say where a layer's filters were thrown far, in nearly one direction."""
    lost = [
        f"{name} (norm {before.norm:.2g} to {now[name].norm:.2g}, rank {before.rank:.1f} to "
        f"{now[name].rank:.1f})"
        for name, before in began.items()
        if now[name].norm > _FAR * before.norm and now[name].rank < _ALIKE * before.rank
    ]
    if not lost:
        return None
    return f"the filters of {', '.join(lost)} collapsed, the run may be lost; fix: --clip agc:0.1"


class _Running:
    """Means of an epoch's terms, and its predictions by class, on their device until read."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | float = 0.0
        self._count = 0
        self._calls: Tensor | None = None  # images by true class, the last for unknown, and called

    @torch.no_grad()
    def add(
        self, terms: dict[str, Tensor], parts: Tensor, logits: Tensor | None, target: Tensor
    ) -> None:
        self._names, self._count = tuple(terms), self._count + 1
        self._sums = self._sums + parts.detach().float()
        if logits is None:
            return
        classes = logits.shape[1]
        if self._calls is None:
            self._calls = target.new_zeros(classes + 1, classes)
        true = torch.where(target == NO_LABEL, classes, target)
        places = true * classes + logits.argmax(1)
        self._calls.view(-1).index_add_(0, places, torch.ones_like(places))

    def means(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """The means so far, over all processes where their accelerator is given."""
        numbers, calls = self._sums / self._count, self._calls
        if accelerator is not None:
            numbers = accelerator.reduce(numbers, "mean")
            calls = None if calls is None else accelerator.reduce(calls.clone())
        found = {"loss": float(numbers.sum())}
        found |= dict(zip(self._names, numbers.tolist(), strict=True))
        if calls is not None and (labelled := int(calls[:-1].sum())):
            found["accuracy"] = 100 * int(calls.diagonal().sum()) / labelled
        return found

    def one_class(self) -> str | None:
        """What to say where nearly everything was called one class."""
        if self._calls is None or self._calls.shape[1] < 2:
            return None
        called, true = self._calls.sum(0), self._calls[:-1].sum(1)
        predicted, true = (row / row.sum().clamp_min(1) for row in (called, true))
        label = int(predicted.argmax())
        if predicted[label] < _ONE_CLASS or true[label] > _ONE_CLASS - 0.05:
            return None
        return (
            f"{100 * float(predicted[label]):.0f} % of the images are called class {label}, which "
            f"{100 * float(true[label]):.0f} % of them are: the training may be lost"
        )
