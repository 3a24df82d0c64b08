"""Data sets that torchvision reads, and what is said when fetching them fails."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np

from data.layouts import hint, refuse_another
from data.sources import Source, _in_memory, open_image_folder


def open_cifar10(data_dir: Path | None, download: bool) -> Source:
    """CIFAR-10 as torchvision keeps it (``cifar-10-batches-py``), or as an image folder of 32x32.

    Raises:
        ValueError: neither is there, or what is there is damaged.
    """
    from torchvision.datasets import CIFAR10

    return _cifar("cifar10", "CIFAR-10", CIFAR10, data_dir, download)


def open_cifar100(data_dir: Path | None, download: bool) -> Source:
    """CIFAR-100 as torchvision keeps it (``cifar-100-python``), or as an image folder of 32x32.

    Raises:
        ValueError: neither is there, or what is there is damaged.
    """
    from torchvision.datasets import CIFAR100

    return _cifar("cifar100", "CIFAR-100", CIFAR100, data_dir, download)


def open_stl10(data_dir: Path | None, download: bool) -> Source:
    """STL-10 as torchvision keeps it (``stl10_binary``), or as an image folder of 96x96.

    5,000 images to train on, 8,000 to test on; the unlabelled ones are not read.

    Raises:
        ValueError: neither is there, or what is there is damaged.
    """
    from torchvision.datasets import STL10

    root, is_folder = _root("stl10", data_dir, download, STL10.base_folder)
    if is_folder:
        return open_image_folder(root, size=(96, 96))
    halves = _read("STL-10", root, STL10, ({"split": "train"}, {"split": "test"}), download)
    images = [_in_memory(half.data, np.asarray(half.labels, dtype=np.int64)) for half in halves]
    return Source(list(halves[0].classes), *images)


@contextmanager
def network_told(name: str) -> Iterator[None]:
    """Calls an error of the network one, in one line.

    Raises:
        ValueError: the network failed, or what came is not what was published.
    """
    try:
        yield
    except (URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"{name} could not be fetched: the network failed ({reason}); fix: try again, or fetch "
            "it elsewhere and name its folder with --data"
        ) from error


def fetched(url: str, folder: Path, md5: str) -> None:
    """Fetches an archive and unpacks it into a folder.

    Raises:
        ValueError: the network failed, or what came is not what was published.
    """
    from torchvision.datasets.utils import download_and_extract_archive

    with network_told(url):
        try:
            download_and_extract_archive(url, str(folder), md5=md5, remove_finished=True)
        except RuntimeError as error:  # torchvision's word for a checksum that differs
            raise ValueError(
                f"{url} did not arrive whole ({error}); fix: delete what lies in {folder} and try "
                "again"
            ) from error


def _cifar(name: str, title: str, kind: Any, data_dir: Path | None, download: bool) -> Source:
    root, is_folder = _root(name, data_dir, download, kind.base_folder)
    if is_folder:
        return open_image_folder(root, size=(32, 32))
    meta = [kind.meta["filename"], kind.meta["md5"]]
    halves = _read(title, root, kind, ({"train": True}, {"train": False}), download, meta)
    images = [
        _in_memory(
            np.ascontiguousarray(half.data.transpose(0, 3, 1, 2)),
            np.asarray(half.targets, dtype=np.int64),
        )
        for half in halves
    ]
    return Source(list(halves[0].classes), *images)


def _root(name: str, data_dir: Path | None, download: bool, base: str) -> tuple[Path, bool]:
    """The data directory, and whether it is an image folder."""
    if data_dir is None:
        raise ValueError(f"data set {name!r} needs a data directory; fix: add --data DIR")
    if data_dir.is_file():
        raise ValueError(f"--data {data_dir} is a file; fix: unpack it and name the folder")
    if not data_dir.is_dir() and not download:
        raise ValueError(
            f"data directory {data_dir} does not exist; fix: name an existing folder with --data, "
            "or add --download"
        )
    if (data_dir / "train").is_dir() and (data_dir / "test").is_dir():
        refuse_another(data_dir, name)
        return data_dir, True
    if not download and not (data_dir / base).is_dir():
        raise ValueError(
            f"data directory {data_dir} has neither train/<class>/* and test/<class>/* nor {base}"
            f"{hint(data_dir, name)}; fix: name the folder that holds one of them, or add "
            "--download"
        )
    return data_dir, False


def _read(
    name: str,
    root: Path,
    kind: Any,
    halves: tuple[dict[str, Any], dict[str, Any]],
    download: bool,
    *more: list[str],
) -> list[Any]:
    from torchvision.datasets.utils import check_integrity

    with network_told(name):
        try:
            return [kind(str(root), download=download, **half) for half in halves]
        except (URLError, TimeoutError, ConnectionError):
            raise
        except (RuntimeError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
            folder = root / kind.base_folder
            files = [*kind.train_list, *kind.test_list, *more]
            bad = [file for file, md5 in files if not check_integrity(str(folder / file), md5)]
            raise ValueError(
                f"{name} in {folder} is damaged or incomplete ({', '.join(bad) or error}); fix: "
                "delete that folder and run again with --download"
            ) from error
