"""The matcher, and the teacher images that it or the student chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor, nn

from crossmodal import models
from crossmodal.batches import Batch, Batches
from crossmodal.config import Config, Outcome
from crossmodal.data import ImagePairs
from crossmodal.engine import minimise
from crossmodal.unpaired.batches import MatchedBatches
from crossmodal.unpaired.views import Unpaired
from structkd import LagrangianPlanner
from structkd.matching.gallery import RetrievalGallery
from structkd.matching.semantic import SemanticMatcher
from structkd.matching.sembridge import SemBridgeMatcher

# Of the planned matching, in units of the score: cosine, and KL at temperature 3.
EPSILON = 0.05
CAPACITY = 2.0
_EVALUATION_BATCH = 256


def new_matcher(encoder: str, views: Unpaired, config: Config) -> SemanticMatcher:
    """An untrained matcher: two encoders of one name, each for its modality's channels."""
    torch.manual_seed(config.seed)
    rich, poor = (
        models.create(encoder, num_classes=0, in_chans=pairs.clean.shape[1])
        for pairs in (views.rich, views.pseudo)
    )
    matcher = SemanticMatcher(rich, poor, _width(rich, views.rich), _width(poor, views.pseudo))
    models.on_device(matcher, config.device)
    return matcher


def train_matcher(
    matcher: SemanticMatcher, views: Unpaired, config: Config, console: Console | None
) -> Outcome:
    """Self-supervised, on the teacher's images and their poor versions: free pairs."""
    itself = torch.arange(len(views.rich))
    batches = MatchedBatches(views.pseudo, views.rich, lambda epoch: itself, config)

    def step(batch: Batch) -> tuple[None, dict[str, Tensor]]:
        return None, {"SSM": matcher(batch.clean, batch.poor)}

    return minimise("matcher", matcher, None, step, batches, config, console)


def outputs(
    network: Callable[[Tensor], Tensor], pairs: ImagePairs, statistics_of: ImagePairs, device: str
) -> Tensor:
    """What a network gives for all images as they are, in their order, on the CPU."""
    with torch.no_grad():
        found = [
            network(batch.poor).float().cpu()
            for batch in Batches(
                pairs, _EVALUATION_BATCH, statistics=statistics_of.statistics, device=device
            )
        ]
    return torch.cat(found)


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
    """All that a choice of teacher images reads.

    Attributes:
        semantic: the rich images by the matcher's embedding; ids are rows of ``rich``.
        queries: the student images' embeddings by the matcher, (N, D).
        logits: the rich images by the teacher's logits, same ids.
        teacher_logits: the same logits (M, K), by row.
        labels: the student images' classes.
    """

    semantic: RetrievalGallery
    queries: Tensor
    logits: RetrievalGallery
    teacher_logits: Tensor
    labels: Tensor

    def first(self, *, planned: bool) -> Tensor:
        """The matcher's choice: nearest in class, or by a plan."""
        return _matcher(self.semantic, planned).match(self.queries, self.labels).ids

    def again(self, student_logits: Tensor, rows: Tensor, *, planned: bool) -> Tensor:
        """The choice of these student images, ``rows``, by what the student predicts for them."""
        return _matcher(self.logits, planned).match(student_logits, self.labels[rows]).ids


def galleries(
    matcher: SemanticMatcher, teacher: nn.Module, views: Unpaired, device: str
) -> Galleries:
    """Embed both training sets once; neither the matcher nor the teacher changes any more."""
    teacher.to(device).eval()
    embedded = outputs(matcher.embed_teacher, views.rich, views.rich, device)
    # Poor images are normalised by their own statistics, as the pseudo ones were by theirs: two
    # sensors need not agree on brightness.
    queries = outputs(matcher.embed_student, views.poor, views.poor, device)
    logits = outputs(teacher, views.rich, views.rich, device)
    semantic = RetrievalGallery(embedded.shape[1])
    semantic.add(embedded, views.rich.labels)
    by_logits = RetrievalGallery(logits.shape[1], metric="kl")
    by_logits.add(logits, views.rich.labels)
    return Galleries(semantic, queries, by_logits, logits, views.poor.labels)


def _matcher(gallery: RetrievalGallery, planned: bool) -> SemBridgeMatcher:
    # A match is good long before a plan is exact, and keeps its limits all the same.
    planner = (
        LagrangianPlanner(EPSILON, "capacity", gradient="none", max_iterations=100, tolerance=1e-3)
        if planned
        else None
    )
    return SemBridgeMatcher(gallery, planner, capacity=CAPACITY)


def _width(network: nn.Module, pairs: ImagePairs) -> int:
    network.eval()
    with torch.no_grad():
        example = network(torch.zeros(1, *pairs.clean.shape[1:]))
    network.train()
    return int(example.shape[1])
