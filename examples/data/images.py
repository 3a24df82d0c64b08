"""One modality of one split: in memory, or read when it is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.decode import Pixels, Rows
from data.poverty import Poverty
from data.sources import stratified

NO_LABEL = -100
_LOOKED_AT = 50_000  # images that statistics and fingerprints are taken from, where there are more
_CHUNK = 1024
_LOOK_DRAW = 9


class Statistics(NamedTuple):
    """Mean and standard deviation of every channel over all pixels, each (C,)."""

    mean: Tensor
    std: Tensor

    def normalise(self, images: Tensor) -> Tensor:
        """Float images of mean 0 and deviation 1; a constant channel is 0 everywhere."""
        if images.shape[-3] != len(self.mean):
            raise ValueError(
                f"images of {images.shape[-3]} channel(s) cannot be normalised by the statistics "
                f"of {len(self.mean)}"
            )
        mean, std = (part.to(images.device).view(-1, 1, 1) for part in self)
        scale = torch.where(std > 0, 1 / std, 0)
        return (images - mean) * scale

    @property
    def constant(self) -> list[int]:
        """The places of the channels that never change."""
        return (self.std == 0).nonzero()[:, 0].tolist()


@dataclass(frozen=True)
class Images:
    """A modality's images with what is known of each.

    Attributes:
        read: rows of the half to raw images (n, C, H, W), uint8 or float32.
        rows: which rows of the half belong here.
        labels: (N,) int64, all of them; what tables and matches by class read.
        index: (N,) int64, each sample's place in the whole data set (test after train).
        classes: names, label k is ``classes[k]``.
        poverty: makes the raw images poor; None leaves them.
        targets: (N,) what training may know: the label, or -100 where there is none.
        base: images that these are made from by the poverty, in the same order; read instead.
        like: images whose statistics these are normalised with; None for their own.
        pixels: the images in memory, (N, C, H, W); None reads them when asked for.
    """

    read: Callable[[Rows], Pixels]
    rows: Rows
    labels: Tensor
    index: Tensor
    classes: list[str]
    poverty: Poverty | None = None
    targets: Tensor | None = None
    base: Images | None = None
    like: Images | None = None
    pixels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def raw(self, rows: Tensor) -> Tensor:
        """The images of these rows, before the poverty where they are not in memory."""
        if self.pixels is not None:
            return self.pixels[rows]
        if self.base is not None:
            return self.base.raw(rows)
        return torch.from_numpy(self.read(self.rows[rows.numpy()]))

    def take(self, rows: Tensor) -> Tensor:
        """The images of these rows as the networks' modality, not yet normalised."""
        images = self.raw(rows)
        return images if self.poverty is None else self.poverty(images, self.index[rows])

    def known(self) -> Tensor:
        """What training may know of every image."""
        return self.labels if self.targets is None else self.targets

    def made(self, poverty: Poverty) -> Images:
        """These images in the poor modality, normalised by their own statistics."""
        return replace(self, poverty=poverty, base=self, pixels=None)

    def chosen(self, rows: Tensor) -> Images:
        """These rows alone."""
        return replace(
            self,
            rows=self.rows[rows.numpy()],
            labels=self.labels[rows],
            index=self.index[rows],
            targets=None if self.targets is None else self.targets[rows],
            base=None if self.base is None else self.base.chosen(rows),
            pixels=None if self.pixels is None else self.pixels[rows],
        )

    def loaded(self, done: dict[int, Images] | None = None, *, made: bool = True) -> Images:
        """The same, in memory; ``made`` poor once and for all, or anew whenever it is taken.

        ``done`` holds what is already there, so that what is shared stays so.
        """
        done = {} if done is None else done
        if id(self) not in done:
            base, like = (
                None if images is None else images.loaded(done, made=made)
                for images in (self.base, self.like)
            )
            near = replace(self, base=base, poverty=self.poverty if made else None)
            pixels = base.pixels if base and not made else torch.cat(list(near.chunks()))
            poverty = None if made else self.poverty
            done[id(self)] = replace(self, pixels=pixels, poverty=poverty, base=None, like=like)
        return done[id(self)]

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return tuple(self.take(torch.zeros(1, dtype=torch.int64)).shape[1:])

    @property
    def size(self) -> int:
        """Bytes in memory."""
        first = self.take(torch.zeros(1, dtype=torch.int64))
        return first.numel() * first.element_size() * len(self)

    @property
    def statistics(self) -> Statistics:
        """Those to normalise with."""
        return self._looked_at[0] if self.like is None else self.like.statistics

    @property
    def fingerprint(self) -> str:
        """A hash of images and labels: equal where the training data are."""
        return self._looked_at[1]

    @cached_property
    def _looked_at(self) -> tuple[Statistics, str]:
        digest = hashlib.sha256(self.labels.numpy().tobytes())
        if self.targets is not None:
            digest.update(self.targets.numpy().tobytes())
        channels, pixels = self.shape[0], 0
        total, squares = torch.zeros(2, channels, dtype=torch.float64)
        low, high = torch.full((channels,), torch.inf), torch.full((channels,), -torch.inf)
        origin = None
        for images in self.chunks(_LOOKED_AT):
            digest.update(images.numpy().tobytes())
            flat = images.transpose(0, 1).flatten(1).double()
            # Squares around a first mean lose no digits where the deviation is small beside it.
            origin = flat.mean(1) if origin is None else origin
            total += (flat - origin[:, None]).sum(1)
            squares += (flat - origin[:, None]).square().sum(1)
            low, high = torch.minimum(low, flat.amin(1).float()), high.maximum(flat.amax(1).float())
            pixels += flat.shape[1]
        assert origin is not None
        variance = (squares - total.square() / pixels) / max(pixels - 1, 1)
        std = torch.where(low == high, 0.0, variance.clamp_min(0).sqrt())
        return Statistics((origin + total / pixels).float(), std.float()), digest.hexdigest()[:16]

    def chunks(self, most: int | None = None) -> Iterator[Tensor]:
        """The images in their order, some at a time; a stratified choice of ``most`` of them."""
        rows = torch.arange(len(self))
        if most is not None and len(self) > most:
            rows = torch.from_numpy(stratified(self.labels.numpy(), most, draw=_LOOK_DRAW))
        for chunk in rows.split(_CHUNK):
            yield self.take(chunk)


def counts(images: Images) -> np.ndarray:
    """Images a class."""
    return np.bincount(images.labels.numpy(), minlength=len(images.classes))
