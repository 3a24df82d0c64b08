"""Data sets as pairs of a clean and a poor image; a further set is one entry in ``DATA_SETS``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from crossmodal.noise import check_amount, salt_and_pepper
from crossmodal.sources import Rows, Source, open_cifar10, open_mnist, stratified

SPLITS = ("train", "val", "fit", "test")
VAL_FRACTION = 0.1
# Fixed draws, apart from every training seed: the same images are held out for everybody.
_VAL_DRAW, _LIMIT_DRAW = 2, 3


class Statistics(NamedTuple):
    """Mean and standard deviation of the clean images, 0 to 255, each (C,)."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class ImagePairs:
    """One split in memory: every sample in both modalities.

    Attributes:
        clean: uint8 (N, C, H, W), what the teacher sees.
        poor: uint8 (N, C, H, W), what the student sees.
        labels: int64 (N,).
        index: int64 (N,), each sample's place in the whole data set (test after train).
        classes: the class names, label k is ``classes[k]``.
        name: the data set.
        amount: fraction of pixels replaced; None where the poor modality is a sensor's own.
    """

    clean: Tensor
    poor: Tensor
    labels: Tensor
    index: Tensor
    classes: list[str]
    name: str
    amount: float | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def statistics(self) -> Statistics:
        """Mean and std of the clean images, each channel over all pixels."""
        pixels = self.clean.transpose(0, 1).flatten(1)
        # One channel at a time: float64 of the whole set would be eight times its size.
        means = torch.stack([channel.double().mean() for channel in pixels])
        stds = torch.stack([channel.double().std() for channel in pixels])
        return Statistics(means.float(), torch.where(stds > 0, stds, 1.0).float())

    @cached_property
    def fingerprint(self) -> str:
        """A hash of clean images and labels: equal exactly where the training data are."""
        digest = hashlib.sha256(self.clean.contiguous().numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Recipe:
    """A data set's defaults: the models, the noise, the schedule and the augmentation."""

    teacher: str
    student: str
    amount: float
    epochs: int
    teacher_epochs: int
    lr: float
    batch_size: int = 64
    pad: int = 4
    flip: bool = True
    warmup: float = 0.0


@dataclass(frozen=True)
class DataSet:
    """A registry entry: ``open(data_dir, download) -> Source`` and the recipe."""

    open: Callable[[Path | None, bool], Source]
    recipe: Recipe


def data_set(name: str) -> DataSet:
    """The registry entry of ``name``; ValueError with the known names where there is none."""
    if name not in DATA_SETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(sorted(DATA_SETS))}")
    return DATA_SETS[name]


def load(
    name: str,
    *,
    data_dir: str | Path | None = None,
    split: str,
    amount: float,
    limit: int | None = None,
    seed: int = 0,
    download: bool = False,
) -> ImagePairs:
    """Read one split of a data set in both modalities.

    ``val`` is a fixed stratified tenth of ``train`` and ``fit`` is the rest of it: choose on
    ``val`` after training on ``fit``, report on ``test`` after training on ``train``.

    Args:
        name: a key of ``DATA_SETS``.
        data_dir: where the images lie; sets that come with a package need none.
        split: ``train``, ``val``, ``fit`` or ``test``.
        amount: fraction of the pixels that noise replaces, in [0, 1].
        limit: keep that many images of ``train`` or ``fit``, a fixed stratified choice; ``val`` and
            ``test`` stay whole.
        seed: of the noise.
        download: fetch the data set into ``data_dir`` if it is one that torchvision can fetch.

    Raises:
        ValueError: the name, split, amount or limit is wrong, or the data are missing or damaged.
    """
    entry = data_set(name)
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    check_amount(amount)
    source = entry.open(None if data_dir is None else Path(data_dir).expanduser(), download)
    half, offset = (source.test, len(source.train.labels)) if split == "test" else (source.train, 0)
    rows = _rows(half.labels, split)
    if limit is not None and split in ("train", "fit"):
        if not len(source.classes) <= limit <= len(rows):
            raise ValueError(
                f"limit must lie between {len(source.classes)} (one image a class) and {len(rows)} "
                f"(the images of split {split!r} of {name}), got {limit}"
            )
        rows = rows[stratified(half.labels[rows], limit, draw=_LIMIT_DRAW)]
    clean = torch.from_numpy(half.read(rows))
    index = torch.from_numpy(rows + offset)
    if half.read_poor is None:
        poor = salt_and_pepper(clean, amount, seed=seed, indices=index)
    else:
        poor = torch.from_numpy(half.read_poor(rows))
    return ImagePairs(
        clean,
        poor,
        torch.from_numpy(half.labels[rows]),
        index,
        source.classes,
        name,
        amount if half.read_poor is None else None,
    )


def _rows(labels: Rows, split: str) -> Rows:
    everything = np.arange(len(labels), dtype=np.int64)
    if split in ("train", "test"):
        return everything
    held_out = stratified(labels, round(VAL_FRACTION * len(labels)), draw=_VAL_DRAW)
    return held_out if split == "val" else np.setdiff1d(everything, held_out)


DATA_SETS: dict[str, DataSet] = {
    "mnist": DataSet(
        open_mnist,
        Recipe(
            "resnet8",
            "resnet8x0_5",
            amount=0.5,
            epochs=12,
            teacher_epochs=8,
            lr=0.1,
            batch_size=32,
            pad=2,
            flip=False,
        ),
    ),
    # The paper's protocol (6.2), with its "0.1" read as the fraction replaced.
    "cifar10": DataSet(
        open_cifar10,
        Recipe("resnet32x4", "resnet8x4", 0.1, epochs=300, teacher_epochs=300, lr=0.1),
    ),
}
