"""What is minimised at a step, as modules: a batch goes in, logits and named terms come out."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import structkd
from crossmodal import models
from crossmodal.data import NO_LABEL, Batch, Images
from crossmodal.methods import Plan, Setup
from structkd import Criterion, SemanticMatcher
from structkd.criteria.base import same_buffers

Terms = dict[str, Tensor]
LABELS = "CE"  # the term whose weight never falls
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
        return logits[: len(batch.target)], {LABELS: cross_entropy(logits, target)}


class Distilled(Step):
    """A student on poor images, its frozen teacher on the rich ones.

    loss = supervision * CE(student, labels) + criterion(student's features, teacher's features)

    Of a mixed batch, the student sees own images and free pairs in one pass, and the teacher the
    pairs alone.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, plan: Plan, example: Batch, setup: Setup,
        seed: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.supervision = plan.supervision
        both = (example.pairs or example).poor, (example.pairs or example).rich
        stages = [plan.stages(models.stage_names(net)) for net in (student, teacher)]
        layers, teacher_layers = ({"intermediate": names} for names in stages)
        setup = replace(setup, stages=min(map(len, stages)))
        torch.manual_seed(_CRITERION_SEED + seed)
        self.distiller = structkd.Distiller(
            student, teacher, plan.build(setup), example=both,
            layers=layers, teacher_layers=teacher_layers,
        )  # fmt: skip

    @property
    def network(self) -> nn.Module:  # type: ignore[override]
        return self.distiller.student

    @property
    def criterion(self) -> Criterion:  # type: ignore[override]
        return self.distiller.criterion

    def forward(self, batch: Batch) -> tuple[Tensor, Terms]:
        images, target, index = batch.poor, batch.target, batch.index
        rich, paired = batch.rich, None
        if batch.pairs is not None:
            images, target, index = mixed(batch)
            rich, paired = batch.pairs.rich, torch.arange(len(batch.target), len(target))
        logits, terms = self.distiller(images, target, x_teacher=rich, paired=paired, index=index)
        supervised = {LABELS: self.supervision * cross_entropy(logits, target)}
        return logits[: len(batch.target)], supervised | terms


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
