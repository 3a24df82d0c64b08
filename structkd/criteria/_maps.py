"""Pairing of intermediate maps, with errors that say how to make them pair up."""

from __future__ import annotations

from torch import Tensor

from structkd._checks import describe
from structkd.features import Features
from structkd.projectors import to_common_size


def map_pairs(student: Features, teacher: Features, reader: str) -> list[tuple[Tensor, Tensor]]:
    """Returns the maps of both networks in pairs, after checking that none is left over."""
    count_s, count_t = len(student.intermediate), len(teacher.intermediate)
    if count_s != count_t:
        raise ValueError(
            f"{reader} pairs the maps of student and teacher in order, got {count_s} and {count_t} "
            "map(s); capture as many layers of both, FeatureCapture(net, intermediate=[...])"
        )
    return list(zip(student.intermediate, teacher.intermediate, strict=True))


def common_positions(first: Tensor, second: Tensor, names: str) -> tuple[Tensor, Tensor]:
    """Brings two maps to one height and width; tokens and rows must agree already.

    Args:
        first: Map ``(B, C, H, W)``, tokens ``(B, N, C)`` or rows ``(B, C)``.
        second: The same kind, of any channels.
        names: What the two are called in an error.

    Returns:
        Both; maps that differ in size are average-pooled to the smaller height and width.

    Raises:
        ValueError: If the kinds differ or the numbers of tokens do.
    """
    if first.dim() != second.dim():
        raise ValueError(
            f"{names} must be of one kind, got {describe(first)} and {describe(second)}; reshape "
            "tokens to maps (B, C, H, W) or capture matching layers"
        )
    if first.dim() == 4:
        return to_common_size(first, second)
    if first.dim() == 3 and first.shape[1] != second.shape[1]:
        raise ValueError(
            f"{names} must have as many tokens, got {describe(first)} and {describe(second)}; "
            "reshape tokens to maps (B, C, H, W), which are pooled to a common size"
        )
    return first, second


def pooled(features: Tensor) -> Tensor:
    """Returns the mean of maps or tokens over their positions, ``(B, C)``."""
    return features.mean(dim=(2, 3) if features.dim() == 4 else 1)


def as_map(features: Tensor) -> Tensor:
    """Views maps, tokens or rows as ``(B, C, H, W)``; a token sequence is one pixel high."""
    if features.dim() == 2:
        return features[:, :, None, None]
    return features if features.dim() == 4 else features.transpose(1, 2).unsqueeze(2)
