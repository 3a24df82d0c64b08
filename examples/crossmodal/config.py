"""How a network is trained, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True)
class Config:
    """How one network is trained.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step.
        lr: the largest learning rate; it falls along a cosine to ``final_lr``, step by step.
        final_lr: learning rate at the end.
        warmup: share of the training, in [0, 1), over which the rate first rises to ``lr``.
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
    warmup: float = 0.0
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
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be a share in [0, 1), got {self.warmup}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be fp32 or bf16, got {self.precision!r}")

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """SGD; a subclass may choose another."""
        return torch.optim.SGD(
            parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )

    def scheduler(
        self, optimizer: torch.optim.Optimizer, steps: int
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The learning rate over a training of so many steps."""
        schedulers = torch.optim.lr_scheduler
        rising = round(self.warmup * steps)
        falling = schedulers.CosineAnnealingLR(optimizer, steps - rising, self.final_lr)
        if not rising:
            return falling
        linear = schedulers.LinearLR(optimizer, 1 / (rising + 1), total_iters=rising)
        return schedulers.SequentialLR(optimizer, [linear, falling], [rising])


@dataclass(frozen=True)
class Outcome:
    """A trained network, the seconds it took, and the last epoch's means over its steps.

    Attributes:
        model: the network, hooks removed.
        loss: what was minimised, the sum of ``terms``.
        terms: the loss's parts by name, weights included.
        train_accuracy: in percent, on the augmented images while training; NaN without logits.
        seconds: of training.
    """

    model: nn.Module
    loss: float
    terms: dict[str, float]
    train_accuracy: float
    seconds: float
