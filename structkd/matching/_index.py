"""One class of a gallery: its index, and the exact ranking of what that finds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structkd.matching._faiss import IndexSpec
from structkd.matching._metric import Metric
from structkd.matching._store import Column

SPARE = 8  # candidates beyond k that are ranked exactly
_CHUNK = 1 << 22  # elements of a float64 block


class ClassIndex:
    """The index of one class, and the gallery rows behind its positions.

    Until a class holds what training needs, an exact flat index stands in. A flat index holds the
    factors less their mean: no ranking changes, and float32 rounds what tells the rows apart, not
    what they share.
    """

    def __init__(self, spec: IndexSpec) -> None:
        self.spec = spec
        self._rows = Column(torch.empty(0, dtype=torch.int64))
        self.is_final = spec.training_size == 0
        self.centre: Tensor | None = None
        self.index = spec.new() if self.is_final else spec.flat()
        self.largest = 0.0  # norm of the longest row that the index ever held

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> Tensor:
        """The gallery rows of the class, in the index's order."""
        return self._rows.value

    @property
    def is_flat(self) -> bool:
        """Whether the index compares a query with every row."""
        return self.spec.is_flat or not self.is_final

    def add(self, rows: Tensor, factors: Tensor) -> None:
        """Adds gallery rows with their float64 factors; trains once there are enough."""
        self._rows.append(rows)
        self._put(rows, factors)
        if not self.is_final and len(self) >= self.spec.training_size:
            self._train()

    def remove(self, rows: Tensor, metric: Metric, vectors: Tensor) -> None:
        """Removes gallery rows; an index that cannot is filled again, and keeps its training."""
        gone = torch.isin(self.rows, rows)
        positions = self.rows[gone] if self._names_rows else gone.nonzero()[:, 0]
        kept = self.rows[~gone]
        try:
            self.index.remove_ids(positions.numpy())
        except RuntimeError:  # FAISS's "not implemented for this type of index"
            self.index.reset()
            self.fill(kept, metric, vectors)
        self._rows = Column(kept)

    def fill(self, rows: Tensor, metric: Metric, vectors: Tensor) -> None:
        """Puts gallery rows into an empty index."""
        for part in torch.split(rows, max(1, _CHUNK // self.spec.width)):
            self._put(part, metric.rows(vectors[part]))

    @property
    def _names_rows(self) -> bool:
        return self.spec.names_rows and self.is_final

    def _put(self, rows: Tensor, factors: Tensor) -> None:
        if self.is_flat:
            self.centre = factors.mean(dim=0) if self.centre is None else self.centre
            factors = factors - self.centre
        self.largest = max(self.largest, float(torch.linalg.vector_norm(factors, dim=1).max()))
        if self._names_rows:
            self.index.add_with_ids(factors.float().numpy(), rows.numpy())
        else:
            self.index.add(factors.float().numpy())

    def _train(self) -> None:
        centre = 0.0 if self.centre is None else self.centre
        held = (torch.from_numpy(self.index.reconstruct_n(0, len(self))) + centre).float()
        self.index = self.spec.new()
        self.index.train(held.numpy())
        self.is_final, self.centre = True, None
        self._put(self.rows, held)

    def search(
        self, metric: Metric, queries: Tensor, vectors: Tensor, ids: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Returns float64 scores and ids ``(Q, k)`` of the nearest, ranked in float64.

        The index proposes ``k + SPARE`` in float32. Where float32 could have hidden a better one, a
        flat index is asked for ever more.
        """
        count = len(self)
        scores = torch.full((len(queries), k), -torch.inf, dtype=torch.float64)
        best = torch.full((len(queries), k), -1, dtype=torch.int64)
        unsure, spare = torch.arange(len(queries)), SPARE
        while len(unsure):
            asked = min(k + spare, count)
            again = []
            step = max(1, _CHUNK // (asked * queries.shape[1]))
            for start in range(0, len(unsure), step):
                part = unsure[start : start + step]
                position, limit = self._propose(metric, queries[part], asked)
                # A missing one is -1: some row, masked at once.
                rows = position.clamp(min=0) if self._names_rows else self.rows[position]
                exact = metric.scores(queries[part, None], vectors[rows])
                exact = exact.masked_fill(position < 0, -torch.inf)
                exact, chosen = _rank(exact, ids[rows], k)
                scores[part, : exact.shape[1]] = exact
                best[part, : exact.shape[1]] = chosen.masked_fill(exact.isneginf(), -1)
                if self.is_flat and asked < count:
                    again.append(part[exact[:, -1] <= limit])
            unsure, spare = torch.cat(again) if again else unsure[:0], spare * 8
        return scores, best

    def _propose(self, metric: Metric, queries: Tensor, asked: int) -> tuple[Tensor, Tensor]:
        """Returns the positions that the index finds, and how good a row it left out can be."""
        factors = metric.queries(queries)
        found, position = map(torch.from_numpy, self.index.search(factors.float().numpy(), asked))
        centre = torch.zeros_like(factors[0]) if self.centre is None else self.centre
        # Rounding of both factors and of their inner product, summed in any order: in float32
        # here, in float64 where the exact scores are computed.
        length = centre.norm() + self.largest
        unit = 2.0**-24 * self.largest + 2.0**-50 * length
        rounding = (factors.shape[1] + 4) * unit * torch.linalg.vector_norm(factors, dim=1)
        return position, found[:, -1] + factors @ centre + rounding

    def state(self) -> dict[str, Any]:
        """Returns all that does not follow from the gallery's vectors."""
        return {
            "rows": self._rows.share(),
            "index": None if self.is_flat else self.spec.to_bytes(self.index),
            "is_final": self.is_final,
            "centre": self.centre,
            "largest": self.largest,
        }

    @classmethod
    def from_state(
        cls, spec: IndexSpec, state: dict[str, Any], metric: Metric, vectors: Tensor
    ) -> ClassIndex:
        """Returns the class whose :meth:`state` it was."""
        own = cls(spec)
        own._rows, own.centre = Column(state["rows"]), state["centre"]
        own.is_final, own.largest = state["is_final"], state["largest"]
        if own.is_flat:
            own.fill(own.rows, metric, vectors)
        else:
            own.index = spec.from_bytes(state["index"])
        return own


def _rank(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the best ``k`` of every row, ties to the lowest id."""
    ids, order = ids.sort(dim=1)
    scores, places = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return scores[:, :k], ids.gather(1, places[:, :k])
