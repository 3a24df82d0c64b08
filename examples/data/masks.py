"""Scenes with a class for every pixel: folders of images, paired by name, beside a folder of masks.

A scene without a mask is a pair without labels: it is distilled, and never tested on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.utils.data import Dataset

from data.batches import PASS, Batch, Batches
from data.decode import AlikeFiles, read_bands
from data.draws import uniform
from data.images import NO_LABEL, Images
from data.pairs import by_name, named
from data.sources import Pixels, Rows, stratified
from data.views import VAL_FRACTION, Views

_listed = partial(named, most=3)
_TEST, _VAL, _LABELS, _CROPS = 41, 42, 43, 44  # fixed draws
_ABSENT = 255  # a pixel without a label, as masks are held


@dataclass(frozen=True)
class SceneOptions:
    """Options of scenes with masks."""

    # Folder that the others lie in; where it has train/ and test/, each of these holds them.
    data: Path | None = None
    # Folders of what the teacher sees; the bands of several are stacked.
    rich: tuple[Path, ...] = ()
    # Folders of what the students see.
    poor: tuple[Path, ...] = ()
    # Folder of the masks, one band each, in the images' size.
    masks: Path | None = None
    # Pixel values that are the classes, in their order; all that the masks hold by default.
    values: tuple[int, ...] = ()
    # Names of the classes, in the order of --values.
    classes: tuple[str, ...] = ()
    # Pixel value that says: no label here.
    ignore: int | None = None
    # Masks are so many times as large as images: a pixel's class is the one that most have.
    finer: Annotated[int, tyro.conf.Suppress] = 1
    # So many training scenes have labels, for teacher and students; all pairs are distilled.
    labels: int | None = None
    # Which scenes these are: another number, another fixed draw.
    draw: int = 0
    # Share of the scenes with a mask for testing, where there is no test/.
    test_fraction: float = 0.2
    # val holds a tenth of the training scenes out, for choosing settings.
    evaluate: Literal["test", "val"] = "test"
    # Training crops in pixels each way; 0 for whole scenes.
    crop: int = 0
    # Turn crops by quarters, and mirror them.
    turn: bool = True
    # Gigabytes of images that may be held; more are read during the training.
    memory: float = 4.0
    # Processes that read such images.
    workers: int = 2

    def check(self) -> None:
        """Refuse what no training can have."""
        for name in ("crop", "memory", "workers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} must be at least 0, got {getattr(self, name)}")
        if self.draw < 0 or (self.draw and self.labels is None):
            raise ValueError(
                f"--draw must be at least 0, and stands beside --labels, got {self.draw}"
            )
        if self.finer < 1:
            raise ValueError(f"finer must be at least 1, got {self.finer}")
        if not 0 < self.test_fraction < 1:
            raise ValueError(f"--test-fraction must lie in (0, 1), got {self.test_fraction}")
        for name, told in (("rich", "DIR..."), ("poor", "DIR..."), ("masks", "DIR")):
            if not getattr(self, name):
                raise ValueError(f"--{name} is needed; fix: --{name} {told}")
        if len(set(self.values)) != len(self.values):
            raise ValueError(f"--values must differ, got {self.values}")
        if self.ignore is not None and self.ignore in self.values:
            raise ValueError(
                f"--ignore {self.ignore} is one of --values {self.values}; fix: leave it out of one"
            )
        if self.classes and len(self.classes) != len(self.values):
            raise ValueError(
                f"--classes must name each of --values {self.values}, got {self.classes}"
            )


@dataclass(frozen=True)
class Masks:
    """The classes of some scenes' pixels.

    Attributes:
        files: one a scene; None where it has none.
        values: the pixel values of classes 0, 1, ...
        ignore: the pixel value of no label.
        finer: see :class:`SceneOptions`.
        shape: of an image, (H, W).
        pixels: all of them in memory, (N, H, W) uint8; None reads them when asked for.
    """

    files: Sequence[Path | None]
    values: tuple[int, ...]
    ignore: int | None
    finer: int
    shape: tuple[int, int]
    pixels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.files)

    def take(self, rows: Tensor) -> Tensor:
        """Targets (n, H, W) int64, -100 where a pixel has no label.

        Raises:
            ValueError: a mask is damaged, of another size, or holds a value that is no class.
        """
        if self.pixels is None:
            held = torch.from_numpy(np.stack([self._held(int(row)) for row in rows]))
        else:
            held = self.pixels[rows]
        return torch.where(held == _ABSENT, NO_LABEL, held.long())

    def loaded(self) -> Masks:
        """The same, in memory."""
        held = [self._held(row) for row in range(len(self))]
        return replace(self, pixels=torch.from_numpy(np.stack(held)))

    def chosen(self, rows: Tensor) -> Masks:
        """Those of some scenes alone."""
        pixels = None if self.pixels is None else self.pixels[rows]
        return replace(self, files=[self.files[row] for row in rows.tolist()], pixels=pixels)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of them: equal where the targets are."""
        digest = hashlib.sha256()
        for row in range(len(self)):
            digest.update(self.take(torch.tensor([row])).numpy().tobytes())
        return digest.hexdigest()[:16]

    def counts(self) -> Tensor:
        """Pixels a class, over all scenes."""
        found = torch.zeros(len(self.values), dtype=torch.int64)
        for row in range(len(self)):
            targets = self.take(torch.tensor([row]))
            found += torch.bincount(targets[targets >= 0], minlength=len(found))
        return found

    def _held(self, row: int) -> np.ndarray:
        file = self.files[row]
        if file is None:
            return np.full(self.shape, _ABSENT, np.uint8)
        raw, (height, width) = _read_mask(file), self.shape
        if raw.shape != (height * self.finer, width * self.finer):
            raise ValueError(
                f"mask {file} is {raw.shape[0]}x{raw.shape[1]}, its image is {height}x{width}; "
                "fix: resize it without smoothing"
            )
        held = np.full(raw.shape, _ABSENT, np.uint8)
        for label, value in enumerate(self.values):
            held[raw == value] = label
        odd = set(np.unique(raw[held == _ABSENT]).tolist()) - {self.ignore}
        if odd:
            raise ValueError(
                f"mask {file} holds {_listed(sorted(odd))}, the classes are "
                f"{_listed(self.values)}; fix: --values with all of them, or --ignore VALUE"
            )
        return held if self.finer == 1 else _most(held, self.finer, len(self.values))


def _most(held: np.ndarray, finer: int, classes: int) -> np.ndarray:
    """Every block's most frequent class, the last of those that are level; absent where most is."""
    height, width = (side // finer for side in held.shape)
    blocks = held.reshape(height, finer, width, finer).swapaxes(1, 2).reshape(height, width, -1)
    kinds = [*range(classes), _ABSENT]
    votes = np.stack([(blocks == kind).sum(-1) for kind in kinds])
    return np.array(kinds, np.uint8)[len(kinds) - 1 - votes[::-1].argmax(0)]


def _read_mask(file: Path) -> Pixels:
    image = read_bands(file)
    if image.shape[0] != 1:
        raise ValueError(f"mask {file} has {image.shape[0]} bands; fix: store one, a class a value")
    return image[0]


@dataclass(frozen=True)
class SceneViews(Views):
    """Images of both modalities, with the masks of their scenes."""

    masks: Masks | None = None
    held_out_masks: Masks | None = None

    def loaded(self, *, made: bool = True) -> SceneViews:
        done: dict[int, Images] = {}
        return replace(
            self,
            **{name: images.loaded(done, made=made) for name, images in self._images().items()},
            masks=self.masks.loaded(),
            held_out_masks=self.held_out_masks.loaded(),
        )

    def summary(self) -> list[str]:
        """What there is, one line each."""
        known = int((self.poor.known() != NO_LABEL).sum())
        lines = [
            f"{name}: {len(images)} training and {len(held_out)} held-out scenes, "
            f"{'x'.join(map(str, images.shape))}"
            for name, images, held_out in (
                ("rich", self.rich, self.held_out_rich),
                ("poor", self.poor, self.held_out_poor),
            )
        ]
        shares = self.masks.counts().double()
        told = ", ".join(
            f"{name} {100 * share:.1f} %"
            for name, share in zip(self.poor.classes, (shares / shares.sum()).tolist(), strict=True)
        )
        return [*lines, f"{known} of the training scenes have labels; of their pixels: {told}"]


def open_scene_views(options: SceneOptions, name: str) -> SceneViews:
    """The scenes, read when asked for.

    Raises:
        ValueError: a folder is missing or empty, names do not pair, images are unlike each other,
            or masks do not fit them.
    """
    halves = _halves(options)
    found = [_scenes(options, half) for half in halves or ("",)]
    if halves and not found[1].masks:
        raise ValueError(f"no scene of test/ has a mask; fix: add them to {options.masks}")
    train = np.arange(len(found[0].names))
    labelled = np.array([row for row in train if found[0].masks.get(found[0].names[row])], int)
    if not halves:
        test = labelled[_some(len(labelled), options.test_fraction, _TEST)]
        train = np.setdiff1d(train, test)
        sides = [(found[0], train), (found[0], test)]
    else:
        of_test = [n for n, scene in enumerate(found[1].names) if scene in found[1].masks]
        sides = [(found[0], train), (found[1], np.array(of_test, int))]
    if options.evaluate == "val":
        labelled = np.intersect1d(train, labelled)
        val = labelled[_some(len(labelled), VAL_FRACTION, _VAL)]
        train = np.setdiff1d(train, val)
        sides = [(found[0], train), (found[0], val)]
    known = np.intersect1d(train, labelled)
    if options.labels is not None:
        if not 1 <= options.labels <= len(known):
            raise ValueError(
                f"--labels must lie between 1 and {len(known)} (the training scenes with a mask), "
                f"got {options.labels}"
            )
        known = known[
            stratified(
                np.zeros(len(known), int), options.labels, draw=_LABELS + 1000 * options.draw
            )
        ]
    values = options.values or _values(found[0], known, options.ignore)
    classes = list(options.classes or map(str, values))
    made: list[tuple[Images, Images, Masks]] = []
    for half, rows in sides:
        labels = torch.zeros(len(rows), dtype=torch.int64)
        index = torch.from_numpy(rows + (0 if half is found[0] else len(found[0].names)))
        rich, poor = (
            Images(read, rows, labels, index, classes, name) for read in (half.rich, half.poor)
        )
        if rich.shape[1:] != poor.shape[1:]:
            sizes = [f"{one.shape[1]}x{one.shape[2]}" for one in (rich, poor)]
            raise ValueError(
                f"rich images are {sizes[0]}, poor ones {sizes[1]}; fix: bring both to one size"
            )
        files = [half.masks.get(half.names[row]) for row in rows]
        if half is found[0] and not made:
            kept = set(known.tolist())
            files = [f if row in kept else None for f, row in zip(files, rows, strict=True)]
            targets = torch.where(torch.tensor([f is not None for f in files]), 0, NO_LABEL)
            rich, poor = (replace(one, targets=targets) for one in (rich, poor))
        shape = (poor.shape[1], poor.shape[2])
        made.append((rich, poor, Masks(files, tuple(values), options.ignore, options.finer, shape)))
    (rich, poor, masks), (held_out_rich, held_out_poor, held_out_masks) = made
    if options.crop > min(masks.shape):
        raise ValueError(f"--crop must be at most {min(masks.shape)}, got {options.crop}")
    counts = masks.counts()
    if bare := [classes[n] for n in (counts == 0).nonzero()[:, 0].tolist()]:
        raise ValueError(
            f"no labelled training scene has a pixel of {_listed(bare)}; fix: more --labels, or "
            "leave it out of --values"
        )
    return SceneViews(
        rich, poor, held_out_rich, held_out_poor, True, "its own sensor",
        masks=masks, held_out_masks=held_out_masks,
    )  # fmt: skip


@dataclass(kw_only=True)
class SceneBatches(Batches):
    """Batches of scenes: both modalities and the mask are cropped, turned and mirrored alike."""

    masks: Masks

    def _dataset(self, number: int | None, ids: Tensor | None) -> Dataset[Batch]:
        return _Scenes(self, number)


@dataclass(frozen=True)
class _Scenes(Dataset[Batch]):
    of: SceneBatches
    number: int | None  # of the epoch; None for whole scenes as they are

    def __getitem__(self, rows: list[int]) -> Batch:
        of, index = self.of, torch.tensor(rows)
        count = len(of.masks)
        passes, index = index // count * PASS, index % count
        masks = of.masks.take(index)
        sides = [None if one is None else one.take(index) for one in (of.rich, of.poor)]
        if self.number is not None:
            led = of.poor or of.rich
            draws = uniform((of.seed, _CROPS, self.number), led.index[index] + passes, 4)
            cut = _Cut(of.options.crop, of.options.turn, draws)
            masks = cut(masks[:, None])[:, 0]
            sides = [None if side is None else cut(side) for side in sides]
        rich, poor = (
            None if side is None else images.statistics.normalise(side)
            for images, side in zip((of.rich, of.poor), sides, strict=True)
        )
        return Batch(rich, poor, masks, index)


@dataclass(frozen=True)
class _Cut:
    """Crops (n, C, H, W), turned by quarters and mirrored; ``draws`` (n, 4) in [0, 1)."""

    size: int
    turn: bool
    draws: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        size = (self.size, self.size) if self.size else (height, width)
        made = []
        for image, (down, across, quarters, mirrored) in zip(images, self.draws, strict=True):
            top = int(down * (height - size[0] + 1))
            left = int(across * (width - size[1] + 1))
            crop = image[:, top : top + size[0], left : left + size[1]]
            if self.turn:
                # A scene that is not square keeps its shape: half turns alone.
                steps = int(quarters * 4) if size[0] == size[1] else 2 * int(quarters * 2)
                crop = torch.rot90(crop, steps, (1, 2))
                crop = crop.flip(2) if mirrored < 0.5 else crop
            made.append(crop)
        return torch.stack(made)


@dataclass(frozen=True)
class _Found:
    """The scenes of one half, by name."""

    names: list[str]
    rich: _Stacked
    poor: _Stacked
    masks: dict[str, Path]


@dataclass(frozen=True)
class _Stacked:
    """Reads rows of the bands of several folders."""

    sides: tuple[AlikeFiles, ...]

    def __call__(self, rows: Rows) -> Pixels:
        read = [side(rows) for side in self.sides]
        for side, images in zip(self.sides, read, strict=True):
            if images.shape[2:] != read[0].shape[2:]:
                sizes = ["x".join(map(str, one.shape[2:])) for one in (images, read[0])]
                raise ValueError(
                    f"images of {side.files[0].parent} are {sizes[0]}, those of "
                    f"{self.sides[0].files[0].parent} {sizes[1]}; fix: bring both to one size"
                )
        return np.concatenate(read, 1)


def _halves(options: SceneOptions) -> tuple[str, ...]:
    places = [options.data] if options.data else [*options.rich, *options.poor, options.masks]
    has = [(place / "train").is_dir() and (place / "test").is_dir() for place in places]
    if any(has) and not all(has):
        lacking = _listed([str(place) for place, one in zip(places, has, strict=True) if not one])
        raise ValueError(f"{lacking} has no train/ and test/, others have; fix: split all alike")
    return ("train", "test") if all(has) else ()


def _place(options: SceneOptions, folder: Path, half: str) -> Path:
    folder = folder.expanduser()
    place = options.data.expanduser() / half / folder if options.data else folder / half
    if not place.is_dir():
        fix = "name an existing one"
        if options.data:
            fix = "--data must name the folder that holds it"
        raise ValueError(f"folder {place} does not exist; fix: {fix}")
    return place


def _scenes(options: SceneOptions, half: str) -> _Found:
    folders = {
        side: [_place(options, folder, half) for folder in getattr(options, side)]
        for side in ("rich", "poor")
    }
    files = {place: by_name(place) for place in dict.fromkeys(folders["rich"] + folders["poor"])}
    everywhere = set.intersection(*(set(found) for found in files.values()))
    lonely = [
        str(found[stem]) for found in files.values() for stem in sorted(found.keys() - everywhere)
    ]
    if lonely:
        raise ValueError(
            f"{len(lonely)} image(s) have no partner of the same name in every folder: "
            f"{_listed(lonely)}; fix: add the partners, or remove these"
        )
    place = _place(options, options.masks, half)
    masks = by_name(place)
    odd = sorted(masks.keys() - everywhere)
    if len(odd) == len(masks):
        raise ValueError(
            f"no mask of {place} has the name of an image in {folders['poor'][0]}: masks "
            f"{_listed(odd)}, images {_listed(sorted(everywhere))}; fix: name them alike"
        )
    if odd:
        raise ValueError(
            f"{len(odd)} mask(s) of {place} have no image: {_listed(odd)}; fix: remove them, or "
            "add the images"
        )
    names = sorted(everywhere)
    sides = (
        _Stacked(tuple(AlikeFiles([files[place][stem] for stem in names]) for place in places))
        for places in folders.values()
    )
    return _Found(names, *sides, masks)


def _values(found: _Found, rows: Rows, ignore: int | None) -> tuple[int, ...]:
    """What the labelled training scenes' masks hold."""
    held: set[float] = set()
    for row in rows:
        held |= set(np.unique(_read_mask(found.masks[found.names[row]])).tolist())
        if len(held) > _ABSENT:
            break
    values = sorted(held - {ignore})
    if not 2 <= len(values) < _ABSENT or any(value != int(value) for value in values):
        raise ValueError(
            f"the masks of the labelled training scenes hold {len(values)} value(s), "
            f"{_listed(values)}; fix: two or more whole numbers, a class each, named by --values"
        )
    return tuple(int(value) for value in values)


def _some(count: int, fraction: float, draw: int) -> Rows:
    if count < 2:
        raise ValueError(f"{count} scene(s) with a mask leave none to train on; fix: more masks")
    taken = min(max(round(fraction * count), 1), count - 1)
    return stratified(np.zeros(count, int), taken, draw=draw)
