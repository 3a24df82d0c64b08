"""A figure of held-out samples: both modalities, the class, and what each student says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from crossmodal.data import Images
from crossmodal.data.sources import stratified
from crossmodal.tables.figures import drawing
from crossmodal.training.evaluation import still

COUNT = 8  # samples, all classes in proportion
_DRAW = 32
_RIGHT, _WRONG = "#117733", "#CC6677"


def draw_samples(
    rich: Images,
    poor: Images,
    like: Images,
    students: Mapping[str, nn.Module],
    rgb: Sequence[int],
    path: Path,
) -> None:
    """Samples side by side, the rich modality above the poor one, the predictions below.

    Args:
        rich, poor: The held-out images, row by row of one sample.
        like: The poor training images, whose statistics the students know.
        students: Trained networks by name.
        rgb: Where red, green and blue stand in the rich images, where they have other bands.
    """
    chosen = torch.from_numpy(stratified(poor.labels.numpy(), COUNT, draw=_DRAW))
    rows = [rich.chosen(chosen), poor.chosen(chosen)]
    said = {name: predictions(student, rows[1], like) for name, student in students.items()}
    classes, labels = poor.classes, rows[1].labels.tolist()
    with drawing(path, (1.15 * len(labels) + 1.0, 2.9 + 0.2 * len(said))) as figure:
        panels = figure.subplots(2, len(labels), squeeze=False)
        for line, (images, kind) in enumerate(zip(rows, ("rich", "poor"), strict=True)):
            raw = images.take(torch.arange(len(labels))).float()
            for place, axes in enumerate(panels[line]):
                axes.imshow(visible(raw[place], rgb), cmap="gray", vmin=0, vmax=1)
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
            panels[line][0].set_ylabel(kind)
        for place, label in enumerate(labels):
            panels[0][place].set_title(classes[label])
            for number, calls in enumerate(said.values()):
                panels[1][place].annotate(
                    classes[calls[place]],
                    (0.5, -0.14 - 0.19 * number),
                    xycoords="axes fraction",
                    ha="center",
                    va="center",
                    color=_RIGHT if calls[place] == label else _WRONG,
                )
        for number, name in enumerate(said):
            where = (-0.12, -0.14 - 0.19 * number)
            panels[1][0].annotate(name, where, xycoords="axes fraction", ha="right", va="center")


@torch.no_grad()
def predictions(student: nn.Module, images: Images, like: Images) -> list[int]:
    """The class that a student calls every image."""
    student.cpu().eval()
    return [int(k) for batch in still(images, like) for k in student(batch.poor).argmax(1)]


def visible(image: Tensor, rgb: Sequence[int]) -> NDArray[np.float32]:
    """One image (C, H, W) as (H, W, 3) or (H, W) in [0, 1], from its darkest to its brightest.

    Two in a hundred pixels at either end are cut, as radar has a few that outshine all others.
    """
    bands = list(rgb) if len(rgb) == 3 and max(rgb) < len(image) else [0, 1, 2]
    shown = image[bands] if len(image) >= 3 else image[:1]
    low, high = (float(shown.quantile(share)) for share in (0.02, 0.98))
    scaled = ((shown - low) / max(high - low, 1e-6)).clamp(0, 1)
    return scaled.permute(1, 2, 0).squeeze(-1).numpy()
