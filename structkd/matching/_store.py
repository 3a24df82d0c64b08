"""Growing tables of tensors: what a gallery keeps of every sample."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from structkd._checks import describe
from structkd.features import Features


class Column:
    """A tensor that grows by rows, with room to spare: many small writes cost what one large does.

    Others may hold the memory that it was made from or that :meth:`share` returned, DataLoader
    workers for example; it copies that before its first write.
    """

    def __init__(self, value: Tensor) -> None:
        self._held = value
        self._count = len(value)
        self._is_own = False

    def __len__(self) -> int:
        return self._count

    @property
    def value(self) -> Tensor:
        """All rows as one tensor, until the next write; not to be written to."""
        return self._held[: self._count]

    def append(self, piece: Tensor) -> None:
        """Adds rows."""
        self._reserve(self._count + len(piece))
        self._held[self._count - len(piece) : self._count] = piece

    def write(self, rows: Tensor, piece: Tensor) -> None:
        """Puts rows in place; those beyond the end are added."""
        if len(rows):
            self._reserve(max(self._count, int(rows.max()) + 1))
            self._held[rows] = piece

    def share(self) -> Tensor:
        """All rows as one tensor without room to spare, which later writes leave as it is."""
        if len(self._held) > self._count:
            self._held = self.value.clone()
        self._is_own = False
        return self._held

    def _reserve(self, count: int) -> None:
        if count > len(self._held) or not self._is_own:
            room = len(self._held) if count <= len(self._held) else max(count, 2 * self._count)
            # What inference mode makes could not be written to outside of it.
            with torch.inference_mode(False):
                held = self._held.new_empty(room, *self._held.shape[1:])
            held[: self._count] = self.value
            self._held, self._is_own = held, True
        self._count = count


class FeatureStore:
    """The features of all samples, a column a field, or of none of them."""

    def __init__(self, columns: dict[str, Tensor] | None = None) -> None:
        self._columns = {name: Column(part) for name, part in (columns or {}).items()}

    def check(self, features: Features | None, count: int, held: int) -> dict[str, Tensor]:
        """Returns what to :meth:`write` for ``count`` samples beside ``held`` others."""
        if held and bool(self._columns) != (features is not None):
            come, before = ("none", "with") if features is None else ("some", "without")
            raise ValueError(
                "features must come with every add() or with none, "
                f"got {come} after {held} samples {before} them"
            )
        if features is None:
            return {}
        rows = _rows(features, count)
        kept = {name: describe(column.value[:0]) for name, column in self._columns.items()}
        come_now = {name: describe(part[:0]) for name, part in rows.items()}
        if kept and kept != come_now:
            raise ValueError(
                f"features must be like those of earlier calls, {kept}, got {come_now}"
            )
        return rows

    def __bool__(self) -> bool:
        return bool(self._columns)

    def write(self, rows: Tensor, parts: dict[str, Tensor]) -> None:
        """Puts what :meth:`check` returned at some rows; those beyond the end are added."""
        for name, part in parts.items():
            self._columns.setdefault(name, Column(part[:0])).write(rows, part)

    def read(self, rows: Tensor, ids: Tensor) -> Features:
        """Returns the features at some rows on the device of ``ids``, which become the index."""
        if not self._columns:
            raise ValueError(
                "the gallery holds no features: pass add(..., features=teacher_features)"
            )
        kept = {name: column.value[rows].to(ids.device) for name, column in self._columns.items()}
        maps = sorted(name for name in kept if name.startswith("intermediate"))
        return Features(
            logits=kept.get("logits"),
            embedding=kept.get("embedding"),
            intermediate=tuple(kept[name] for name in maps),
            index=ids,
        )

    def clear(self, rows: Tensor) -> None:
        """Overwrites rows with zeros."""
        for column in self._columns.values():
            column.write(rows, torch.zeros(1, dtype=column.value.dtype))

    def state(self) -> dict[str, Tensor]:
        """Returns the columns by name, which later writes leave as they are."""
        return {name: column.share() for name, column in self._columns.items()}


def _rows(features: Features, count: int) -> dict[str, Tensor]:
    """Returns the tensors of features by name, on the CPU."""
    if not isinstance(features, Features):
        raise TypeError(f"features must be structkd.Features, got {describe(features)}")
    named = {"logits": features.logits, "embedding": features.embedding}
    named |= {f"intermediate.{i:03d}": part for i, part in enumerate(features.intermediate)}
    rows = {name: part.detach().cpu() for name, part in named.items() if part is not None}
    if not rows:
        raise ValueError("features must hold logits, an embedding or maps, got none of them")
    for name, part in rows.items():
        if len(part) != count:
            raise ValueError(f"features.{name} must hold {count} samples, got {describe(part)}")
    return rows


def by_class(labels: Tensor) -> list[tuple[int, Tensor]]:
    """Returns every class with the positions of its members, in order."""
    if not len(labels):
        return []
    ordered, position = labels.sort(stable=True)
    classes, starts = np.unique(ordered.numpy(), return_index=True)
    ends = [*starts[1:].tolist(), len(labels)]
    return [
        (label, position[start:end])
        for label, start, end in zip(classes.tolist(), starts.tolist(), ends, strict=True)
    ]
