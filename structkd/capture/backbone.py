"""What can be read off a network: wrappers, stages, classifier, prefix tokens, likely layers."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

INPUT = ":input"
_COMPILED = "OptimizedModule"  # torch.compile's wrapper
# Where a wrapper keeps the network.
_WRAPPERS = {
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    _COMPILED: "_orig_mod",
}
# Wrappers of layers give what the layer in them gives: torch's activation checkpointing is one.
_LAYER_WRAPPERS = {**_WRAPPERS, "CheckpointWrapper": "_checkpoint_wrapped_module"}


def unwrapped(module: nn.Module) -> nn.Module:
    """Returns the network inside DDP, FSDP and torch.compile wrappers."""
    return _nested(module)[-1]


def is_compiled(module: nn.Module) -> bool:
    """Tells whether a network or a part of it was given to ``torch.compile``."""
    return any(
        type(part).__name__ == _COMPILED or part._compiled_call_impl is not None
        for part in module.modules()
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


def layers_at(network: nn.Module, name: str) -> list[nn.Module]:
    """Returns the layer of a dotted name and the layers in its wrappers, none if there is none.

    Wrappers that were put around a layer later, ``net.layer2 = torch.compile(net.layer2)``, are
    looked through.
    """
    found = [network]
    for part in name.split("."):
        inside = next((m._modules[part] for m in found if m._modules.get(part) is not None), None)
        if inside is None:
            return []
        found = _nested(inside, _LAYER_WRAPPERS)
    return found


def runs(layer: nn.Module) -> bool:
    """Tells whether a layer has a forward pass; a list or dict of modules has none."""
    return forward_of(layer) is not nn.Module.forward


def forward_of(layer: nn.Module) -> Any:
    """Returns the function in a layer's class, which a scripted layer does not let be read."""
    return inspect.getattr_static(type(layer), "forward", None)


def _nested(module: nn.Module, wrappers: dict[str, str] = _WRAPPERS) -> list[nn.Module]:
    """Returns a module and what its wrappers hold, from the outside in: the network is last."""
    found = [module]
    while attribute := wrappers.get(type(found[-1]).__name__):
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
    info: Any = getattr(module, "feature_info", None)
    if hasattr(info, "get_dicts"):  # of features_only, which cuts off what is not asked for
        info = info.get_dicts()
    entries = getattr(info, "info", info)
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        return []
    return [
        Stage(_name_in(module, entry["module"]), entry.get("num_chs"), entry.get("reduction"))
        for entry in entries
        if isinstance(entry, dict) and entry.get("module")
    ]


def _name_in(module: nn.Module, name: str) -> str:
    """Returns a stage's name in a timm network, which ``features_only`` flattens or moves."""
    names = (name, name.replace(".", "_"), f"model.{name}")
    return next((n for n in names if layers_at(module, n)), name)


def all_stages(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of all stages, shallow to deep, by the conventions of a network's package.

    Those are timm's ``feature_info``; smp's ``encoder`` and ``decoder.blocks``; the layers of
    torchvision's segmentation ``backbone``; the ``stages`` of transformers' SegFormer.
    """
    found = [stage.name for stage in stages(module)]
    for prefix in () if found else ("encoder", "encoder.model", "backbone", "segformer"):
        part = layers_at(module, prefix)
        if not part:
            continue
        told = getattr(part[0], "return_layers", {})  # of torchvision's IntermediateLayerGetter
        found = [stage.name for stage in stages(part[0])] or [
            name
            for name, child in part[0].named_children()
            if name in told or re.fullmatch(r"layer\d", name)
        ]
        if not found:
            several = getattr(part[0], "stages", nn.ModuleList())
            found = [f"stages.{name}" for name, _ in several.named_children()]
        if found:
            found = [f"{prefix}.{name}" for name in found]
            break
    blocks = layers_at(module, "decoder.blocks") if found else []
    found += [f"decoder.blocks.{name}" for part in blocks for name, _ in part.named_children()]
    return tuple(found)


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


def likely_layers(module: nn.Module) -> dict[str, str | list[str]]:
    """Guesses the layers that a user would name, for an error to suggest.

    The logits are those of the last linear layer outside the blocks, the embedding is what goes
    into it (or into a last 1x1 convolution), and the intermediate layers are the network's stages:
    the largest group of children of one class that hold convolutions or attention.

    Args:
        module: Any network.

    Returns:
        Names by field, shallow to deep for ``intermediate``; a field without a guess is left out.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        ...                     nn.Flatten(), nn.Linear(8, 10))
        >>> likely_layers(net)
        {'embedding': '4:input', 'logits': '4', 'intermediate': ['0']}
    """
    network = unwrapped(module)
    blocks = _stages_in(network, "", _is_spatial)
    outside = [
        (name, layer)
        for name, layer in network.named_modules()
        if name and not any(name == block or name.startswith(block + ".") for block in blocks)
    ]
    linear = [name for name, layer in outside if isinstance(layer, nn.Linear)]
    usual = [name for name in linear if _is_usual_head(name)]
    by_timm = default_embedding(network)
    found: dict[str, str | list[str]] = {}
    if by_timm or linear:
        head = by_timm.removesuffix(INPUT) if by_timm else (usual or linear)[-1]
        found = {"embedding": head + INPUT, "logits": head}
        if not blocks:  # a network of linear layers
            blocks = _stages_in(network, "", lambda layer: isinstance(layer, nn.Linear))
            blocks = [name for name in blocks if name != head and not head.startswith(name + ".")]
    else:
        convs = [(name, layer) for name, layer in network.named_modules() if _is_conv(layer)]
        if len(convs) > 1 and set(convs[-1][1].kernel_size) == {1}:
            head = convs[-1][0]
            found = {"embedding": head + INPUT}
            blocks = [name for name in blocks if name != head]
    return found | ({"intermediate": blocks} if blocks else {})


def _is_usual_head(name: str) -> bool:
    usual = any(word in name for word in ("fc", "head", "classif", "logit", "linear"))
    return usual and "aux" not in name


def _is_conv(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.conv._ConvNd)


def _is_spatial(layer: nn.Module) -> bool:
    return _is_conv(layer) or "attention" in type(layer).__name__.lower()


def _stages_in(module: nn.Module, prefix: str, is_kind: Callable[[nn.Module], bool]) -> list[str]:
    """Returns the children that are the stages of a module, by the layers of a kind in them."""
    groups: dict[type[nn.Module], dict[str, int]] = {}
    children: dict[str, nn.Module] = {}
    for name, child in _running_children(module, prefix):
        size = sum(is_kind(layer) for layer in child.modules())
        if size:
            children[name] = child
            groups.setdefault(type(child), {})[name] = size
    if not groups:
        return []
    group = max(groups.values(), key=lambda sizes: sum(sizes.values()))
    # A stem of one convolution is no stage beside stages of many.
    names = [name for name, size in group.items() if size >= min(2, max(group.values()))]
    if len(names) > 1:
        return names
    only = children[names[0]]
    inside = _stages_in(only, names[0] + ".", is_kind)
    is_container = isinstance(only, nn.Sequential)
    return inside if len(inside) > 1 or (inside and is_container) else names


def _running_children(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields a module's children; those of a list or dict of modules, which never runs itself."""
    for name, child in module.named_children():
        if not runs(child):
            yield from _running_children(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def prefix_tokens(module: nn.Module) -> int:
    """Returns how many class, distillation and register tokens go before a timm ViT's patches."""
    for part in (module, getattr(module, "model", None)):  # where features_only keeps it
        count = getattr(part, "num_prefix_tokens", None)
        if isinstance(count, int):
            return count
    return 0


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
