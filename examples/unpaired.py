"""Nothing is paired: ``python examples/unpaired.py folders --rich DIR --poor DIR``.

The teacher learns from rich images, the students from poor images of other scenes: only the classes
are shared. There are two ways to distil all the same. The teacher's images *made poor* are pairs
that need not be collected. SemBridge (Wei et al., AAAI 2026) gives every student image a teacher
image of its class: by a matcher that learns from such pairs (SSM), by the student's own predictions
while it learns (DynM), and with a loss that aligns their features (SKA). The loop, the table and
what is kept are as in ``train.py``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch import Tensor, nn

import job
import models
import train
from data import APART, Batches, Images, MixedBatches, Views, open_views
from data.options import each_once
from data.sources import stratified
from recipe import near
from store import Checkpoint, Run
from structkd import (
    FeatureCapture,
    LagrangianPlanner,
    RematchSchedule,
    RetrievalGallery,
    SemanticMatcher,
    SemBridgeMatcher,
)
from structkd.diagnostics import transport_cost

EPSILON, CAPACITY = 0.05, 2.0  # of the planned matching, in units of the score
_MATCH_SEED = 3_000_000
_SAMPLE, _SAMPLE_DRAW = 500, 5  # images whose transport cost is followed; exact solvers take N^3
_SHOWN, _SHOWN_DRAW = 8, 32  # students whose teacher images are kept, to be looked at
_DENSE = "{type: DenseStructureLoss, weight: 5.0}"  # what won on validation images


@dataclass(frozen=True)
class Row:
    """A row of the table: where its pairs come from, and what is minimised over them.

    ``first`` is the first match: ``semantic`` is the matcher's, ``random`` a draw in the class,
    ``each epoch`` a new draw for every epoch, ``itself`` the student's own image in the rich
    modality, which exists for a reference only; empty for no match.
    """

    criterion: str | None = None  # over pairs made poor; "" for that of --criterion
    made: bool = False  # rich images made poor stand beside the own ones in every batch
    first: str = ""
    again: bool = False  # the student chooses again while it learns (DynM)
    aligned: bool = False  # SKA is added
    planned: bool = False  # by a plan that limits how many students a teacher image may serve


ROWS: Mapping[str, Row] = {
    "alone": Row(),
    "pairs made poor": Row(made=True),
    "pairs made poor + dense": Row(_DENSE, made=True),
    "pairs made poor + criterion": Row("", made=True),
    "random in class": Row(first="each epoch"),
    "matching": Row(first="semantic"),
    "matching, chosen again": Row(first="semantic", again=True),
    "SemBridge as published": Row(first="semantic", again=True, aligned=True),
    "SemBridge without SSM": Row(first="random", again=True, aligned=True),
    "SemBridge without DynM": Row(first="semantic", aligned=True),
    "SemBridge, planned": Row(first="semantic", again=True, aligned=True, planned=True),
    "own pairs (reference)": Row(first="itself"),
}


@dataclass(frozen=True)
class Options(train.Options):
    """Options of a job without pairs; a recipe is a YAML file of the same names."""

    # Rows of the table, by the names in unpaired.ROWS.
    rows: tuple[str, ...] = (
        "alone", "pairs made poor", "pairs made poor + dense", "SemBridge as published",
    )  # fmt: skip
    # Criterion over matches, and over free pairs in the row `pairs made poor + criterion`.
    criterion: tuple[str, ...] = ("{type: KDLoss, temperature: 4.0}",)
    # Over matches: weights of cross-entropy, criterion and alignment, as published.
    weights: tuple[float, float, float] = (0.3, 0.4, 0.003)
    # Let the criterion's weight over free pairs fall to 0 along a cosine.
    falling: bool = True
    # What makes the teacher's images poor; --view by default.
    pseudo: str = ""
    # The matcher's two encoders; the teacher's network by default.
    matcher: str = ""
    # Passes of the matcher.
    matcher_epochs: int = 100
    # The T of its loss.
    matcher_temperature: float = 1.0
    # What aligns, with the last of --weights.
    alignment: str = "ska"
    # Epochs, of 200, at which students choose again: the first, the step, its growth, how often.
    rematch: tuple[int, int, int, int] = (30, 30, 5, 4)
    # By what: a pass of their own over their images, as published, or, for less time, what they
    # predicted while they trained.
    rematch_by: Literal["pass", "training"] = "pass"

    def check(self) -> None:
        super().check()
        each_once(self, "rows")
        for name in self.rows:
            if name not in ROWS:
                hint = near(name, ROWS)
                raise ValueError(f"--rows: unknown {name!r}; {hint}known: {', '.join(ROWS)}")
            if name in self.wanted and self.labels is not None and ROWS[name].first:
                raise ValueError(
                    f"--labels: {name!r} matches every image by its label, also those without one; "
                    "fix: rows without matches"
                )
        if min(self.weights) < 0:
            raise ValueError(f"--weights must be at least 0, got {self.weights}")

    @property
    def wanted(self) -> tuple[str, ...]:
        """The rows; by default, if labels are few, only those without matches."""
        if self.labels is None or self.rows != type(self).rows:
            return self.rows
        return tuple(name for name in self.rows if not ROWS[name].first)

    @property
    def apart(self) -> bool:
        """Whether the two sides are sets of their own, not halves of a paired one."""
        return self.reader in APART

    @classmethod
    def adapted(cls, values: dict[str, Any]) -> dict[str, Any]:
        """A paired recipe for its halves: half the images, twice the passes."""
        if values.get("reader") in APART:
            return values
        doubled = {k: 2 * values[k] for k in ("epochs", "teacher_epochs") if values.get(k)}
        name = f"unpaired-{values['recipe'].removeprefix('unpaired-')}"
        return values | doubled | {"recipe": name}


@dataclass(frozen=True)
class Method(train.Method):
    """A row with its name; the parts have their weights."""

    row: Row = Row()

    @classmethod
    def named(cls, name: str, options: Options) -> Method:
        row, (task, weight, alignment) = ROWS[name], options.weights
        # A recipe's list may begin with the lone student, which is a row of its own here.
        own = next((m.parts for m in map(train.Method.of, options.criterion) if m.parts), ())
        if (row.first or row.criterion == "") and not own:
            told = f"--criterion: row {name!r} minimises one, got {', '.join(options.criterion)}"
            raise ValueError(f"{told}; fix: --criterion KDLoss, or other --rows")
        if not row.first:
            if row.criterion:
                own = train.Method.of(row.criterion).parts
            return cls(name, () if row.criterion is None else own, 1.0, row)
        parts = tuple(part | {"weight": weight * part.get("weight", 1.0)} for part in own)
        if row.aligned and alignment:
            aligning = train.Method.of(options.alignment).parts
            parts += tuple(part | {"weight": alignment} for part in aligning)
        return cls(name, parts, task, row)

    @property
    def described(self) -> dict[str, Any]:
        found = super().described | {"row": asdict(self.row)}
        return found | ({"plan": [EPSILON, CAPACITY]} if self.row.planned else {})


class Session(train.Session):
    """A job without pairs: a matcher besides the teacher, where a row needs one."""

    title = "nothing paired, accuracy on poor images"
    options: Options
    quality: Mapping[str, float] = {}  # of the matcher, where there is one

    def rows(self) -> list[Method]:
        return [Method.named(name, self.options) for name in self.options.wanted]

    def opened(self) -> Views:
        options = self.options
        views = open_views(options, unpaired=not options.apart, pseudo=options.pseudo)
        if views.originals is None and any(ROWS[name].first == "itself" for name in options.wanted):
            raise ValueError("--rows: 'own pairs (reference)' needs images that were made poor")
        return views.held(options)

    # The teacher's other work: stage 1, the matcher.

    @property
    def _needs_matcher(self) -> bool:
        return any(method.row.first == "semantic" for method in self.methods)

    @property
    def _matcher_options(self) -> Options:
        """How a matcher learns, as published."""
        return replace(
            self.options, epochs=self.options.matcher_epochs, batch_size=64, lr=1e-3,
            optimizer="adamw", weight_decay=1e-3, clip="none", ema=0.0, falling=False,
        )  # fmt: skip

    def matcher_training(self) -> train.Training:
        options = self._matcher_options
        torch.manual_seed(0)
        encoders, widths = [], []
        for images in (self.views.rich, self.views.pseudo):
            name = self.options.matcher or self.options.teacher
            network = models.create(name, num_classes=0, in_chans=images.shape[0])
            with torch.no_grad():
                widths.append(network.eval()(torch.zeros(1, *images.shape)).shape[1])
            encoders.append(network.train())
        matcher = SemanticMatcher(*encoders, *widths, temperature=options.matcher_temperature)
        # Poor versions of the same images, each cropped apart.
        batches = self.batches(
            options, poor=self.views.pseudo, rich=self.views.rich, together=False
        )

        def loss(model: nn.Module, batch: Any, share: float) -> tuple[None, dict[str, Tensor]]:
            return None, {"SSM": model(batch.rich, batch.poor)}

        return train.Training("matcher", matcher, matcher, batches, options, loss)

    def matcher_checkpoint(self) -> Checkpoint:
        options = self._matcher_options
        found = self.settings("teacher") | {
            "model": options.matcher or options.teacher,
            "pseudo": self.views.pseudo.fingerprint,
            "training": {name: getattr(options, name) for name in self.read},
            "temperature": options.matcher_temperature,
        }
        return Checkpoint(self.out, "matcher", found)

    def _shared_missing(self) -> list[train.Training]:
        found = super()._shared_missing()
        if self._needs_matcher and not self.matcher_checkpoint().path.exists():
            found.append(self.matcher_training())
        return found

    def train_shared(self) -> None:
        super().train_shared()
        if self._needs_matcher:
            self.matcher = self._shared(self.matcher_checkpoint(), self.matcher_training, "matcher")
            if not self.helper:
                device = PartialState().device
                self.quality = matcher_quality(self.matcher, self.views, self.galleries, device)
                self.show.say(self.described)

    @property
    def described(self) -> str:
        """The matcher's quality in a line."""
        told = (f"{told.replace(', %', '')} {value:g}" + " %" * told.endswith("%")
                for told, value in self.quality.items())  # fmt: skip
        return f"matcher: {', '.join(told)}"

    @property
    def _header(self) -> dict[str, Any]:
        return super()._header | ({"matcher": self.quality} if self.quality else {})

    @cached_property
    def galleries(self) -> Galleries:
        """The rich images as the matcher and the teacher see them."""
        return Galleries.of(
            getattr(self, "matcher", None), self.teacher, self.views, PartialState().device
        )

    # Stages 2 and 3: students.

    def student_training(self, method: Method, seed: int) -> train.Training:
        row, views, options = method.row, self.views, self.options
        if not (row.made or row.first):
            return super().student_training(method, seed)
        options = replace(options, falling=options.falling and row.made)
        network, label = self.network("student", seed), f"{method.label} seed {seed}"
        batches: Batches | MixedBatches
        if row.made:
            own = self.batches(options, poor=views.poor, seed=seed)
            made = self.batches(options, poor=views.pseudo, rich=views.rich, seed=seed)
            batches = MixedBatches.of(own, made)
        else:
            rich = views.originals if row.first == "itself" else views.rich
            batches = self.batches(options, poor=views.poor, rich=rich, together=False, seed=seed)
        if not method.parts:
            loss = train.supervised("poor", method.labels)
            return train.Training(label, network, network, batches, options, loss)
        model = self._distiller(method, network, batches, seed)
        loss = train.distilled(method.labels)
        training = train.Training(label, model, network, batches, options, loss)
        if row.first and hasattr(self, "teacher"):  # a look ahead has no teacher yet
            training.choose = Chooser(row, network, views, self.galleries, options, seed)
        return training

    def student_settings(self, method: Method, seed: int) -> dict[str, Any]:
        found, row, options = super().student_settings(method, seed), method.row, self.options
        found["falling"] = options.falling and row.made and bool(method.parts)
        found["labelled"] = None
        if row.first == "semantic":
            found["matcher"] = self.matcher_checkpoint().name
        if row.again:
            found["rematch"] = [*options.rematch, options.rematch_by]
        if row.made:
            found["made"] = self.views.pseudo.fingerprint
        return found

    def result(self, training: train.Training, network: nn.Module) -> Run:
        run = super().result(training, network)
        if (chooser := training.choose) is not None:
            run["seconds"] = round(training.seconds - chooser.trace.watching, 2)
            chooser.watch()
            run["trace"] = asdict(chooser.trace)
        return run


@torch.no_grad()
def outputs(network: Callable[[Tensor], Tensor], images: Images, device: torch.device) -> Tensor:
    """A network's outputs for all images without augmentation, in order, on the CPU."""
    batches = Batches(train.Options(), poor=replace(images, targets=None)).still()
    return torch.cat([network(batch.poor.to(device)).float().cpu() for batch in batches])


def features(network: nn.Module, images: Images, device: torch.device) -> dict[str, Tensor]:
    """A network's logits and embeddings of all images as they are, as the transport reads them.

    Logits have each row centred: softmax knows no more.
    """
    with FeatureCapture(network.to(device).eval(), intermediate=[]) as capture:

        def both(batch: Tensor) -> Tensor:
            found = capture(batch)
            return torch.cat([found.logits, found.embedding], 1)

        found = outputs(both, images, device)
    logits, embedding = found.tensor_split([len(images.classes)], dim=1)
    return {"logits": logits - logits.mean(1, keepdim=True), "features": embedding}


@dataclass(frozen=True)
class Galleries:
    """What is needed to choose teacher images; ids are rows of the rich images."""

    semantic: RetrievalGallery | None  # the rich images by the matcher's embedding
    queries: Tensor | None  # the student images' embeddings by the matcher, (N, D)
    embedded: Tensor | None  # the rich images' likewise, (M, D)
    logits: RetrievalGallery  # the rich images by the teacher's logits
    features: Mapping[str, Tensor]  # of the rich images: the teacher's logits and embeddings
    labels: Tensor  # the student images' classes
    teacher: nn.Module

    @classmethod
    def of(cls, matcher: Any, teacher: nn.Module, views: Views, device: torch.device) -> Galleries:
        """Embed both training sets once; neither the matcher nor the teacher changes any more."""
        seen = features(teacher, views.rich, device)
        by_logits = RetrievalGallery(len(views.rich.classes), metric="kl")
        by_logits.add(seen["logits"], views.rich.labels)
        semantic = queries = embedded = None
        if matcher is not None:
            matcher.to(device)
            embedded = outputs(matcher.embed_teacher, views.rich, device)
            # Poor images are normalised by their own statistics, as the made ones were by theirs:
            # two sensors need not agree on brightness.
            queries = outputs(matcher.embed_student, views.poor, device)
            semantic = RetrievalGallery(embedded.shape[1])
            semantic.add(embedded, views.rich.labels)
        return cls(semantic, queries, embedded, by_logits, seen, views.poor.labels, teacher)

    def first(self, *, planned: bool) -> Tensor:
        """The matcher's choice: nearest in class, or by a plan."""
        return _matcher(self.semantic, planned).match(self.queries, self.labels).ids

    def again(self, student_logits: Tensor, rows: Tensor, *, planned: bool) -> Tensor:
        """The choice of these student images, ``rows``, by what the student predicts for them."""
        return _matcher(self.logits, planned).match(student_logits, self.labels[rows]).ids


def _matcher(gallery: RetrievalGallery, planned: bool) -> SemBridgeMatcher:
    # A match is good long before its plan is exact, and the limits always hold.
    limits: dict[str, Any] = {"gradient": "none", "max_iterations": 100, "tolerance": 1e-3}
    planner = LagrangianPlanner(EPSILON, "capacity", **limits) if planned else None
    return SemBridgeMatcher(gallery, planner, capacity=CAPACITY)


def matcher_quality(
    matcher: Any, views: Views, galleries: Galleries, device: torch.device
) -> dict[str, float]:
    """How good the matcher is without the labels, by words that say what a number is.

    The class of the nearest of *all* rich images; where the own pair stands among all pairs, from
    1: the free ones, which it was trained on, and those that halves of a paired set hide.
    """
    keys, queries = galleries.embedded, galleries.queries
    nearest = torch.cat([(some @ keys.T).argmax(1) for some in queries.split(1024)])
    right = views.rich.labels[nearest] == views.poor.labels
    found = {"nearest of all is of the class, %": 100 * float(right.float().mean())}
    pairs = {"free": (outputs(matcher.embed_student, views.pseudo, device), keys)}
    if views.originals is not None:
        pairs["hidden"] = queries, outputs(matcher.embed_teacher, views.originals, device)
    for kind, (poor, rich) in pairs.items():
        ranks = pair_ranks(poor, rich)
        among = f"of {len(ranks)} {kind} pairs"
        found[f"the own is nearest {among}, %"] = 100 * float((ranks == 1).float().mean())
        found[f"its median rank {among}"] = float(ranks.median())
    return {told: round(value, 2) for told, value in found.items()}


def pair_ranks(queries: Tensor, keys: Tensor) -> Tensor:
    """For every row of ``queries`` the place, from 1, of that row of ``keys`` by inner product."""
    own = (queries * keys).sum(1)
    # Rounding differs between the two products: what is that near is the same.
    blocks = zip(queries.split(1024), own.split(1024), strict=True)
    return torch.cat([1 + (some @ keys.T > at[:, None] + 1e-6).sum(1) for some, at in blocks])


def random_match(labels: Tensor, teachers: Tensor, generator: torch.Generator) -> Tensor:
    """For every student (N,) a row of ``teachers`` (M,) of its class, drawn with replacement."""
    ids = torch.empty(len(labels), dtype=torch.int64)
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero()[:, 0]
        rows = (teachers == label).nonzero()[:, 0]
        ids[members] = rows[torch.randint(len(rows), (len(members),), generator=generator)]
    return ids


def rematch_epochs(published: Sequence[int], epochs: int) -> list[int]:
    """The published epochs, of 200, at the same shares of another number of epochs."""
    start, step, growth, times = published
    found = RematchSchedule(start, step, growth, times=times).epochs(200)
    return list(dict.fromkeys(max(1, round(epoch * epochs / 200)) for epoch in found))


@dataclass
class Trace:
    """What a student's matches cost over training; entry e is after e epochs.

    Costs are of a fixed sample of students and of their teacher images: by logits, each row
    centred, and by the embeddings, where both networks' have one width.
    """

    transport: list[float] = field(default_factory=list)  # their Wasserstein distance, by logits
    matched: list[float] = field(default_factory=list)  # root mean square of the matched pairs'
    transport_features: list[float] = field(default_factory=list)  # the same two by embeddings
    matched_features: list[float] = field(default_factory=list)
    students: list[int] = field(default_factory=list)  # a few, and by the epoch after the choice
    given: dict[int, list[int]] = field(default_factory=dict)  # their teacher images
    rematching: dict[int, float] = field(default_factory=dict)  # seconds, by the epoch after it
    changed: dict[int, float] = field(default_factory=dict)  # share of the matches
    in_use: dict[int, int] = field(default_factory=dict)  # different teacher images
    watching: float = 0.0  # seconds spent on measuring the above, no part of training


@dataclass(eq=False)
class Chooser:
    """Chooses every student's teacher image before an epoch, and keeps the trace."""

    row: Row
    student: nn.Module
    views: Views
    galleries: Galleries
    options: Options
    seed: int

    def __post_init__(self) -> None:
        self.device, labels = PartialState().device, self.views.poor.labels
        self.trace = Trace()
        self._epochs = (
            rematch_epochs(self.options.rematch, self.options.epochs) if self.row.again else []
        )
        # Of the images that stand beside the student's.
        self._seen = self.galleries.features
        if self.row.first == "itself":
            self._seen = features(self.galleries.teacher, self.views.originals, self.device)
        shape = len(labels), len(self.views.poor.classes)
        self._predicted = torch.full(shape, torch.nan, device=self.device)
        self._draws = torch.Generator().manual_seed(_MATCH_SEED + self.seed)
        self._sample = torch.from_numpy(stratified(labels.numpy(), _SAMPLE, draw=_SAMPLE_DRAW))
        self._ids = self._first()
        shown = stratified(labels.numpy(), min(_SHOWN, len(labels)), draw=_SHOWN_DRAW)
        self.trace.students, self.trace.given[0] = shown.tolist(), self._ids[shown].tolist()

    def __call__(self, epoch: int) -> Tensor:
        """The rows of the teacher images for this epoch, counted from 0."""
        if epoch in self._epochs:
            self._rematch(epoch)
        elif epoch and self.row.first == "each epoch":
            self._ids = self._first()
        self.watch()
        return self._ids

    @property
    def observes(self) -> bool:
        """Whether DynM reads what the student predicts while it trains."""
        return self.row.again and self.options.rematch_by == "training"

    def observe(self, index: Tensor, logits: Tensor) -> None:
        """Remember what the student predicted at a step of training."""
        self._predicted[index] = logits.float()

    def watch(self) -> None:
        """Measure what the matches cost at the student's present state."""
        started = time.perf_counter()
        images = self.views.poor.chosen(self._sample)
        seen = features(self.student, images, self.device)
        self.student.train()
        for name, suffix in (("logits", ""), ("features", "_features")):
            student, teacher = seen[name], self._seen[name][self._ids[self._sample]]
            if student.shape == teacher.shape:
                cost, matched = transport_cost(student, teacher), (student - teacher).square()
                getattr(self.trace, f"transport{suffix}").append(float(cost))
                getattr(self.trace, f"matched{suffix}").append(float(matched.sum(1).mean().sqrt()))
        self.trace.watching += time.perf_counter() - started

    def state_dict(self) -> dict[str, Any]:
        return {
            "ids": self._ids, "predicted": self._predicted, "draws": self._draws.get_state(),
            "trace": asdict(self.trace),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._ids, self._predicted = state["ids"], state["predicted"].to(self.device)
        self._draws.set_state(state["draws"])
        self.trace = Trace(**state["trace"])

    def _first(self) -> Tensor:
        labels = self.views.poor.labels
        if self.row.first == "semantic":
            return self.galleries.first(planned=self.row.planned)
        if self.row.first == "itself":
            return torch.arange(len(labels))
        return random_match(labels, self.views.rich.labels, self._draws)

    def _rematch(self, epoch: int) -> None:
        started = time.perf_counter()
        if self.observes:
            logits = self._predicted.cpu()
        else:
            logits = outputs(self.student.to(self.device).eval(), self.views.poor, self.device)
            self.student.train()
        # An epoch leaves its incomplete last batch out: an image never seen keeps its match.
        rows = logits.isfinite().all(1).nonzero()[:, 0]
        ids = self._ids.clone()
        ids[rows] = self.galleries.again(logits[rows], rows, planned=self.row.planned)
        self.trace.rematching[epoch] = time.perf_counter() - started
        self.trace.changed[epoch] = float((ids != self._ids).float().mean())
        self.trace.in_use[epoch] = len(ids.unique())
        self.trace.given[epoch] = ids[self.trace.students].tolist()
        self._ids = ids


def main(arguments: Sequence[str] | None = None) -> int:
    return job.main(Options, Session, arguments)


if __name__ == "__main__":
    sys.exit(main())
