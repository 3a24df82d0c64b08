"""Growing tables of tensors: what a gallery keeps of every sample."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from structkd._checks import describe
from structkd.features import Features


class Column:
    """A tensor that grows by rows; pieces are joined when it is read."""

    def __init__(self, value: Tensor) -> None:
        self._pieces = [value]
        self._count = len(value)

    def __len__(self) -> int:
        return self._count

    def append(self, piece: Tensor) -> None:
        """Adds rows."""
        self._pieces.append(piece.clone())  # the caller may reuse its memory
        self._count += len(piece)

    @property
    def value(self) -> Tensor:
        """All rows as one tensor."""
        if len(self._pieces) > 1:
            self._pieces = [torch.cat(self._pieces)]
        return self._pieces[0]


class FeatureStore:
    """The features of all samples, a column a field, or of none of them."""

    def __init__(self, columns: dict[str, Tensor] | None = None) -> None:
        self._columns = {name: Column(part) for name, part in (columns or {}).items()}

    def check(self, features: Features | None, count: int, held: int) -> dict[str, Tensor]:
        """Returns the rows to :meth:`append` for ``count`` samples after ``held`` others."""
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

    def append(self, rows: dict[str, Tensor]) -> None:
        """Adds rows that :meth:`check` returned."""
        for name, part in rows.items():
            self._columns.setdefault(name, Column(part[:0])).append(part)

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

    def state(self) -> dict[str, Tensor]:
        """Returns the columns by name."""
        return {name: column.value for name, column in self._columns.items()}


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


def whole_numbers(values: Tensor, name: str, count: int | None = None) -> Tensor:
    """Returns ``(N,)`` int64 on the CPU after checking type and shape."""
    if not isinstance(values, Tensor) or values.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be an int64 tensor, got {describe(values)}")
    if values.dim() != 1 or (count is not None and len(values) != count):
        wanted = "(N,)" if count is None else f"({count},), one a row"
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(values.shape)}")
    return values.detach().long().cpu()
