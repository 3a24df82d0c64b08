"""What a network says of itself: timm's stages and classifier, prefix tokens, patch grids."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

INPUT = ":input"
_COMPILED = "OptimizedModule"  # torch.compile's wrapper
# Where a wrapper keeps the network.
_WRAPPERS = {
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    _COMPILED: "_orig_mod",
}


def unwrapped(module: nn.Module) -> nn.Module:
    """Returns the network inside DDP, FSDP and torch.compile wrappers."""
    return _nested(module)[-1]


def is_compiled(module: nn.Module) -> bool:
    """Tells whether a network, or the network in a wrapper, was given to ``torch.compile``."""
    return any(
        type(part).__name__ == _COMPILED or part._compiled_call_impl is not None
        for part in _nested(module)
    )


def averaging_wrapper(module: nn.Module) -> nn.Module | None:
    """Returns the DDP or FSDP wrapper around a network, which averages its gradients, if any."""
    for part in _nested(module)[:-1]:
        if type(part).__name__ != _COMPILED:
            return part
    return None


def averages_gradients(module: nn.Module) -> bool:
    """Tells whether a network is wrapped or sharded so that processes average its gradients."""
    # fully_shard wraps nothing: it makes a class of its own of the network's, FSDPResNet.
    sharded = type(unwrapped(module)).__name__.startswith("FSDP")
    return sharded or averaging_wrapper(module) is not None


def _nested(module: nn.Module) -> list[nn.Module]:
    """Returns a module and what its wrappers hold, from the outside in: the network is last."""
    found = [module]
    while attribute := _WRAPPERS.get(type(found[-1]).__name__):
        found.append(getattr(found[-1], attribute))
    return found


@dataclass(frozen=True)
class Stage:
    """One entry of timm's ``feature_info``: a layer, its channels, its stride."""

    name: str
    channels: int | None
    reduction: int | None


def stages(module: nn.Module) -> list[Stage]:
    """Returns a timm model's stages, shallow to deep, nothing for others."""
    info = getattr(module, "feature_info", None)
    entries = getattr(info, "info", info)
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        return []
    return [
        Stage(entry["module"], entry.get("num_chs"), entry.get("reduction"))
        for entry in entries
        if isinstance(entry, dict) and entry.get("module")
    ]


def default_intermediate(module: nn.Module) -> tuple[str, ...]:
    """Returns the last stage but one of a timm model (the only one of one)."""
    names = [stage.name for stage in stages(module)]
    return tuple(names[-2:-1] or names)


def default_embedding(module: nn.Module) -> str | None:
    """Returns the input of a timm model's classifier, of the first where it has several."""
    get_classifier = getattr(module, "get_classifier", None)
    if not callable(get_classifier):
        return None
    classifier = get_classifier()
    if isinstance(classifier, tuple | list):
        classifier = classifier[0] if classifier else None
    names = [name for name, layer in module.named_modules() if layer is classifier and name]
    return names[0] + INPUT if names else None


def prefix_tokens(module: nn.Module) -> int:
    """Returns how many class, distillation and register tokens go before a timm ViT's patches."""
    count = getattr(module, "num_prefix_tokens", 0)
    return count if isinstance(count, int) else 0


def says_channels_last(module: nn.Module) -> bool:
    """Tells whether a timm model's maps are ``(B, H, W, C)``."""
    return str(getattr(module, "output_fmt", "")).endswith("NHWC")


def patch_grids(module: nn.Module, image: tuple[int, int] | None) -> Iterator[tuple[int, int]]:
    """Yields the grids that a network's patches may form, by its strides and by what it says.

    Args:
        module: The network.
        image: Height and width of the image that went in, where it was one.
    """
    reductions = dict.fromkeys(stage.reduction for stage in stages(module) if stage.reduction)
    if image is not None:
        for reduction in reductions:
            yield math.ceil(image[0] / reduction), math.ceil(image[1] / reduction)
            yield image[0] // reduction, image[1] // reduction
    grid = getattr(getattr(module, "patch_embed", None), "grid_size", None)
    if isinstance(grid, tuple | list) and len(grid) == 2:
        yield int(grid[0]), int(grid[1])
