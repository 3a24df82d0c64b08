"""Mixed batches: the student's own images, and the teacher's made poor, which are free pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, count, islice

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
        size, many = alone.recipe.batch_size, alone.share[1]
        if size % (2 * many):
            raise ValueError(
                f"batch_size must be a multiple of {2 * many} where one half of a batch are free "
                f"pairs, got {size}"
            )
        half = replace(alone.recipe, batch_size=size // 2, accumulate=1)
        return cls(alone, replace(alone, recipe=half), replace(pairs, recipe=half))

    def __len__(self) -> int:
        return len(self.alone)

    def epoch(self, number: int, ids: Tensor | None = None) -> Iterator[Batch]:
        """The batches of an epoch counted from 0; ``ids`` names a row of the teacher's images for
        every own image."""
        own = chain.from_iterable(
            self.own.epoch(passed, ids) for passed in self._passes(number, self.own)
        )
        pairs = chain.from_iterable(
            self.pairs.epoch(passed) for passed in self._passes(number, self.pairs)
        )
        for batch, free in islice(zip(own, pairs, strict=False), len(self)):
            yield replace(batch, pairs=free)

    def first(self, size: int | None = None) -> Batch:
        """The first images of both, as they are; a step's where no size is given."""
        return replace(self.own.first(size), pairs=self.pairs.first(size))

    def _passes(self, number: int, over: Batches) -> Iterator[int]:
        """Passes of this epoch's own over a half, counted through all epochs."""
        return count(number * -(-len(self) // len(over)))
