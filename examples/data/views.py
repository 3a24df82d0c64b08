"""What a job trains on: the rich images of its teacher, the poor ones of its students.

Two providers give them: :func:`paired`, every sample in both modalities, and :func:`unpaired`, two
sets of different samples, told only by class.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from inspect import signature

import numpy as np
import torch

from data import splits
from data.decode import refuse_sizes
from data.images import NO_LABEL, Images, counts
from data.options import Options
from data.pairs import open_folders
from data.poverty import Poverty, poverty
from data.readers import reader
from data.scenes import open_scenes
from data.sources import Images as Half
from data.sources import Rows, Source, stratified
from structkd.diagnostics import modality_gap

VAL_FRACTION = 0.1
# Published data sets; another count is another data set.
_CLASSES = {
    "mnist": 10, "cifar10": 10, "cifar100": 100, "stl10": 10, "tiny_imagenet": 200,
    "imagenet": 1000, "ombria": 4,
}  # fmt: skip
# Options that are some readers' only.
_READERS = ("rich", "poor", "only_pairs", "size", "classes", "test_fraction", "bands")
_LOOKED_AT = 1000  # images of a side that the gap of free pairs is measured on
# Fixed draws, apart from every training seed: the same images are held out for everybody.
_VAL, _LIMIT, _HALVES, _TEST, _SCENES_VAL, _SCENES_LIMIT, _LABELS = 2, 3, 4, 6, 7, 8, 10


@dataclass(frozen=True)
class Views:
    """The images of a job."""

    rich: Images  # what the teacher learns from
    poor: Images  # what the students learn from
    held_out_rich: Images
    held_out_poor: Images
    paired: bool  # row i of poor is the sample of row i of rich
    poverty: str  # what makes the poor modality poor, for the record
    pseudo: Images | None = None  # the samples of rich made poor: the matcher's free pairs
    # ``poor`` in the rich modality, where it was made from that. Without pairs only the reference
    # may see it: the setting has no such thing.
    originals: Images | None = None

    def loaded(self, *, made: bool = True) -> Views:
        """All of it in memory, made poor once and for all or anew at every pass."""
        done: dict[int, Images] = {}
        return replace(self, **{k: v.loaded(done, made=made) for k, v in self._images().items()})

    def held(self, options: Options) -> Views:
        """In memory, where they fit into ``options.memory``; the batches are the same bits."""
        if self.size > 1e9 * options.memory:
            return self
        return self.loaded(made=options.crop != "resized")  # such a crop is made poor after it

    @property
    def size(self) -> int:
        return sum({id(images): images.size for images in self._images().values()}.values())

    def _images(self) -> dict[str, Images]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Images)}

    def summary(self) -> list[str]:
        """What there is, and what is odd about it, one line each."""
        lines = []
        for name in ("rich", "poor"):
            images, held_out = getattr(self, name), getattr(self, f"held_out_{name}")
            found = counts(images)
            lines.append(
                f"{name}: {len(images)} training and {len(held_out)} held-out images, "
                f"{'x'.join(map(str, images.shape))}, {len(images.classes)} classes of "
                f"{found.min()} to {found.max()}"
            )
            files = getattr(images.read, "files", [])
            if files and (several := len(images) - len({files[row] for row in images.rows})):
                lines.append(
                    f"{name}: {len(images) - several} files with {len(images)} labels; an image "
                    "stands once for each of its labels, so an accuracy on them ends below 100 %"
                )
            if constant := images.statistics.constant:
                lines.append(
                    f"warning: {name} band(s) {', '.join(map(str, constant))} (counted from 0) "
                    "never change in the training images and are given as 0"
                )
            for kind, some in (("training", images), ("held-out", held_out)):
                few = counts(some)
                for label in np.flatnonzero(few < max(2, np.median(few) / 10)):
                    lines.append(
                        f"warning: class {images.classes[label]!r} has {few[label]} {kind} {name} "
                        f"image(s), others about {int(np.median(few))}"
                    )
        if self.paired:
            lines.append(f"pairs: {len(self.poor)} training, {len(self.held_out_poor)} held out")
            sizes = [f"{i.shape[1]}x{i.shape[2]}" for i in (self.rich, self.poor)]
            if sizes[0] != sizes[1]:
                lines.append(
                    f"warning: rich images are {sizes[0]}, poor ones {sizes[1]}: crops from a "
                    "padded border move both by as many pixels; fix: --size N or --pad 0"
                )
        if self.pseudo is not None and self.pseudo.shape == self.poor.shape:
            # Both are normalised by their own moments, so a warning is no verdict.
            some = (
                torch.cat(list(images.chunks(_LOOKED_AT))).float()
                for images in (self.pseudo, self.poor)
            )
            gap = modality_gap(*some)
            prefix = "warning: " if gap.far.any() else ""
            lines += [f"{prefix}free pairs: {line}" for line in gap.describe().splitlines()[:4]]
        unlabelled = int((self.poor.known() == NO_LABEL).sum())
        if unlabelled:
            lines.append(f"{len(self.poor) - unlabelled} of the poor training images have labels")
        return lines


def open_views(options: Options, *, unpaired: bool = False, pseudo: str = "") -> Views:
    """The images, read when asked for; ValueError where an option or the data do not fit.

    ``unpaired`` gives the halves of a paired set to teacher and students apart; ``pseudo`` is what
    makes the teacher's images poor then, ``options.view`` by default.
    """
    if options.reader in ("scenes", "folders"):
        views = _apart(options, pseudo)
    else:
        source = open_source(options)
        for half in (source.train, source.test):
            refuse_sizes(half.read), refuse_sizes(half.read_poor)
        own = source.train.read_poor is not None
        made = None if own else poverty(options.view)
        if pseudo and (made is None or not unpaired):
            raise ValueError(
                "--pseudo is for poor images that are made, and nothing paired: not "
                f"{options.recipe}"
            )
        views = _paired(source, options, made)
        if unpaired:
            free = poverty(pseudo, "--pseudo") if pseudo else made
            views = _halved(views, options.recipe, None if made is None else (made, free))
    return views if options.labels is None else _labelled(views, options.labels)


def open_source(options: Options) -> Source:
    """What the reader finds, before anything is chosen of it or read.

    Raises:
        ValueError: the data are missing or of another layout, or an option is not the reader's.
    """
    read = reader(options.reader)
    known = signature(read).parameters
    given = {}
    for one in fields(Options):
        if one.name in ("data", "download") or one.name not in _READERS:
            continue
        value = getattr(options, one.name)
        if one.name in known:
            if value not in (None, ()):
                given[one.name] = value
        elif value != one.default:
            raise ValueError(
                f"--{one.name.replace('_', '-')} has no effect on {options.recipe}; fix: "
                "leave it out"
            )
    folder = None if options.data is None else options.data.expanduser()
    source = read(folder, options.download, **given)
    known = _CLASSES.get(options.reader)
    if known is not None and len(source.classes) != known:
        raise ValueError(
            f"{options.reader} has {known} classes, {options.data} has {len(source.classes)}; fix: "
            "another recipe, or the folder of that data set; 'folder' takes any"
        )
    return source


def _paired(source: Source, options: Options, made: Poverty | None) -> Views:
    """The images; ``made`` is None where the poor modality is a sensor of its own."""
    offsets = {"train": 0, "test": len(source.train.labels)}

    def pick(half: str, rows: Rows) -> tuple[Images, Images]:
        images = getattr(source, half)
        index = torch.from_numpy(rows + offsets[half])
        labels = torch.from_numpy(images.labels[rows])
        rich = Images(images.read, rows, labels, index, source.classes, options.recipe)
        if made is not None:
            return rich, rich.made(made)
        return rich, replace(rich, read=images.read_poor)

    train, held_out = _split(source.train, options, len(source.classes))
    rich, poor = pick("train", train)
    half = "train" if options.evaluate == "val" else "test"
    other = held_out if options.evaluate == "val" else np.arange(len(source.test.labels))
    held_out_rich, held_out_poor = pick(half, other)
    # Noise leaves a pixel's scale as it is; other poor images have one of their own.
    like = rich if made is not None and made.drawn else None
    return Views(
        rich=rich,
        poor=replace(poor, like=like) if like else poor,
        held_out_rich=held_out_rich,
        held_out_poor=held_out_poor,
        paired=True,
        poverty="its own sensor" if made is None else str(made),
        originals=rich,
    )


def _halved(views: Views, name: str, made: tuple[Poverty, Poverty] | None) -> Views:
    """A paired set made unpaired: the teacher gets one half rich, the student the other poor.

    ``made`` is what makes the student's images poor, and the teacher's; None where the poor
    modality is a sensor of its own.
    """
    parts = halves(views.rich.labels)
    rich, originals = (views.rich.chosen(rows) for rows in parts)
    for half in (rich, originals):
        if counts(half).min() < 1:
            few = f"{len(views.rich)} images leave a class of {name} without an image in a half"
            raise ValueError(f"{few}; fix: a larger --limit")
    if made is None:
        pseudo, poor = (views.poor.chosen(rows) for rows in parts)
    else:
        poor, pseudo = originals.made(made[0]), rich.made(made[1])
    return replace(
        views,
        rich=rich,
        poor=poor,
        paired=False,
        pseudo=pseudo,
        originals=replace(originals, like=rich),
    )


def _apart(options: Options, pseudo: str) -> Views:
    """Two sets of different samples: a fixed stratified fifth of each is for testing.

    ``val`` takes a tenth of the rest instead.
    """
    if options.reader == "scenes":
        count = len(options.bands) or 10
        if options.rgb and not all(0 <= band < count for band in options.rgb):
            raise ValueError(f"--rgb must lie in 0..{count - 1}, got {options.rgb}")
        classes, *sides = open_scenes(options.recipe, options.data, bands=count)
        pseudo = pseudo or "bands:" + ",".join(map(str, options.rgb))
    else:
        classes, *sides = open_folders(options.rich, options.poor, options.size)
        pseudo = pseudo or options.view
    sets, offset = [], 0
    for side in sides:
        refuse_sizes(side.read)
        everything = np.arange(len(side.labels))
        train, test = _held_out(everything, side, options.test_fraction, _TEST)
        if options.evaluate == "val":
            train, test = _held_out(train, side, VAL_FRACTION, _SCENES_VAL)
        train = _limited(train, side.labels, options.limit, _SCENES_LIMIT, len(classes))
        for rows in (train, test):
            labels, index = (torch.from_numpy(part) for part in (side.labels[rows], rows + offset))
            sets.append(Images(side.read, rows, labels, index, classes, options.recipe))
        offset += len(side.labels)
    rich, held_out_rich, poor, held_out_poor = sets
    free = rich.made(poverty(pseudo, "--pseudo"))
    if free.shape != poor.shape:
        made, real = ("x".join(map(str, images.shape)) for images in (free, poor))
        raise ValueError(
            f"rich images made poor by {pseudo} are {made}, the poor ones {real}; fix: another "
            "--pseudo, or --size N"
        )
    return Views(rich, poor, held_out_rich, held_out_poor, False, "its own sensor", free)


def halves(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two disjoint halves of all rows, ascending, every class in proportion; a fixed draw."""
    first = torch.from_numpy(stratified(labels.numpy(), len(labels) // 2, draw=_HALVES))
    return first, torch.from_numpy(np.setdiff1d(np.arange(len(labels)), first))


def _split(images: Half, options: Options, classes: int) -> tuple[Rows, Rows]:
    """Training rows, and those that validation holds out of them."""
    train = np.arange(len(images.labels), dtype=np.int64)
    held_out = train[:0]
    if options.evaluate == "val":
        train, held_out = _held_out(train, images, VAL_FRACTION, _VAL)
    return _limited(train, images.labels, options.limit, _LIMIT, classes), held_out


def _limited(rows: Rows, labels: Rows, limit: int | None, draw: int, classes: int) -> Rows:
    return rows if limit is None else rows[_some("--limit", limit, labels[rows], classes, draw)]


def _some(option: str, count: int, labels: Rows, classes: int, draw: int) -> Rows:
    if not classes <= count <= len(labels):
        low, high = f"{classes} (one image a class)", f"{len(labels)} (the training images)"
        raise ValueError(f"{option} must lie between {low} and {high}, got {count}")
    return stratified(labels, count, draw=draw)


def _held_out(rows: Rows, images: Half, fraction: float, draw: int) -> tuple[Rows, Rows]:
    """The rest and the held-out rows, whole groups; at least one image a class in the latter."""
    groups = None if images.groups is None else images.groups[rows]
    held_out = rows[splits.held_out(images.labels[rows], groups, fraction, draw=draw)]
    return np.setdiff1d(rows, held_out), held_out


def _labelled(views: Views, count: int) -> Views:
    """The same, with labels for ``count`` training images of each side and -100 for the rest.

    Pairs keep their labels together. Students are distilled from the images without a label all the
    same; a teacher trains on those that have one. Without pairs the labels are the student's alone.
    """
    labels = views.poor.labels
    known = _some("--labels", count, labels.numpy(), len(views.poor.classes), _LABELS)
    targets = torch.full_like(labels, NO_LABEL)
    targets[known] = labels[known]
    if not views.paired:
        return replace(views, poor=replace(views.poor, targets=targets))
    rich = replace(views.rich, targets=targets)
    like = None if views.poor.like is None else rich
    base = None if views.poor.base is None else rich
    poor = replace(views.poor, targets=targets, base=base, like=like)
    return replace(views, rich=rich, poor=poor, originals=rich)
