"""Mixed batches: the student's own images, and the teacher's made poor, which are free pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, count, islice

import torch
from torch import Tensor

from data.batches import Batch, Batches


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
