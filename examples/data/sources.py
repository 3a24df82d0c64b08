"""What a data set is before it is read: two parts with labels, files listed and split."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.decode import SUFFIXES, Pixels, Rows
from data.layouts import hint

_TEST = 31
_PASSES = 10  # over the groups, at most


@dataclass(frozen=True)
class Part:
    """Part of a data set, not yet read: labels (N,), and a reader of rows into (n, C, H, W).

    ``read_poor`` is for data with a second sensor; without it the poor modality is made.
    ``groups`` (N,) numbers what belongs together: validation takes whole groups.
    """

    labels: Rows
    read: Callable[[Rows], Pixels]
    read_poor: Callable[[Rows], Pixels] | None = None
    groups: Rows | None = None


@dataclass(frozen=True)
class Source:
    """A whole data set; where nothing pairs its sides they stand for the halves, rich for train."""

    classes: list[str]
    train: Part
    test: Part
    lonely: Sequence[Path] = ()  # no file of the other side has their class and name


def class_names(*folders: Path, wanted: str = "folder") -> list[str]:
    """The class folders of some folders, which must be the same."""
    first, *others = (
        {child.name for child in folder.iterdir() if child.is_dir() and child.name[0] != "."}
        for folder in folders
    )
    for folder, found in zip(folders[1:], others, strict=True):
        alone = [
            f"{named(sorted(odd))} in {there} alone"
            for odd, there in ((first - found, folders[0]), (found - first, folder))
            if odd
        ]
        if alone:
            raise ValueError(
                f"class folders differ: {', '.join(alone)}; fix: give both the same class folders"
            )
    if len(first) < 2:
        raise ValueError(
            f"{folders[0]} has {len(first)} class folders, at least 2 are needed"
            f"{hint(folders[0], wanted)}; fix: lay images out as <class>/<image>"
        )
    return sorted(first)


def class_files(
    folder: Path,
    classes: list[str],
    suffixes: Collection[str] = SUFFIXES,
    *,
    least: int = 1,
    inside: str = "",
) -> tuple[Rows, list[Path]]:
    """Labels and files of ``folder/<class>/*`` with these suffixes, class by class."""
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        place = folder / name / inside
        found = sorted(f for f in place.glob("[!.]*") if f.suffix.lower() in suffixes)
        if len(found) < least:
            raise ValueError(
                f"class folder {place} holds {len(found) or 'no'} image(s) "
                f"({', '.join(sorted(suffixes))}), at least {least} needed; fix: add some, or "
                "remove the folder"
            )
        files += found
        labels += [label] * len(found)
    return np.asarray(labels, dtype=np.int64), files


def pair_name(file: Path) -> str:
    """What pairs a file with others; an accent counts the same in either of its spellings."""
    return unicodedata.normalize("NFC", file.stem)  # macOS gives the other


def by_name(folder: Path) -> dict[str, Path]:
    """The images of a folder by their names without suffix."""
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in SUFFIXES or file.name.startswith("."):
            continue
        name = pair_name(file)
        if name in found:
            raise ValueError(
                f"{found[name]} and {file.name} have one name, so a partner could be of "
                "either; fix: remove one"
            )
        found[name] = file
    if not found:
        raise ValueError(
            f"folder {folder} holds no image ({', '.join(sorted(SUFFIXES))}); fix: add some, or "
            "remove the folder on both sides"
        )
    return found


def partners(folders: Sequence[Path]) -> tuple[list[list[Path]], list[Path]]:
    """The files of each folder whose name all have, in one order, and those that lack a partner."""
    found = [by_name(folder) for folder in folders]
    both = sorted(set.intersection(*map(set, found)))
    lonely = [files[stem] for files in found for stem in sorted(files.keys() - set(both))]
    return [[files[stem] for stem in both] for files in found], lonely


def refuse_lonely(lonely: Sequence[Path], more: str = "") -> None:
    """Refuse files without a partner."""
    if lonely:
        raise ValueError(
            f"{len(lonely)} image(s) without a partner of the same name in every folder: "
            f"{named(lonely)}; fix: add the partners, or remove these{more}"
        )


def named(names: Sequence[object], most: int = 5) -> str:
    """The first of some names, and how many more there are."""
    more = len(names) - most
    return ", ".join(map(str, names[:most])) + (f" and {more} more" if more > 0 else "")


# Fixed choices and splits.


def stratified(labels: Rows, count: int, *, draw: int) -> Rows:
    """``count`` positions, ascending, all classes in proportion; a larger count holds a smaller.

    Each class has one at least, where there are as many positions as classes.
    """
    shuffled = np.random.Generator(np.random.Philox(key=draw)).permutation(len(labels))
    share = np.empty(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        share[members] = (np.arange(len(members)) + 0.5) / len(members)
        share[members[0]] = 0.0
    return np.sort(np.lexsort((labels, share))[:count])


def split(
    labels: Rows, fraction: float, groups: Rows | None = None, *, draw: int = 0
) -> tuple[Rows, Rows]:
    """Rows to train on and to test on, each ascending, of a set without a split of its own."""
    test = held_out(labels, groups, fraction, draw=_TEST + 1000 * draw)
    left = np.bincount(labels) - np.bincount(labels[test], minlength=int(labels.max()) + 1)
    if (bare := int((left == 0).sum())) > 0:
        raise ValueError(
            f"--test-fraction {fraction:g} leaves {bare} class(es) without an image to train on; "
            "fix: a smaller fraction, or more images"
        )
    return np.setdiff1d(np.arange(len(labels)), test), test


def held_out(labels: Rows, groups: Rows | None, fraction: float, *, draw: int) -> Rows:
    """A fixed choice of about that fraction of the rows, ascending, at least one of every class.

    Whole groups are taken in or put back, in a drawn order, wherever the classes' counts come
    nearer to their shares by it.
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

    def far(counts: Rows) -> float:
        return float(np.square((counts - target) / target)[present].sum())

    for _ in range(_PASSES):
        before = inside.copy()
        for group in order:
            other = taken - members[group] if inside[group] else taken + members[group]
            if far(other) < far(taken):
                taken, inside[group] = other, not inside[group]
        if (inside == before).all():
            break
    if (taken[present] == 0).any() or (taken[present] == whole[present]).any():
        raise ValueError(
            "images that belong together are too many for every class to lie on both sides of a "
            f"split of {fraction:g}; fix: more places a class, or another fraction"
        )
    return np.flatnonzero(inside[groups]).astype(np.int64)
