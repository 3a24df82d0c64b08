"""Two sensors that saw the same things: ``<class>/<name>.*`` on both sides, paired by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.decode import SUFFIXES, AlikeFiles
from data.layouts import hint, refuse_another
from data.sources import Images, Source, class_files, common_classes
from data.splits import TEST_FRACTION, for_test, refuse_fraction

_LISTED = 5
_TEST_NAMES = ("test", "val")


def open_pairs(
    data_dir: Path | None,
    download: bool,
    *,
    rich: str | Path = "",
    poor: str | Path = "",
    size: int = 0,
    test_fraction: float = TEST_FRACTION,
    only_pairs: bool = False,
) -> Source:
    """Two folders of one's own.

    Each holds ``<class>/<name>.*``, or ``train/<class>/<name>.*`` and ``test/<class>/<name>.*``
    (``val`` will do for ``test``). A file's partner has its class and its name, whatever the
    suffix. A side's images are alike in bands and size; the two sides need not be.

    Args:
        data_dir: what ``rich`` and ``poor`` are relative to, if anything.
        download: must be False: there is no publisher.
        rich, poor: the two folders.
        size: brings all images to so many pixels each way; 0 leaves them.
        test_fraction: where the folders have no ``test``: a fixed stratified choice.

    Raises:
        ValueError: a folder is missing, names or classes differ, a class is empty, or an image is
            damaged or unlike the others.
    """
    if download:
        raise ValueError("--download: nobody publishes pairs of your own; fix: leave it out")
    if not rich or not poor:
        raise ValueError(
            "data set 'pairs' needs both folders; fix: --rich DIR --poor DIR, each with "
            "<class>/<name>.* in it"
        )
    base = data_dir or Path()
    folders = [(base / Path(side).expanduser()) for side in (rich, poor)]
    return open_two(
        *folders, size=size, test_fraction=test_fraction, name="pairs", only_pairs=only_pairs
    )


def open_cml(
    data_dir: Path | None,
    download: bool,
    *,
    size: int = 0,
    test_fraction: float = TEST_FRACTION,
) -> Source:
    """The DSKD paper's radar and optics of ships: ``optics/<class>/*`` and ``radar/<class>/*``.

    The paper gives 224x224 images of 8 classes and no split. Optics are the rich side.

    Raises:
        ValueError: as :func:`open_pairs`.
    """
    if download:
        raise ValueError(
            "cml lies on a drive that has no plain address (the link is in the paper, section 5); "
            "fix: fetch it by hand and name its folder with --data"
        )
    if data_dir is None:
        raise ValueError("data set 'cml' needs a data directory; fix: add --data DIR")
    folders = [data_dir / side for side in ("optics", "radar")]
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(
                f"{data_dir} has no folder {folder.name}{hint(data_dir, 'cml')}; fix: --data must "
                "name the folder that holds radar/<class>/* and optics/<class>/*"
            )
    return open_two(*folders, size=size, test_fraction=test_fraction, name="cml")


def open_two(
    rich: Path, poor: Path, *, size: int, test_fraction: float, name: str, only_pairs: bool = False
) -> Source:
    """The pairs of two folders, split by folder or by fraction."""
    if rich.resolve() == poor.resolve():
        raise ValueError(f"both sides are {rich}; fix: name two folders")
    for side in (rich, poor):
        refuse_another(side, name)
    halves = [_halves(side) for side in (rich, poor)]
    if halves[0] != halves[1]:
        said = [" and ".join(half) if half else "no split" for half in halves]
        raise ValueError(f"{rich} has {said[0]}, {poor} has {said[1]}; fix: split both sides alike")
    if halves[0]:
        refuse_fraction(rich, test_fraction)
    found = [_paired(rich / half, poor / half, name, only_pairs) for half in halves[0] or ("",)]
    classes = found[0][0]
    if len(found) == 2 and found[1][0] != classes:
        odd = sorted(set(classes) ^ set(found[1][0]))
        raise ValueError(
            f"classes of {' and '.join(halves[0])} in {rich} differ: {named(odd)} in one alone; "
            "fix: give both the same class folders"
        )
    parts = []
    for _, *sides, labels, _ in found:
        everything = np.asarray(labels, dtype=np.int64)
        rows = [np.arange(len(labels))]
        if len(found) == 1:
            test = for_test(everything, fraction=test_fraction)
            rows = [np.setdiff1d(rows[0], test), test]
        for some in rows:
            chosen = [[side[row] for row in some] for side in sides]
            parts.append((everything[some], chosen))
    alike = [parts[0][1][side][0] for side in (0, 1)]
    made = []
    for some_labels, chosen in parts:
        readers = [
            AlikeFiles(files, size or None, like=like)
            for files, like in zip(chosen, alike, strict=True)
        ]
        made.append(Images(some_labels, *readers))
    return Source(classes, *made, tuple(file for *_, lonely in found for file in lonely))


def open_folders(
    rich: Path | None, poor: Path | None, size: int
) -> tuple[list[str], Images, Images]:
    """Two folders of one's own that nothing pairs: ``<class>/*`` with the same classes in both."""
    if rich is None or poor is None:
        raise ValueError("two folders are needed; fix: --rich DIR --poor DIR, each <class>/*")
    classes, sides = common_classes(rich, poor), []
    for folder in (rich, poor):
        files, labels = class_files(folder, classes, SUFFIXES, least=2)
        read = AlikeFiles(files, size or None)
        sides.append(Images(labels, read))
    return classes, *sides


def _halves(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise ValueError(f"folder {folder} does not exist; fix: name an existing one")
    if not (folder / "train").is_dir():
        return ()
    for test in _TEST_NAMES:
        if (folder / test).is_dir():
            return ("train", test)
    raise ValueError(
        f"{folder} has train and neither {' nor '.join(_TEST_NAMES)}; fix: add test/<class>/*, or "
        "put the classes into the folder itself"
    )


def _paired(
    rich: Path, poor: Path, name: str, only_pairs: bool = False
) -> tuple[list[str], list[Path], list[Path], list[int], list[Path]]:
    """Classes, the files of either side in one order, labels, and files without a partner."""
    classes = [_classes(side, name) for side in (rich, poor)]
    if classes[0] != classes[1]:
        alone = [sorted(set(a) - set(b)) for a, b in (classes, classes[::-1])]
        parts = [f"{named(odd)} in {side} alone"
                 for side, odd in zip((rich, poor), alone, strict=True) if odd]  # fmt: skip
        raise ValueError(f"classes differ: {', '.join(parts)}; fix: add or remove these folders")
    files: list[Path] = []
    partners: list[Path] = []
    labels: list[int] = []
    lonely: list[Path] = []
    for label, folder in enumerate(classes[0]):
        sides = [by_name(side / folder) for side in (rich, poor)]
        both = sorted(sides[0].keys() & sides[1].keys())
        lonely += [sides[k][stem] for k in (0, 1) for stem in sorted(sides[k].keys() - set(both))]
        files += [sides[0][stem] for stem in both]
        partners += [sides[1][stem] for stem in both]
        labels += [label] * len(both)
    if lonely and not only_pairs:
        told = named(lonely)
        raise ValueError(
            f"{len(lonely)} image(s) without a partner of the same class and name on the other "
            f"side: {told}; fix: add the partners, --only-pairs to leave these out, or "
            "examples/unpaired.py folders, which needs no pairs"
        )
    if bare := sorted(set(range(len(classes[0]))) - set(labels)):
        raise ValueError(f"class {classes[0][bare[0]]!r} has no pair; fix: the names must agree")
    return classes[0], files, partners, labels, lonely


def _classes(folder: Path, name: str) -> list[str]:
    found = sorted(child.name for child in folder.iterdir() if child.is_dir())
    if len(found) < 2:
        raise ValueError(
            f"{folder} has {len(found)} class folders, at least 2 are needed"
            f"{hint(folder, name)}; fix: lay images out as <class>/<name>.*"
        )
    return found


def by_name(folder: Path) -> dict[str, Path]:
    """The images of a folder by their names without suffix."""
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in SUFFIXES or file.name.startswith("."):
            continue
        if file.stem in found:
            raise ValueError(
                f"{found[file.stem]} and {file.name} have one name, so a partner could be of "
                "either; fix: remove one"
            )
        found[file.stem] = file
    if not found:
        raise ValueError(
            f"folder {folder} holds no image ({', '.join(sorted(SUFFIXES))}); fix: add some, or "
            "remove the folder on both sides"
        )
    return found


def named(names: Sequence[object], most: int = _LISTED) -> str:
    """The first of some names, and how many more there are."""
    more = len(names) - most
    return ", ".join(map(str, names[:most])) + (f" and {more} more" if more > 0 else "")
