"""Batches of student images, each beside the rich image that it is matched with."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from crossmodal.batches import Batch, Batches
from crossmodal.config import Config
from crossmodal.data import ImagePairs, Statistics

_TEACHER_SEED = 2_000_000  # the teacher's crops are none of the student's

Choose = Callable[[int], Tensor]


class MatchedBatches:
    """Student images as ``batch.poor``, their matched rich images as ``batch.clean``.

    Before every pass ``choose(epoch)`` names a row of ``rich`` for every row of ``poor``, with
    ``epoch`` counting from 0. Both sides draw crops and flips of their own, since what stands in
    one image stands nowhere in the other. ``index`` and ``target`` are the student's. Each side is
    normalised by its own statistics, the rich one by ``rich_statistics`` where they are given.
    """

    def __init__(
        self,
        poor: ImagePairs,
        rich: ImagePairs,
        choose: Choose,
        config: Config,
        *,
        rich_statistics: Statistics | None = None,
    ) -> None:
        self._choose = choose
        self._students, self._teachers = (
            Batches(
                pairs,
                config.batch_size,
                statistics=statistics or pairs.statistics,
                shuffle=True,
                pad=config.pad,
                flip=config.flip,
                seed=seed,
                device=config.device,
            )
            for pairs, seed, statistics in (
                (poor, config.seed, None),
                (rich, _TEACHER_SEED + config.seed, rich_statistics),
            )
        )
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._students)

    def __iter__(self) -> Iterator[Batch]:
        ids = self._choose(self._epoch).to(self._students.device)
        self._epoch += 1
        for batch in self._students:
            matched = self._teachers.take(ids[batch.index])
            yield Batch(matched.clean, batch.poor, batch.target, batch.index)
