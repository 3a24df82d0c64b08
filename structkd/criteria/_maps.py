"""Maps, tokens and rows brought to one form, and paired, with errors that name the fix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from structkd._checks import describe, whole
from structkd.criteria.base import missing
from structkd.distributed import Shards
from structkd.features import Features
from structkd.projectors import project

Layers = int | Sequence[int] | None


def channels(features: Tensor) -> int:
    """Returns the channels of ``(B, C, H, W)`` maps, ``(B, N, C)`` tokens or ``(B, C)`` rows."""
    return features.shape[-1] if features.dim() == 3 else features.shape[1]


def as_map(features: Tensor) -> Tensor:
    """Views maps, tokens or rows as ``(B, C, H, W)``; a token sequence is one pixel high."""
    if features.dim() == 2:
        return rearrange(features, "b c -> b c 1 1")
    return features if features.dim() == 4 else rearrange(features, "b n c -> b c 1 n")


def pooled(features: Tensor) -> Tensor:
    """Returns the mean of maps or tokens over their positions, ``(B, C)``; rows as they are."""
    if features.dim() == 2:
        return features
    pattern = "b c h w -> b c" if features.dim() == 4 else "b n c -> b c"
    return reduce(features, pattern, "mean")


def adapted(adapter: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    """Brings a student's map, tokens or rows to the teacher's channels, in their own form.

    Args:
        adapter: One of this library's, which takes its shape at the first call, or a user's module
            for maps ``(B, C, H, W)``.
        student: Map, tokens or rows.
        teacher: The same or another kind, of any size.

    Raises:
        ValueError: If a user's module gives other channels than the teacher has.
    """
    wanted = channels(teacher)
    result = project(adapter, as_map(student), wanted)
    if result.dim() != 4 or result.shape[1] != wanted:
        raise ValueError(
            f"the adapter must bring {describe(student)} to the teacher's {wanted} channels, got "
            f"{describe(result)}"
        )
    if student.dim() == 4:
        return result
    return rearrange(result, "b c 1 1 -> b c" if student.dim() == 2 else "b c 1 n -> b n c")


def checked_layers(layer: Layers) -> Layers:
    """Returns ``layer`` after checking that it is a position, several of them, or None for all."""
    if layer is None:
        return None
    if isinstance(layer, list | tuple):
        if not layer:
            raise ValueError("layer must name at least one position, got none; None means all maps")
        return tuple(checked_layer(value) for value in layer)
    return checked_layer(layer)


def checked_layer(layer: object) -> int:
    """Returns ``layer`` after checking that it is one position, which may count from the end."""
    return whole("layer", layer, at_least=-(2**31))


def picked_maps(features: Features, layer: Layers, name: str) -> tuple[Tensor, ...]:
    """Returns the maps at the positions ``layer`` of ``features.intermediate``, None for all."""
    maps = features.intermediate
    if not maps:
        raise ValueError(missing("the criterion", f"{name}.intermediate", features, "intermediate"))
    if layer is None:
        return maps
    positions = (layer,) if isinstance(layer, int) else tuple(layer)
    for position in positions:
        if not -len(maps) <= position < len(maps):
            raise ValueError(
                f"layer={position}, but {name}.intermediate holds {len(maps)} map(s); capture more "
                "layers, intermediate=[...], or choose another position"
            )
    return tuple(maps[position] for position in positions)


def map_pair(student: Features, teacher: Features, layer: int) -> tuple[Tensor, Tensor]:
    """Returns the maps at position ``layer`` of both ``intermediate`` tuples."""
    return picked_maps(student, layer, "student")[0], picked_maps(teacher, layer, "teacher")[0]


def map_pairs(
    student: Features, teacher: Features, reader: str, layer: Layers = None
) -> list[tuple[Tensor, Tensor]]:
    """Returns the maps of both networks in pairs, after checking that none is left over."""
    maps_s = picked_maps(student, layer, "student")
    maps_t = picked_maps(teacher, layer, "teacher")
    if len(maps_s) != len(maps_t):
        raise ValueError(
            f"{reader} pairs the maps of student and teacher in order, got {len(maps_s)} and "
            f"{len(maps_t)} map(s); capture as many layers of both, intermediate=[...]"
        )
    return list(zip(maps_s, maps_t, strict=True))


def on_one_grid(first: Tensor, second: Tensor, names: str) -> tuple[Tensor, Tensor]:
    """Views two features as maps ``(B, C, H, W)`` whose positions lie on grids that can be pooled.

    A row ``(B, C)`` is a map of one position. Tokens ``(B, N, C)`` that meet as many tokens keep
    their order, one pixel high. Other tokens need a grid: the other side's, if it has N positions,
    otherwise a square one.

    Args:
        first: Map, tokens or rows.
        second: The same or another kind.
        names: What the two are called in an error.

    Returns:
        Both as maps, of any two sizes.

    Raises:
        ValueError: If tokens would need a grid and have none.
    """
    if first.dim() == 3 and second.dim() == 3 and first.shape[1] == second.shape[1]:
        return as_map(first), as_map(second)
    return _gridded(first, second, names), _gridded(second, first, names)


def common_positions(first: Tensor, second: Tensor, names: str) -> tuple[Tensor, Tensor]:
    """Views two features as maps of one height and width, as :func:`on_one_grid` does.

    Maps that differ in size are average-pooled to the smaller height and the smaller width of both.
    """
    return to_common_size(*on_one_grid(first, second, names))


def check_positions(first: Tensor, second: Tensor, reader: str) -> None:
    """Raises where maps of one size have one position, on which ``reader`` is 0 whatever they say.

    Args:
        first: A map ``(B, C, H, W)``.
        second: Another of the same height and width.
        reader: The criterion.
    """
    if first.shape[2] * first.shape[3] == 1:
        raise ValueError(
            f"{reader} compares positions, but student and teacher share one only (maps of 1 x 1, "
            "or rows), where it is 0 whatever they hold: capture an earlier layer with positions, "
            "leave this one out with layer=[...], or take a criterion on channels such as "
            f"FitNetLoss; the maps came down to {describe(first)} and {describe(second)}"
        )


def common_pair(student: Features, teacher: Features, layer: int) -> tuple[Tensor, Tensor]:
    """Returns the maps at one position of both as ``(B, C, H, W)`` of one height and width."""
    return common_positions(*map_pair(student, teacher, layer), "student and teacher intermediate")


def check_several(features: Tensor, reader: str, shards: Shards) -> None:
    """Raises where all samples of ``(B, C, H, W)`` together have fewer than two positions."""
    count = shards.total * features.shape[2] * features.shape[3]
    if count < 2:
        raise ValueError(
            f"{reader} compares positions over the batch: it needs at least 2, got {count} (one "
            "sample and a map of 1 x 1, or a row); use drop_last=True in the DataLoader, or "
            "capture an earlier layer"
        )


def to_common_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pools two maps to the smaller height and the smaller width of both."""
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    resized = [
        features if features.shape[2:] == size else F.adaptive_avg_pool2d(features, size)
        for features in (student, teacher)
    ]
    return resized[0], resized[1]


def _gridded(features: Tensor, other: Tensor, names: str) -> Tensor:
    if features.dim() != 3:
        return as_map(features)
    count = features.shape[1]
    if other.dim() == 4 and other.shape[2] * other.shape[3] == count:
        height = other.shape[2]
    elif math.isqrt(count) ** 2 == count:
        height = math.isqrt(count)
    elif other.dim() == 2:  # all positions are pooled to one
        return as_map(features)
    else:
        raise ValueError(
            f"{names} must lie on grids that can be pooled to one, got {describe(features)}, whose "
            f"{count} tokens form no square, and {describe(other)}; drop class and register tokens "
            "and reshape the patches to maps (B, C, H, W), or let FeatureCapture do it"
        )
    return rearrange(features, "b (h w) c -> b c h w", h=height)
