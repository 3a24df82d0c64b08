"""Scenes with a class for every pixel: folders of images, paired by name, beside a folder of masks.

A scene without a mask is a pair without labels: it is distilled, and never tested on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor

from data.batches import PASS, Batch, Batches
from data.decode import AlikeFiles, Pixels, Rows, Stacked, read_bands
from data.draws import uniform
from data.images import NO_LABEL, Images
from data.options import ImageOptions, at_least
from data.sources import by_name, named, pair_name, partners, refuse_lonely, stratified
from data.views import VAL_FRACTION, Views

_listed = partial(named, most=3)
_TEST, _VAL, _LABELS, _CROPS = 41, 42, 43, 44  # fixed draws
_ABSENT = 255  # a pixel without a label, as masks are held


@dataclass(frozen=True)
class SceneOptions(ImageOptions):
    """Options of scenes with masks, whose folders may lie in train/ and test/."""

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
    # Which scenes have labels, where not all: another number, another fixed draw.
    draw: int = 0
    # Training crops in pixels each way; 0 for whole scenes.
    crop: int = 0
    # Turn crops by quarters, and mirror them.
    turn: bool = True

    def check(self) -> None:
        super().check()
        at_least(self, crop=0, draw=0, finer=1)
        if self.draw and self.labels is None:
            raise ValueError(f"--draw stands beside --labels, got {self.draw}")
        for name in ("rich", "poor", "masks"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is needed; fix: --{name} DIR")
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
    """The classes of some scenes' pixels: ``pixels`` (N, H, W) uint8, 255 for no label."""

    pixels: Tensor
    values: Sequence[int]  # of classes 0, 1, ... in the files

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, rows: Tensor) -> Tensor:
        """Targets (n, H, W) int64, -100 where a pixel has no label."""
        held = self.pixels[rows]
        return torch.where(held == _ABSENT, NO_LABEL, held.long())

    def chosen(self, rows: Tensor) -> Masks:
        """Those of some scenes alone."""
        return Masks(self.pixels[rows], self.values)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of them: equal where the targets are."""
        digest = hashlib.sha256()
        for row in range(len(self)):
            digest.update(self.take(torch.tensor([row])).numpy().tobytes())
        return digest.hexdigest()[:16]

    def counts(self) -> Tensor:
        """Pixels a class, over all scenes."""
        return torch.bincount(self.pixels.flatten(), minlength=256)[: len(self.values)]


def _classes(
    raw: Pixels, file: Path, shape: tuple[int, int], values: Sequence[int], options: SceneOptions
) -> np.ndarray:
    """A mask's pixel values as classes, in an image's size."""
    (height, width), finer = shape, options.finer
    if raw.shape != (height * finer, width * finer):
        raise ValueError(
            f"mask {file} is {raw.shape[0]}x{raw.shape[1]}, its image is {height}x{width}; "
            "fix: resize it without smoothing"
        )
    held = np.full(raw.shape, _ABSENT, np.uint8)
    for label, value in enumerate(values):
        held[raw == value] = label
    if odd := set(np.unique(raw[held == _ABSENT]).tolist()) - {options.ignore}:
        raise ValueError(
            f"mask {file} holds {_listed(sorted(odd))}, the classes are {_listed(values)}; fix: "
            "--values with all of them, or --ignore VALUE"
        )
    if finer == 1:
        return held
    # Every block's most frequent class, the last of those that are level.
    blocks = held.reshape(height, finer, width, finer).swapaxes(1, 2).reshape(height, width, -1)
    kinds = np.array([*range(len(values)), _ABSENT], np.uint8)[::-1]
    return kinds[np.stack([(blocks == kind).sum(-1) for kind in kinds]).argmax(0)]


def _read_mask(file: Path) -> Pixels:
    image = read_bands(file, indices=True)
    if image.shape[0] != 1:
        raise ValueError(f"mask {file} has {image.shape[0]} bands; fix: store one, a class a value")
    return image[0]


@dataclass(frozen=True)
class SceneViews(Views):
    """Images of both modalities, with the masks of their scenes, which are always in memory."""

    masks: Masks | None = None
    held_out_masks: Masks | None = None

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


def open_scene_views(options: SceneOptions) -> SceneViews:
    """The scenes, their images read when asked for and their masks now.

    Raises:
        ValueError: a folder is missing or empty, names do not pair, images are unlike each other,
            or masks do not fit them.
    """
    halves = _halves(options)
    found = [_scenes(options, half) for half in halves or ("",)]
    train, labelled = np.arange(len(found[0].masks)), found[0].labelled
    other, first = found[-1], len(train) if halves else 0
    test = (
        other.labelled
        if halves
        else _some(labelled, options.test_fraction, _TEST + 1000 * options.test_draw)
    )
    if not len(test):
        raise ValueError(f"no scene of test/ has a mask; fix: add them to {options.masks}")
    train = train if halves else np.setdiff1d(train, test)
    known = np.intersect1d(train, labelled)
    if options.evaluate == "val":
        other, first, test = found[0], 0, _some(known, VAL_FRACTION, _VAL)
        train, known = np.setdiff1d(train, test), np.setdiff1d(known, test)
    if options.labels is not None:
        if not 1 <= options.labels <= len(known):
            raise ValueError(
                f"--labels must lie between 1 and {len(known)} (the training scenes with a mask), "
                f"got {options.labels}"
            )
        draw = _LABELS + 1000 * options.draw
        known = known[stratified(np.zeros(len(known), int), options.labels, draw=draw)]
    files = [found[0].masks[row] if row in known else None for row in train]
    raw = {} if options.values else {file: _read_mask(file) for file in files if file}
    values = options.values or _values(list(raw.values()), options.ignore)
    classes = list(options.classes or map(str, values))

    def sides(scenes: _Scenes, rows: Rows, first: int) -> list[Images]:
        labels, index = torch.zeros(len(rows), dtype=torch.int64), torch.from_numpy(rows + first)
        made = [Images(side, rows, labels, index, classes) for side in (scenes.rich, scenes.poor)]
        sizes = ["x".join(map(str, images.shape[1:])) for images in made]
        if sizes[0] != sizes[1]:
            told = f"rich images are {sizes[0]}, poor ones {sizes[1]}"
            raise ValueError(f"{told}; fix: bring both to one size")
        return made

    def masks(images: Images, files: Sequence[Path | None]) -> Masks:
        held = torch.full((len(files), *images.shape[1:]), _ABSENT, dtype=torch.uint8)
        for row, file in enumerate(files):
            if file:
                read = raw[file] if file in raw else _read_mask(file)
                shown = _classes(read, file, images.shape[1:], values, options)
                held[row] = torch.from_numpy(shown)
        return Masks(held, values)

    targets = torch.tensor([0 if file else NO_LABEL for file in files])
    rich, poor = (replace(one, targets=targets) for one in sides(found[0], train, 0))
    held_out = sides(other, test, first)
    first_of = torch.zeros(1, dtype=torch.int64)
    for both in zip((rich, poor), held_out, strict=True):
        kinds = [f"{len(i[0])} band(s) in {i.dtype}" for i in (one.take(first_of) for one in both)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"scenes to train on have {kinds[0]}, those to test on {kinds[1]}; fix: store all "
                "scenes of a side alike"
            )
    if options.crop > min(poor.shape[1:]):
        raise ValueError(f"--crop must be at most {min(poor.shape[1:])}, got {options.crop}")
    both = masks(poor, files), masks(held_out[1], [other.masks[row] for row in test])
    if bare := [classes[n] for n in (both[0].counts() == 0).nonzero()[:, 0].tolist()]:
        raise ValueError(
            f"no labelled training scene has a pixel of {_listed(bare)}; fix: more --labels, or "
            "leave it out of --values"
        )
    return SceneViews(
        rich, poor, *held_out, True, "its own sensor", masks=both[0], held_out_masks=both[1]
    )


@dataclass(kw_only=True)
class SceneBatches(Batches):
    """Batches of scenes: both modalities and the mask are cropped, turned and mirrored alike."""

    masks: Masks

    def first(self, size: int | None = None) -> Batch:
        """The first scenes, as large as a step's crops: whole ones may not fit into memory."""
        batch, crop = super().first(size), self.options.crop or None
        seen = (None if one is None else one[..., :crop, :crop] for one in (batch.rich, batch.poor))
        return Batch(*seen, batch.target[..., :crop, :crop], batch.index)

    def made(self, index: Tensor, number: int | None, ids: Tensor | None) -> Batch:
        passes, index = index // len(self._led) * PASS, index % len(self._led)
        seen = {"rich": self.rich, "poor": self.poor}
        parts = {name: one.take(index) for name, one in seen.items() if one is not None}
        parts["target"] = self.masks.take(index)[:, None]
        if number is not None:
            keys = self._led.index[index] + passes
            draws = uniform((self.seed, _CROPS, number), keys, 4)
            size, turn = self.options.crop, self.options.turn
            parts = {name: turned_crops(one, draws, size, turn) for name, one in parts.items()}
        target = parts.pop("target")[:, 0]
        normal = {name: seen[name].statistics.normalise(one) for name, one in parts.items()}
        return Batch(normal.get("rich"), normal.get("poor"), target, index)


def turned_crops(images: Tensor, draws: Tensor, size: int, turn: bool) -> Tensor:
    """Crops (n, C, H, W), turned by quarters and mirrored; ``draws`` (n, 4) in [0, 1)."""
    height, width = images.shape[-2:]
    high, wide = (size, size) if size else (height, width)
    made = []
    for image, (down, across, quarters, mirrored) in zip(images, draws, strict=True):
        top, left = int(down * (height - high + 1)), int(across * (width - wide + 1))
        crop = image[:, top : top + high, left : left + wide]
        if turn:
            # A scene that is not square keeps its shape: half turns alone.
            steps = int(quarters * 4) if high == wide else 2 * int(quarters * 2)
            crop = torch.rot90(crop, steps, (1, 2))
            crop = crop.flip(2) if mirrored < 0.5 else crop
        made.append(crop)
    return torch.stack(made)


@dataclass(frozen=True)
class _Scenes:
    """The scenes of one half."""

    rich: Stacked
    poor: Stacked
    masks: list[Path | None]  # one a scene

    @property
    def labelled(self) -> Rows:
        return np.array([row for row, file in enumerate(self.masks) if file], int)


def _halves(options: SceneOptions) -> tuple[str, ...]:
    places = [options.data] if options.data else [*options.rich, *options.poor, options.masks]
    lacking = [p for p in places if not ((p / "train").is_dir() and (p / "test").is_dir())]
    if lacking and len(lacking) < len(places):
        told = f"{_listed(lacking)} has no train/ and test/, others have"
        raise ValueError(f"{told}; fix: split all alike")
    return () if lacking else ("train", "test")


def _scenes(options: SceneOptions, half: str) -> _Scenes:
    def place(folder: Path) -> Path:
        folder, root = folder.expanduser(), options.data
        found = root.expanduser() / half / folder if root else folder / half
        if not found.is_dir():
            fix = "--data must name the folder that holds it" if root else "name an existing one"
            raise ValueError(f"folder {found} does not exist; fix: {fix}")
        return found

    sides = [[place(folder) for folder in side] for side in (options.rich, options.poor)]
    places = list(dict.fromkeys(sides[0] + sides[1]))
    files, lonely = partners(places)
    refuse_lonely(lonely)
    masks, names = by_name(place(options.masks)), list(map(pair_name, files[0]))
    odd = sorted(masks.keys() - set(names))
    if len(odd) == len(masks):
        raise ValueError(
            f"no mask of {options.masks} has the name of an image in {places[-1]}: masks "
            f"{_listed(odd)}, images {_listed(names)}; fix: name them alike"
        )
    if odd:
        raise ValueError(
            f"{len(odd)} mask(s) of {options.masks} have no image: {_listed(odd)}; fix: remove "
            "them, or add the images"
        )
    read = dict(zip(places, map(AlikeFiles, files), strict=True))
    stacked = (Stacked([read[one] for one in side]) for side in sides)
    return _Scenes(*stacked, [masks.get(name) for name in names])


def _values(masks: Sequence[Pixels], ignore: int | None) -> tuple[int, ...]:
    """What the labelled training scenes' masks hold."""
    held = {value for mask in masks for value in np.unique(mask).tolist()}
    values = sorted(held - {ignore})
    if not 2 <= len(values) < _ABSENT or any(value != int(value) for value in values):
        raise ValueError(
            f"the masks of the labelled training scenes hold {len(values)} value(s), "
            f"{_listed(values)}; fix: two or more whole numbers, a class each, named by --values"
        )
    return tuple(int(value) for value in values)


def _some(rows: Rows, fraction: float, draw: int) -> Rows:
    if len(rows) < 2:
        raise ValueError(
            f"{len(rows)} scene(s) with a mask leave none to train on; fix: more masks"
        )
    taken = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
    return rows[stratified(np.zeros(len(rows), int), taken, draw=draw)]
