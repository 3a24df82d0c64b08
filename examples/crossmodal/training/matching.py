"""Without pairs: the matcher, and the teacher image that it or the student chooses."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from crossmodal import models
from crossmodal.data import Images, Views
from crossmodal.data.sources import stratified
from crossmodal.methods.variants import Variant
from crossmodal.recipes import Recipe
from crossmodal.training.evaluation import still
from structkd import (
    LagrangianPlanner,
    RematchSchedule,
    RetrievalGallery,
    SemanticMatcher,
    SemBridgeMatcher,
)
from structkd.diagnostics import transport_cost

# Of the planned matching, in units of the score: cosine, and KL at temperature 3.
EPSILON, CAPACITY = 0.05, 2.0
BYS = ("epoch", "pass")
_MATCH_SEED = 3_000_000
_SAMPLE, _SAMPLE_DRAW = 500, 5  # images whose transport cost is followed; exact solvers take N^3


def new_matcher(encoder: str, views: Views, seed: int) -> SemanticMatcher:
    """An untrained matcher: two encoders of one name, each for its modality's channels."""
    if views.pseudo is None:
        raise ValueError("a matcher needs rich images made poor, which this data set has not got")
    torch.manual_seed(seed)
    encoders, widths = [], []
    for images in (views.rich, views.pseudo):
        network = models.create(encoder, num_classes=0, in_chans=images.shape[0])
        with torch.no_grad():
            widths.append(network.eval()(torch.zeros(1, *images.shape)).shape[1])
        encoders.append(network.train())
    return SemanticMatcher(*encoders, *widths)


@torch.no_grad()
def outputs(network: Callable[[Tensor], Tensor], images: Images, device: torch.device) -> Tensor:
    """What a network gives for all images as they are, in their order, on the CPU."""
    batches = still(images, images.like or images)
    return torch.cat([network(batch.poor.to(device)).float().cpu() for batch in batches])


def random_match(labels: Tensor, teachers: Tensor, generator: torch.Generator) -> Tensor:
    """For every student (N,) a row of ``teachers`` (M,) of its class, drawn with replacement."""
    ids = torch.empty(len(labels), dtype=torch.int64)
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero()[:, 0]
        rows = (teachers == label).nonzero()[:, 0]
        ids[members] = rows[torch.randint(len(rows), (len(members),), generator=generator)]
    return ids


@dataclass(frozen=True)
class Galleries:
    """All that a choice of teacher images reads; ids are rows of the rich images."""

    semantic: RetrievalGallery  # the rich images by the matcher's embedding
    queries: Tensor  # the student images' embeddings by the matcher, (N, D)
    logits: RetrievalGallery  # the rich images by the teacher's logits
    teacher_logits: Tensor  # the same logits, (M, K)
    labels: Tensor  # the student images' classes
    teacher: nn.Module

    @classmethod
    def of(
        cls, matcher: SemanticMatcher, teacher: nn.Module, views: Views, device: torch.device
    ) -> Galleries:
        """Embed both training sets once; neither the matcher nor the teacher changes any more."""
        teacher.to(device).eval()
        matcher.to(device)
        embedded = outputs(matcher.embed_teacher, views.rich, device)
        # Poor images are normalised by their own statistics, as the pseudo ones were by theirs: two
        # sensors need not agree on brightness.
        queries = outputs(matcher.embed_student, views.poor, device)
        logits = outputs(teacher, views.rich, device)
        semantic = RetrievalGallery(embedded.shape[1])
        semantic.add(embedded, views.rich.labels)
        by_logits = RetrievalGallery(logits.shape[1], metric="kl")
        by_logits.add(logits, views.rich.labels)
        return cls(semantic, queries, by_logits, logits, views.poor.labels, teacher)

    def first(self, *, planned: bool) -> Tensor:
        """The matcher's choice: nearest in class, or by a plan."""
        return _matcher(self.semantic, planned).match(self.queries, self.labels).ids

    def again(self, student_logits: Tensor, rows: Tensor, *, planned: bool) -> Tensor:
        """The choice of these student images, ``rows``, by what the student predicts for them."""
        return _matcher(self.logits, planned).match(student_logits, self.labels[rows]).ids


def _matcher(gallery: RetrievalGallery, planned: bool) -> SemBridgeMatcher:
    # A match is good long before a plan is exact, and keeps its limits all the same.
    limits: dict[str, Any] = {"gradient": "none", "max_iterations": 100, "tolerance": 1e-3}
    planner = LagrangianPlanner(EPSILON, "capacity", **limits) if planned else None
    return SemBridgeMatcher(gallery, planner, capacity=CAPACITY)


@dataclass(frozen=True)
class Rematching:
    """When a student chooses again, and by what.

    ``epoch`` is what the student predicted in training over the epochs so far, each image's latest,
    at the price of the search alone; ``pass`` a pass of its own over all images, as published.
    """

    schedule: RematchSchedule
    by: str = "epoch"

    @classmethod
    def scaled(cls, published: RematchSchedule, epochs: int, by: str = "epoch") -> Rematching:
        """Published epochs, which are of 200, at the same places of another number of epochs."""
        moved = (published.start, published.step, published.growth)
        start, step, growth = (round(value * epochs / 200) for value in moved)
        made = RematchSchedule(max(1, start), max(1, step), growth, times=published.times)
        return cls(made, by)


@dataclass
class Trace:
    """What a student's matches cost over training; entry e is after e epochs.

    Logits are of a fixed sample of students and of their teacher images, each row centred: softmax
    knows no more.
    """

    transport: list[float] = field(default_factory=list)  # their Wasserstein distance
    matched: list[float] = field(default_factory=list)  # root mean square of the matched pairs'
    rematching: dict[int, float] = field(default_factory=dict)  # seconds, by the epoch after it
    searching: dict[int, float] = field(default_factory=dict)  # the search's part of them
    changed: dict[int, float] = field(default_factory=dict)  # share of the matches
    in_use: dict[int, int] = field(default_factory=dict)  # different teacher images
    watching: float = 0.0  # seconds spent on measuring the above, no part of training


@dataclass(eq=False)
class Chooser:
    """Names every student's teacher image before an epoch, and keeps the trace."""

    variant: Variant
    student: nn.Module
    views: Views
    galleries: Galleries
    logits: Tensor  # the teacher's, of the images that stand beside the student's
    rematching: Rematching
    recipe: Recipe
    device: torch.device

    def __post_init__(self) -> None:
        dynamic, labels = self.variant.dynamic, self.views.poor.labels
        self.trace = Trace()
        self._epochs = self.rematching.schedule.epochs(self.recipe.epochs) if dynamic else ()
        shape = len(labels), len(self.views.poor.classes)
        self._predicted = torch.full(shape, torch.nan, device=self.device)
        self._draws = torch.Generator().manual_seed(_MATCH_SEED + self.recipe.seed)
        self._sample = torch.from_numpy(stratified(labels.numpy(), _SAMPLE, draw=_SAMPLE_DRAW))
        self._ids = self._first()
        self.wants_logits = dynamic and self.rematching.by == "epoch"

    def __call__(self, epoch: int) -> Tensor:
        """The rows of the teacher images for this epoch, counted from 0."""
        if epoch in self._epochs:
            self._rematch(epoch)
        elif epoch and self.variant.first == "each epoch":
            self._ids = self._first()
        self.watch()
        return self._ids

    def observe(self, index: Tensor, logits: Tensor) -> None:
        """Remember what the student predicted at a step of training."""
        self._predicted[index] = logits.float()

    def watch(self) -> None:
        """Measure what the matches cost at the student's present state."""
        started = time.perf_counter()
        student = _centred(self._logits_of(self.views.poor.chosen(self._sample)))
        teacher = _centred(self.logits[self._ids[self._sample]])
        self.trace.transport.append(float(transport_cost(student, teacher)))
        squared = (student - teacher).square().sum(1)
        self.trace.matched.append(float(squared.mean().sqrt()))
        self.trace.watching += time.perf_counter() - started

    def state_dict(self) -> dict[str, Any]:
        return {
            "ids": self._ids,
            "predicted": self._predicted,
            "draws": self._draws.get_state(),
            "trace": asdict(self.trace),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._ids, self._predicted = state["ids"], state["predicted"].to(self.device)
        self._draws.set_state(state["draws"])
        self.trace = Trace(**state["trace"])

    def _first(self) -> Tensor:
        first, labels = self.variant.first, self.views.poor.labels
        if first == "semantic":
            return self.galleries.first(planned=self.variant.planned)
        if first == "itself":
            return torch.arange(len(labels))
        return random_match(labels, self.views.rich.labels, self._draws)

    def _rematch(self, epoch: int) -> None:
        started = time.perf_counter()
        own_pass = self.rematching.by == "pass"
        logits = self._logits_of(self.views.poor) if own_pass else self._predicted.cpu()
        predicted = time.perf_counter()
        # An epoch leaves its incomplete last batch out: an image never seen keeps its match.
        rows = logits.isfinite().all(1).nonzero()[:, 0]
        ids = self._ids.clone()
        ids[rows] = self.galleries.again(logits[rows], rows, planned=self.variant.planned)
        self.trace.searching[epoch] = time.perf_counter() - predicted
        self.trace.rematching[epoch] = time.perf_counter() - started
        self.trace.changed[epoch] = float((ids != self._ids).float().mean())
        self.trace.in_use[epoch] = len(ids.unique())
        self._ids = ids

    def _logits_of(self, images: Images) -> Tensor:
        logits = outputs(self.student.eval(), images, self.device)
        self.student.train()
        return logits


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(1, keepdim=True)
