"""CIFAR-100 and STL-10 in their publishers' binary files, and a network that fails."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, CIFAR100, STL10, utils

from data import Views
from tests.examples.entries import recipe_views
from tests.examples.files import values, write
from tests.examples.layouts import write_cifar100, write_stl10


def opened(name: str, root: Path, **wanted: object) -> Views:
    return recipe_views(name, data=root, **wanted).loaded()


@pytest.fixture
def cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_cifar100(tmp_path, monkeypatch)


@pytest.fixture
def stl10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_stl10(tmp_path, monkeypatch)


def test_cifar100(cifar100: Path) -> None:
    views = opened("cifar100", cifar100)
    assert views.rich.classes == ["a", "b", "c", "d"]
    assert views.rich.labels.tolist() == [0, 1, 2, 3] * 2
    assert np.array_equal(views.rich.pixels, values(8, 3, 32, 32, seed=0))
    assert np.array_equal(views.held_out_rich.pixels, values(4, 3, 32, 32, seed=1))
    (cifar100 / CIFAR100.base_folder / "test").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"CIFAR100 .* damaged or incomplete \(test\); fix:"):
        opened("cifar100", cifar100)


def test_stl10(stl10: Path) -> None:
    views = opened("stl10", stl10)
    assert views.rich.classes == ["airplane", "bird", "car"]
    assert views.rich.labels.tolist() == [0, 1, 2] * 2
    assert np.array_equal(views.rich.pixels, values(6, 3, 96, 96, seed=0))
    assert len(views.held_out_rich) == 3
    cut = stl10 / STL10.base_folder / "train_X.bin"
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"STL10 .* damaged or incomplete \(train_X\.bin\)"):
        opened("stl10", stl10)


@pytest.mark.parametrize(("name", "size"), [("cifar100", 32), ("stl10", 96)])
def test_as_an_image_folder(tmp_path: Path, name: str, size: int) -> None:
    for half in ("train", "test"):
        for label in "ab":
            write(tmp_path / half / label / "0.png", values(size, size, 3))
    assert opened(name, tmp_path).rich.shape == (3, size, size)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_a_folder_of_another_layout(tmp_path: Path, name: str) -> None:
    other = {"cifar10": CIFAR100, "cifar100": STL10, "stl10": CIFAR10}[name]
    (tmp_path / other.base_folder).mkdir()
    looks = {"cifar10": "cifar100", "cifar100": "stl10", "stl10": "cifar10"}[name]
    with pytest.raises(ValueError, match=f"has neither .*; it looks like {looks}; fix:"):
        opened(name, tmp_path)
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / other.base_folder).mkdir()
    (tmp_path / other.base_folder).rmdir()
    with pytest.raises(ValueError, match=f"it looks like {looks} in its folder inner"):
        opened(name, tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "tiny_imagenet"])
def test_a_network_error_is_called_one(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*a: object, **k: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refused)
    with pytest.raises(ValueError, match=r"the network failed \(no route to host\); fix: try"):
        opened(name, tmp_path, download=True)


def test_an_archive_that_arrives_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(url: str, filename: str, **k: object) -> None:
        Path(filename).write_bytes(b"half of it")

    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, **k: url)
    monkeypatch.setattr(utils, "_urlretrieve", cut)
    with pytest.raises(ValueError, match="is damaged or incomplete"):
        opened("tiny_imagenet", tmp_path, download=True)
