"""A tiny data set in memory, and its recipe: four classes, each bright in another place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import progress
import train as script
from data.readers import READERS, Reader
from data.sources import Part, Source
from tests.examples import entries

CLASSES = ["north", "east", "south", "west"]
RECIPE = """
reader: tiny
teacher: resnet8
student: resnet8x0_5
view: noise:0.2
epochs: 3
lr: 0.05
batch_size: 16
pad: 1
device: cpu
seeds: [0]
criterion: [alone, kd]
"""


def half(count: int, seed: int) -> Part:
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    images = random.integers(0, 80, (count, 1, 12, 12), dtype=np.uint8)
    places = (np.s_[:6, :], np.s_[:, 6:], np.s_[6:, :], np.s_[:, :6])
    for image, label in zip(images, labels, strict=True):
        image[0][places[label]] += 150
    return Part(labels.astype(np.int64), images.__getitem__)


@pytest.fixture(autouse=True)
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    source = Source(CLASSES, half(80, seed=1), half(40, seed=2))
    reader = Reader(lambda folder, options: source, data="optional")
    monkeypatch.setitem(READERS, "tiny", reader)
    file = tmp_path / "tiny.yaml"
    file.write_text(RECIPE)
    monkeypatch.setattr(entries, "TINY", str(file))
    # The readers' tests have parts of the published sets.
    entries.class_counts(monkeypatch, mnist=10, tiny=4)
    return file


@pytest.fixture
def run(recipe: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs ``train.py`` on the tiny set."""

    def run(*more: str, out: Path = tmp_path / "out") -> int:
        return script.main([str(recipe), "--out", str(out), *more])

    return run


@pytest.fixture
def job(recipe: Path, tmp_path: Path) -> Callable[..., script.Session]:
    """Opens a job on the tiny set, its images as they are, with a few options changed."""

    def job(**changes: object) -> script.Session:
        still = {"epochs": 1, "pad": 0, "flip": False, "out": tmp_path / "job"}
        return script.Session(script.recipe(str(recipe), script.Options, **still | changes))

    return job


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records which networks are trained."""
    labels: list[str] = []
    begin = progress.Show.begin

    def recorded(self: progress.Show, label: str, *rest: int) -> None:
        labels.append(label)
        begin(self, label, *rest)

    monkeypatch.setattr(progress.Show, "begin", recorded)
    return labels
