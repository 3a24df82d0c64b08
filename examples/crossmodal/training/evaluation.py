"""Looking at a trained network: its accuracy, and its features for the figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from crossmodal import models
from crossmodal.data import Batch, Batches, Images
from crossmodal.recipes import Recipe
from structkd import FeatureCapture
from structkd.diagnostics import predictable_share

_STILL = Recipe(pad=0, flip=False)


def still(images: Images, like: Images, **more: Any) -> Iterator[Batch]:
    """All images as they are, normalised as ``like``; ``more`` is for ``Batches``."""
    return Batches(_STILL, poor=replace(images, like=like, targets=None), **more).still()


@torch.no_grad()
def accuracy(
    network: nn.Module, images: Images, like: Images, accelerator: Accelerator, *, workers: int = 0
) -> float:
    """In percent; ``like`` are the training images, whose statistics the network knows."""
    network.to(accelerator.device).eval()
    correct = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    where = {"device": accelerator.device, "workers": workers}
    share = accelerator.process_index, accelerator.num_processes
    for batch in still(images, like, share=share, **where):
        correct += (network(batch.poor).argmax(1) == batch.target).sum()
    return 100.0 * int(accelerator.reduce(correct)) / len(images)


@torch.no_grad()
def features(
    network: nn.Module, images: Images, like: Images, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """Embeddings (N, D) and the mean-pooled last stage but one (N, C) of all images, on the CPU."""
    network.to(device).eval()
    names = models.stage_names(network)
    embeddings, pooled = [], []
    with FeatureCapture(network, intermediate=names[max(len(names) - 2, 0)]) as capture:
        for batch in still(images, like):
            feats = capture(batch.poor.to(device))
            embeddings.append(feats.embedding.float().cpu())
            (stage,) = feats.intermediate
            pooled.append(stage.mean((2, 3) if stage.ndim == 4 else 1).float().cpu())
    return torch.cat(embeddings), torch.cat(pooled)


@torch.no_grad()
def predictable(
    student: nn.Module, teacher: nn.Module, poor: Images, rich: Images, like: tuple[Images, Images]
) -> list[float]:
    """The share of the teacher's maps, stage by stage, that a linear map of the student's predicts.

    It is the mean over channels, in [0, 1], on pairs; ``like`` has what each side was trained on.
    """
    both = _maps(student, poor, like[0]), _maps(teacher, rich, like[1])
    shares = (predictable_share(*maps) for maps in zip(*both, strict=False))
    return [float(share.clamp_min(0).mean()) for share in shares]


def _maps(network: nn.Module, images: Images, like: Images) -> list[Tensor]:
    """The maps of all images, a tensor a stage."""
    names = models.stage_names(network)
    with FeatureCapture(network.cpu().eval(), intermediate=names) as capture:
        passes = [capture(batch.poor).intermediate for batch in still(images, like)]
    return [torch.cat(stage) for stage in zip(*passes, strict=True)]
