"""The search of one class: proposed by torch or FAISS in float32, ranked in float64."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from structkd._checks import describe

SPARE = 8  # candidates beyond k that are ranked exactly
_CHUNK = 1 << 22  # numbers of a float64 block
_SCORES = 1 << 24  # scores that a flat search holds at once
_POINTS = 39  # a centroid, FAISS's own least for k-means


class Cosine:
    """``<x, y> / (|x| |y|)``, the inner product of what :meth:`rows` and :meth:`queries` return."""

    def rows(self, vectors: Tensor) -> Tensor:
        """Returns the teachers' factors ``(N, width)`` in float64."""
        return _unit(vectors)

    def queries(self, vectors: Tensor) -> Tensor:
        """Returns the students' factors ``(Q, width)`` in float64."""
        return _unit(vectors)

    def scores(self, queries: Tensor, vectors: Tensor) -> Tensor:
        """Returns the similarities of ``(..., dim)`` vectors, broadcast, summed without a matmul.

        The result for a pair does not depend on its place in the batch, so that equal vectors tie.
        """
        return (_unit(queries) * _unit(vectors)).sum(dim=-1)


class NegativeKL:
    r"""``-KL(p || q)`` of softened logits, p the teacher's and q the student's; as :class:`Cosine`.

    ``-KL(p || q) = <p, log q> - sum p log p = <[p, -sum p log p], [log q, 1]>``.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def rows(self, vectors: Tensor) -> Tensor:
        log_p = self._log_softmax(vectors)
        p = log_p.exp()
        return torch.cat([p, -(p * log_p).sum(dim=-1, keepdim=True)], dim=-1)

    def queries(self, vectors: Tensor) -> Tensor:
        log_q = self._log_softmax(vectors)
        return torch.cat([log_q, torch.ones_like(log_q[..., :1])], dim=-1)

    def scores(self, queries: Tensor, vectors: Tensor) -> Tensor:
        # The difference first: near KL = 0 the inner-product form would cancel.
        log_p = self._log_softmax(vectors)
        return (log_p.exp() * (self._log_softmax(queries) - log_p)).sum(dim=-1)

    def _log_softmax(self, logits: Tensor) -> Tensor:
        return torch.log_softmax(logits.double() / self.temperature, dim=-1)


def _unit(vectors: Tensor) -> Tensor:
    vectors = vectors.double()
    # Twice, as the square of a tiny entry may underflow.
    vectors = vectors / vectors.abs().amax(dim=-1, keepdim=True)
    unit: Tensor = vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return unit


class IndexSpec:
    """What every class's index is made from: a checked factory string, parameters and a device.

    Attributes:
        is_flat: Whether torch compares a query with every row of the class.
        training_size: How many vectors a FAISS index needs for its training; 0 for none.
    """

    def __init__(self, width: int, factory: str, parameters: str, device: str) -> None:
        self.width, self.factory, self.parameters = width, factory, parameters
        self.device = torch.device(device)
        for name, value in (("index", factory), ("parameters", parameters)):
            if not isinstance(value, str):
                raise TypeError(f"{name} must be a string, got {describe(value)}")
        self.is_flat, self.training_size = factory == "Flat", 0
        if self.is_flat:
            if parameters:
                raise ValueError(
                    f"parameters must be empty for index='Flat', which has none, got {parameters!r}"
                )
            try:
                torch.empty(0, device=self.device)
            except (RuntimeError, AssertionError, NotImplementedError) as error:
                raise ValueError(
                    f"device={str(device)!r}, but torch has no such device here: take 'cpu', or "
                    f"install a torch that fits the driver ({error})"
                ) from error
        elif self.device.type != "cpu":
            raise ValueError(
                f"device must be 'cpu' for index={factory!r}, which FAISS searches, got "
                f"{str(device)!r}: index='Flat', which torch searches, may lie on any device"
            )
        else:
            # So that FAISS rejects it here, not at the first large class.
            self._check(self._new())

    def filled(self, factors: Tensor) -> Any:
        """Returns a FAISS index that holds float32 factors, trained on them if need be."""
        index, rows = self._new(), factors.numpy()
        try:
            if not index.is_trained:
                index.train(rows)
            index.add(rows)
        except RuntimeError as error:
            raise ValueError(
                f"index={self.factory!r} does not take the {len(rows)} samples of a class, choose "
                f"another, 'Flat' for example: {error}"
            ) from error
        return index

    def to_bytes(self, index: Any) -> Tensor:
        """Returns a FAISS index as a tensor of bytes."""
        return torch.from_numpy(load_faiss().serialize_index(index))

    def from_bytes(self, content: Any) -> Any:
        """Returns the index that :meth:`to_bytes` wrote."""
        index = load_faiss().deserialize_index(torch.as_tensor(content).numpy())
        load_faiss().ParameterSpace().set_index_parameters(index, self.parameters)
        return index

    def _new(self) -> Any:
        faiss = load_faiss()
        try:
            index = faiss.index_factory(self.width, self.factory, faiss.METRIC_INNER_PRODUCT)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"index must be a FAISS factory string for inner products and vectors of width "
                f"{self.width}, got {self.factory!r}: {error}"
            ) from error
        try:
            faiss.ParameterSpace().set_index_parameters(index, self.parameters)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"parameters must be a FAISS parameter string for index={self.factory!r}, "
                f"'nprobe=16' for example, got {self.parameters!r}: {error}"
            ) from error
        return index

    def _check(self, index: Any) -> None:
        """Raises if the index cannot search a class; reads how many vectors its training needs."""
        faiss, parts = load_faiss(), _parts(index)
        if any(isinstance(part, faiss.IndexIDMap) for part in parts):
            raise ValueError(
                f"index={self.factory!r} takes no vectors without ids: leave IDMap out, the "
                "gallery keeps the ids itself"
            )
        if any(part.metric_type != faiss.METRIC_INNER_PRODUCT for part in parts):
            raise ValueError(
                f"index={self.factory!r} compares by Euclidean distance, whatever metric FAISS is "
                "asked for: choose one for inner products, 'HNSW32' or 'IVF256,PQ16' for example"
            )
        if not index.is_trained:
            self.training_size = _training_size(parts)
            return
        try:
            index.add(np.eye(2, self.width, dtype=np.float32))
            index.search(np.eye(1, self.width, dtype=np.float32), 1)
        except RuntimeError as error:
            raise ValueError(
                f"index={self.factory!r} does not take vectors by themselves, choose another, "
                f"'Flat' for example: {error}"
            ) from error


@functools.cache
def load_faiss() -> ModuleType:
    """Imports FAISS, after torch: the other order hangs forked DataLoader workers that search."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "an index other than 'Flat' needs FAISS: pip install faiss-cpu"
        ) from error
    _one_thread_after_fork(faiss.omp_set_num_threads)
    module: ModuleType = faiss
    return module


@functools.cache
def _one_thread_after_fork(set_threads: Callable[[int], None]) -> None:
    """Sets one thread in a forked child, which would wait for its parent's OpenMP threads."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=functools.partial(set_threads, 1))


def _parts(index: Any) -> list[Any]:
    """Returns a FAISS index and those that it wraps, from the outside in."""
    faiss, parts = load_faiss(), [index]
    while True:
        if isinstance(index, faiss.IndexRefine):
            index = faiss.downcast_index(index.base_index)
        elif isinstance(index, faiss.IndexPreTransform | faiss.IndexIDMap):
            index = faiss.downcast_index(index.index)
        else:
            return parts
        parts.append(index)


def _training_size(parts: list[Any]) -> int:
    """Returns how many vectors give every centroid enough; 256 where none are trained."""
    faiss, centroids = load_faiss(), 0
    for part in parts:
        if isinstance(part, faiss.IndexPreTransform):
            steps = [part.chain.at(place) for place in range(part.chain.size())]
            if any(isinstance(faiss.downcast_VectorTransform(s), faiss.OPQMatrix) for s in steps):
                centroids = 256  # of the product quantiser that a rotation is fitted for
    quantiser = getattr(parts[-1], "pq", None)
    codes = 1 << quantiser.nbits if quantiser is not None else 0
    return _POINTS * max(centroids, codes, getattr(parts[-1], "nlist", 0)) or 256


class ClassIndex:
    """The samples of one class, and the exact ranking of what its index proposes.

    A class too small to train a FAISS index is searched flat. A flat search holds the factors less
    a centre: no ranking changes, and float32 rounds what tells the rows apart, not what they share.

    Args:
        spec: What the index is made from.
        metric: The similarity.
        rows: The gallery's rows of this class, rising.
        vectors: The vectors of the whole gallery.
        content: A FAISS index as :meth:`IndexSpec.to_bytes` wrote it, in place of building one.
    """

    def __init__(
        self,
        spec: IndexSpec,
        metric: Cosine | NegativeKL,
        rows: Tensor,
        vectors: Tensor,
        content: Any = None,
    ) -> None:
        self.spec, self.metric, self.rows = spec, metric, rows
        self.is_flat = spec.is_flat or len(rows) < spec.training_size
        pieces = torch.split(rows, max(1, _CHUNK // spec.width))
        if self.is_flat:
            self._centre = metric.rows(vectors[pieces[0]]).mean(dim=0)
            self._longest, self._blocks = 0.0, []
            for piece in pieces:
                factors = metric.rows(vectors[piece]) - self._centre
                longest = float(torch.linalg.vector_norm(factors, dim=1).max())
                self._longest = max(self._longest, longest)
                self._blocks.append(factors.float().to(spec.device))
        elif content is None:
            self.index = spec.filled(torch.cat([metric.rows(vectors[p]).float() for p in pieces]))
        else:
            self.index = spec.from_bytes(content)

    def content(self) -> Tensor | None:
        """Returns the FAISS index as bytes, None where there is none."""
        return None if self.is_flat else self.spec.to_bytes(self.index)

    def search(
        self, queries: Tensor, vectors: Tensor, ids: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Returns float64 scores and ids ``(Q, k)`` of the nearest, ranked in float64.

        ``k + SPARE`` are proposed in float32. Where float32 could have hidden a better one, a flat
        search returns more and more candidates.
        """
        count = len(self.rows)
        scores = torch.full((len(queries), k), -torch.inf, dtype=torch.float64)
        best = torch.full((len(queries), k), -1, dtype=torch.int64)
        unsure, spare = torch.arange(len(queries)), SPARE
        while len(unsure):
            asked = min(k + spare, count)
            again = []
            for part in torch.split(unsure, max(1, _CHUNK // (asked * queries.shape[1]))):
                place, limit = self._propose(queries[part], asked)
                rows = self.rows[place]  # a missing one is -1: the last row, masked at once
                exact = self.metric.scores(queries[part, None], vectors[rows])
                exact = exact.masked_fill(place < 0, -torch.inf)
                exact, chosen = _rank(exact, ids[rows], k)
                scores[part, : exact.shape[1]] = exact
                best[part, : exact.shape[1]] = chosen.masked_fill(exact.isneginf(), -1)
                if limit is not None and asked < count:
                    again.append(part[exact[:, -1] <= limit])
            unsure, spare = torch.cat(again) if again else unsure[:0], spare * 8
        return scores, best

    def _propose(self, queries: Tensor, asked: int) -> tuple[Tensor, Tensor | None]:
        """Returns places ``(Q, asked)`` in the class, and how good a row left out can be.

        For a FAISS index that is not known.
        """
        factors = self.metric.queries(queries)
        if not self.is_flat:
            return torch.from_numpy(self.index.search(factors.float().numpy(), asked)[1]), None
        found, place = _flat_search(factors.float(), self._blocks, asked)
        # Rounding of both factors and of their inner product, summed in any order: in float32
        # here, in float64 where the exact scores are computed.
        length = self._centre.norm() + self._longest
        unit = 2.0**-24 * self._longest + 2.0**-50 * length
        rounding = (factors.shape[1] + 4) * unit * torch.linalg.vector_norm(factors, dim=1)
        return place, found[:, -1] + factors @ self._centre + rounding


def _rank(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the best ``k`` of every row, ties to the lowest id."""
    ids, order = ids.sort(dim=1)
    scores, places = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return scores[:, :k], ids.gather(1, places[:, :k])


def _flat_search(queries: Tensor, blocks: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Returns the ``k`` largest inner products of float32 queries over all blocks of rows.

    Both ``(Q, k)`` on the CPU: the products, and the places of the rows counted over the blocks.
    """
    _one_thread_after_fork(torch.set_num_threads)
    device = blocks[0].device
    found = []
    with _true_float32(device):
        for some in torch.split(queries, max(1, _SCORES // len(blocks[0]))):
            asked, start = some.to(device), 0
            scores = asked.new_empty(len(asked), 0)
            places = torch.empty(len(asked), 0, dtype=torch.int64, device=device)
            for block in blocks:
                more, place = (asked @ block.T).topk(min(k, len(block)), dim=1)
                scores, places = torch.cat([scores, more], 1), torch.cat([places, place + start], 1)
                scores, order = scores.topk(min(k, scores.shape[1]), dim=1)
                places, start = places.gather(1, order), start + len(block)
            found.append((scores.cpu(), places.cpu()))
    return torch.cat([part[0] for part in found]), torch.cat([part[1] for part in found])


@contextmanager
def _true_float32(device: torch.device) -> Iterator[None]:
    """Keeps TF32, bfloat16 and autocast away: the search bounds what float32 rounds, no more."""
    backends: list[Any] = [torch.backends.cuda.matmul]
    cpu: Any = torch.backends.mkldnn
    name: str = "allow_tf32"
    full: bool | str = False
    if hasattr(backends[0], "fp32_precision"):
        # torch 2.9 renamed it, refuses the old name once the new one was used, and has one for
        # the CPU apart, which torch.set_float32_matmul_precision("medium") sets to bfloat16.
        backends.append(cpu.matmul)
        name, full = "fp32_precision", "ieee"
    before = [getattr(backend, name) for backend in backends]
    for backend in backends:
        setattr(backend, name, full)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            setattr(backend, name, value)


def by_class(labels: Tensor) -> list[tuple[int, Tensor]]:
    """Returns every class with the positions of its members, in order."""
    if not len(labels):
        return []
    ordered, position = labels.sort(stable=True)
    classes, counts = torch.unique_consecutive(ordered, return_counts=True)
    return list(zip(classes.tolist(), torch.split(position, counts.tolist()), strict=True))
