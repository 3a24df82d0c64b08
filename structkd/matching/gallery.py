"""The teacher samples by class, and the search for a student's nearest."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from structkd._checks import describe, whole
from structkd.features import Features
from structkd.matching import _file
from structkd.matching._faiss import IndexSpec
from structkd.matching._index import ClassIndex
from structkd.matching._inputs import usable_vectors, whole_numbers
from structkd.matching._metric import make_metric
from structkd.matching._samples import SampleTable
from structkd.matching._store import by_class


class RetrievalGallery:
    r"""Holds teacher samples, one FAISS index a class, and finds the nearest of a student's class.

    ``cosine`` scores by :math:`\langle x, y \rangle / (|x| |y|)`. ``kl`` takes logits and scores by
    :math:`-\mathrm{KL}(p_j \| q_i)` with the teacher's :math:`p_j = \mathrm{softmax}(t_j / T)` and
    the student's :math:`q_i = \mathrm{softmax}(s_i / T)`. That is an inner product, so the arg-min
    over the class is an exact search:

    .. math::
        -\mathrm{KL}(p_j \| q_i) = \langle [\, p_j,\; -\textstyle\sum p_j \log p_j \,],
        [\, \log q_i,\; 1 \,] \rangle

    Vectors are kept in float32. FAISS proposes candidates in float32; their scores are computed
    again and ranked in float64, and equal ones stand by id, the lowest first. With ``index="Flat"``
    the result is that of a float64 search over the class: where rounding leaves a doubt, more
    candidates are asked for. So many equal teachers in a class cost time. Other indexes rank
    exactly what they found, and what they miss stays missed.

    On a GPU a flat index is searched by torch, with the same result, and needs no FAISS at all;
    other indexes there need faiss-gpu.

    A class too small to train its index (39 vectors a centroid) is searched exactly until it has
    grown. Every vector is held twice, as given and in its index. Many small calls of :meth:`add`
    cost what one large call does, but for the calls themselves. The gallery can be pickled and
    searched inside DataLoader workers, forked or spawned; import torch before faiss for that.

    Args:
        dim: Width of the vectors; for ``kl`` the number of logits.
        metric: ``cosine`` or ``kl``.
        temperature: T > 0, for ``kl`` only; the paper's is 3.
        index: FAISS factory string of every class's index, ``"IVF1024,Flat"`` for example. Of a
            million rows of 256, ``"IVF2000,PQ64x4fs,RFlat"`` was the fastest (docs/speed.md).
        parameters: FAISS parameter string for it, ``"nprobe=16"`` or
            ``"nprobe=32,k_factor_rf=10"`` for example.
        device: Where the index lies, ``cpu`` or ``cuda[:n]``; the vectors as given stay on the CPU.

    Raises:
        ValueError: If an argument is out of range, FAISS refuses ``index`` or ``parameters``, or
            torch sees no such device.
        ImportError: If FAISS, or its GPU support for another index than ``"Flat"`` on ``cuda``, is
            not installed.

    References:
        Wei et al., *Asymmetric Cross-Modal Knowledge Distillation: Bridging Modalities with Weak
        Semantic Consistency*, AAAI 2026: first matching (cosine), dynamic matching (KL). Search:
        Douze et al., *The Faiss library*, 2024.

    Example:
        >>> gallery = RetrievalGallery(2)
        >>> gallery.add(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), torch.tensor([0, 0, 1]))
        >>> scores, ids = gallery.search(torch.tensor([[1.0, 3.0]]), torch.tensor([0]), k=1)
        >>> ids
        tensor([[1]])
    """

    def __init__(
        self,
        dim: int,
        *,
        metric: str = "cosine",
        temperature: float = 3.0,
        index: str = "Flat",
        parameters: str = "",
        device: str = "cpu",
    ) -> None:
        self.dim = whole("dim", dim)
        self._metric = make_metric(metric, temperature)
        self.metric, self.temperature = metric, float(temperature)
        self.index, self.parameters, self.device = index, parameters, device
        self._spec = IndexSpec(self._metric.width(self.dim), index, parameters, str(device))
        self._classes: dict[int, ClassIndex] = {}
        self._samples = SampleTable(self.dim)

    def __len__(self) -> int:
        return len(self._samples)

    def __repr__(self) -> str:
        return (
            f"RetrievalGallery(dim={self.dim}, metric={self.metric!r}, index={self.index!r}, "
            f"samples={len(self)}, classes={len(self._classes)})"
        )

    @property
    def sizes(self) -> dict[int, int]:
        """The number of samples by class."""
        return {label: len(index) for label, index in sorted(self._classes.items())}

    @property
    def is_trained(self) -> bool:
        """Whether every class has the index that was asked for, none its exact stand-in."""
        return all(index.is_final for index in self._classes.values())

    def add(
        self,
        vectors: Tensor,
        labels: Tensor,
        ids: Tensor | None = None,
        *,
        features: Features | None = None,
    ) -> None:
        """Adds teacher samples.

        Args:
            vectors: Embeddings, or logits for ``kl``, ``(N, dim)``, any float dtype.
            labels: Classes ``(N,)``, int64.
            ids: What ``search`` returns for them, ``(N,)`` int64, >= 0 and never twice. By default
                they count on from the largest id there ever was, which is the position in the
                teacher's data set if all of it is added in order.
            features: The teacher's features of these samples, kept on the CPU for :meth:`features`
                (``index`` is not kept: the ids are it). Give them in every call or in none.

        Raises:
            ValueError: If shapes disagree, a vector is not finite or (for ``cosine``) zero, an id
                comes twice or is negative, or ``features`` are unlike those of earlier calls.
            TypeError: If a tensor has the wrong dtype.
        """
        vectors = self._checked(vectors, "vectors")
        count = len(vectors)
        labels = whole_numbers(labels, "labels", count)
        ids = self._samples.new_ids(ids, count)
        parts = self._samples.checked_features(features, count)
        self._put(self._samples.add(ids), vectors, labels, parts)

    def remove(self, ids: Tensor) -> None:
        """Removes teacher samples; a class without any is gone.

        What FAISS can take out of an index is taken out; an index of another kind (HNSW, or one
        with ``RFlat``) is filled again with what its class still has, as trained. Default ids go
        on from the largest there ever was; in :meth:`add` a removed id may be given again. The
        memory is used again by the next :meth:`add`.

        Args:
            ids: Known ids ``(M,)`` int64, each once.

        Raises:
            ValueError: If an id is unknown or comes twice.
            TypeError: If ``ids`` is no int64 tensor.
        """
        rows = self._samples.distinct_rows(ids)
        self._take(rows)
        self._samples.free(rows)

    def update(
        self,
        ids: Tensor,
        vectors: Tensor,
        *,
        features: Features | None = None,
        labels: Tensor | None = None,
    ) -> None:
        """Gives known teacher samples other vectors, as :meth:`remove` and :meth:`add` would.

        Args:
            ids: Known ids ``(M,)`` int64, each once.
            vectors: What takes the place of their vectors, ``(M, dim)``, any float dtype.
            features: What takes the place of their features; by default those stay.
            labels: Their new classes, ``(M,)`` int64; by default they stay in theirs.

        Raises:
            ValueError: If an id is unknown or comes twice, the gallery holds no features though
                some are given, or as :meth:`add`. The gallery is then what it was.
            TypeError: If a tensor has the wrong dtype.
        """
        rows = self._samples.distinct_rows(ids)
        vectors = self._checked(vectors, "vectors")
        if len(vectors) != len(rows):
            raise ValueError(
                f"vectors must hold one row for each of {len(rows)} ids, got {describe(vectors)}"
            )
        labels = (
            self._samples.labels[rows]
            if labels is None
            else whole_numbers(labels, "labels", len(rows))
        )
        parts = {} if features is None else self._samples.checked_features(features, len(rows))
        self._take(rows)
        self._put(rows, vectors, labels, parts)

    def search(self, queries: Tensor, labels: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """Finds the ``k`` nearest samples of every query's class, one search a class.

        Args:
            queries: ``(Q, dim)``, any float dtype: embeddings, or logits for ``kl``.
            labels: The class to search for each query, ``(Q,)`` int64.
            k: How many, >= 1.

        Returns:
            Scores ``(Q, k)`` float32, best first (cosine in -1..1, or -KL <= 0), and ids ``(Q, k)``
            int64, on the device of ``queries``. Where the class holds fewer than ``k``, or an
            inexact index finds fewer, the rest has score -inf and id -1.

        Raises:
            ValueError: If the gallery or a query's class is empty, a query has another width, is
                not finite or (for ``cosine``) is zero.
            TypeError: If a tensor has the wrong dtype.
        """
        device = queries.device if isinstance(queries, Tensor) else None
        queries, labels = self._query(queries, labels)
        k = whole("k", k)
        scores = torch.empty(len(queries), k, dtype=torch.float64)
        ids = torch.empty(len(queries), k, dtype=torch.int64)
        for label, members in by_class(labels):
            scores[members], ids[members] = self._classes[label].search(
                self._metric, queries[members], self._samples.vectors, self._samples.ids, k
            )
        return scores.float().to(device), ids.to(device)

    def scores(self, queries: Tensor, ids: Tensor) -> Tensor:
        """Returns the exact float64 scores ``(Q, M)`` of queries ``(Q, dim)`` and ids ``(M,)``.

        Raises:
            ValueError: As :meth:`search`, or if an id is unknown.
        """
        device = queries.device if isinstance(queries, Tensor) else None
        queries = self._checked(queries, "queries")
        vectors = self._samples.vectors[self._samples.rows(ids)]
        product = self._metric.queries(queries) @ self._metric.rows(vectors).T
        return product.to(device)

    def ids(self, label: int) -> Tensor:
        """Returns the ids of a class in rising order, ``(N,)`` int64; none for an unknown class."""
        if label not in self._classes:
            return torch.empty(0, dtype=torch.int64)
        return self._samples.ids[self._classes[label].rows].sort().values

    def features(self, ids: Tensor) -> Features:
        """Returns what :meth:`add` kept of the samples ``ids (M,)``, with the ids as ``index``.

        Raises:
            ValueError: If an id is unknown or no features were kept.
        """
        return self._samples.features(ids)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the gallery to one file, atomically, with a version and a checksum."""
        _file.write(path, self._state())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str = "cpu") -> RetrievalGallery:
        """Reads a gallery that :meth:`save` wrote.

        The checksum tells damage, not malice: load only files that you trust.

        Raises:
            ValueError: If the file is of another kind or version, cut short, or damaged.
            FileNotFoundError: If there is none.
        """
        gallery = cls.__new__(cls)
        gallery.__setstate__({**_file.read(path), "device": device})
        return gallery

    def __getstate__(self) -> dict[str, Any]:
        state = self._state()
        for part in state["classes"].values():
            # Spawned workers take tensors by file descriptor: one that dies meanwhile, as this copy
            # of the index does, frees its number for the next.
            part["index"] = None if part["index"] is None else part["index"].numpy()
        return state

    def _state(self) -> dict[str, Any]:
        return {
            "dim": self.dim,
            "metric": self.metric,
            "temperature": self.temperature,
            "index": self.index,
            "parameters": self.parameters,
            "device": self.device,
            **self._samples.state(),
            "classes": {label: index.state() for label, index in self._classes.items()},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = ("metric", "temperature", "index", "parameters", "device")
        RetrievalGallery.__init__(self, state["dim"], **{name: state[name] for name in names})
        self._samples = SampleTable(self.dim, state)
        self._classes = {
            label: ClassIndex.from_state(self._spec, part, self._metric, state["vectors"])
            for label, part in state["classes"].items()
        }

    def _put(self, rows: Tensor, vectors: Tensor, labels: Tensor, parts: dict[str, Tensor]) -> None:
        """Writes checked samples to their rows and to the indexes of their classes."""
        self._samples.write(rows, vectors, labels, parts)
        for label, members in by_class(labels):
            if label not in self._classes:
                self._classes[label] = ClassIndex(self._spec)
            self._classes[label].add(rows[members], self._metric.rows(vectors[members]))

    def _take(self, rows: Tensor) -> None:
        """Takes rows out of the indexes of their classes."""
        for label, members in by_class(self._samples.labels[rows]):
            index = self._classes[label]
            if len(members) == len(index):
                del self._classes[label]
            else:
                index.remove(rows[members], self._metric, self._samples.vectors)

    def _checked(self, vectors: Tensor, name: str) -> Tensor:
        return usable_vectors(vectors, name, self.dim, directed=self.metric == "cosine")

    def _query(self, queries: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not len(self):
            raise ValueError("the gallery is empty: add() teacher samples before a search")
        queries = self._checked(queries, "queries")
        labels = whole_numbers(labels, "labels", len(queries))
        missing = sorted(set(labels.tolist()) - self._classes.keys())
        if missing:
            raise ValueError(
                f"labels name classes without a teacher sample: {missing}; the gallery has "
                f"{sorted(self._classes)}: leave those students out, or add teachers"
            )
        return queries, labels
