"""Image folders: any one, Tiny ImageNet as it is published, ImageNet whole or in part."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.archives import fetched, network_told
from data.decode import PHOTOS, TIFF, AlikeFiles
from data.layouts import hint, refuse_another
from data.sources import Images, Rows, Source, class_files
from data.splits import TEST_FRACTION, for_test, refuse_fraction

_SUFFIXES = PHOTOS | TIFF
_TESTS = ("test", "val")
_MARGIN = 256 / 224  # ImageNet's usual frame around the middle that is cut out
_TINY = "tiny-imagenet-200"
_TINY_URL = f"http://cs231n.stanford.edu/{_TINY}.zip"
_TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
_IMAGENET = "fix: ask image-net.org for it, and name the folder that holds train/ and val/"


def open_folder(
    data_dir: Path | None,
    download: bool,
    *,
    size: int = 0,
    test_fraction: float = TEST_FRACTION,
) -> Source:
    """Any image folder: ``train/<class>/*`` and ``test/<class>/*`` (or ``val``), or ``<class>/*``.

    Args:
        data_dir: the folder.
        download: must be False.
        size: brings all images to so many pixels each way, their middle kept; 0 leaves them.
        test_fraction: without a ``test``, a fixed stratified choice.

    Raises:
        ValueError: the layout is another one, a class is empty or on one side only.
    """
    root = _folder("folder", data_dir, download, "an image folder of your own has no publisher")
    refuse_another(root, "folder")
    halves = [root / half for half in ("train", *_TESTS) if (root / half).is_dir()][:2]
    if halves and (len(halves) < 2 or halves[0].name != "train"):
        raise ValueError(
            f"{root} has {halves[0].name} alone{hint(root, 'folder')}; fix: lay it out as "
            "train/<class>/* and test/<class>/*, or as <class>/*"
        )
    classes = _classes(halves[0] if halves else root)
    if halves:
        refuse_fraction(root, test_fraction)
        if _classes(halves[1]) != classes:
            odd = sorted(set(classes) ^ set(_classes(halves[1])))
            raise ValueError(
                f"class folders of {halves[0]} and {halves[1]} differ: {', '.join(odd[:5])} in one "
                "alone; fix: give both the same class folders"
            )
        return _source(classes, [class_files(half, classes, _SUFFIXES) for half in halves], size)
    files, labels = class_files(root, classes, _SUFFIXES, least=2)
    test = for_test(labels, fraction=test_fraction)
    parts = (np.setdiff1d(np.arange(len(labels)), test), test)
    return _source(classes, [([files[row] for row in rows], labels[rows]) for rows in parts], size)


def open_tiny_imagenet(data_dir: Path | None, download: bool) -> Source:
    """Tiny ImageNet as Stanford publishes it: 200 classes, 64x64; ``val`` is what is tested on.

    ``train/<wnid>/images/*.JPEG``, ``val/images/*.JPEG`` with ``val/val_annotations.txt``; the
    published ``test`` has no labels. Classes are WordNet's ids, in the order of ``wnids.txt``
    sorted.

    Raises:
        ValueError: a file is missing, or an annotation names another image or class.
    """
    if data_dir is None:
        raise ValueError("data set 'tiny_imagenet' needs a data directory; fix: add --data DIR")
    root = data_dir if (data_dir / "wnids.txt").is_file() else data_dir / _TINY
    if download and not root.is_dir():
        fetched(_TINY_URL, data_dir, _TINY_MD5)
    for part in ("wnids.txt", "train", "val/images", "val/val_annotations.txt"):
        if not (root / part).exists():
            raise ValueError(
                f"{data_dir} has no {part}, nor has a folder {_TINY} in it"
                f"{hint(data_dir, 'tiny_imagenet')}; fix: name the unpacked folder, or add "
                "--download"
            )
    classes = sorted((root / "wnids.txt").read_text().split())
    label = {name: number for number, name in enumerate(classes)}
    train: tuple[list[Path], list[int]] = ([], [])
    for name in classes:
        found = sorted((root / "train" / name / "images").glob("*.JPEG"))
        if not found:
            raise ValueError(f"class folder {root / 'train' / name / 'images'} holds no .JPEG")
        train[0].extend(found)
        train[1].extend([label[name]] * len(found))
    val: tuple[list[Path], list[int]] = ([], [])
    notes = root / "val" / "val_annotations.txt"
    for number, line in enumerate(notes.read_text().splitlines(), start=1):
        file, name, *_ = [*line.split("\t"), "", ""]
        if name not in label or not (root / "val" / "images" / file).is_file():
            raise ValueError(
                f"{notes}, line {number} names {file!r} of class {name!r}, which "
                f"{'is no class' if name not in label else 'does not exist'}; fix: unpack it again"
            )
        val[0].append(root / "val" / "images" / file)
        val[1].append(label[name])
    if not val[0]:
        raise ValueError(f"{notes} names no image; fix: unpack it again")
    return _source(classes, [(f, np.asarray(k, dtype=np.int64)) for f, k in (train, val)], 64)


def open_imagenet(data_dir: Path | None, download: bool, *, size: int = 224) -> Source:
    """ImageNet (ILSVRC 2012): ``train/<wnid>/*.JPEG`` and ``val/<wnid>/*.JPEG``.

    Where the published archives lie there instead, torchvision unpacks them. ``val`` is tested on.

    Raises:
        ValueError: the layout is another one.
    """
    root = _folder("imagenet", data_dir, download, "ImageNet's publisher asks for a registration")
    if not (root / "train").is_dir() and list(root.glob("ILSVRC2012_*.tar*")):
        _unpacked(root)
    return _imagenet(root, "imagenet", None, size)


def open_imagenet100(
    data_dir: Path | None, download: bool, *, classes: Path | None = None, size: int = 224
) -> Source:
    """A hundred classes of ImageNet, or any other list of them.

    Args:
        data_dir: ImageNet's folder, or one with those classes alone.
        download: must be False.
        classes: a file that begins its lines with their WordNet ids; empty where the folder has
            those classes alone.
        size: pixels each way.

    Raises:
        ValueError: the layout is another one, or a class is not there.
    """
    root = _folder(
        "imagenet100", data_dir, download, "ImageNet's publisher asks for a registration"
    )
    if not classes:
        found = _classes(root / "train") if (root / "train").is_dir() else []
        if found and len(found) != 100:
            raise ValueError(
                f"{root / 'train'} has {len(found)} classes and no list says which are meant; fix: "
                "--classes FILE, a WordNet id a line"
            )
        return _imagenet(root, "imagenet100", None, size)
    file = Path(classes).expanduser()
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--classes {file} cannot be read: {error}") from error
    chosen = sorted({line.split()[0] for line in lines if line.strip() and line[0] != "#"})
    if len(chosen) < 2:
        raise ValueError(f"--classes {file} names {len(chosen)} classes, at least 2 are needed")
    return _imagenet(root, "imagenet100", chosen, size)


def _imagenet(root: Path, name: str, classes: list[str] | None, size: int) -> Source:
    halves = [root / half for half in ("train", "val")]
    for half in halves:
        if not half.is_dir():
            raise ValueError(f"{root} has no folder {half.name}{hint(root, name)}; {_IMAGENET}")
    known = [_classes(half) for half in halves]
    wanted = known[0] if classes is None else classes
    for half, there in zip(halves, known, strict=True):
        missing = sorted(set(wanted) - set(there))
        if missing:
            raise ValueError(
                f"{half} lacks {len(missing)} of {len(wanted)} classes: {', '.join(missing[:5])}"
                f"; fix: {half.name}/<wnid>/*.JPEG for every class"
            )
    parts = [class_files(half, wanted, _SUFFIXES) for half in halves]
    return _source(wanted, parts, size, margin=_MARGIN)


def _unpacked(root: Path) -> None:
    from torchvision.datasets import ImageNet

    with network_told("ImageNet"):
        for split in ("train", "val"):
            ImageNet(str(root), split=split)


def _folder(name: str, data_dir: Path | None, download: bool, why: str) -> Path:
    if data_dir is None:
        raise ValueError(f"data set {name!r} needs a data directory; fix: add --data DIR")
    if download:
        raise ValueError(f"--download is not for {name}: {why}; fix: name its folder with --data")
    if not data_dir.is_dir():
        raise ValueError(
            f"data directory {data_dir} does not exist or is a file; fix: name the unpacked folder"
        )
    return data_dir


def _classes(folder: Path) -> list[str]:
    found = sorted(child.name for child in folder.iterdir() if child.is_dir())
    if len(found) < 2:
        raise ValueError(
            f"{folder} has {len(found)} class folders, at least 2 are needed"
            f"{hint(folder, 'folder')}; fix: lay images out as <class>/<image>"
        )
    return found


def _source(
    classes: list[str], parts: list[tuple[list[Path], Rows]], size: int, *, margin: float = 1.0
) -> Source:
    like = parts[0][0][0]
    halves = [
        Images(labels, AlikeFiles(files, size or None, True, like, margin))
        for files, labels in parts
    ]
    return Source(classes, *halves)
