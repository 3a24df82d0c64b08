"""What a lone student's maps tell of the teacher's."""

from __future__ import annotations

import torch

from crossmodal import models
from crossmodal.training.evaluation import predictable
from tests.examples.tiny import opened


def test_a_network_predicts_its_own_maps_and_noise_hides_the_teachers() -> None:
    torch.manual_seed(0)
    views = opened(poor="noise:0.9")
    net = models.create("resnet8x0_5", num_classes=4, in_chans=1)
    other = models.create("resnet8", num_classes=4, in_chans=1)
    rich, poor = views.rich, views.poor
    own = predictable(net, net, rich, rich, (rich, rich))
    assert len(own) == 3
    assert min(own) > 0.8  # but for channels that are dead
    clean = predictable(net, other, rich, rich, (rich, rich))
    hidden = predictable(net, other, poor, rich, (poor, rich))
    assert all(0 <= low < high <= 1 for low, high in zip(hidden, clean, strict=True))
