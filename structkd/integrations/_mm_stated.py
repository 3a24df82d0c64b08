"""What can be read off mmpretrain's classifiers, configs and data samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from structkd._devices import sent
from structkd.capture.backbone import INPUT, default_embedding, default_intermediate


def default_layers(classifier: nn.Module) -> dict[str, Any]:
    """Returns what to capture of an mmpretrain classifier where nothing else is asked for.

    Args:
        classifier: An ``ImageClassifier`` or a ``TimmClassifier``; any other has no defaults.
    """
    backbone, head = getattr(classifier, "backbone", None), getattr(classifier, "head", None)
    if backbone is None:  # TimmClassifier holds a timm model that has its head in it
        return _timm_layers("model", getattr(classifier, "model", None))
    found: dict[str, Any] = {}
    if isinstance(head, nn.Module):
        linear = [name for name, part in head.named_modules() if isinstance(part, nn.Linear)]
        found["logits"] = "head"
        if linear:
            found["embedding"] = f"head.{linear[-1]}{INPUT}"
    timm_model = getattr(backbone, "timm_model", None)
    if timm_model is not None:
        return {**_timm_layers("backbone.timm_model", timm_model), **found}
    stages = getattr(backbone, "res_layers", None)  # names, in the ResNet family
    if stages is None:
        parts = getattr(backbone, "stages", None)
        stages = [f"stages.{position}" for position in range(len(parts or ()))]
    if stages:
        found["intermediate"] = "backbone." + (stages[-2:-1] or stages)[0]
    return found


def _timm_layers(prefix: str, model: object) -> dict[str, Any]:
    if not isinstance(model, nn.Module) or not hasattr(model, "get_classifier"):
        return {}
    embedding = default_embedding(model)
    names = [f"{prefix}.{name}" for name in default_intermediate(model)]
    found: dict[str, Any] = {"logits": prefix}
    if embedding:
        found["embedding"] = f"{prefix}.{embedding}"
    if names:
        found["intermediate"] = names
    return found


def stated_size(classifier: nn.Module) -> tuple[int, int, int]:
    """Returns the channels that the first convolution takes, and the image size if it is stated."""
    backbone = getattr(classifier, "backbone", getattr(classifier, "model", classifier))
    first = next((part for part in backbone.modules() if isinstance(part, nn.Conv2d)), None)
    size = getattr(backbone, "img_size", None)
    if not isinstance(size, tuple | list | int):
        size = 224
    height, width = (size, size) if isinstance(size, int) else size
    return 3 if first is None else first.in_channels, int(height), int(width)


def names_weights(config: object) -> bool:
    """Tells whether a config names pretrained weights anywhere."""
    if isinstance(config, Mapping):
        if config.get("type") == "Pretrained" or config.get("pretrained"):
            return True
        return any(names_weights(value) for value in config.values())
    if isinstance(config, list | tuple):
        return any(names_weights(value) for value in config)
    return False


class Renormalise:
    """Takes images as the student's preprocessor gives them to what the teacher's would give."""

    def __init__(self, student: Any, teacher: nn.Module) -> None:
        other: Any = getattr(teacher, "data_preprocessor", None)
        self.pair = None
        if all(getattr(network, "_enable_normalize", False) for network in (student, other)):
            self.flips = _to_rgb(student) != _to_rgb(other)
            numbers = [student.mean, student.std, other.mean, other.std]
            if self.flips or not (
                torch.equal(numbers[0], numbers[2]) and torch.equal(numbers[1], numbers[3])
            ):
                self.pair = [number.tolist() for number in numbers]

    def __call__(self, images: Tensor) -> Tensor:
        if self.pair is None:
            return images
        mean_s, std_s, mean_t, std_t = (
            sent(torch.tensor(numbers, dtype=images.dtype), images.device) for numbers in self.pair
        )
        pixels = images * std_s + mean_s
        if self.flips:
            pixels = pixels.flip(1)
        return (pixels - mean_t) / std_t


def _to_rgb(preprocessor: Any) -> bool:
    """Tells whether a preprocessor turns the channels; those of mmengine have another word."""
    own = getattr(preprocessor, "_channel_conversion", False)
    return bool(getattr(preprocessor, "to_rgb", own))


def labels_of(data_samples: Sequence[Any]) -> Tensor | None:
    """Returns labels, one a sample, or the scores that Mixup leaves in their place, or nothing."""
    if all("gt_score" in sample for sample in data_samples):
        return torch.stack([sample.gt_score for sample in data_samples])
    if all("gt_label" in sample and len(sample.gt_label) == 1 for sample in data_samples):
        return torch.cat([sample.gt_label for sample in data_samples])
    return None


def index_of(data_samples: Sequence[Any], device: torch.device) -> Tensor | None:
    """Returns the positions of the samples in their data set, where all of them say theirs."""
    found = [sample.get("sample_idx") for sample in data_samples]
    if any(not isinstance(index, int) for index in found):
        return None
    return sent(torch.tensor(found), device)


def pairs_of(data_samples: Sequence[Any]) -> Tensor | None:
    """Returns which samples have a pair, ``(B,)`` bool, where any of them says so."""
    found = [sample.get("paired") for sample in data_samples]
    if all(given is None for given in found):
        return None
    return torch.tensor([given is None or bool(given) for given in found])
