"""Registers the tiny data set, and runs the scripts on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from crossmodal import cli, models, recipes
from crossmodal.data import Views, sources
from crossmodal.runs import session
from crossmodal.tables import figures, write
from crossmodal.training.engine import Outcome, Training
from tests.examples.tiny import CLASSES, ENTRY, half, opened


@pytest.fixture(autouse=True)
def tiny_set(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Registers the data set ``tiny`` and keeps the figures small."""
    file = tmp_path_factory.mktemp("recipes") / "recipes.toml"
    file.write_text(recipes.FILE.read_text() + ENTRY)
    monkeypatch.setattr(recipes, "FILE", file)
    source = sources.Source(CLASSES, half(80, seed=1), half(40, seed=2))
    monkeypatch.setattr(sources, "open_tiny", lambda folder, download: source, raising=False)
    monkeypatch.setattr(write, "_FIGURE_IMAGES", 24)


@pytest.fixture
def views() -> Views:
    return opened()


@pytest.fixture
def teacher() -> nn.Module:
    torch.manual_seed(7)
    return models.create("resnet8", num_classes=4, in_chans=1)


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., int]:
    """Runs ``train.py`` (or another script) on ``tiny``, on the CPU."""

    def run(*more: str, name: str = "tiny", kind: str = "train", out: Path = tmp_path) -> int:
        return cli.main([name, "--out", str(out), "--device", "cpu", *more], kind=kind)

    return run


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records which networks are trained, and leaves out the figures that take the most time."""
    for slow in ("draw_tsne", "draw_self_similarity", "draw_curves", "draw_accuracy"):
        monkeypatch.setattr(figures, slow, lambda *a, **k: None)
    labels: list[str] = []
    original = session.fit

    def recorded(training: Training, *rest: object) -> Outcome:
        labels.append(training.label)
        return original(training, *rest)

    monkeypatch.setattr(session, "fit", recorded)
    return labels
