"""A tiny data set in memory: four classes of 12x12 images, told apart by where they are bright."""

from __future__ import annotations

import numpy as np
import pytest

from crossmodal import data, engine, figures, outputs
from crossmodal.data import DataSet, ImagePairs, Recipe
from crossmodal.sources import Images, Source

CLASSES = ["north", "east", "south", "west"]


def _images(count: int, seed: int) -> Images:
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    images = random.integers(0, 80, (count, 1, 12, 12), dtype=np.uint8)
    halves = (np.s_[:6, :], np.s_[:, 6:], np.s_[6:, :], np.s_[:, :6])
    for image, label in zip(images, labels, strict=True):
        image[0][halves[label]] += 150
    return Images(labels.astype(np.int64), lambda rows: images[rows])


@pytest.fixture(autouse=True)
def tiny_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers the data set ``tiny`` and keeps the figures small."""
    source = Source(CLASSES, _images(80, seed=1), _images(40, seed=2))
    recipe = Recipe(
        "resnet8", "resnet8x0_5", 0.2, epochs=2, teacher_epochs=3, lr=0.05, batch_size=16, pad=1
    )
    monkeypatch.setitem(data.DATA_SETS, "tiny", DataSet(lambda folder, download: source, recipe))
    monkeypatch.setattr(outputs, "_FIGURE_IMAGES", 24)


@pytest.fixture
def pairs() -> ImagePairs:
    """The training images of ``tiny``."""
    return data.load("tiny", split="train", amount=0.2)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records which networks are trained, and leaves out the figures that take the most time."""
    for slow in ("draw_tsne", "draw_self_similarity"):
        monkeypatch.setattr(figures, slow, lambda *a, **k: None)
    names: list[str] = []
    teach, distil = engine.train_teacher, engine.distil

    def teach_recorded(name: str, *rest: object, **options: object) -> engine.Outcome:
        names.append("teacher")
        return teach(name, *rest, **options)

    def distil_recorded(
        method: str,
        student: str,
        teacher: object,
        pairs: object,
        config: engine.Config,
        **o: object,
    ) -> engine.Outcome:
        names.append(f"{method} {config.seed}")
        return distil(method, student, teacher, pairs, config, **o)

    monkeypatch.setattr(engine, "train_teacher", teach_recorded)
    monkeypatch.setattr(engine, "distil", distil_recorded)
    return names
