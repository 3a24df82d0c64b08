"""Networks by name: timm's own, the papers' that it lacks (one file here a family), and smp's.

A file registers its networks with ``timm.models.register_model`` when it is imported.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil

import timm
import torch.nn.functional as F
from torch import Tensor, nn

import structkd
from models.adapter import Normalised

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")

__all__ = ["Normalised", "create", "padded", "stage_names"]


def create(name: str, *, num_classes: int, in_chans: int) -> nn.Module:
    """``timm.create_model`` for any of its names or ours, from scratch.

    ``Unet/resnet18`` is a network of segmentation_models_pytorch: architecture and encoder.

    Raises:
        ValueError: no such model; the message has the near names.
    """
    if "/" in name:
        return _segmentation(name, num_classes, in_chans)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)
        hint = f"near names: {', '.join(near)}" if near else "timm.list_models() lists the names"
        raise ValueError(f"unknown model {name!r}; {hint}")
    model: nn.Module = timm.create_model(name, num_classes=num_classes, in_chans=in_chans)
    return model


def _segmentation(name: str, num_classes: int, in_chans: int) -> nn.Module:
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise ValueError(
            f"model {name!r} is one of segmentation_models_pytorch, which is not installed; fix: "
            "pip install segmentation-models-pytorch"
        ) from error
    architecture, _, encoder = name.partition("/")
    try:
        model: nn.Module = smp.create_model(
            architecture, encoder, encoder_weights=None, in_channels=in_chans, classes=num_classes
        )
    except KeyError as error:
        told = error.args[0] if error.args else error
        raise ValueError(f"unknown model {name!r}: {told}") from error
    return model


def stage_names(model: nn.Module) -> list[str]:
    """Dotted names of a network's stages, first to last, as timm or its own package lists them.

    Raises:
        ValueError: no stages are known.
    """
    try:
        with structkd.FeatureCapture(model, intermediate="all", embedding="") as capture:
            return list(capture.intermediate)
    except ValueError as error:
        raise ValueError(f"{type(model).__name__} has no known stages: {error}") from error


def padded(network: nn.Module, images: Tensor) -> Tensor:
    """Logits of whole images of any size: networks for pixels halve it up to five times.

    The border is mirrored to a multiple of 32, and cut off again.
    """
    height, width = images.shape[-2:]
    more = [-width % 32, -height % 32]
    if any(more):
        images = F.pad(images, (0, more[0], 0, more[1]), mode="reflect")
    logits = network(images)
    return logits[..., :height, :width]
