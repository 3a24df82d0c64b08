"""Batches of one modality or of both, from memory or streamed: the same bits either way.

Whatever is drawn for a sample (its crop, its flip, its noise) depends on the seed, the epoch, the
sample and how often the epoch had it before; the order of an epoch on seed and epoch: neither the
number of workers nor that of processes changes a batch, and an epoch can be made again without
those before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, count, islice

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as vision

from data.draws import permutation, uniform
from data.images import NO_LABEL, Images
from data.options import Options

_ORDER, _CROPS, _OTHER_CROPS, _LABELLED, _UNLABELLED, _MIXED = 21, 22, 23, 24, 25, 26
PASS = 1 << 40  # more than any set has samples: parts the draws of an epoch's passes
_SCALE, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of RandomResizedCrop, as torchvision's


@dataclass(frozen=True)
class Batch:
    """Normalised float32 images (B, C, H, W) of either modality, targets and rows, each (B,) int64.

    A target of -100 says that the image has no label. A modality that is not asked for is None.
    """

    rich: Tensor | None
    poor: Tensor | None
    target: Tensor
    index: Tensor
    paired: Tensor | None = None  # rows that have a rich image, where not all have one

    def to(self, device: str | torch.device) -> Batch:
        return Batch(*(None if part is None else part.to(device) for part in vars(self).values()))


@dataclass(kw_only=True)
class Batches:
    """Epochs over the rows of one modality, with the images of another beside them."""

    options: Options = field(kw_only=False)  # batch size, crops and flips
    seed: int = 0  # of the order, the crops and the flips
    poor: Images | None = None  # what the student sees; its rows make the epoch if given
    rich: Images | None = None  # what the teacher sees: row i of both is one sample, unless told
    together: bool = True  # crop both alike, as one scene seen twice; else apart, as two scenes
    device: str | torch.device = "cpu"  # where the batches go
    share: tuple[int, int] = (0, 1)  # this process and their number, which part every batch
    workers: int = 0  # processes that read what is not in memory
    labelled: float = 0.0  # the least share of rows with a label in every batch; they come again

    def __post_init__(self) -> None:
        led = self.poor or self.rich
        if led is None:
            raise ValueError("batches need poor images, rich ones or both")
        self._led, self.size, self.classes = led, self.options.batch_size, led.classes
        if self.size % self.share[1]:
            many = f"a multiple of the {self.share[1]} processes"
            raise ValueError(f"--batch-size must be {many}, got {self.size}")

    def __len__(self) -> int:
        """Batches of an epoch; an incomplete last one is left out, unless it is the only one."""
        return max(len(self._led) // self.size, 1)

    def epoch(self, number: int, ids: Tensor | None = None) -> Iterator[Batch]:
        """The batches of an epoch counted from 0; ``ids`` names a row of ``rich`` for every row."""
        rank, count = self.share
        steps = [part.tensor_split(count)[rank] for part in self._order(number)]
        yield from self._read(steps, number, ids)

    def _order(self, number: int) -> list[Tensor]:
        """The rows of every batch of an epoch, further by a length of the set with every pass.

        Where chance would give a batch fewer labels than ``labelled``, rows with a label and rows
        without one are drawn apart. Each kind comes in passes of its own, and an epoch has as many
        batches as without, so that a training has the same steps however few the labels.
        """
        key, size = (self.seed, _ORDER, number), self.size
        known = self._led.known() != NO_LABEL
        if not known.any() or float(known.float().mean()) >= self.labelled:
            return list(permutation(key, len(known)).split(size)[: len(self)])
        size = min(size, len(known))
        many = max(round(self.labelled * size), 1)
        drawn = (
            _passes(some.nonzero()[:, 0], (*key, kind), len(self) * count, len(known)).split(count)
            if count
            else (some.nonzero()[:0, 0],) * len(self)
            for some, kind, count in (
                (known, _LABELLED, many),
                (~known, _UNLABELLED, size - many),
            )
        )
        both = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        # Every process gets rows of both kinds, not the one all labels.
        return [rows[permutation((*key, _MIXED, step), size)] for step, rows in enumerate(both)]

    def still(self, size: int = 256) -> Iterator[Batch]:
        """This process's share of all images in their order, neither cropped nor flipped."""
        rank, count = self.share
        rows = torch.arange(len(self._led))[rank::count]
        yield from self._read(list(rows.split(size)))

    def first(self, size: int | None = None) -> Batch:
        """The first rows as they are, each beside some row of ``rich``; a step's where no size."""
        if size is None:
            size = min(self.size, len(self._led)) // self.share[1]
        ids = None if self.rich is None else torch.arange(len(self._led)) % len(self.rich)
        return self.made(torch.arange(size), None, ids).to(self.device)

    @property
    def streamed(self) -> bool:
        """Whether images are read during the training."""
        return any(i is not None and i.pixels is None for i in (self.poor, self.rich))

    def _read(
        self, steps: list[Tensor], number: int | None = None, ids: Tensor | None = None
    ) -> Iterator[Batch]:
        loader = DataLoader(
            steps,
            batch_size=None,
            collate_fn=partial(self.made, number=number, ids=ids),
            num_workers=self.workers if self.streamed else 0,
            # It draws a seed for its workers, which must not move the training's own.
            generator=torch.Generator(),
        )
        for batch in loader:
            yield batch.to(self.device)

    def made(self, index: Tensor, number: int | None, ids: Tensor | None) -> Batch:
        """The batch of some rows; ``number`` None leaves the images as they are."""
        # An image that comes again in an epoch is drawn anew, or it is learned by heart.
        passes, index = index // len(self._led) * PASS, index % len(self._led)
        poor, rich = self.poor, self.rich
        # Drawn by the student's row: a teacher image that serves many is not one crop.
        keys = self._led.index[index] + passes
        images_p = images_t = raw = None
        if poor is not None:
            raw = poor.raw(index)
            images_p = self._image(raw, poor, index, _CROPS, number, keys)
        if rich is not None:
            rows = index if ids is None else ids[index]
            # Poor images are often made from these very ones: read once.
            shared = poor is not None and poor.base is rich and poor.pixels is None
            raw = raw if shared and ids is None else rich.raw(rows)
            key = _CROPS if self.together else _OTHER_CROPS
            images_t = self._image(raw, rich, rows, key, number, keys)
        return Batch(images_t, images_p, self._led.known()[index], index)

    def _image(
        self, raw: Tensor, images: Images, rows: Tensor, key: int, number: int | None, keys: Tensor
    ) -> Tensor:
        options, draws = self.options, None
        if number is not None:
            draws = uniform((self.seed, key, number), keys, 5)
            if options.crop == "resized":
                raw = resized_crops(raw, draws, flip=options.flip)
        made = raw if images.poverty is None else images.poverty(raw, images.index[rows])
        normal = images.statistics.normalise(made)
        if draws is None or options.crop == "resized":
            return normal
        return padded_crops(normal, draws, pad=options.pad, flip=options.flip)


def _passes(rows: Tensor, key: tuple[int, ...], count: int, length: int) -> Tensor:
    """``count`` of the rows: all of them in a drawn order, then all in another, and so on.

    Every pass adds ``length``.
    """
    passes = range(-(-count // len(rows)))
    drawn = [rows[permutation((*key, p), len(rows))] + p * length for p in passes]
    return torch.cat(drawn)[:count]


def padded_crops(images: Tensor, draws: Tensor, *, pad: int, flip: bool) -> Tensor:
    """Crops of normalised images (n, C, H, W) in their own size, from a border of their mean, 0.

    ``draws`` (n, 3 or more) in [0, 1) say how far down and across, and which are mirrored.
    """
    count, channels, height, width = images.shape
    if not pad and not flip:
        return images
    offsets = (draws[:, :2] * (2 * pad + 1)).long().clamp(max=2 * pad)
    ys = offsets[:, :1] + torch.arange(height)
    across = torch.arange(width).expand(count, -1)
    if flip:
        across = torch.where(draws[:, 2:3] < 0.5, across.flip(1), across)
    xs = offsets[:, 1:2] + across
    flat = (ys[:, :, None] * (width + 2 * pad) + xs[:, None, :]).view(count, 1, -1)
    padded = F.pad(images, (pad,) * 4).flatten(2)
    return padded.gather(2, flat.expand(-1, channels, -1)).view_as(images)


def resized_crops(images: Tensor, draws: Tensor, *, flip: bool) -> Tensor:
    """Crops of 8 to 100 % of the area, brought to the images' own size, as RandomResizedCrop's.

    A crop that would stick out is cut to the image, where torchvision draws again.
    """
    count, _, height, width = images.shape
    low, high = _SCALE
    area = (low + draws[:, 0] * (high - low)) * height * width
    log_low, log_high = (math.log(value) for value in _RATIO)
    ratio = torch.exp(log_low + draws[:, 1] * (log_high - log_low))
    down = (area / ratio).sqrt().round().clamp(1, height).long()
    across = (area * ratio).sqrt().round().clamp(1, width).long()
    top = (draws[:, 3] * (height - down + 1)).long()
    left = (draws[:, 4] * (width - across + 1)).long()
    crops = []
    for n in range(count):
        box = (int(top[n]), int(left[n]), int(down[n]), int(across[n]))
        crop = vision.resized_crop(images[n], *box, [height, width], antialias=True)
        crops.append(crop.flip(-1) if flip and draws[n, 2] < 0.5 else crop)
    return torch.stack(crops)


@dataclass(frozen=True)
class MixedBatches:
    """Epochs of batches of which one half are own images and the other half are pairs.

    A batch has as many images as one of own images alone, and an epoch as many batches, so that
    every row of a table takes the same steps. The pairs are passed over as often as that needs.
    """

    alone: Batches  # of own images, in whole batches: what gives an epoch its length
    own: Batches  # the same in half batches
    pairs: Batches

    @classmethod
    def of(cls, alone: Batches, pairs: Batches) -> MixedBatches:
        """Halves the batches of both.

        Raises:
            ValueError: a batch has no half for every process.
        """
        size, many = alone.size, alone.share[1]
        if size % (2 * many):
            raise ValueError(
                f"--batch-size must be a multiple of {2 * many} where one half of a batch are free "
                f"pairs, got {size}"
            )
        half = replace(alone.options, batch_size=size // 2)
        return cls(alone, replace(alone, options=half), replace(pairs, options=half))

    def __len__(self) -> int:
        return len(self.alone)

    @property
    def size(self) -> int:
        return self.alone.size

    @property
    def streamed(self) -> bool:
        return self.own.streamed or self.pairs.streamed

    @property
    def classes(self) -> list[str]:
        return self.alone.classes

    def epoch(self, number: int, ids: Tensor | None = None) -> Iterator[Batch]:
        """The batches of an epoch counted from 0."""
        own, pairs = (
            chain.from_iterable(some.epoch(passed) for passed in self._passes(number, some))
            for some in (self.own, self.pairs)
        )
        for both in islice(zip(own, pairs, strict=False), len(self)):
            yield _joined(*both)

    def first(self, size: int | None = None) -> Batch:
        """The first images of both, as they are; a step's where no size is given."""
        if size is not None:  # an example of pairs
            return self.pairs.first(size)
        return _joined(self.own.first(), self.pairs.first())

    def _passes(self, number: int, over: Batches) -> Iterator[int]:
        """Passes of this epoch's own over a half, counted through all epochs."""
        return count(number * -(-len(self) // len(over)))


def _joined(own: Batch, pairs: Batch) -> Batch:
    """Own images first; the pairs' rows are named."""
    poor = torch.cat([own.poor, pairs.poor])
    target, index = (
        torch.cat([getattr(own, name), getattr(pairs, name)]) for name in ("target", "index")
    )
    rows = torch.arange(len(own.target), len(target), device=target.device)
    return Batch(pairs.rich, poor, target, index, rows)
