"""Recipes: how a network is trained, and what each data set says of it in ``recipes.toml``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from crossmodal.near import did_you_mean, looked_up

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).with_name("recipes.toml")
PREFIX = "unpaired-"
ROLES = ("teacher", "student", "matcher")
# Fields that a role's training does not read.
UNREAD = {
    "teacher": ("falling", "fresh_noise", "labelled"),
    "student": (),
    "matcher": ("falling", "labelled"),
}
_TYPES: dict[str, tuple[Any, str]] = {
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "str": (str, "a text"),
    "bool": (bool, "true or false"),
    "Mapping": (Mapping, "a table"),
    "tuple": ((list, tuple), "a list"),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer": ("sgd", "adam", "adamw"),
    "crop": ("pad", "resized"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
}
# 100 epochs are published, as are AdamW's numbers.
_MATCHER = {
    "epochs": 100, "batch_size": 64, "lr": 1e-3, "weight_decay": 1e-3, "optimizer": "adamw",
    "warmup": 0.0, "clip": "none", "ema": 0.0, "falling": False, "fresh_noise": False,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How one network is trained; ``--help`` prints what each field says."""

    epochs: Annotated[int, "passes over the training images"] = 100
    batch_size: Annotated[int, "images a step, over all processes"] = 64
    accumulate: Annotated[int, "steps whose gradients make one step of the optimizer"] = 1
    lr: Annotated[float, "largest learning rate; it falls along a cosine, step by step"] = 0.05
    final_lr: Annotated[float, "learning rate at the end"] = 1e-6
    warmup: Annotated[float, "share of the training over which the rate first rises to lr"] = 0.0
    optimizer: Annotated[str, "sgd, adam or adamw"] = "sgd"
    momentum: Annotated[float, "of SGD"] = 0.9
    weight_decay: Annotated[float, "on the network and the criterion's heads"] = 5e-4
    clip: Annotated[
        str, "of gradients: none, agc:F (F times a filter's own norm), norm:N or value:V"
    ] = "agc:0.1"
    labelled: Annotated[float, "least share of a batch with labels, under --labels"] = 1 / 3
    falling: Annotated[bool, "let the criterion's weight fall to 0 along a cosine"] = False
    ema: Annotated[float, "decay of the moving average that is evaluated; 0 for none"] = 0.0
    crop: Annotated[str, "pad, or resized: a part of the image brought to its size"] = "pad"
    pad: Annotated[int, "border in pixels that random crops may reach into"] = 4
    flip: Annotated[bool, "mirror half of the training images"] = True
    fresh_noise: Annotated[bool, "draw the noise anew at every pass"] = False
    precision: Annotated[str, "auto (measured), fp32, bf16 or fp16; halves by autocast"] = "auto"
    channels_last: Annotated[bool, "memory format; auto measures bf16 with it"] = False
    seed: Annotated[int, "of initial weights, order of the batches and crops"] = 0

    def __post_init__(self) -> None:
        least = dict.fromkeys(("epochs", "batch_size", "accumulate"), 1)
        least |= dict.fromkeys(("pad", "weight_decay", "momentum", "final_lr"), 0)
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        # At 0.95 what is left to fall is a twentieth; above that a short run has no step left.
        if not 0 <= self.warmup <= 0.95:
            raise ValueError(f"warmup must be a share in [0, 0.95], got {self.warmup}")
        if not 0 <= self.labelled <= 1:
            raise ValueError(f"labelled must be a share in [0, 1], got {self.labelled}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be a decay in [0, 1), got {self.ema}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                got = getattr(self, name)
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {got!r}")
        self.clipping()

    def clipping(self) -> tuple[str, float] | None:
        mode, _, size = self.clip.partition(":")
        try:
            value = float(size) if size else 0.0
        except ValueError:
            value = -1.0
        if mode not in ("none", "agc", "norm", "value") or (mode != "none" and not value > 0):
            raise ValueError(f"clip must be none, agc:0.1, norm:1 or value:1, got {self.clip!r}")
        return None if mode == "none" else (mode, value)

    def optimized(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        kind = {"sgd": "momentum"}.get(self.optimizer, self.optimizer)  # timm's "sgd" is Nesterov's
        return create_optimizer_v2(trained, kind, self.lr, self.weight_decay, self.momentum)

    def scheduled(self, optimizer: torch.optim.Optimizer, steps: int) -> Any:
        """timm's schedule of the learning rate over a training of so many steps."""
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
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def spoils_late(self) -> bool:
        """Whether images are made poor at every pass: the noise is new, or follows the crop."""
        return self.fresh_noise or self.crop == "resized"

    @classmethod
    def told(cls) -> dict[str, str]:
        """What each field is, by its name."""
        hints = get_type_hints(cls, include_extras=True)
        return {field.name: hints[field.name].__metadata__[0] for field in fields(cls)}

    @property
    def settings(self) -> dict[str, Any]:
        """What a result depends on: the fields that differ from the defaults.

        A field that is new in a later version, at its default, leaves old results known.
        """
        defaults = {field.name: field.default for field in fields(self)}
        return {k: getattr(self, k) for k, v in defaults.items() if getattr(self, k) != v}


@dataclass(frozen=True)
class DataSet:
    """An entry of ``recipes.toml``."""

    name: str
    teacher: str  # model names; the matcher's encoders are the teacher's network unless named
    student: str
    matcher: str = ""
    reader: str = ""  # open_<reader>(data_dir, download, **options), see crossmodal.data.readers
    options: Mapping[str, Any] = field(default_factory=dict)  # of the reader, with their defaults
    poor: str = "noise"  # what makes its images poor, where it has one modality
    unpaired: bool = False  # give its halves to teacher and students apart
    scenes: bool = False  # two folders, MS and RGB, of different samples
    amount: float = 0.5  # of the noise
    bands: int = 0  # of multispectral images, and where red, green and blue stand among them
    rgb: tuple[int, ...] = ()
    rematch: Mapping[str, int] = field(  # RematchSchedule's arguments, in epochs of 200
        default_factory=lambda: {"start": 30, "step": 30, "growth": 5, "times": 4}
    )
    train: Mapping[str, Any] = field(default_factory=dict)  # Recipe's fields but the matcher's
    teacher_recipe: Mapping[str, Any] = field(default_factory=dict)  # what differs for each
    student_recipe: Mapping[str, Any] = field(default_factory=dict)
    matcher_recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def matched(self) -> bool:
        """Whether teacher images must be chosen, as there are no pairs."""
        return self.unpaired or self.scenes

    def recipe(self, role: str, given: Mapping[str, Any], own: Mapping[str, Any]) -> Recipe:
        """The recipe of one role; ``given`` is for teacher and students, ``own`` for it alone."""
        common: Mapping[str, Any] = self.train
        if role == "matcher":
            # Its images are the teacher's; its schedule is published and its own.
            common = _MATCHER | {k: v for k, v in common.items() if k in ("pad", "flip", "crop")}
        values = {**common, **getattr(self, f"{role}_recipe")}
        if self.unpaired and role != "matcher":  # half the images: twice the passes
            values["epochs"] = 2 * values.get("epochs", Recipe.epochs)
        if self.matched and role == "student":
            # Made images are never quite like real ones, and the end is the student's own.
            values.setdefault("falling", True)
        own_only = {
            "teacher": UNREAD["teacher"],
            "matcher": _MATCHER.keys() - {"epochs"},
        }
        given = {k: v for k, v in given.items() if k not in own_only.get(role, ())}
        return checked(Recipe, {**values, **given, **own}, f"recipe of {self.name}")


def data_sets(more: Path | None = None) -> dict[str, DataSet]:
    """All entries by name, those of a file of one's own included, and the unpaired ones."""
    found: dict[str, DataSet] = {}
    known: dict[str, dict[str, Any]] = {}  # the entries as they are written, for `like`
    for path in filter(None, (FILE, more)):
        try:
            content = tomllib.loads(path.read_text())
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"recipes {path} cannot be read: {error}") from error
        for name, entry in content.items():
            where = f"{path.name} [{name}]"
            if not isinstance(entry, dict):
                raise ValueError(f"{where} must be a table of a data set's fields, got {entry!r}")
            base = {}
            if (like := entry.pop("like", None)) is not None:
                base = looked_up(f"entry in {where}, like =", like, {**known, **content})
            content[name] = {**base, **entry}
            whole = {**content[name], "name": name}
            if name.startswith(PREFIX):
                whole["unpaired"] = True
            found[name] = checked(DataSet, whole, where)
        known |= content
    halved = {
        PREFIX + name: replace(entry, name=PREFIX + name, unpaired=True)
        for name, entry in found.items()
        if entry.reader and not entry.unpaired
    }
    return found | {name: entry for name, entry in halved.items() if name not in found}


def checked(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """An instance of a dataclass.

    Raises:
        ValueError: a field is unknown, missing, or of another type.
    """
    known = [field.name for field in fields(kind)]
    for name in values:
        if name not in known:
            hint = did_you_mean(name, known) + f"known: {', '.join(known)}"
            raise ValueError(f"{where} has an unknown field {name!r}; {hint}")
    for one in fields(kind):
        if one.name not in values:
            if one.default is MISSING and one.default_factory is MISSING:
                raise ValueError(f"{where} has no {one.name}; fix: add {one.name} = ...")
            continue
        wanted, value = str(one.type).removeprefix("Annotated[").partition(",")[0], values[one.name]
        allowed, words = _TYPES.get(wanted.partition("[")[0], (object, ""))
        # Python takes true for a whole number, which nobody means.
        odd = words and isinstance(value, bool) and wanted != "bool"
        if odd or not isinstance(value, allowed):
            raise ValueError(f"{where}: {one.name} must be {words}, got {value!r}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
