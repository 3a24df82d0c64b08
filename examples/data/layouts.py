"""What a folder looks like, for those who name the wrong one."""

from __future__ import annotations

from pathlib import Path

from data.decode import SUFFIXES, TIFF

# What each data set's folder holds, the more telling ones first.
_HOLDS: dict[str, tuple[str, ...]] = {
    "cifar10": ("cifar-10-batches-py",),
    "cifar100": ("cifar-100-python",),
    "stl10": ("stl10_binary",),
    "tiny_imagenet": ("wnids.txt", "val/val_annotations.txt"),
    "ombria": ("train/s1_after", "train/s2_after", "train/mask"),
    "cml": ("radar", "optics"),
    "s2s_eu, s2s_cn or m2s_gl": ("MS", "RGB"),
}
_MANY = 1000  # files looked at, at most


def looks_like(folder: Path) -> str:
    """The data set whose layout a folder has, or one folder in it; empty where none is known."""
    if not folder.is_dir():
        return ""
    if found := _itself(folder):
        return found
    inner = sorted(child for child in folder.iterdir() if child.is_dir())[:_MANY]
    for child in inner:
        # Class folders are part of a layout, not a data set each.
        if (found := _itself(child)) and not found.startswith(("folder", "eurosat")):
            return f"{found} in its folder {child.name}"
    return ""


def hint(folder: Path, wanted: str) -> str:
    """``; it looks like NAME``, where it does, and like another data set than the wanted one."""
    found = looks_like(folder)
    return f"; it looks like {found}" if found and found != wanted else ""


def refuse_another(folder: Path, wanted: str) -> None:
    """Refuses a folder whose layout is another data set's and could be taken for class folders.

    Raises:
        ValueError: it is; the message says whose.
    """
    found = _itself(folder) if folder.is_dir() else ""
    # The layouts of class folders can be read as such.
    if found and found != wanted and not found.startswith(("folder", "eurosat", "imagenet")):
        raise ValueError(
            f"{folder} is not {wanted}'s: it looks like {found}; fix: name the folder of {wanted}, "
            "or the data set that lies there"
        )


def _itself(folder: Path) -> str:
    for name, parts in _HOLDS.items():
        if all((folder / part).exists() for part in parts):
            return name
    halves = [half for half in ("train", "test", "val") if (folder / half).is_dir()]
    if len(halves) > 1:
        classes = [child.name for child in (folder / "train").glob("*/")][:_MANY]
        if "val" in halves and any(_wordnet(name) for name in classes):
            return "imagenet or imagenet100"
        return "folder (train/<class>/* and test/<class>/*)" if classes else ""
    classes = sorted(child for child in folder.glob("*/") if child.is_dir())[:_MANY]
    for child in classes:
        found = sorted(child.iterdir())[:_MANY]
        files = [file for file in found if file.suffix.lower() in SUFFIXES]
        tiff = all(file.suffix.lower() in TIFF for file in files)
        if files and tiff and all(file.name.startswith(f"{child.name}_") for file in files):
            return "eurosat"
        if files:
            return "folder (<class>/*)"
    return ""


def _wordnet(name: str) -> bool:
    return len(name) == 9 and name[0] == "n" and name[1:].isdigit()
