"""Argument checks that name the argument, what came and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import TypeVar

import torch
from torch import Tensor

ChoiceT = TypeVar("ChoiceT", bound=str)

# torch's ignore_index: a row of this target has no label.
NO_LABEL = -100


def describe(value: object) -> str:
    """Returns a tensor as ``float32 (8, 16)``, anything else as its type."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__


def number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> float:
    """Returns ``value`` as a float after checking that it is finite and in range."""
    if isinstance(value, bool) or not isinstance(value, Real):
        got = describe(value)
        if isinstance(value, str):
            got += f" {value!r}; YAML reads 1e-3 as text, and 1.0e-3 as a number"
        raise TypeError(f"{name} must be a number, got {got}")
    result = float(value)
    wanted = []
    if above is not None:
        wanted.append(f"> {above:g}")
    if at_least is not None:
        wanted.append(f">= {at_least:g}")
    if at_most is not None:
        wanted.append(f"<= {at_most:g}")
    inside = (
        math.isfinite(result)
        and (above is None or result > above)
        and (at_least is None or result >= at_least)
        and (at_most is None or result <= at_most)
    )
    if not inside:
        raise ValueError(f"{name} must be finite {' and '.join(wanted)}, got {value}".strip())
    return result


def whole(name: str, value: object, *, at_least: int = 1) -> int:
    """Returns ``value`` as an int after checking that it is a whole number in range."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {describe(value)}")
    if int(value) < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    return int(value)


def choice(name: str, value: str, allowed: Sequence[ChoiceT]) -> ChoiceT:
    """Returns ``value`` after checking that it is one of ``allowed``."""
    for option in allowed:
        if value == option:
            return option
    raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def terms_of(terms: Sequence[str], known: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the terms to take in the order of ``known``, after checking their names."""
    chosen = (terms,) if isinstance(terms, str) else tuple(terms)
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        got = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"terms must name one or more of {', '.join(known)}, got {got}")
    return tuple(name for name in known if name in chosen)


def near(name: str, known: Iterable[str]) -> str:
    """Returns a hint that lists the known names nearest to ``name``."""
    names = list(known)
    close = get_close_matches(name, names, n=5, cutoff=0.4) or names[:10]
    return f"near names: {', '.join(close)}" if close else "there are none"


def class_indices(target: Tensor | None, shape: Sequence[int], *, reader: str) -> Tensor:
    """Returns class indices ``(B, ...)`` int64, -100 where there is none, after checking them.

    The range is checked on the CPU only: on an accelerator that would stall the stream, so the
    device's own assertion reports the error there. ``shape`` is that of the logits, (B, K, ...).
    """
    batch, classes, *size = shape
    if target is None:
        raise ValueError(
            f"{reader} needs target, the class indices (B,), or (B, H, W) of pixels, with "
            f"{NO_LABEL} where there is none: pass target=labels"
        )
    if not isinstance(target, Tensor) or target.dtype not in (torch.int64, torch.int32):
        advice = f"; take target.long(), with {NO_LABEL} where there is none"
        fix = advice if isinstance(target, Tensor) else ""
        raise TypeError(
            f"target must be an int64 tensor of class indices, got {describe(target)}{fix}"
        )
    if target.shape != (batch, *size):
        wanted = (batch, *size)
        raise ValueError(f"target must have shape {wanted}, got {tuple(target.shape)}")
    meaning = f"or be {NO_LABEL}, no label; the number of classes in logits"
    in_range(target, "target", classes, meaning, but=NO_LABEL)
    return target.long()


def labels(target: Tensor | None, shape: Sequence[int], *, reader: str) -> tuple[Tensor, Tensor]:
    """Returns class indices ``(B, ...)`` and which rows have one, checked by `class_indices`.

    A row without a label (-100) gets the index 0 and False.
    """
    index = class_indices(target, shape, reader=reader)
    labelled = index != NO_LABEL
    return torch.where(labelled, index, 0), labelled


def check_rows(which: Tensor, name: str, batch: int) -> None:
    """Raises where rows of a batch are neither a mask ``(batch,)`` nor positions ``(n,)`` in it."""
    wanted = f"a bool mask ({batch},) or int64 positions (n,)"
    if not isinstance(which, Tensor) or which.dtype not in (torch.bool, torch.int64, torch.int32):
        raise TypeError(f"{name} must be {wanted}, got {describe(which)}")
    if which.dim() != 1 or (which.dtype == torch.bool and len(which) != batch):
        raise ValueError(f"{name} must be {wanted}, got {describe(which)}")
    if which.dtype != torch.bool:
        in_range(which, name, batch, "the number of rows")


def chosen_rows(which: Tensor, name: str, batch: int) -> Tensor:
    """Returns the positions ``(n,)`` int64 that a mask ``(batch,)`` or a set of positions names.

    A mask on an accelerator makes the host wait for it; one on the CPU does not, nor do positions.
    """
    check_rows(which, name, batch)
    return which.nonzero()[:, 0] if which.dtype == torch.bool else which.long()


def in_range(index: Tensor, name: str, size: int, meaning: str, *, but: int | None = None) -> None:
    """Raises where a CPU tensor of indices leaves ``[0, size)``; ``meaning`` says what size is.

    ``but`` is a negative number that may stand for no index.
    """
    if index.device.type != "cpu" or torch.compiler.is_compiling() or not index.numel():
        return
    low, high = (int(end) for end in index.aminmax())
    if low == but:  # then it hides what else is negative
        low, high = (int(end) for end in index.masked_fill(index == but, 0).aminmax())
    if low < 0 or high >= size:
        raise ValueError(
            f"{name} must lie in 0..{size - 1} ({meaning} is {size}), got values in {low}..{high}"
        )
