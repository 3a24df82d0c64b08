"""What timm's tools look for in a network, for those that are registered here."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Head:
    """What timm's tools look for behind the features: an average pool and a classifier ``fc``."""

    num_classes: int
    num_features: int
    fc: nn.Module

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new last layer; ``global_pool`` is only ever the average here."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool must be 'avg' or None, got {global_pool!r}")
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Average pool, then the classifier unless ``pre_logits``."""
        x = x.mean((-2, -1))
        return x if pre_logits else self.fc(x)


def own_options(pretrained: bool, options: dict[str, Any]) -> dict[str, Any]:
    """The options that are the network's; timm hands every entry point its bookkeeping as well."""
    if pretrained:
        raise ValueError("pretrained must be False: these networks have no published weights")
    bookkeeping = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    return {key: value for key, value in options.items() if key not in bookkeeping}
