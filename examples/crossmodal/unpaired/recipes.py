"""Defaults of the unpaired jobs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from crossmodal.config import Config
from crossmodal.data import DATA_SETS
from structkd.matching.dataset import RematchSchedule

PREFIX = "unpaired-"


@dataclass(frozen=True)
class AdamConfig(Config):
    """A schedule for Adam or AdamW; ``momentum`` is not read."""

    kind: Literal["adam", "adamw"] = "adamw"

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Adam, or AdamW with decoupled weight decay."""
        chosen = torch.optim.Adam if self.kind == "adam" else torch.optim.AdamW
        return chosen(parameters, lr=self.lr, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class MatcherRecipe:
    """The matcher's encoders, both of one name, and its epochs. 100 epochs are published."""

    encoder: str
    epochs: int = 100


MATCHERS: dict[str, MatcherRecipe] = {
    "mnist": MatcherRecipe("resnet8", 20),
    "cifar10": MatcherRecipe("resnet20"),
}


def names() -> list[str]:
    """The embedded jobs, one for every paired data set, and those on folders."""
    return [*(PREFIX + name for name in DATA_SETS), *SCENES]


def matcher_recipe(dataset: str) -> MatcherRecipe:
    """The matcher of an embedded job; where none is written down, the teacher's own network."""
    return MATCHERS.get(dataset) or MatcherRecipe(DATA_SETS[dataset].recipe.teacher)


def matcher_config(epochs: int, **common: object) -> AdamConfig:
    """AdamW, lr 1e-3, weight decay 1e-3, batch 64, as published."""
    options = {**common, "batch_size": 64, "lr": 1e-3, "weight_decay": 1e-3}
    return AdamConfig(epochs=epochs, **options)  # type: ignore[arg-type]


def scaled(schedule: RematchSchedule, epochs: int) -> RematchSchedule:
    """Published epochs, which are of 200, at the same places of a shorter or longer run."""
    start, step = (max(1, round(value * epochs / 200)) for value in (schedule.start, schedule.step))
    growth = round(schedule.growth * epochs / 200)
    return RematchSchedule(start, step, growth, times=schedule.times)


@dataclass(frozen=True)
class SceneRecipe:
    """A remote-sensing job: Adam 1e-3, batch 256, 200 epochs, ResNet-34 teacher, as published.

    Attributes:
        bands: of a multispectral image.
        rgb: where red, green and blue stand among them, counted from 0. Not published: this is the
            sensor's own order (B2, B3, B4, ... of ten bands, B1, B2, B3, B4, ... of fourteen).
        rematch: the published epochs of 200.
        student: the published networks are resnet34, mobilenetv2_100 and shufflenet_v2_x0_5.
    """

    bands: int
    rgb: tuple[int, int, int]
    rematch: RematchSchedule
    teacher: str = "resnet34"
    student: str = "mobilenetv2_100"
    matcher: str = "resnet34"
    epochs: int = 200
    matcher_epochs: int = 100
    batch_size: int = 256
    lr: float = 1e-3


SCENES: Mapping[str, SceneRecipe] = {
    "s2s_eu": SceneRecipe(10, (2, 1, 0), RematchSchedule(30, 30, 5, times=4)),
    "s2s_cn": SceneRecipe(14, (3, 2, 1), RematchSchedule(45, 15, 5, times=5)),
    "m2s_gl": SceneRecipe(10, (2, 1, 0), RematchSchedule(15, 30, 5, times=5)),
}
