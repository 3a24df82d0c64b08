"""Matched samples for training, and the epochs at which to match again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count, islice, takewhile
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from structkd._checks import NO_LABEL, describe, whole
from structkd.gallery.gallery import whole_numbers
from structkd.matching.sembridge import Match

_MISSING = object()  # marks a missing label, since None may be a label


class MatchedSample(NamedTuple):
    """An item of a :class:`MatchedDataset`; torch's collate makes one of batches from many.

    Attributes:
        student: The student's sample without its label: ``image`` of ``(image, label)``,
            ``(image, extra)`` of ``(image, label, extra)``, a dict without the label's key.
        teacher: The matched teacher's sample, likewise.
        label: The class, as the student's set gives it.
        index: The student's position in its set, which a criterion with a memory reads.
        match: The teacher's id, which is its position in its set.
    """

    student: Any
    teacher: Any
    label: Any
    index: int  # type: ignore[assignment]  # a field, as in Features; no tuple is searched here
    match: int


class MatchedDataset(Dataset[MatchedSample]):
    """Pairs every student sample with its matched teacher sample.

    Item ``i`` is a :class:`MatchedSample` of ``student_set[i]`` and
    ``teacher_set[match.ids[i]]``. It unpacks, ``student, teacher, label, index, match = item``, and
    torch's own collate batches it by field.

    Samples are tuples (or lists) or dicts, of any length; the two sets need not have the same. A
    student's sample must hold its class, in place 1 of a tuple and under ``"label"`` of a dict
    unless a key says otherwise. A teacher's need not: a sample of one field, a dict without
    ``"label"`` or a bare image is taken as it is. Where both have a class (-100 is none), it must
    be the same.

    The match is in shared memory: :meth:`update` reaches the workers of a running DataLoader,
    forked or spawned, persistent ones included. What workers have loaded ahead (``prefetch_factor``
    batches each) still has the old match, so update before the epoch's ``iter(loader)``. Every
    single pair is of the old match or of the new one, never of neither. Processes of a group each
    have their own: :meth:`SemBridgeMatcher.match_all` gives all of them the same match.

    Args:
        student_set: Map-style data set of the student's samples.
        teacher_set: Map-style data set of the teacher's; the gallery's ids are its positions.
        match: The match of all students, or its ids ``(len(student_set),)`` int64.
        label_key: Where a student's sample holds its class: a place in a tuple, which may count
            from the end, or a key of a dict.
        teacher_label_key: Where a teacher's sample does; it must be there if it is given.

    Raises:
        ValueError: If the match does not cover the students, or an id is no position of
            ``teacher_set``. On access: if a label is missing, or both labels are whole numbers and
            differ, which means that the match belongs to other data or another order.
        TypeError: If an argument has the wrong type. On access: if a sample is none of these.

    Example:
        >>> import torch
        >>> students = [("poor 0", 1), ("poor 1", 0)]
        >>> teachers = [{"image": "rich 0", "label": 0}, {"image": "rich 1", "label": 1}]
        >>> pairs = MatchedDataset(students, teachers, torch.tensor([1, 0]))
        >>> pairs[0]
        MatchedSample(student='poor 0', teacher={'image': 'rich 1'}, label=1, index=0, match=1)
    """

    def __init__(
        self,
        student_set: Dataset[Any] | Sequence[Any],
        teacher_set: Dataset[Any] | Sequence[Any],
        match: Match | Tensor,
        *,
        label_key: str | int | None = None,
        teacher_label_key: str | int | None = None,
    ) -> None:
        for name, data in (("student_set", student_set), ("teacher_set", teacher_set)):
            if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
                raise TypeError(f"{name} must be a map-style data set, got {describe(data)}")
        for name, key in (("label_key", label_key), ("teacher_label_key", teacher_label_key)):
            if isinstance(key, bool) or not isinstance(key, str | int | None):
                raise TypeError(f"{name} must be a place, a key or None, got {describe(key)}")
        # torch's Dataset declares no length.
        self.student_set: Any = student_set
        self.teacher_set: Any = teacher_set
        self.label_key, self.teacher_label_key = label_key, teacher_label_key
        self._ids: Tensor = self._merged(match, None)
        self._ids.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def ids(self) -> Tensor:
        """A copy of the ids in use, ``(len(self),)`` int64."""
        return self._ids.clone()

    def update(self, match: Match | Tensor) -> None:
        """Puts another match in place, for running workers too.

        A match with an ``index``, as :meth:`SemBridgeMatcher.match_all` gives, may leave students
        out: they keep theirs.
        """
        self._ids.copy_(self._merged(match, self._ids))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._ids.share_memory_()  # type: ignore[no-untyped-call]  # a deep copy is not

    def __len__(self) -> int:
        return len(self.student_set)

    def __getitem__(self, index: int) -> MatchedSample:
        index = range(len(self))[index]
        position = int(self._ids[index])
        poor, label = _split(self.student_set[index], self.label_key, "label_key")
        if label is _MISSING:
            raise ValueError(
                f"student sample {index} holds no label where label_key={self.label_key!r} looks: "
                "give the place in the tuple or the key of the dict that has the class"
            )
        rich, other = _split(
            self.teacher_set[position], self.teacher_label_key, "teacher_label_key"
        )
        if other is _MISSING and self.teacher_label_key is not None:
            raise ValueError(
                f"teacher sample {position} holds no label at teacher_label_key="
                f"{self.teacher_label_key!r}: leave it out if the teacher's set has no labels"
            )
        own, others = _class_of(label), _class_of(other)
        if own is not None and others is not None and own != others:
            raise ValueError(
                f"student sample {index} of class {own} is matched with teacher sample "
                f"{position} of class {others}: match the data sets in the order they have here"
            )
        return MatchedSample(poor, rich, label, index, position)

    def _merged(self, match: Match | Tensor, held: Tensor | None) -> Tensor:
        """Returns the ids of all students after a match, those it leaves out as ``held``."""
        count, size = len(self.student_set), len(self.teacher_set)
        index = match.index if isinstance(match, Match) else None
        ids = match.ids if isinstance(match, Match) else match
        ids = whole_numbers(ids, "match", count if index is None else len(index))
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= size):
            raise ValueError(
                f"match must hold positions 0..{size - 1} of teacher_set, got values in "
                f"{int(ids.min())}..{int(ids.max())}"
            )
        if index is None:
            return ids.clone()
        index = whole_numbers(index, "match.index")
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= count):
            raise ValueError(
                f"match.index must hold positions 0..{count - 1} of student_set, got values in "
                f"{int(index.min())}..{int(index.max())}"
            )
        covered = len(torch.unique(index))
        if held is None and covered < count:
            raise ValueError(
                f"the first match must cover all {count} students, got {covered} of them"
            )
        merged = torch.empty(count, dtype=torch.int64) if held is None else held.clone()
        merged[index] = ids
        return merged


class RematchSchedule:
    r"""The epochs at which the student chooses its teacher samples anew.

    .. math::
        e_t = e_0 + \sum_{i=1}^{t} \bigl(\Delta e + e_\mu (i - 1)\bigr), \qquad t = 0, 1, 2, \ldots

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
        return isinstance(epoch, Integral) and epoch in self.epochs(int(epoch) + 1)

    def __repr__(self) -> str:
        return (
            f"RematchSchedule(start={self.start}, step={self.step}, growth={self.growth}, "
            f"times={self.times})"
        )


def _split(sample: object, key: str | int | None, name: str) -> tuple[Any, Any]:
    """Returns a sample without its label, and the label or ``_MISSING``."""
    if isinstance(sample, Mapping):
        key = "label" if key is None else key
        if key not in sample:
            return sample, _MISSING
        return {other: part for other, part in sample.items() if other != key}, sample[key]
    if isinstance(key, str):
        raise TypeError(
            f"{name}={key!r} is a dict's key, but a sample is {describe(sample)}: give the "
            "label's place in the tuple, or make the samples dicts"
        )
    place = 1 if key is None else key
    if not isinstance(sample, tuple | list) or not -len(sample) <= place < len(sample):
        alone = isinstance(sample, tuple | list) and len(sample) == 1
        return (sample[0] if alone else sample), _MISSING  # type: ignore[index]
    place %= len(sample)
    rest = (*sample[:place], *sample[place + 1 :])
    return (rest[0] if len(rest) == 1 else rest), sample[place]


def _class_of(label: object) -> int | None:
    """Returns a class index as an int, None for no label and for multi-label vectors."""
    if isinstance(label, Tensor):
        single = label.dim() == 0 and not label.is_floating_point()
    else:
        single = isinstance(label, Integral)
    return None if not single or label == NO_LABEL else int(label)  # type: ignore[call-overload]
