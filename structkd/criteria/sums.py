"""Weighted sums of criteria."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from structkd._checks import describe, near, number, whole
from structkd.criteria._fields import Input
from structkd.criteria._weights import Weighted
from structkd.criteria.base import Criterion
from structkd.features import Features


class CriterionSum(Weighted):
    """A weighted sum of criteria, written ``a + 0.5 * b``.

    Every member reads its own fields, so pass :class:`Features`. Members have names, those of their
    classes unless others are given, with ``_2`` added to a name that comes twice; ``state_dict``
    goes by them, so it loads whatever the order. Term names are the members', with `` (2)`` added
    to a name that comes twice.

    Weights are tensors: :meth:`set_weight` changes one from step to step, and a compiled criterion
    is not compiled again. They are configuration and no part of ``state_dict``. :func:`falling`
    gives a schedule.

    Args:
        members: Criteria by name.
        weights: Weights by name, 1 where none is given.

    Raises:
        ValueError: If there is no member, or a weight names none.
        TypeError: If a member is no criterion.

    Example:
        >>> import torch, structkd
        >>> criterion = structkd.KDLoss() + 0.5 * structkd.CORALLoss()
        >>> feats = structkd.Features(logits=torch.eye(4), embedding=torch.eye(4))
        >>> list(criterion.terms(feats, feats))
        ['KD', 'CORAL']
        >>> criterion.weights
        {'KDLoss': 1.0, 'CORALLoss': 0.5}
        >>> criterion.set_weight("CORALLoss", 0.1)
    """

    def __init__(
        self, members: Mapping[str, Criterion], weights: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        if not members:
            raise ValueError("a sum needs at least one criterion, got none")
        self.criteria = nn.ModuleDict()
        values: dict[str, float] = {}
        for name, weight, member in _flattened(members, weights or {}):
            unused = _unused(name, self.criteria)
            self.criteria[unused], values[unused] = member, weight
        self._weigh(values)

    @classmethod
    def of(cls, *criteria: Criterion) -> CriterionSum:
        """Returns the sum of criteria, named by their classes; members of sums come apart."""
        names: dict[str, Criterion] = {}
        for criterion in criteria:
            names[_unused(type(criterion).__name__, names)] = criterion
        return cls(names)

    def scaled(self, factor: float) -> CriterionSum:
        """Returns a sum of the same members, every weight times ``factor``."""
        weights = {name: factor * weight for name, weight in self.weights.items()}
        return CriterionSum(dict(self._members()), weights)

    def terms(
        self, student: Input, teacher: Input, target: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns every member's weighted terms under distinct names."""
        fields = {member.reads for _, member in self._members()}
        if len(fields) > 1 and not (
            isinstance(student, Features) and isinstance(teacher, Features)
        ):
            raise TypeError(
                "student and teacher must be Features for a sum whose members read different "
                f"fields, got {describe(student)} and {describe(teacher)}"
            )
        merged: dict[str, Tensor] = {}
        weights = self._present()
        for part, member in self._members():
            weight = weights[part]
            for name, value in member.terms(student, teacher, target).items():
                unique, count = name, 1
                while unique in merged:
                    count += 1
                    unique = f"{name} ({count})"
                merged[unique] = weight.to(value.dtype) * value
        return merged

    def extra_repr(self) -> str:
        return f"weights={self.weights}"

    def _members(self) -> list[tuple[str, Criterion]]:
        return [
            (name, member)
            for name, member in self.criteria.items()
            if isinstance(member, Criterion)
        ]


def falling(step: int, total: int) -> float:
    r"""Share of a weight that is left at a step, falling from 1 to 0 along a cosine.

    :math:`\frac{1}{2} (1 + \cos(\pi \, step / total))`, and 0 from ``total`` on. A criterion whose
    weight falls shapes the student while it still moves much, and leaves the last word to the
    labels. It is a number for :meth:`CriterionSum.set_weight`, which compiles nothing again.

    Args:
        step: Steps done, >= 0: batches or epochs.
        total: Steps of the whole training, >= 1.

    Returns:
        A number in [0, 1].

    Raises:
        TypeError, ValueError: If a number is not whole or out of range.

    Example:
        >>> import structkd
        >>> criterion = 20 * structkd.KDLoss()
        >>> for epoch in range(10):
        ...     criterion.set_weight("KDLoss", 20 * falling(epoch, 10))
        >>> [round(falling(step, 4), 3) for step in range(5)]
        [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    done = whole("step", step, at_least=0) / whole("total", total)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def fields_read(criterion: Criterion) -> tuple[str, ...]:
    """Returns the fields of ``Features`` that a criterion reads, its members' included."""
    found = [criterion.reads]
    found += [part.reads for part in criterion.modules() if isinstance(part, Criterion)]
    return tuple(dict.fromkeys(field for fields in found for field in fields))


def reads_teacher(criterion: Criterion) -> bool:
    """Tells whether a criterion, or one inside it, looks at the teacher's features."""
    inner = [part for part in criterion.modules() if isinstance(part, Criterion)]
    # What holds others reads by them.
    return any(part.reads_teacher for part in (inner[1:] or inner))


def _flattened(
    members: Mapping[str, Criterion], weights: Mapping[str, float]
) -> Iterable[tuple[str, float, Criterion]]:
    """Yields name, weight and member; members of a sum come apart and keep their own names."""
    for name in weights:
        if name not in members:
            raise ValueError(f"weights names no member {name!r}; {near(name, members)}")
    for name, member in members.items():
        if not isinstance(member, Criterion):
            raise TypeError(f"member {name!r} must be a Criterion, got {describe(member)}")
        weight = number("weight", weights.get(name, 1.0))
        if isinstance(member, CriterionSum):
            for (inner, part), own in zip(member._members(), member.weights.values(), strict=True):
                yield _base_name(inner), weight * own, part
        else:
            yield name, weight, member


def _base_name(name: str) -> str:
    """Returns a member's name without the number that told it from its like."""
    stem, _, count = name.rpartition("_")
    return stem if stem and count.isdigit() else name


def _unused(name: str, taken: Iterable[str]) -> str:
    unique, count = name, 1
    while unique in taken:
        count += 1
        unique = f"{name}_{count}"
    return unique
