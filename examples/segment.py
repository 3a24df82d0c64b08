"""A class for every pixel: ``python examples/segment.py --data DIR``, or two folders and masks.

The teacher sees all bands, the students the poor ones: alone, with their own moving average's
answers where labels are few (the mean teacher, which needs no second sensor), or with criteria. The
loop, the job and what is kept are ``train.py``'s; the scenes come from ``data/masks.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from accelerate import PartialState
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

import job
import models
import train
from data.images import NO_LABEL
from data.masks import Masks, SceneBatches, SceneOptions, open_scene_views
from methods import MEAN_TEACHER, Method
from store import write_atomically


@dataclass(frozen=True)
class Options(SceneOptions, train.LoopOptions):
    """Options of a job on pixels; a recipe is a YAML file of the same names."""

    # Rows of the table: alone, mean teacher, a name of methods.yaml, or a criterion's YAML.
    criterion: tuple[str, ...] = (
        "alone", MEAN_TEACHER, "{type: DenseStructureLoss, weight: 5.0}",
    )  # fmt: skip
    # Class whose intersection over union the table shows; the mean of all by default.
    judged: str = ""
    # Stages that criteria on maps read: encoder, decoder or both.
    layers: str = "both"
    # Optimizer.
    optimizer: str = "adamw"
    lr: float = 2e-3
    weight_decay: float = 1e-2
    clip: str = "none"
    # With --labels, the least share of a student's batch that has labels.
    labelled: float = 0.5
    # Bands of the rich images that are shown as red, green and blue.
    rgb: Annotated[tuple[int, ...], tyro.conf.Suppress] = ()

    def check(self) -> None:
        super().check()
        if self.layers not in ("encoder", "decoder", "both"):
            raise ValueError(f"--layers must be encoder, decoder or both, got {self.layers!r}")


class Session(train.Session):
    """The teacher and the students of scenes with masks."""

    title = "intersection over union on poor images"
    measure = "IoU"
    resized = "--crop N"
    options: Options
    read = (
        "epochs", "batch_size", "lr", "optimizer", "weight_decay", "clip", "ema", "precision",
        "crop", "turn",
    )  # fmt: skip

    def opened(self) -> Any:
        views = open_scene_views(self.options)
        if self.options.judged and self.options.judged not in views.poor.classes:
            raise ValueError(
                f"--judged must be one of {', '.join(views.poor.classes)}, got "
                f"{self.options.judged!r}"
            )
        return views.held(self.options)

    def seen(self, images: Any) -> tuple[int, ...]:
        channels, *size = images.shape
        crop = self.options.crop
        return (channels, crop, crop) if crop else (channels, *size)

    def batches(self, options: Options, **images: Any) -> SceneBatches:
        return SceneBatches(options, masks=self.views.masks, **train.here(options), **images)

    def stages(self, method: Method, network: nn.Module) -> list[str]:
        if not method.reads_maps:
            return []
        names = models.stage_names(network)
        wanted = self.options.layers
        return [name for name in names if wanted == "both" or name.startswith(wanted)]

    def student_settings(self, method: Any, seed: int) -> dict[str, Any]:
        found = super().student_settings(method, seed)
        if method.parts:
            found["layers"] = self.options.layers
        return found

    def settings(self, role: str, **own: Any) -> dict[str, Any]:
        return super().settings(role, masks=self.views.masks.fingerprint, **own)

    def evaluated(self, student: nn.Module) -> dict[str, Any]:
        views = self.views
        found = ious(student, views.held_out_poor, views.poor, views.held_out_masks, self.options)
        return {self.measure: self._judged(found), "mean IoU": sum(found) / len(found),
                "classes": dict(zip(views.poor.classes, found, strict=True))}  # fmt: skip

    def teacher_evaluated(self, teacher: nn.Module) -> dict[str, float]:
        views = self.views
        found = ious(teacher, views.held_out_rich, views.rich, views.held_out_masks, self.options)
        return {"rich images": self._judged(found)}

    def _judged(self, found: Sequence[float]) -> float:
        name = self.options.judged
        return found[self.views.poor.classes.index(name)] if name else sum(found) / len(found)

    def facts_of(self, role: str) -> dict[str, Any]:
        return super().facts_of(role) | {"values": list(self.views.masks.values)}

    def report(self, runs: Sequence[dict[str, Any]]) -> None:
        super().report(runs)
        shown = [method for method in self.methods if method.label != MEAN_TEACHER]
        picture(self, [shown[0], shown[-1]] if len(shown) > 1 else shown)


@torch.no_grad()
def answers(network: nn.Module, images: Any, like: Any, masks: Masks, options: Options) -> Any:
    """Targets and predictions, each (n, H, W), of all scenes, a few at a time."""
    network.to(PartialState().device).eval()
    poor = replace(images, like=like, targets=None)
    batches = SceneBatches(options, poor=poor, masks=masks, **train.here(options))
    for batch in batches.still(32):
        yield batch.target, models.padded(network, batch.poor).argmax(1)


def ious(network: nn.Module, images: Any, like: Any, masks: Masks, options: Options) -> list[float]:
    """Intersection over union a class in percent, by counts over all scenes of all processes.

    A class that is neither there nor predicted has 0, as torchmetrics has it.
    """
    metric = MulticlassJaccardIndex(len(masks.values), average=None, ignore_index=NO_LABEL)
    metric.to(PartialState().device)
    for target, told in answers(network, images, like, masks, options):
        metric.update(told, target)
    return [100 * value for value in metric.compute().tolist()]


def picture(session: Session, methods: Sequence[Any]) -> Path | None:
    """``scenes.png``: a row a test scene, what is seen, what is true, what the students say."""
    from matplotlib.figure import Figure

    views, options = session.views, session.options
    rows = _shown_scenes(views.held_out_masks, views.poor.classes, options.judged)
    columns: list[tuple[str, Tensor]] = [
        ("the student sees", _grey(views.held_out_poor.take(rows), ())),
        ("the teacher sees", _grey(views.held_out_rich.take(rows), options.rgb)),
    ]
    truth = views.held_out_masks.take(rows)
    columns.append(("truth", truth))
    for method in methods:
        network = session.network("student", options.seeds[0])
        if session.student_checkpoint(method, options.seeds[0]).load_into(network) is None:
            continue
        images, masks = views.held_out_poor.chosen(rows), views.held_out_masks.chosen(rows)
        ((_, told),) = answers(network, images, views.poor, masks, options)
        columns.append((_short(method), told.cpu()))
    figure = Figure(figsize=(2 * len(columns), 2 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for down in range(len(rows)):
        for across, (name, images) in enumerate(columns):
            axis = axes[down][across]
            axis.set_axis_off()
            if across < 2:
                axis.imshow(images[down].numpy())
            else:
                axis.imshow(_coloured(images[down], truth[down] if across > 2 else None))
            if not down:
                axis.set_title(name, fontsize=9)
    path = session.out / "scenes.png"
    write_atomically(path, lambda file: figure.savefig(file, dpi=110))
    session.show.say(f"picture: {path} (wrong pixels are red)")
    return path


def _short(method: Any) -> str:
    names = [part["type"] for part in method.parts]
    return " + ".join(names) if names else method.label


def _shown_scenes(masks: Masks, classes: list[str], judged: str) -> Tensor:
    """Four scenes, evenly among those with a fifth to four fifths of the judged class."""
    label = classes.index(judged) if judged else len(classes) - 1
    targets = masks.take(torch.arange(len(masks)))
    shares = (targets == label).flatten(1).double().mean(1)
    rows = ((shares > 0.2) & (shares < 0.8)).nonzero()[:, 0]
    rows = rows if len(rows) >= 4 else shares.argsort(descending=True)
    return rows[torch.linspace(0, len(rows) - 1, min(4, len(rows))).round().long()]


def _grey(images: Tensor, rgb: Sequence[int]) -> Tensor:
    """(n, H, W, 3) in [0, 1]: the bands named, or the first, stretched to what 98 % hold."""
    places = list(rgb) if len(rgb) == 3 else [0, 1, 2] if images.shape[1] == 3 else [0, 0, 0]
    shown = images[:, places].float()
    low, high = (torch.quantile(shown.flatten(1), q, dim=1).view(-1, 1, 1, 1) for q in (0.01, 0.99))
    return ((shown - low) / (high - low).clamp_min(1e-6)).clamp(0, 1).permute(0, 2, 3, 1)


def _coloured(told: Tensor, truth: Tensor | None) -> Any:
    """Classes in colours, the first black; where the truth is another, red."""
    import matplotlib

    colours = torch.tensor(matplotlib.colormaps["tab10"].colors)
    colours = torch.cat([torch.zeros(1, 3), colours[torch.tensor([0, 2, 1, 4, 5, 6, 7, 8, 9])]])
    shown = colours[told.clamp_min(0) % len(colours)]
    shown[told == NO_LABEL] = 0.5
    if truth is not None:
        shown[(told != truth) & (truth != NO_LABEL)] = torch.tensor([0.84, 0.15, 0.16])
    return shown.numpy()


def main(arguments: Sequence[str] | None = None) -> int:
    return job.main(Options, Session, arguments, like="floods")


if __name__ == "__main__":
    sys.exit(main())
