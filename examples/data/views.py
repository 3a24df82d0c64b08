"""What a job trains on: the rich images of its teacher, the poor ones of its students.

They are pairs, every sample in both modalities, or two sets of different samples, told only by
class.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from data.decode import Rows, refuse_sizes
from data.images import NO_LABEL, Images, counts
from data.options import Options
from data.poverty import Poverty, poverty
from data.readers import open_source, reader_of
from data.sources import Part, Source, held_out, stratified
from structkd.diagnostics import modality_gap

VAL_FRACTION = 0.1
_LOOKED_AT = 1000  # images of a side that the gap of free pairs is measured on
# Fixed draws, apart from every training seed: the same images are held out for everybody.
_VAL, _LIMIT, _HALVES, _TEST, _APART_VAL, _APART_LIMIT, _LABELS = 2, 3, 4, 6, 7, 8, 10


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
    source = open_source(options)
    if options.view != Options.view and (source.train.read_poor is not None or _shown(options)):
        name, more = options.recipe.removeprefix("unpaired-"), _shown(options) and ", or --pseudo"
        raise ValueError(
            f"--view {options.view} has no effect on {name}: its poor images are a sensor's; fix: "
            f"leave it out{more}"
        )
    for part in (source.train, source.test):
        refuse_sizes(part.read), refuse_sizes(part.read_poor)
    if reader_of(options).apart:
        views = _apart(source, options, pseudo)
    else:
        made = None if source.train.read_poor is not None else poverty(options.view)
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


def _paired(source: Source, options: Options, made: Poverty | None) -> Views:
    """The images; ``made`` is None where the poor modality is a sensor of its own."""
    train, test = np.arange(len(source.train.labels)), np.arange(len(source.test.labels))
    first, other = len(train), source.test
    if options.evaluate == "val":
        train, test = _cut(train, source.train, VAL_FRACTION, _VAL)
        first, other = 0, source.train
    train = _limited(train, source, source.train, options, _LIMIT)
    rich, held_out_rich = (
        _images(source, source.train, train, 0),
        _images(source, other, test, first),
    )
    if made is None:
        poor = replace(rich, read=source.train.read_poor)
        held_out_poor = replace(held_out_rich, read=other.read_poor)
    else:
        poor, held_out_poor = rich.made(made), held_out_rich.made(made)
        if made.drawn:  # noise leaves a pixel's scale as it is; others have one of their own
            poor = replace(poor, like=rich)
    said = "its own sensor" if made is None else str(made)
    return Views(rich, poor, held_out_rich, held_out_poor, True, said, originals=rich)


def _halved(views: Views, name: str, made: tuple[Poverty, Poverty] | None) -> Views:
    """A paired set made unpaired: the teacher gets one half rich, the student the other poor.

    ``made`` is what makes the student's images poor, and the teacher's; None where the poor
    modality is a sensor of its own.
    """
    parts = halves(views.rich.labels)
    rich, originals = (views.rich.chosen(rows) for rows in parts)
    if min(counts(rich).min(), counts(originals).min()) < 1:
        few = f"{len(views.rich)} images leave a class of {name} without an image in a half"
        raise ValueError(f"{few}; fix: a larger --limit")
    if made is None:
        pseudo, poor = (views.poor.chosen(rows) for rows in parts)
    else:
        poor, pseudo = originals.made(made[0]), rich.made(made[1])
    originals = replace(originals, like=rich)
    return replace(views, rich=rich, poor=poor, paired=False, pseudo=pseudo, originals=originals)


def _apart(source: Source, options: Options, pseudo: str) -> Views:
    """Two sets of different samples: a fixed stratified fifth of each is for testing.

    ``val`` takes a tenth of the rest instead.
    """
    shown = pseudo or _shown(options) or options.view
    sets, first = [], 0
    for side in (source.train, source.test):
        train, test = _cut(
            np.arange(len(side.labels)),
            side,
            options.test_fraction,
            _TEST + 1000 * options.test_draw,
        )
        if options.evaluate == "val":
            train, test = _cut(train, side, VAL_FRACTION, _APART_VAL)
        train = _limited(train, source, side, options, _APART_LIMIT)
        sets += [_images(source, side, rows, first) for rows in (train, test)]
        first += len(side.labels)
    rich, held_out_rich, poor, held_out_poor = sets
    option = "--view" if shown == options.view else "--pseudo"
    free = rich.made(poverty(shown, option))
    if free.shape != poor.shape:
        made, real = ("x".join(map(str, images.shape)) for images in (free, poor))
        raise ValueError(
            f"rich images made poor by {shown} are {made}, the poor ones {real}; fix: "
            f"another {option}, or --size N"
        )
    return Views(rich, poor, held_out_rich, held_out_poor, False, "its own sensor", free)


def _shown(options: Options) -> str:
    """The view that makes a sensor's bands look like unpaired photographs, where it is known."""
    apart = bool(options.rgb) and reader_of(options).apart
    return "bands:" + ",".join(map(str, options.rgb)) if apart else ""


def _images(source: Source, part: Part, rows: Rows, first: int) -> Images:
    """Rows of a part whose first is sample ``first`` of the whole set."""
    labels, index = torch.from_numpy(part.labels[rows]), torch.from_numpy(rows + first)
    return Images(part.read, rows, labels, index, source.classes)


def halves(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two disjoint halves of all rows, ascending, every class in proportion; a fixed draw."""
    first = torch.from_numpy(stratified(labels.numpy(), len(labels) // 2, draw=_HALVES))
    return first, torch.from_numpy(np.setdiff1d(np.arange(len(labels)), first))


def _limited(rows: Rows, source: Source, part: Part, options: Options, draw: int) -> Rows:
    if options.limit is None:
        return rows
    return rows[_some("--limit", options.limit, part.labels[rows], len(source.classes), draw)]


def _some(option: str, count: int, labels: Rows, classes: int, draw: int) -> Rows:
    if not classes <= count <= len(labels):
        low, high = f"{classes} (one image a class)", f"{len(labels)} (the training images)"
        raise ValueError(f"{option} must lie between {low} and {high}, got {count}")
    return stratified(labels, count, draw=draw)


def _cut(rows: Rows, part: Part, fraction: float, draw: int) -> tuple[Rows, Rows]:
    """The rest and the held-out rows, whole groups; at least one image a class in the latter."""
    groups = None if part.groups is None else part.groups[rows]
    out = rows[held_out(part.labels[rows], groups, fraction, draw=draw)]
    return np.setdiff1d(rows, out), out


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
