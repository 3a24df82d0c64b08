"""What a forward pass produced, as every criterion reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from structkd._checks import chosen_rows, describe, near
from structkd._devices import sent

FIELDS = ("logits", "embedding", "intermediate", "index")


@dataclass(frozen=True, eq=False)
class Features:
    """The named results of one forward pass; criteria read the fields they need.

    Attributes:
        logits: Class scores ``(B, K)``, or of pixels ``(B, K, H, W)``; continuous predictions too.
        embedding: What goes into the classifier, ``(B, D)``.
        intermediate: Maps ``(B, C, H, W)``, tokens ``(B, N, C)`` without a grid, or rows
            ``(B, C)``, which are maps without positions; shallow to deep. A single tensor becomes
            a tuple of one.
        index: Position of every sample in the data set, ``(B,)`` int64, for criteria with a memory.
        absent: Why a field is missing, by its name, where a capture chose the layers by itself.

    Raises:
        TypeError: If a field holds something that is no tensor.

    Example:
        >>> import torch
        >>> feats = Features(logits=torch.zeros(8, 10), intermediate=torch.zeros(8, 16, 4, 4))
        >>> feats
        Features(logits=(8, 10), intermediate=[(8, 16, 4, 4)])
        >>> feats.replace(index=torch.arange(8)).index.shape
        torch.Size([8])
    """

    logits: Tensor | None = None
    embedding: Tensor | None = None
    intermediate: tuple[Tensor, ...] = ()
    index: Tensor | None = None
    absent: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        maps: Sequence[Tensor] | Tensor | None = self.intermediate
        if isinstance(maps, Tensor):
            maps = (maps,)
        object.__setattr__(self, "intermediate", tuple(maps or ()))
        for name in ("logits", "embedding", "index"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"Features.{name} must be a tensor or None, got {describe(value)}")
        for position, value in enumerate(self.intermediate):
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"Features.intermediate[{position}] must be a tensor, got {describe(value)}"
                )

    def replace(self, **changes: Any) -> Features:
        """Returns a copy with some fields changed, ``feats.replace(index=index)`` for example."""
        return replace(self, **changes)

    def rows(self, which: Tensor) -> Features:
        """Returns the features of some samples of the batch, in the order that is asked for.

        Args:
            which: A bool mask ``(B,)``, or int64 positions ``(n,)``; none of them gives fields of
                zero rows, which keep their width.

        Raises:
            TypeError: If ``which`` is neither.
            ValueError: If a mask is of another length than a field, or a position is out of range.

        Example:
            >>> import torch
            >>> feats = Features(logits=torch.eye(3), index=torch.tensor([7, 8, 9]))
            >>> feats.rows(torch.tensor([True, False, True])).index
            tensor([7, 9])
        """

        def taken(value: Tensor, name: str) -> Tensor:
            chosen = chosen_rows(which, f"which, the rows of Features.{name},", len(value))
            return value.index_select(0, sent(chosen, value.device))

        held = {name: getattr(self, name) for name in ("logits", "embedding", "index")}
        kept = {name: taken(value, name) for name, value in held.items() if value is not None}
        maps = [taken(value, f"intermediate[{i}]") for i, value in enumerate(self.intermediate)]
        return self.replace(**kept, intermediate=maps)

    def __repr__(self) -> str:
        parts = []
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Tensor):
                parts.append(f"{entry.name}={tuple(value.shape)}")
            elif entry.name == "intermediate" and value:
                parts.append(f"{entry.name}={[tuple(part.shape) for part in value]}")
        return f"Features({', '.join(parts)})"


def named_features(given: object, name: str) -> Features:
    """Returns features as they are, or those that a dict of their names holds."""
    if isinstance(given, Features):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} must be Features or a dict of their names, got {describe(given)}")
    for key in given:
        if key not in FIELDS:
            raise ValueError(f"{name} has no field {key!r}; {near(str(key), FIELDS)}")
    return Features(**given)
