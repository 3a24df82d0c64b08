"""A training loop that calls timm's public functions as its script does, in the script's order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup, create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import AverageMeter, CheckpointSaver, accuracy, dispatch_clip_grad, random_seed
from torch import nn


@dataclass
class Flow:
    """What the script reads from its command line."""

    data: Path
    output: Path
    epochs: int = 2
    stop_after: int | None = None  # epochs, as if the run were cut off there
    resume: Path | None = None
    amp: bool = False
    dtype: torch.dtype | None = None
    ema: bool = False
    compiles: str = ""
    mixup: float = 0.0
    channels_last: bool = False
    rank: int = 0
    world: int = 1
    optimizer: dict[str, Any] = field(
        default_factory=lambda: {"opt": "adamw", "lr": 0.01, "weight_decay": 0.05}
    )


@dataclass
class Outcome:
    """What a run leaves behind."""

    task: TrainingTask
    losses: list[float]  # the mean of each epoch
    steps: list[float]
    evaluated: list[dict[str, float]]
    optimizer: torch.optim.Optimizer

    def state(self) -> dict[str, torch.Tensor]:
        """Returns every tensor that the task would save, by a flat name."""
        flat: dict[str, torch.Tensor] = {}
        for ema in (False, True) if self.task.has_ema() else (False,):
            for key, part in self.task.get_checkpoint_state(ema=ema).items():
                held = part if key.startswith("state_dict") else part["criterion"]
                flat |= {f"{key}.{name}": value.clone() for name, value in held.items()}
        return flat


def train(flow: Flow, student: nn.Module, make_task: Callable[..., TrainingTask]) -> Outcome:
    """Trains a student; ``make_task(model, loss, device, dtype)`` makes the task."""
    random_seed(0, flow.rank)
    device = torch.device("cpu")
    config = resolve_data_config({"input_size": (3, 32, 32)}, model=student)
    student.to(device=device, dtype=flow.dtype)
    if flow.channels_last:
        student.to(memory_format=torch.channels_last)
    loaders = [_loader(flow, split, config, device) for split in ("train", "test")]
    mixup = None
    loss_fn: nn.Module = nn.CrossEntropyLoss()
    if flow.mixup:
        mixup = Mixup(mixup_alpha=flow.mixup, num_classes=4)
        from timm.loss import SoftTargetCrossEntropy

        loss_fn = SoftTargetCrossEntropy()
    task = make_task(model=student, criterion=loss_fn, device=device, dtype=flow.dtype)
    optimizer = create_optimizer_v2(task.get_trainable_module(), **flow.optimizer)
    start = 0
    if flow.resume is not None:
        start = resume_task_checkpoint(task, str(flow.resume), optimizer=optimizer) or 0
    if flow.ema:
        task.setup_ema(decay=0.9)
        if flow.resume is not None:
            load_task_ema_checkpoint(task, str(flow.resume))
    if flow.compiles:
        task.compile(backend=flow.compiles)
        if flow.ema:
            task.compile_ema(backend=flow.compiles)
    if flow.world > 1:
        task.prepare_distributed(device_ids=None, broadcast_buffers=True)
    flow.output.mkdir(exist_ok=True)
    saver = CheckpointSaver(
        model=task.get_trainable_module(),
        optimizer=optimizer,
        checkpoint_dir=str(flow.output),
        recovery_dir=str(flow.output),
        task=task,
    )
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=flow.epochs, warmup_epochs=0
    )
    if start > 0:
        scheduler.step(start)
    outcome = Outcome(task, [], [], [], optimizer)
    for epoch in range(start, epochs if flow.stop_after is None else flow.stop_after):
        random_seed(epoch, flow.rank)  # the script does not: its resumed runs shuffle otherwise
        _train_epoch(flow, outcome, loaders[0], mixup)
        models = [task.get_eval_model()] + ([task.get_eval_model(ema=True)] if flow.ema else [])
        metrics = [_validate(flow, model, loaders[1]) for model in models][-1]
        outcome.evaluated.append(metrics)
        if flow.rank == 0:
            saver.save_checkpoint(epoch, metric=metrics["top1"])
        scheduler.step(epoch + 1, metrics["top1"])
    return outcome


def _loader(flow: Flow, split: str, config: dict[str, Any], device: torch.device) -> Any:
    training = split == "train"
    dataset = create_dataset("", root=str(flow.data), split=split, is_training=training)
    return create_loader(
        dataset,
        input_size=config["input_size"],
        batch_size=16 // flow.world,
        is_training=training,
        no_aug=True,
        mean=config["mean"],
        std=config["std"],
        num_workers=0,
        use_prefetcher=False,
        distributed=flow.world > 1,
        device=device,
    )


def _moved(flow: Flow, images: torch.Tensor) -> torch.Tensor:
    images = images.to(dtype=flow.dtype)
    if flow.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images


def _autocast(flow: Flow) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16) if flow.amp else nullcontext()


def _train_epoch(flow: Flow, outcome: Outcome, loader: Any, mixup: Mixup | None) -> None:
    task, meter = outcome.task, AverageMeter()
    task.get_trainable_module().train()
    outcome.optimizer.zero_grad()
    for step, (images, target) in enumerate(loader):
        images = _moved(flow, images)
        if mixup is not None:
            images, target = mixup(images, target)
        with _autocast(flow):
            loss = task(images, target)["loss"]
        loss.backward()
        dispatch_clip_grad(task.get_clip_parameters(), value=5.0, mode="norm")
        outcome.optimizer.step()
        meter.update(loss.item(), len(images))
        outcome.steps.append(loss.item())
        outcome.optimizer.zero_grad()
        task.update_ema(step=step + 1)
    outcome.losses.append(meter.avg)


def _validate(flow: Flow, model: nn.Module, loader: Any) -> dict[str, float]:
    top1, loss = AverageMeter(), AverageMeter()
    model.eval()
    with torch.inference_mode():
        for images, target in loader:
            with _autocast(flow):
                output = model(_moved(flow, images))
            loss.update(nn.functional.cross_entropy(output.float(), target).item(), len(output))
            top1.update(accuracy(output, target)[0].item(), len(output))
    return {"top1": top1.avg, "loss": loss.avg}
