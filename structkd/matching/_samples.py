"""What a gallery holds of its samples, a row for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from structkd.features import Features
from structkd.matching._ids import IdTable
from structkd.matching._inputs import refuse_ids, twice, whole_numbers
from structkd.matching._store import Column, FeatureStore


class SampleTable:
    """Id, vector, class and features of every sample, in rows that are used again.

    Args:
        dim: Width of the vectors.
        state: What :meth:`state` returned, of which nothing is copied before the next write.
    """

    def __init__(self, dim: int, state: Mapping[str, Any] | None = None) -> None:
        if state is None:
            vectors = torch.empty(0, dim, dtype=torch.float32)
            state = {"vectors": vectors, "labels": torch.empty(0, dtype=torch.int64)}
        self._vectors, self._labels = Column(state["vectors"]), Column(state["labels"])
        self._ids = IdTable(state.get("ids"), state.get("following", 0))
        self._features = FeatureStore(state.get("features"))

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def vectors(self) -> Tensor:
        """The vectors of all rows, ``(N, dim)`` float32, zero where a row is free."""
        return self._vectors.value

    @property
    def labels(self) -> Tensor:
        """The classes of all rows, ``(N,)``."""
        return self._labels.value

    @property
    def ids(self) -> Tensor:
        """The ids of all rows, ``(N,)``, -1 where a row is free."""
        return self._ids.value

    def new_ids(self, ids: Tensor | None, count: int) -> Tensor:
        """Returns ids for ``count`` new samples after checking them; none count on."""
        if ids is None:
            return torch.arange(self._ids.following, self._ids.following + count)
        ids = whole_numbers(ids, "ids", count)
        if count and int(ids.min()) < 0:
            raise ValueError(f"ids must be >= 0 (-1 means none), got {int(ids.min())}")
        double = torch.cat([twice(ids), ids[self._ids.find(ids) >= 0]])
        refuse_ids(double, "ids must be new and distinct, got again:")
        return ids

    def rows(self, ids: Tensor) -> Tensor:
        """Returns the rows of known ids."""
        ids = whole_numbers(ids, "ids")
        rows = self._ids.find(ids)
        refuse_ids(ids[rows < 0], "ids are not in the gallery:")
        return rows

    def distinct_rows(self, ids: Tensor) -> Tensor:
        """Returns the rows of known ids, each of which comes once."""
        rows = self.rows(ids)
        refuse_ids(self.ids[twice(rows)], "ids must be distinct, got again:")
        return rows

    def checked_features(self, features: Features | None, count: int) -> dict[str, Tensor]:
        """Returns what to :meth:`write` of ``count`` samples' features, or of none."""
        return self._features.check(features, count, len(self))

    def features(self, ids: Tensor) -> Features:
        """Returns the features of known ids, which become the index."""
        return self._features.read(self.rows(ids), ids)

    def add(self, ids: Tensor) -> Tensor:
        """Gives new ids a row each, to be written to, and returns the rows."""
        return self._ids.add(ids)

    def write(
        self, rows: Tensor, vectors: Tensor, labels: Tensor, features: dict[str, Tensor]
    ) -> None:
        """Puts checked samples at rows that have their ids."""
        self._vectors.write(rows, vectors)
        self._labels.write(rows, labels)
        self._features.write(rows, features)

    def free(self, rows: Tensor) -> None:
        """Takes rows their samples."""
        self._ids.free(rows)
        self._vectors.write(rows, torch.zeros(1))
        self._features.clear(rows)
        if not len(self):
            # Nothing is left that later features would have to be like.
            following = self._ids.following
            self._vectors, self._labels = (
                Column(column.value[:0].clone()) for column in (self._vectors, self._labels)
            )
            self._ids, self._features = IdTable(following=following), FeatureStore()

    def state(self) -> dict[str, Any]:
        """Returns all of it as tensors, which later writes leave as they are."""
        return {
            "vectors": self._vectors.share(),
            "labels": self._labels.share(),
            "ids": self._ids.share(),
            "following": self._ids.following,
            "features": self._features.state(),
        }
