"""The figure of samples: what is drawn of an image, and what a student says of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from crossmodal.tables.samples import draw_samples, predictions, visible
from tests.examples.tiny import opened


class Brightest(nn.Module):
    """Knows the four classes of the tiny set by where an image is bright."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        halves = images[..., :6, :], images[..., 6:], images[..., 6:, :], images[..., :6]
        return torch.stack([half.mean((1, 2, 3)) for half in halves], 1)


def test_predictions_come_in_the_order_of_the_images() -> None:
    views = opened(amount=0.0)
    said = predictions(Brightest(), views.held_out_poor, views.poor)
    assert said == views.held_out_poor.labels.tolist()


def test_an_image_is_shown_by_its_bands_from_dark_to_bright() -> None:
    bands = torch.stack([torch.full((4, 4), float(k)) for k in range(5)])
    shown = visible(bands, (4, 2, 0))
    assert shown.shape == (4, 4, 3)
    assert shown[0, 0].tolist() == pytest.approx([1, 0.5, 0], abs=0.02)
    assert visible(bands, ())[0, 0].tolist() == pytest.approx([0, 0.5, 1], abs=0.02)
    assert visible(bands[:1], (4, 2, 0)).shape == (4, 4)  # these bands are not there
    assert visible(torch.ones(1, 4, 4), ()).max() == 0


def test_a_figure_is_drawn(tmp_path: Path) -> None:
    views, path = opened(), tmp_path / "samples.png"
    students = {"alone": Brightest(), "kd": Brightest()}
    held_out = views.held_out_rich, views.held_out_poor
    draw_samples(*held_out, views.poor, students, (), path)
    assert path.stat().st_size > 10_000
