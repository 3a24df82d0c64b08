"""Looking at a trained network: its accuracy, and its features for the figures."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from crossmodal import models
from crossmodal.batches import Batches
from crossmodal.data import ImagePairs, Statistics
from crossmodal.stages import stages
from structkd import FeatureCapture

Modality = Literal["clean", "poor"]


def evaluate(
    model: nn.Module,
    pairs: ImagePairs,
    *,
    modality: Modality,
    statistics: Statistics,
    device: str = "cpu",
) -> float:
    """Accuracy in percent on one modality; ``statistics`` are those of the training images."""
    model.to(device).eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    with torch.no_grad():
        for batch in Batches(pairs, 256, statistics=statistics, device=device):
            images = batch.clean if modality == "clean" else batch.poor
            correct += (model(images).argmax(1) == batch.target).sum()
    return 100.0 * int(correct) / len(pairs)


def capture_features(
    model: nn.Module,
    pairs: ImagePairs,
    *,
    modality: Modality,
    statistics: Statistics,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Embeddings (N, D) and the mean-pooled last stage but one (N, C) of all images, on the CPU."""
    model.to(device).eval()
    names = stages(models.stage_names(model), "one")
    embeddings, pooled = [], []
    with FeatureCapture(model, intermediate=names) as capture, torch.no_grad():
        for batch in Batches(pairs, 256, statistics=statistics, device=device):
            feats = capture(batch.clean if modality == "clean" else batch.poor)
            if feats.embedding is None:
                raise ValueError(f"{type(model).__name__} has no classifier to read embeddings at")
            embeddings.append(feats.embedding.cpu())
            (stage,) = feats.intermediate
            pooled.append(stage.mean((2, 3) if stage.ndim == 4 else 1).cpu())
    return torch.cat(embeddings), torch.cat(pooled)
