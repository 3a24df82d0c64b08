"""Networks by name: timm's own, the papers' that it lacks (one file here a family), and smp's.

A file registers its networks with ``timm.models.register_model``; importing it is all it takes.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil

import timm
from torch import nn

from models.adapter import Normalised

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")

__all__ = ["Normalised", "create", "stage_names"]


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
    """Dotted names of a network's stages, first to last.

    A timm model's come from its ``feature_info``; an encoder's of segmentation_models_pytorch and
    its decoder's blocks from the modules of those names.
    """
    info = getattr(model, "feature_info", None)
    if not info and hasattr(model, "encoder") and hasattr(model, "decoder"):
        encoder = [f"encoder.{name}" for name in ("layer1", "layer2", "layer3", "layer4")]
        blocks = getattr(model.decoder, "blocks", [])
        decoder = [f"decoder.blocks.{n}" for n in range(len(blocks))]
        found = [name for name in encoder + decoder if _has(model, name)]
        if found:
            return found
    if not info:
        raise ValueError(
            f"{type(model).__name__} has no feature_info to name its stages; use another timm model"
        )
    return [stage["module"] for stage in info]


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True
