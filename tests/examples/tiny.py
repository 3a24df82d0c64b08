"""A tiny data set in memory: four classes of 12x12 images, told apart by where they are bright."""

from __future__ import annotations

import numpy as np
import torch

from crossmodal import recipes
from crossmodal.data import Images, Views, Wanted, open_views, sources

CLASSES = ["north", "east", "south", "west"]
ENTRY = """
[tiny]
reader = "tiny"
teacher = "resnet8"
student = "resnet8x0_5"
matcher = "resnet8x0_5"
amount = 0.2
train = { epochs = 2, lr = 0.05, batch_size = 16, pad = 1, precision = "fp32" }
teacher_recipe = { epochs = 3 }
matcher_recipe = { epochs = 2, precision = "fp32", batch_size = 16 }
"""


def half(count: int, seed: int, channels: int = 1) -> sources.Images:
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    images = random.integers(0, 80, (count, channels, 12, 12), dtype=np.uint8)
    places = (np.s_[:6, :], np.s_[:, 6:], np.s_[6:, :], np.s_[:, :6])
    for image, label in zip(images, labels, strict=True):
        for channel in image:
            channel[places[label]] += 150
    return sources._in_memory(images, labels.astype(np.int64))


def opened(name: str = "tiny", **wanted: object) -> Views:
    return open_views(recipes.data_sets()[name], Wanted(**wanted)).loaded()


def recipe(**fields: object) -> recipes.Recipe:
    plain = {"epochs": 1, "batch_size": 16, "pad": 0, "flip": False, "precision": "fp32"}
    return recipes.Recipe(**plain | fields)


def pixels(images: torch.Tensor, labels: torch.Tensor | None = None, **more: object) -> Images:
    """Images in memory."""
    labels = torch.arange(len(images)) % 4 if labels is None else labels
    index = torch.arange(len(images)) + 1000
    rows = np.arange(len(images))
    return Images(lambda rows: images.numpy()[rows], rows, labels, index, CLASSES, "set", **more)
