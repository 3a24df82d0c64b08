"""Matched samples for training, and the epochs at which to match again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, islice, takewhile
from numbers import Integral
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from structkd._checks import describe, whole
from structkd.matching._inputs import whole_numbers
from structkd.matching.sembridge import Match


class MatchedDataset(Dataset[tuple[Any, Any, Any]]):
    """Pairs every student sample with its matched teacher sample.

    Item ``i`` is ``(student_set[i] sample, teacher_set[match.ids[i]] sample, label)``, the label as
    the student's set gives it. The match is in shared memory: :meth:`update` reaches the workers of
    a running DataLoader, forked or spawned, persistent ones included. What workers have loaded
    ahead (``prefetch_factor`` batches each) still has the old match, so update before the epoch's
    ``iter(loader)``. Every single pair is of the old match or of the new one, never of neither.

    Args:
        student_set: Map-style data set of ``(sample, label, ...)``.
        teacher_set: Map-style data set of ``(sample, label, ...)``; the gallery's ids are its
            positions.
        match: The match, or its ids ``(len(student_set),)`` int64.

    Raises:
        ValueError: If the match has another length than ``student_set``, or an id is no position of
            ``teacher_set``. On access: if both labels are whole numbers and differ, the match
            belongs to other data or another order.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import torch
        >>> students = [("poor 0", 1), ("poor 1", 0)]
        >>> teachers = [("rich 0", 0), ("rich 1", 1)]
        >>> pairs = MatchedDataset(students, teachers, torch.tensor([1, 0]))
        >>> pairs[0]
        ('poor 0', 'rich 1', 1)
    """

    def __init__(
        self,
        student_set: Dataset[Any] | Sequence[Any],
        teacher_set: Dataset[Any] | Sequence[Any],
        match: Match | Tensor,
    ) -> None:
        for name, data in (("student_set", student_set), ("teacher_set", teacher_set)):
            if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
                raise TypeError(f"{name} must be a map-style data set, got {describe(data)}")
        # torch's Dataset declares no length.
        self.student_set: Any = student_set
        self.teacher_set: Any = teacher_set
        self._ids: Tensor = self._checked(match).clone()
        self._ids.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def ids(self) -> Tensor:
        """A copy of the ids in use, ``(len(self),)`` int64."""
        return self._ids.clone()

    def update(self, match: Match | Tensor) -> None:
        """Puts another match in place, for running workers too."""
        self._ids.copy_(self._checked(match))

    def __len__(self) -> int:
        return len(self.student_set)

    def __getitem__(self, index: int) -> tuple[Any, Any, Any]:
        position = int(self._ids[index])
        poor, label, *_ = self.student_set[index]
        rich, other, *_ = self.teacher_set[position]
        own, others = _class_of(label), _class_of(other)
        if own is not None and others is not None and own != others:
            raise ValueError(
                f"student sample {index} of class {own} is matched with teacher sample "
                f"{position} of class {others}: match the data sets in the order they have here"
            )
        return poor, rich, label

    def _checked(self, match: Match | Tensor) -> Tensor:
        ids = match.ids if isinstance(match, Match) else match
        ids = whole_numbers(ids, "match", len(self.student_set))
        size = len(self.teacher_set)
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= size):
            raise ValueError(
                f"match must hold positions 0..{size - 1} of teacher_set, got values in "
                f"{int(ids.min())}..{int(ids.max())}"
            )
        return ids


class RematchSchedule:
    r"""The epochs at which the student chooses its teacher samples anew.

    .. math::
        e_t = e_0 + \sum_{i=1}^{t} \big(\Delta e + e_\mu (i - 1)\big), \qquad t = 0, 1, 2, \dots

    The published lists follow from ``(start, step, growth)``: EU 30, 60, 95, 135 from (30, 30, 5),
    CN 45, 60, 80, 105, 135 from (45, 15, 5), GL 15, 45, 80, 120, 165 from (15, 30, 5). They stop
    there, though within the 200 epochs of training the formula goes on to 180 (EU) and to 170
    (CN); GL's next would be 215. ``times`` stops it as printed.

    Args:
        start: e_0 >= 0, in epochs, counted as the caller counts them.
        step: Epochs >= 1 to the second matching.
        growth: By how much every further gap grows, in epochs >= 0.
        times: How often at most; no limit by default.

    Raises:
        TypeError, ValueError: If an argument is no whole number or out of range.

    References:
        Wei et al., *Asymmetric Cross-Modal Knowledge Distillation: Bridging Modalities with Weak
        Semantic Consistency*, AAAI 2026, dynamic matching.

    Example:
        >>> schedule = RematchSchedule(30, 30, 5, times=4)
        >>> schedule.epochs(200)
        [30, 60, 95, 135]
        >>> 60 in schedule, 61 in schedule
        (True, False)
    """

    def __init__(self, start: int, step: int, growth: int = 0, *, times: int | None = None) -> None:
        self.start = whole("start", start, at_least=0)
        self.step = whole("step", step)
        self.growth = whole("growth", growth, at_least=0)
        self.times = None if times is None else whole("times", times)

    def epochs(self, total: int) -> list[int]:
        """Returns all epochs below ``total`` at which to match again."""
        every = (
            self.start + self.step * t + self.growth * t * (t - 1) // 2
            for t in islice(count(), self.times)
        )
        return list(takewhile(lambda epoch: epoch < total, every))

    def __contains__(self, epoch: object) -> bool:
        return isinstance(epoch, int) and epoch in self.epochs(epoch + 1)

    def __repr__(self) -> str:
        return (
            f"RematchSchedule(start={self.start}, step={self.step}, growth={self.growth}, "
            f"times={self.times})"
        )


def _class_of(label: object) -> int | None:
    """Returns a class index as an int, None for labels of another kind (multi-label vectors)."""
    if isinstance(label, Tensor):
        single = label.dim() == 0 and not label.is_floating_point()
        return int(label) if single else None
    return int(label) if isinstance(label, Integral) else None
