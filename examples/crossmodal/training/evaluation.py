"""Looking at a trained network: its accuracy, and its features for the figures."""

from __future__ import annotations

from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from crossmodal import models
from crossmodal.data import Batches, Images
from crossmodal.recipes import Recipe
from structkd import FeatureCapture

_STILL = Recipe(pad=0, flip=False)


def still(
    images: Images, like: Images, accelerator: Accelerator | None = None, *, workers: int = 0
) -> Batches:
    """All images as they are, normalised as ``like``; an accelerator's process takes its share."""
    device = "cpu" if accelerator is None else accelerator.device
    share = (0, 1)
    if accelerator is not None:
        share = (accelerator.process_index, accelerator.num_processes)
    shown = replace(images, like=like, targets=None)
    return Batches(_STILL, poor=shown, device=device, share=share, workers=workers)


@torch.no_grad()
def accuracy(
    network: nn.Module,
    images: Images,
    like: Images,
    accelerator: Accelerator,
    *,
    workers: int = 0,
) -> float:
    """In percent; ``like`` are the training images, whose statistics the network knows."""
    network.to(accelerator.device).eval()
    correct = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    for batch in still(images, like, accelerator, workers=workers).still():
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
    batches = still(images, like)
    with FeatureCapture(network, intermediate=names[max(len(names) - 2, 0)]) as capture:
        for batch in batches.still():
            feats = capture(batch.poor.to(device))
            if feats.embedding is None:
                raise ValueError(
                    f"{type(network).__name__} has no classifier to read embeddings at"
                )
            embeddings.append(feats.embedding.float().cpu())
            (stage,) = feats.intermediate
            pooled.append(stage.mean((2, 3) if stage.ndim == 4 else 1).float().cpu())
    return torch.cat(embeddings), torch.cat(pooled)
