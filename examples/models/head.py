"""What the networks here share: what timm's tools look for, and their entry in timm's registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn


class Head(nn.Module):
    """A network with named stages, an average pool and a classifier ``fc``."""

    num_classes: int
    num_features: int
    conv1: nn.Module
    bn1: nn.Module
    fc: nn.Module
    feature_info: list[dict[str, Any]]

    def add_stage(self, name: str, chs: int, reduction: int, module: nn.Module | None) -> None:
        """A stage where timm's tools look for it; None where the module is there already."""
        if module is not None:
            self.add_module(name, module)
        info = {"num_chs": chs, "reduction": reduction, "module": name}
        self.feature_info = [*getattr(self, "feature_info", []), info]

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new last layer; 0 classes leave the pooled embedding."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool must be 'avg' or None, got {global_pool!r}")
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the last map, by a stem and the stages."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in self.feature_info:
            x = self.get_submodule(stage["module"])(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Average pool, then the classifier unless ``pre_logits``."""
        x = x.mean((-2, -1))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def register(name: str, network: Callable[..., nn.Module], *given: Any) -> None:
    """Give timm a network by name; ``given`` comes before the options num_classes and in_chans."""

    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise ValueError("pretrained must be False: these networks have no published weights")
        for bookkeeping in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            options.pop(bookkeeping, None)  # timm hands it to every entry point
        return network(*given, **options)

    build.__name__ = build.__qualname__ = name
    register_model(build)
