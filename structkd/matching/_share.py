"""The rows of a batch that a criterion is for, on this process and on all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from structkd._checks import chosen_rows, describe
from structkd._devices import sent
from structkd.criteria._fields import Input, as_features
from structkd.criteria.base import Criterion
from structkd.criteria.sums import reads_teacher
from structkd.distributed import (
    counts_of_ranks,
    rank,
    sum_over_ranks,
    unequal_shards,
    world_size,
)
from structkd.features import Features

# What a kind of rows is called, and its arguments: the teacher's features, and which rows.
ARGUMENTS = {"pair": ("teacher", "paired"), "match": ("matches", "matched")}


@dataclass(frozen=True)
class Share:
    """This process's rows of a kind; without features of the teacher there are none."""

    kind: str
    criterion: Criterion
    student: Features
    teacher: Features | None
    target: Tensor | None
    size: int


def share_of(
    kind: str,
    criterion: Criterion | None,
    student: Features,
    target: Tensor | None,
    given: Input | None,
    which: Tensor | None,
) -> Share | None:
    """Returns the rows of a kind after checking that they fit, None without a criterion for them.

    Args:
        kind: ``pair`` or ``match``.
        criterion: What they are for.
        student: Features of the whole batch, with logits.
        target: Labels of the whole batch.
        given: The teacher's features of these rows.
        which: The rows, a mask or positions; where none are given all of them, if there are
            features or the criterion reads none.
    """
    assert student.logits is not None
    batch = len(student.logits)
    name, name_which = ARGUMENTS[kind]
    rows = None if which is None else chosen_rows(which, name_which, batch)
    if criterion is None:
        return None
    if given is None and not reads_teacher(criterion):
        given = Features()
    if given is None:
        if rows is not None and len(rows):
            raise ValueError(
                f"{name_which} names {len(rows)} row(s) that have a {kind}, but {name} is None: "
                "pass the teacher's features of these rows"
            )
        rows = torch.empty(0, dtype=torch.int64)
    teacher = None if given is None else as_features(given, name, criterion)
    if rows is None:
        return Share(kind, criterion, student, teacher, target, batch)
    if teacher is not None:
        _check_count(teacher, len(rows), kind)
    if target is not None:
        target = target.index_select(0, sent(rows, target.device))
    return Share(kind, criterion, student.rows(rows), teacher, target, len(rows))


def sizes_of(shares: list[Share], device: torch.device, *, gather: bool) -> list[list[int]]:
    """Returns how many rows of each kind there are: on this process, or on every one of them."""
    if not shares or not gather or world_size() == 1:
        return [[share.size] for share in shares]
    counts = [-1 if share.teacher is None else share.size for share in shares]
    together = counts_of_ranks(counts, device)
    for share, sizes in zip(shares, together, strict=True):
        without = [place for place, size in enumerate(sizes) if size < 0]
        if without and max(sizes) > 0:
            name, _ = ARGUMENTS[share.kind]
            raise ValueError(
                f"rank(s) {without} have no {name} while others have rows with a {share.kind}: a "
                "process without any passes features of zero rows, feats.rows(none), and to a "
                "Distiller zero samples, images[:0]"
            )
    return [[max(size, 0) for size in sizes] for sizes in together]


def terms_of(share: Share, sizes: list[int]) -> dict[str, Tensor]:
    """Returns the criterion's terms over the rows of all processes that ``sizes`` counts."""
    assert share.teacher is not None
    _check_enough(share, sum(sizes))
    given = share.student, share.teacher, share.target
    if len(sizes) == 1:
        return share.criterion.terms(*given)
    with unequal_shards(sizes):
        found = share.criterion.terms(*given)
    own = torch.stack(list(found.values()))
    # A mean over no rows is NaN. It counts for nothing, yet stays in the graph: others wait for its
    # part in the collectives of the backward pass.
    own = share.size * own if share.size else torch.where(torch.zeros_like(own) > 0, own, 0)
    # Where a term is of all rows already, the same on each rank, this leaves it as it is.
    assert sizes[rank()] == share.size
    whole = sum_over_ranks(own) / sum(sizes)
    return dict(zip(found, whole.unbind(), strict=True))


def _check_enough(share: Share, count: int) -> None:
    parts = [part for part in share.criterion.modules() if isinstance(part, Criterion)]
    needy = max(parts, key=lambda part: part.min_batch)
    if count < needy.min_batch:
        raise ValueError(
            f"this batch has {count} row(s) with a {share.kind}, but {type(needy).__name__} "
            f"compares samples with each other and needs at least {needy.min_batch} of them: draw "
            "them several at a time, from a loader of their own for example (views.mixed makes one "
            f"batch of two), or leave so few out of {ARGUMENTS[share.kind][1]}"
        )


def _check_count(teacher: Features, count: int, kind: str) -> None:
    name, name_which = ARGUMENTS[kind]
    for value in (teacher.logits, teacher.embedding, teacher.index, *teacher.intermediate):
        if value is not None and len(value) != count:
            raise ValueError(
                f"{name} must hold one row for each of the {count} that {name_which} says have a "
                f"{kind}, in their order, got {describe(value)}: run the teacher on these alone, "
                f"or take its features.rows({name_which})"
            )
