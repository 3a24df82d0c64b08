"""Networks by timm's names: timm's own, and the papers' that it lacks, one file here a family.

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

    Raises:
        ValueError: no such model; the message has the near names.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)
        hint = f"near names: {', '.join(near)}" if near else "timm.list_models() lists the names"
        raise ValueError(f"unknown model {name!r}; {hint}")
    model: nn.Module = timm.create_model(name, num_classes=num_classes, in_chans=in_chans)
    return model


def stage_names(model: nn.Module) -> list[str]:
    """Dotted names of a timm model's stages, first to last, from its ``feature_info``."""
    info = getattr(model, "feature_info", None)
    if not info:
        raise ValueError(
            f"{type(model).__name__} has no feature_info to name its stages; use another timm model"
        )
    return [stage["module"] for stage in info]
