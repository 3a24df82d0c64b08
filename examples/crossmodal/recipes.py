"""Recipes: how a network is trained, and what each data set says of it in ``recipes.toml``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crossmodal.near import did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).with_name("recipes.toml")
PREFIX = "unpaired-"
ROLES = ("teacher", "student", "matcher")
_CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer": ("sgd", "adam", "adamw"),
    "crop": ("pad", "resized"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
}
CLIPS = ("none", "agc", "norm", "value")
# 100 epochs are published, as are AdamW's numbers.
_MATCHER = {
    "epochs": 100, "batch_size": 64, "lr": 1e-3, "weight_decay": 1e-3, "optimizer": "adamw",
    "warmup": 0.0, "clip": "none", "ema": 0.0, "falling": False, "fresh_noise": False,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How one network is trained.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step, over all processes.
        accumulate: steps whose gradients are summed up to one of the optimizer.
        lr: the largest learning rate; it falls along a cosine to ``final_lr``, step by step.
        final_lr: learning rate at the end.
        warmup: share of the training, in [0, 1), over which the rate first rises to ``lr``.
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        momentum: of SGD.
        weight_decay: on the network and the criterion's heads.
        clip: of the network's gradients: ``none``, ``agc:F`` (adaptive, F of each filter's norm),
            ``norm:N`` or ``value:V``, as timm has them.
        falling: let the criterion's weight fall to 0 by the end of training, along a cosine.
        ema: decay of the moving average of the weights that is evaluated; 0 for none.
        crop: ``pad`` crops the padded image, ``resized`` is a crop of 8 to 100 % brought to size.
        pad: border for random crops, in pixels.
        flip: mirror half of the training images.
        fresh_noise: draw the noise anew at every pass.
        precision: ``fp32``, ``bf16`` or ``fp16`` (autocast); ``auto`` measures.
        channels_last: the memory format; with ``auto`` part of what is measured.
        seed: of the initial weights, the order of the batches and their crops.
    """

    epochs: int = 100
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 0.05
    final_lr: float = 1e-6
    warmup: float = 0.0
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: str = "none"
    falling: bool = False
    ema: float = 0.0
    crop: str = "pad"
    pad: int = 4
    flip: bool = True
    fresh_noise: bool = False
    precision: str = "auto"
    channels_last: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("pad", "weight_decay", "momentum", "final_lr"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        # At 0.95 what is left to fall is a twentieth; above that a short run has no step left.
        if not 0 <= self.warmup <= 0.95:
            raise ValueError(f"warmup must be a share in [0, 0.95], got {self.warmup}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be a decay in [0, 1), got {self.ema}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        self.clipping()

    def clipping(self) -> tuple[str, float] | None:
        """Mode and size of the clipping; None for none."""
        mode, _, size = self.clip.partition(":")
        try:
            value = float(size) if size else 0.0
        except ValueError:
            value = -1.0
        if mode not in CLIPS or (mode != "none" and not value > 0):
            raise ValueError(f"clip must be none, agc:0.1, norm:1 or value:1, got {self.clip!r}")
        return None if mode == "none" else (mode, value)

    def optimized(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer over those parameters that are trained."""
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                trained, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
            )
        chosen = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return chosen(trained, lr=self.lr, weight_decay=self.weight_decay)

    def scheduled(self, optimizer: torch.optim.Optimizer, steps: int) -> Any:
        """timm's schedule of the learning rate over a training of so many steps."""
        from timm.scheduler import CosineLRScheduler

        rising = min(round(self.warmup * steps), steps - 1)
        return CosineLRScheduler(
            optimizer,
            t_initial=steps - rising,
            lr_min=self.final_lr,
            warmup_t=rising,
            warmup_lr_init=self.lr / (rising + 1),
            warmup_prefix=True,
            t_in_epochs=False,
        )

    @property
    def spoils_late(self) -> bool:
        """Whether images are made poor at every pass: the noise is new, or follows the crop."""
        return self.fresh_noise or self.crop == "resized"

    @property
    def settings(self) -> dict[str, Any]:
        """What a result depends on: the fields that differ from the defaults.

        A field that is new in a later version, at its default, leaves old results known.
        """
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }


@dataclass(frozen=True)
class DataSet:
    """An entry of ``recipes.toml``.

    Attributes:
        name: how the command line names it.
        reader: ``open_<reader>(data_dir, download, **options) -> Source``, see
            ``crossmodal.data.readers``.
        options: the reader's, with their defaults; the command line can change these alone.
        poor: what makes its images poor, where it has one modality.
        unpaired: whether its halves are given to teacher and students apart.
        scenes: whether it is two folders, ``MS`` and ``RGB``, of different samples.
        amount: the noise's.
        teacher, student, matcher: model names; the matcher's two encoders are the teacher's network
            unless named.
        bands, rgb: of multispectral images, and where red, green and blue stand among them.
        rematch: ``RematchSchedule``'s arguments, in epochs of 200.
        train: fields of the recipe of teacher and students.
        teacher_recipe, student_recipe, matcher_recipe: what differs for each.
    """

    name: str
    teacher: str
    student: str
    matcher: str = ""
    reader: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    poor: str = "noise"
    unpaired: bool = False
    scenes: bool = False
    amount: float = 0.5
    bands: int = 0
    rgb: tuple[int, ...] = ()
    rematch: Mapping[str, int] = field(
        default_factory=lambda: {"start": 30, "step": 30, "growth": 5, "times": 4}
    )
    train: Mapping[str, Any] = field(default_factory=dict)
    teacher_recipe: Mapping[str, Any] = field(default_factory=dict)
    student_recipe: Mapping[str, Any] = field(default_factory=dict)
    matcher_recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def matched(self) -> bool:
        """Whether teacher images must be chosen, as there are no pairs."""
        return self.unpaired or self.scenes

    def recipe(self, role: str, given: Mapping[str, Any], own: Mapping[str, Any]) -> Recipe:
        """The recipe of one role; ``given`` is for teacher and students, ``own`` for it alone."""
        common = {} if role == "matcher" else dict(self.train)
        if self.unpaired and role != "matcher":
            common["epochs"] = 2 * common.get("epochs", Recipe.epochs)
        differing = dict(getattr(self, f"{role}_recipe"))
        if self.unpaired and role == "teacher" and "epochs" in differing:
            differing["epochs"] *= 2  # half the images: twice the passes make as many steps
        if role == "matcher":
            # Its images are the teacher's; its schedule is published and its own.
            images = {k: v for k, v in self.train.items() if k in ("pad", "flip", "crop")}
            common = {**_MATCHER, **images}
            given = {k: v for k, v in given.items() if k not in _MATCHER or k == "epochs"}
        if role == "teacher":
            given = {k: v for k, v in given.items() if k not in ("fresh_noise", "falling")}
        return checked(Recipe, {**common, **differing, **given, **own}, f"recipe of {self.name}")


def data_sets(more: Path | None = None) -> dict[str, DataSet]:
    """All entries by name, those of a file of one's own included, and the unpaired ones.

    Raises:
        ValueError: the file cannot be read, or an entry has a field that is not known.
    """
    found: dict[str, DataSet] = {}
    for path in filter(None, (FILE, more)):
        try:
            content = tomllib.loads(path.read_text())
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"recipes {path} cannot be read: {error}") from error
        for name, entry in content.items():
            whole = {**content.get(entry.pop("like", ""), {}), **entry, "name": name}
            if name.startswith(PREFIX):
                whole["unpaired"] = True
            found[name] = checked(DataSet, whole, f"{path.name} [{name}]")
    halved = {
        PREFIX + name: replace(entry, name=PREFIX + name, unpaired=True)
        for name, entry in found.items()
        if entry.reader and not entry.unpaired
    }
    return found | {name: entry for name, entry in halved.items() if name not in found}


def checked(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """An instance of a dataclass; an unknown field is refused with the near name."""
    known = [field.name for field in fields(kind)]
    for name in values:
        if name not in known:
            raise ValueError(
                f"{where} has an unknown field {name!r}; {did_you_mean(name, known)}"
                f"known: {', '.join(known)}"
            )
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
