"""Fixed splits: whatever belongs together lies on one side, all classes in proportion."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.sources import Rows, stratified

TEST_FRACTION = 0.2
_TEST = 31
_PASSES = 10  # over the groups, at most


def for_test(labels: Rows, groups: Rows | None = None, fraction: float = TEST_FRACTION) -> Rows:
    """The rows to test on, ascending, of a data set that comes without a split of its own.

    Args:
        labels: (N,).
        groups: (N,), rows of one group lie on one side; None for none.
        fraction: of the rows, in (0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"--test-fraction must lie in (0, 1), got {fraction}")
    test = held_out(labels, groups, fraction, draw=_TEST)
    left = np.bincount(labels) - np.bincount(labels[test], minlength=int(labels.max()) + 1)
    if (bare := int((left == 0).sum())) > 0:
        raise ValueError(
            f"--test-fraction {fraction:g} leaves {bare} class(es) without an image to train on; "
            "fix: a smaller fraction, or more images"
        )
    return test


def refuse_fraction(folder: Path, fraction: float) -> None:
    """Refuse a fraction for testing where a folder has its own images for that.

    Raises:
        ValueError: it is not the one that nobody has to give.
    """
    if fraction != TEST_FRACTION:
        raise ValueError(
            f"--test-fraction {fraction:g} has no effect: {folder} has images for testing; fix: "
            "leave it out"
        )


def held_out(labels: Rows, groups: Rows | None, fraction: float, *, draw: int) -> Rows:
    """A fixed choice of about that fraction of the rows, ascending, at least one of every class.

    Whole groups are taken in or put back, in a drawn order, wherever the classes' counts come
    nearer to their shares by it.

    Raises:
        ValueError: the groups are too large for every class to lie on both sides.
    """
    count = max(round(fraction * len(labels)), len(np.unique(labels)))
    if groups is None:
        return stratified(labels, count, draw=draw)
    order = np.random.Generator(np.random.Philox(key=draw)).permutation(int(groups.max()) + 1)
    classes = int(labels.max()) + 1
    members = np.zeros((len(order), classes), dtype=np.int64)
    np.add.at(members, (groups, labels), 1)
    whole = members.sum(0)
    present = whole > 0
    target = np.maximum(fraction * whole, 1.0)
    taken = np.zeros(classes, dtype=np.int64)
    inside = np.zeros(len(order), dtype=bool)
    for _ in range(_PASSES):
        before = inside.copy()
        for group in order:
            other = taken - members[group] if inside[group] else taken + members[group]
            if _far(other[present], target[present]) < _far(taken[present], target[present]):
                taken, inside[group] = other, not inside[group]
        if (inside == before).all():
            break
    if (taken[present] == 0).any() or (taken[present] == whole[present]).any():
        raise ValueError(
            "images that belong together are too many for every class to lie on both sides of a "
            f"split of {fraction:g}; fix: more places a class, or another fraction"
        )
    return np.flatnonzero(inside[groups]).astype(np.int64)


def _far(counts: NDArray[np.int64], target: NDArray[np.float64]) -> float:
    return float(np.square((counts - target) / target).sum())
