"""The example configs, made small, and run by mmengine's Runner."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner
from torch import Tensor, nn

EXAMPLES = Path(__file__).parents[2] / "examples" / "integrations" / "mmpretrain"


def config(name: str, data: Path, output: Path, **changes: Any) -> Config:
    """Reads an example config and makes networks, batches and epochs small."""
    teacher = data / "teacher.pth"
    os.environ |= {"CIFAR10": str(data), "TEACHER": str(teacher)}
    try:
        cfg = Config.fromfile(EXAMPLES / f"{name}.py")
    finally:
        del os.environ["CIFAR10"], os.environ["TEACHER"]
    for network in (cfg.model.student, cfg.model.teacher):
        network.backbone.update(depth=18, base_channels=8, stem_channels=8)
        network.head.update(in_channels=64, num_classes=4)
    if not teacher.exists():
        save_teacher(cfg, teacher)
    cfg.data_preprocessor.num_classes = 4
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.update(batch_size=16, num_workers=0)
        # Random crops draw from a generator that no checkpoint of mmengine's restores.
        loader.dataset.pipeline = [{"type": "LoadImageFromFile"}, {"type": "PackInputs"}]
    cfg.optim_wrapper.optimizer.lr = 0.02
    cfg.train_cfg.max_epochs = 2
    cfg.default_hooks.logger.interval = 1
    cfg.default_hooks.checkpoint.max_keep_ckpts = -1
    cfg.work_dir = str(output)
    cfg.experiment_name = uuid.uuid4().hex  # mmengine keeps what a run of the same name logged
    cfg.log_level = "ERROR"
    cfg.merge_from_dict(changes)
    return cfg


def save_teacher(cfg: Config, path: Path) -> None:
    """Saves a teacher as mmengine does."""
    from mmpretrain.registry import MODELS

    torch.manual_seed(1)
    torch.save({"meta": {}, "state_dict": MODELS.build(cfg.model.teacher).state_dict()}, path)


class CutOffError(Exception):
    """Ends a run as a crash would."""


class CutOff(Hook):
    """Ends a run before its second epoch."""

    def before_train_epoch(self, runner: Runner) -> None:
        if runner.epoch == 1:
            raise CutOffError


class CPUAmpOptimWrapper(OptimWrapper):
    """mmengine's own wrapper for mixed precision refuses to run without an accelerator."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast("cpu", dtype=torch.bfloat16):
            yield


if "CPUAmpOptimWrapper" not in OPTIM_WRAPPERS:
    OPTIM_WRAPPERS.register_module(module=CPUAmpOptimWrapper)


def train(cfg: Config, *, cut_off: bool = False) -> tuple[Runner, dict[str, list[float]]]:
    """Trains and returns the Runner and every number it logged, by step."""
    runner = Runner.from_cfg(cfg)
    if cut_off:
        runner.register_hook(CutOff())
        with suppress(CutOffError):
            runner.train()
    else:
        runner.train()
    hub = MessageHub.get_current_instance()
    return runner, {key: value.data[0].tolist() for key, value in hub.log_scalars.items()}


def saved(output: Path, epoch: int) -> dict[str, Any]:
    """Loads a checkpoint as ``torch.load`` does by default."""
    found: dict[str, Any] = torch.load(output / f"epoch_{epoch}.pth", weights_only=True)
    return found


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Returns the names whose values are not equal to the bit."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]
