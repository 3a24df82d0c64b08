"""Batches of paired images from memory: the same crop and flip for both modalities."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crossmodal.data import ImagePairs, Statistics
from crossmodal.models import memory_format
from crossmodal.noise import fresh_salt_and_pepper


@dataclass(frozen=True)
class Batch:
    """Normalised float32 images (B, C, H, W), labels and rows, each (B,) int64."""

    clean: Tensor
    poor: Tensor
    target: Tensor
    index: Tensor


class Batches:
    """Iterate over ``pairs`` once an epoch; every pass draws a new order and new crops.

    ``Batch.index`` is the row in ``pairs``, 0 to len(pairs) - 1, as criteria with a memory want it.

    Args:
        pairs: the images, kept on ``device`` as uint8.
        batch_size: images a batch. When shuffling, an incomplete last batch is left out.
        statistics: mean and std that both modalities are normalised with.
        shuffle: a new order every pass.
        pad: black border for a random crop of the images' own size; 0 for none.
        flip: mirror half of the images.
        fresh_noise: make the poor images anew at every pass, instead of the fixed noisy set.
        seed: of the order, the crops, the flips and the fresh noise.
        device: where batches are made.
    """

    def __init__(
        self,
        pairs: ImagePairs,
        batch_size: int,
        *,
        statistics: Statistics,
        shuffle: bool = False,
        pad: int = 0,
        flip: bool = False,
        fresh_noise: bool = False,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if pad < 0:
            raise ValueError(f"pad must be at least 0, got {pad}")
        if fresh_noise and pairs.amount is None:
            raise ValueError(
                f"fresh_noise needs noise to draw, but {pairs.name} has a poor modality of its own"
            )
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.shuffle, self.pad, self.flip = shuffle, pad, flip
        self.size = tuple(pairs.clean.shape[-2:])
        self._amount = pairs.amount if fresh_noise else None
        self._clean = self._stored(pairs.clean)
        # One modality alone comes as both: it is stored, cropped and normalised once.
        self._single = pairs.poor is pairs.clean and not fresh_noise
        shared = fresh_noise or self._single
        self._poor = self._clean if shared else self._stored(pairs.poor)
        self._labels = pairs.labels.to(self.device)
        self._mean = statistics.mean.to(self.device)
        self._std = statistics.std.to(self.device)
        # Order, crops and flips are drawn on the CPU, so that they are the same on every device.
        self._draws = torch.Generator().manual_seed(seed)
        self._noise = torch.Generator(self.device).manual_seed(seed)

    def __len__(self) -> int:
        count = len(self._labels)
        if self.shuffle and count >= self.batch_size:
            return count // self.batch_size
        return -(-count // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        count = len(self._labels)
        order = (
            torch.randperm(count, generator=self._draws) if self.shuffle else torch.arange(count)
        )
        for number in range(len(self)):
            start = number * self.batch_size
            yield self.take(order[start : start + self.batch_size])

    def _stored(self, images: Tensor) -> Tensor:
        # Channels last, border in place: a crop is then one gather.
        padded = F.pad(images, (self.pad,) * 4)
        return padded.permute(0, 2, 3, 1).contiguous().to(self.device)

    def take(self, rows: Tensor) -> Batch:
        """The batch of these rows, newly cropped."""
        ys, xs = self._crops(len(rows))
        rows = rows.to(self.device)
        at = (rows.view(-1, 1, 1), ys.unsqueeze(2), xs.unsqueeze(1))
        clean = self._clean[at]
        if self._single:
            images = self._normalised(clean)
            return Batch(images, images, self._labels[rows], rows)
        if self._amount is None:
            poor = self._poor[at]
        else:
            places = torch.arange(len(rows), device=self.device).view(-1, 1, 1)
            poor = self._freshly_noised(rows, self._amount)[(places, *at[1:])]
        return Batch(self._normalised(clean), self._normalised(poor), self._labels[rows], rows)

    def _crops(self, count: int) -> tuple[Tensor, Tensor]:
        """Source rows (B, H) and columns (B, W) of every crop; mirrored columns run backwards."""
        height, width = self.size
        offsets = torch.randint(2 * self.pad + 1, (2, count, 1), generator=self._draws)
        across = torch.arange(width).expand(count, -1)
        if self.flip:
            mirrored = torch.rand(count, 1, generator=self._draws) < 0.5
            across = torch.where(mirrored, across.flip(1), across)
        ys, xs = offsets[0] + torch.arange(height), offsets[1] + across
        return ys.to(self.device), xs.to(self.device)

    def _freshly_noised(self, rows: Tensor, amount: float) -> Tensor:
        images = self._clean[rows]
        height, width = self.size
        inside = images[:, self.pad : self.pad + height, self.pad : self.pad + width]
        inside.copy_(fresh_salt_and_pepper(inside, amount, self._noise))
        return images

    def _normalised(self, images: Tensor) -> Tensor:
        normalised = ((images - self._mean) / self._std).permute(0, 3, 1, 2)
        return normalised.contiguous(memory_format=memory_format(self.device))
