"""A student of unpaired images: its matches over the epochs, what they cost, what it learns."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor, nn

from crossmodal import engine
from crossmodal.batches import Batch, Batches
from crossmodal.config import Config, Outcome
from crossmodal.data import ImagePairs
from crossmodal.methods import Plan
from crossmodal.registry import Setup
from crossmodal.sources import stratified
from crossmodal.unpaired.batches import MatchedBatches
from crossmodal.unpaired.matching import Galleries, outputs, random_match
from crossmodal.unpaired.variants import Variant
from crossmodal.unpaired.views import Unpaired, chosen
from structkd.diagnostics import transport_cost
from structkd.matching.dataset import RematchSchedule

By = Literal["epoch", "pass"]
BYS: tuple[By, ...] = ("epoch", "pass")

_MATCH_SEED = 3_000_000
_SAMPLE = 500  # images whose transport cost is followed; the exact solver takes N^3
_SAMPLE_DRAW = 5


@dataclass(frozen=True)
class Rematching:
    """When a student chooses again, and by what.

    Attributes:
        schedule: the epochs.
        by: ``epoch`` is what the student predicted in training over the epochs so far, each image's
            latest, at the price of the search alone; ``pass`` a pass of its own over all images as
            they are, as published.
    """

    schedule: RematchSchedule
    by: By = "epoch"


@dataclass
class Trace:
    """What a student's matches cost over training; entry e is after e epochs.

    Attributes:
        transport: Wasserstein distance between the logits of a fixed sample of students and of
            their teacher images (each row centred: softmax knows no more).
        matched: root mean square distance of the matched pairs, the cost of that pairing as a plan.
        rematching: seconds of every re-matching, by the epoch before which it was: the search,
            and the student's pass over its images where it makes one.
        searching: the search's part of them.
        changed: share of the matches that it changed.
        in_use: different teacher images that it chose.
        watching: seconds spent on measuring the above, no part of training.
    """

    transport: list[float] = field(default_factory=list)
    matched: list[float] = field(default_factory=list)
    rematching: dict[int, float] = field(default_factory=dict)
    searching: dict[int, float] = field(default_factory=dict)
    changed: dict[int, float] = field(default_factory=dict)
    in_use: dict[int, int] = field(default_factory=dict)
    watching: float = 0.0


class Chooser:
    """Names every student's teacher image before an epoch, and keeps the trace."""

    def __init__(
        self,
        variant: Variant,
        model: nn.Module,
        views: Unpaired,
        galleries: Galleries,
        teacher_logits: Tensor,
        rematching: Rematching,
        config: Config,
    ) -> None:
        self.trace = Trace()
        self._variant, self._model, self._views = variant, model, views
        self._galleries, self._teacher_logits = galleries, teacher_logits
        epochs = rematching.schedule.epochs(config.epochs)
        self._epochs = set(epochs) if variant.dynamic else set()
        self._by = rematching.by
        self._device = config.device
        shape = len(views.poor), len(views.poor.classes)
        self._predicted = torch.full(shape, torch.nan, device=config.device)
        self._draws = torch.Generator().manual_seed(_MATCH_SEED + config.seed)
        labels = views.poor.labels.numpy()
        sample = torch.from_numpy(stratified(labels, _SAMPLE, draw=_SAMPLE_DRAW))
        self._sample = sample, chosen(views.poor, sample)
        self._ids = self._first()

    def __call__(self, epoch: int) -> Tensor:
        """The rows of the teacher images for this epoch, counted from 0."""
        if epoch in self._epochs:
            self._rematch(epoch)
        elif epoch and self._variant.first == "each epoch":
            self._ids = self._first()
        self.watch()
        return self._ids

    def observe(self, batch: Batch, logits: Tensor) -> None:
        """Remember what the student predicted at a step of training."""
        self._predicted[batch.index] = logits.float()

    def watch(self) -> None:
        """Measure what the matches cost at the student's present state."""
        started = time.perf_counter()
        rows, images = self._sample
        student = _centred(self._logits(images))
        teacher = _centred(self._teacher_logits[self._ids[rows]])
        self.trace.transport.append(float(transport_cost(student, teacher)))
        squared = (student - teacher).square().sum(1)
        self.trace.matched.append(float(squared.mean().sqrt()))
        self.trace.watching += time.perf_counter() - started

    def _first(self) -> Tensor:
        first, labels = self._variant.first, self._views.poor.labels
        if first == "semantic":
            return self._galleries.first(planned=self._variant.planned)
        if first == "itself":
            return torch.arange(len(labels))
        return random_match(labels, self._views.rich.labels, self._draws)

    def _rematch(self, epoch: int) -> None:
        started = time.perf_counter()
        own_pass = self._by == "pass"
        logits = self._logits(self._views.poor) if own_pass else self._predicted.cpu()
        predicted = time.perf_counter()
        # An epoch leaves its incomplete last batch out: an image never seen keeps its match.
        rows = logits.isfinite().all(1).nonzero()[:, 0]
        ids = self._ids.clone()
        ids[rows] = self._galleries.again(logits[rows], rows, planned=self._variant.planned)
        self.trace.searching[epoch] = time.perf_counter() - predicted
        self.trace.rematching[epoch] = time.perf_counter() - started
        self.trace.changed[epoch] = float((ids != self._ids).float().mean())
        self.trace.in_use[epoch] = len(ids.unique())
        self._ids = ids

    def _logits(self, images: ImagePairs) -> Tensor:
        self._model.eval()
        logits = outputs(self._model, images, self._views.poor, self._device)
        self._model.train()
        return logits


def alone(
    plan: Plan, model: nn.Module, views: Unpaired, config: Config, console: Console | None = None
) -> Outcome:
    """Train a student on the poor images and their labels."""
    itself = torch.arange(len(views.poor))
    batches = MatchedBatches(views.poor, views.poor, lambda epoch: itself, config)
    return engine.follow(
        plan,
        model,
        None,
        batches,
        example(views, config),
        setup(views, config),
        config,
        console=console,
    )


def distil(
    variant: Variant,
    plan: Plan,
    model: nn.Module,
    teacher: nn.Module,
    views: Unpaired,
    galleries: Galleries,
    rematching: Rematching,
    config: Config,
    console: Console | None = None,
) -> tuple[Outcome, Trace]:
    """Train a student on the poor images by a variant; ``seconds`` are without the watching."""
    rich = taught_from(variant, views)
    logits = galleries.teacher_logits
    if rich is not views.rich:
        logits = outputs(teacher.to(config.device).eval(), rich, views.rich, config.device)
    chooser = Chooser(variant, model, views, galleries, logits, rematching, config)
    batches = MatchedBatches(
        views.poor, rich, chooser, config, rich_statistics=views.rich.statistics
    )
    outcome = engine.follow(
        plan,
        model,
        teacher,
        batches,
        example(views, config),
        setup(views, config),
        config,
        observe=chooser.observe if variant.dynamic and rematching.by == "epoch" else None,
        console=console,
    )
    trace = chooser.trace
    seconds = outcome.seconds - trace.watching
    chooser.watch()
    return replace(outcome, seconds=seconds), trace


def taught_from(variant: Variant, views: Unpaired) -> ImagePairs:
    """The images that the teacher shows to the students of a variant."""
    if variant.first != "itself":
        return views.rich
    if views.originals is None:
        raise ValueError(
            f"variant {variant.title.format('...')!r} needs the student's images in the rich "
            "modality, which this data set does not have; leave it out"
        )
    return views.originals


def example(views: Unpaired, config: Config) -> Batch:
    """Two samples of either side, to build a criterion from."""
    rows = torch.arange(2)
    rich, poor = (
        Batches(chosen(pairs, rows), 2, statistics=pairs.statistics, device=config.device).take(
            rows
        )
        for pairs in (views.rich, views.poor)
    )
    return Batch(rich.clean, poor.poor, poor.target, poor.index)


def setup(views: Unpaired, config: Config) -> Setup:
    """What a criterion is told of the data."""
    count = len(views.poor)
    return Setup(len(views.poor.classes), count, min(config.batch_size, count))


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(1, keepdim=True)
