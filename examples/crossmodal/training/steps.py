"""What is minimised at a step, as modules: a batch goes in, logits and named terms come out."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import structkd
from crossmodal import models
from crossmodal.data import NO_LABEL, Batch, Images
from crossmodal.methods import Plan, Setup
from structkd import Criterion, Features
from structkd.criteria.base import same_buffers
from structkd.matching.semantic import SemanticMatcher

Terms = dict[str, Tensor]
_CRITERION_SEED = 1_000_000  # apart from the students', so that these start alike in all methods


class Step(nn.Module):
    """One network's training step."""

    network: nn.Module  # what is trained, evaluated and stored
    criterion: Criterion | None = None  # what is trained beside it, and has epochs to count

    def forward(self, batch: Batch) -> tuple[Tensor | None, Terms]:
        """Logits, where there are any, and the terms whose sum is minimised."""
        raise NotImplementedError

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        return same_buffers(self)

    def fall(self, step: int, total: int) -> None:
        """Lets the weight of what is distilled fall, where anything is."""


class Supervised(Step):
    """A network on one modality and its labels, with weight 1."""

    def __init__(self, network: nn.Module, modality: str) -> None:
        super().__init__()
        self.network, self.modality = network, modality

    def forward(self, batch: Batch) -> tuple[Tensor, Terms]:
        images, target = getattr(batch, self.modality), batch.target
        if batch.pairs is not None:
            images, target, _ = mixed(batch)
        logits = self.network(images)
        return logits[: len(batch.target)], {"CE": cross_entropy(logits, target)}


class Distilled(Step):
    """A student on poor images, its frozen teacher on the rich ones.

    loss = supervision * CE(student, labels) + criterion(student's features, teacher's features)

    Of a mixed batch, the student sees own images and free pairs in one pass, and the teacher the
    pairs, and the matches of the own images where these have any.
    """

    soft: Tensor | None  # logits that teach the own images, a row for each

    def __init__(
        self, student: nn.Module, teacher: nn.Module, plan: Plan, example: Batch, setup: Setup,
        seed: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.supervision = plan.supervision
        self.register_buffer("soft", None, persistent=False)

        def build(feats_s: Features, feats_t: Features) -> Criterion:
            torch.manual_seed(_CRITERION_SEED + seed)
            return plan.build(feats_s, feats_t, setup)

        both = (example.pairs or example).poor, (example.pairs or example).rich
        layers, teacher_layers = (
            {"intermediate": plan.stages(models.stage_names(net))} for net in (student, teacher)
        )
        self.distiller = structkd.Distiller(
            student, teacher, build, example=both, layers=layers, teacher_layers=teacher_layers
        )

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        return [*same_buffers(self), "soft"]

    @property
    def network(self) -> nn.Module:  # type: ignore[override]
        return self.distiller.student

    @property
    def criterion(self) -> Criterion:  # type: ignore[override]
        return self.distiller.criterion

    def fall(self, step: int, total: int) -> None:
        self.distiller.set_weight(structkd.falling(step, total))

    def forward(self, batch: Batch) -> tuple[Tensor, Terms]:
        if batch.pairs is not None:
            return self._mixed(batch, batch.pairs)
        logits, terms = self.distiller(
            batch.poor, batch.target, x_teacher=batch.rich, index=batch.index
        )
        supervised = {"CE": self.supervision * cross_entropy(logits, batch.target)}
        return logits, supervised | terms

    def _mixed(self, batch: Batch, pairs: Batch) -> tuple[Tensor, Terms]:
        images, target, index = mixed(batch)
        own = torch.arange(len(batch.target))
        rows = {"paired": torch.arange(len(own), len(target))}
        if batch.rich is not None:
            rows |= {"x_matched": batch.rich, "matched": own}
        elif self.soft is not None:
            rows |= {"matches": Features(logits=self.soft[batch.index]), "matched": own}
        elif self.criterion.match is not None:  # by a criterion that reads no teacher image
            rows |= {"matched": own}
        logits, terms = self.distiller(images, target, pairs.rich, index=index, **rows)
        return logits[: len(own)], terms


class Matching(Step):
    """The matcher, on rich images and the poor ones made from them."""

    def __init__(self, matcher: SemanticMatcher) -> None:
        super().__init__()
        self.network = matcher

    def forward(self, batch: Batch) -> tuple[None, Terms]:
        return None, {"SSM": self.network(batch.rich, batch.poor)}


def mixed(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The student's images of a mixed batch, own ones first; their targets and rows."""
    assert batch.pairs is not None
    parts = batch, batch.pairs
    # torch's cat keeps the memory format of its first tensor.
    images = torch.cat([part.poor for part in parts])
    target, index = (torch.cat([getattr(p, name) for p in parts]) for name in ("target", "index"))
    return images, target, index


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The mean over all rows with a label, of all processes; 0 where no row has one.

    Every process gives its share of that mean times their number, as gradients are averaged.
    """
    count = (target != NO_LABEL).sum()
    world = 1
    if dist.is_available() and dist.is_initialized():
        world = dist.get_world_size()
        dist.all_reduce(count)
    total = F.cross_entropy(wide(logits), target, ignore_index=NO_LABEL, reduction="sum")
    return total * world / count.clamp_min(1)


def wide(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values if values.dtype == torch.float64 else values.float()


def fresh(name: str, images: Images, seed: int) -> nn.Module:
    """A network of that name for these images, its weights drawn by the seed."""
    torch.manual_seed(seed)
    return models.create(name, num_classes=len(images.classes), in_chans=images.shape[0])
