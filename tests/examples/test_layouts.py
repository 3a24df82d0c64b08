"""A folder that holds another data set is refused, and the message says which it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.layouts import looks_like
from tests.examples import layouts
from tests.examples.entries import recipe_views
from tests.examples.files import two_sides, values, write


def written(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root.mkdir()
    if name in ("cifar100", "stl10"):
        return getattr(layouts, f"write_{name}")(root, monkeypatch)
    if name == "cml":
        rich, poor = two_sides(root)
        rich.rename(root / "optics")
        poor.rename(root / "radar")
        return root
    if name.startswith("folder"):
        layouts.classes_of(root, ["a", "b"], 2)
        return root
    if name.startswith("imagenet"):
        return layouts.write_imagenet(root)
    return getattr(layouts, f"write_{name}")(root)


ALL = ["cifar100", "stl10", "tiny_imagenet", "imagenet or imagenet100", "eurosat", "ombria", "cml",
       "folder (<class>/*)"]  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_every_layout_is_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = written(name, tmp_path / "data", monkeypatch)
    assert looks_like(found) == name
    assert looks_like(tmp_path / "nowhere") == ""
    (tmp_path / "empty").mkdir()
    assert looks_like(tmp_path / "empty") == ""


@pytest.mark.parametrize("wanted", ["cifar10", "folder", "pairs"])
@pytest.mark.parametrize("name", ["cifar100", "tiny_imagenet", "ombria", "cml"])
def test_a_reader_of_class_folders_says_what_lies_there(
    name: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = written(name, tmp_path / "data", monkeypatch)
    if name == "tiny_imagenet":  # the published one has a third half, without labels
        write(found / "test" / "images" / "test_0.JPEG", values(64, 64, 3))
    _, poor = two_sides(tmp_path / "sides")
    options = {"rich": str(found), "poor": str(poor)} if wanted == "pairs" else {}
    place = None if wanted == "pairs" else found
    with pytest.raises(ValueError, match=f"looks like {name}.*; fix:"):
        recipe_views(wanted, data=place, **options)


def test_imagenet_can_be_read_as_a_folder(tmp_path: Path) -> None:
    layouts.write_imagenet(tmp_path)
    views = recipe_views("folder", data=tmp_path, size=16)
    assert len(views.rich.classes) == 3
