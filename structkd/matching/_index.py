"""One class of a gallery: a FAISS index, and the exact ranking of what it finds."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from structkd.matching._metric import Metric

SPARE = 8  # candidates beyond k that are ranked exactly
_CHUNK = 1 << 22  # elements of a float64 block
_POINTS = 39  # a centroid, FAISS's own least for k-means


@functools.cache
def load_faiss() -> ModuleType:
    """Imports FAISS, after torch: the other order hangs forked DataLoader workers that search."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "RetrievalGallery needs FAISS: pip install 'structkd[cpu]', or 'structkd[gpu]' for "
            "GPU indexes"
        ) from error
    # A forked child has no OpenMP threads to wait for.
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=functools.partial(faiss.omp_set_num_threads, 1))
    module: ModuleType = faiss
    return module


class IndexSpec:
    """What every class's index is made from: a checked factory string, parameters and a device."""

    def __init__(self, width: int, factory: str, parameters: str, device: str) -> None:
        self.faiss = load_faiss()
        self.width, self.factory, self.parameters = width, factory, parameters
        self.device = torch.device(device)
        self.resources: Any = None
        if self.device.type == "cuda":
            if not hasattr(self.faiss, "StandardGpuResources"):
                raise ImportError(
                    f"device={device!r} needs FAISS with GPU support: pip install 'structkd[gpu]'"
                )
            self.resources = self.faiss.StandardGpuResources()
        elif self.device.type != "cpu":
            raise ValueError(f"device must be 'cpu' or 'cuda[:n]', got {device!r}")
        # What the factory refuses, it refuses here and not at the first large class.
        index = self.make()
        self.is_flat = isinstance(index, self.faiss.IndexFlat)
        self.training_size = 0 if index.is_trained else self._training_size(index)

    def make(self) -> Any:
        """Returns a new empty index on the CPU."""
        try:
            index = self.faiss.index_factory(
                self.width, self.factory, self.faiss.METRIC_INNER_PRODUCT
            )
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"index must be a FAISS factory string for inner products and vectors of width "
                f"{self.width}, got {self.factory!r}: {error}"
            ) from error
        try:
            self.faiss.ParameterSpace().set_index_parameters(index, self.parameters)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"parameters must be a FAISS parameter string for index={self.factory!r}, "
                f"'nprobe=16' for example, got {self.parameters!r}: {error}"
            ) from error
        return index

    def flat(self) -> Any:
        """Returns a new empty exact index on the CPU."""
        return self.faiss.IndexFlatIP(self.width)

    def to_device(self, index: Any) -> Any:
        """Moves an index to the GPU if there is to be one."""
        if self.resources is None:
            return index
        moved = self.faiss.index_cpu_to_gpu(self.resources, self.device.index or 0, index)
        if self.parameters:
            self.faiss.GpuParameterSpace().set_index_parameters(moved, self.parameters)
        return moved

    def _training_size(self, index: Any) -> int:
        """Returns how many vectors give every centroid enough; 256 where none are trained."""
        faiss, centroids = self.faiss, 0
        while isinstance(index, faiss.IndexPreTransform | faiss.IndexRefine):
            if isinstance(index, faiss.IndexRefine):
                index = faiss.downcast_index(index.base_index)
                continue
            steps = (faiss.downcast_VectorTransform(step) for step in _each(index.chain))
            if any(isinstance(step, faiss.OPQMatrix) for step in steps):
                centroids = 256  # of the product quantiser that a rotation is fitted for
            index = faiss.downcast_index(index.index)
        quantiser = getattr(index, "pq", None)
        codes = 1 << quantiser.nbits if quantiser is not None else 0
        return _POINTS * max(centroids, codes, getattr(index, "nlist", 0)) or 256


class ClassIndex:
    """The FAISS index of one class, and the gallery rows behind its positions.

    Until a class holds what training needs, an exact flat index stands in. A flat index holds the
    factors less their mean: no ranking changes, and float32 rounds what tells the rows apart, not
    what they share.
    """

    def __init__(self, spec: IndexSpec) -> None:
        self.spec = spec
        self.rows = torch.empty(0, dtype=torch.int64)
        self.is_final = spec.training_size == 0
        self.centre: Tensor | None = None
        self.index = spec.to_device(spec.make() if self.is_final else spec.flat())
        self.largest = 0.0  # norm of the longest row in the index

    @property
    def is_flat(self) -> bool:
        """Whether the index compares a query with every row."""
        return self.spec.is_flat or not self.is_final

    def add(self, rows: Tensor, factors: Tensor) -> None:
        """Adds gallery rows with their float64 factors; trains once there are enough."""
        self.rows = torch.cat([self.rows, rows])
        if self.is_flat:
            self.centre = factors.mean(dim=0) if self.centre is None else self.centre
            factors = factors - self.centre
        self.largest = max(self.largest, float(torch.linalg.vector_norm(factors, dim=1).max()))
        self.index.add(factors.float().numpy())
        if not self.is_final and len(self.rows) >= self.spec.training_size:
            self._train()

    def _train(self) -> None:
        centre = 0.0 if self.centre is None else self.centre
        held = torch.from_numpy(self.index.reconstruct_n(0, len(self.rows))) + centre
        self.index = self.spec.to_device(self.spec.make())
        self.index.train(held.float().numpy())
        self.index.add(held.float().numpy())
        self.is_final, self.centre = True, None

    def search(
        self, metric: Metric, queries: Tensor, vectors: Tensor, ids: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Returns float64 scores and ids ``(Q, k)`` of the nearest, ranked in float64.

        FAISS proposes ``k + SPARE`` in float32. Where float32 could have hidden a better one, a
        flat index on the CPU is asked for ever more.
        """
        count = len(self.rows)
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
                rows = self.rows[position]
                exact = metric.scores(queries[part, None], vectors[rows])
                exact = exact.masked_fill(position < 0, -torch.inf)
                exact, chosen = _rank(exact, ids[rows], k)
                scores[part, : exact.shape[1]] = exact
                best[part, : exact.shape[1]] = chosen.masked_fill(exact.isneginf(), -1)
                if self.is_flat and self.spec.resources is None and asked < count:
                    again.append(part[exact[:, -1] <= limit])
            unsure, spare = torch.cat(again) if again else unsure[:0], spare * 8
        return scores, best

    def _propose(self, metric: Metric, queries: Tensor, asked: int) -> tuple[Tensor, Tensor]:
        """Returns the positions that FAISS finds, and how good a row it left out can be."""
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
        """Returns all of it as tensors and plain values."""
        faiss = self.spec.faiss
        index = self.index if self.spec.resources is None else faiss.index_gpu_to_cpu(self.index)
        return {
            "rows": self.rows,
            "index": torch.from_numpy(faiss.serialize_index(index)),
            "is_final": self.is_final,
            "centre": self.centre,
            "largest": self.largest,
        }

    @classmethod
    def from_state(cls, spec: IndexSpec, state: dict[str, Any]) -> ClassIndex:
        """Returns the class whose :meth:`state` it was."""
        own = cls(spec)
        own.rows, own.centre = state["rows"], state["centre"]
        own.is_final, own.largest = state["is_final"], state["largest"]
        index = spec.faiss.deserialize_index(torch.as_tensor(state["index"]).numpy())
        if own.is_final and spec.parameters:
            spec.faiss.ParameterSpace().set_index_parameters(index, spec.parameters)
        own.index = spec.to_device(index)
        return own


def _each(vector: Any) -> Iterator[Any]:
    """Iterates over a std::vector as FAISS hands it out."""
    return (vector.at(place) for place in range(vector.size()))


def _rank(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the best ``k`` of every row, ties to the lowest id."""
    ids, order = ids.sort(dim=1)
    scores, places = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return scores[:, :k], ids.gather(1, places[:, :k])
