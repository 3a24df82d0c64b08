"""The teacher samples by class, and the search for a student's nearest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from structkd._checks import choice, describe, number, whole
from structkd.features import Features, named_features
from structkd.gallery import file
from structkd.gallery.search import ClassIndex, Cosine, IndexSpec, NegativeKL, by_class

METRICS = ("cosine", "kl")


class RetrievalGallery:
    r"""Holds teacher samples by class, and finds the nearest of a student's class.

    ``cosine`` scores by :math:`\langle x, y \rangle / (|x| |y|)`. ``kl`` takes logits and scores by
    :math:`-\mathrm{KL}(p_j \| q_i)` with the teacher's :math:`p_j = \mathrm{softmax}(t_j / T)` and
    the student's :math:`q_i = \mathrm{softmax}(s_i / T)`. That is an inner product, so the arg-min
    over the class is an exact search:

    .. math::
        -\mathrm{KL}(p_j \| q_i) = \langle [\, p_j,\; -\sum p_j \log p_j \,],
        [\, \log q_i,\; 1 \,] \rangle

    Vectors are kept in float32. Candidates are proposed in float32; their scores are computed again
    and ranked in float64, and equal scores are ordered by id. With ``index="Flat"``, which torch
    searches on any device, the result is that of a float64 search over the class: where rounding
    leaves a doubt, more candidates are looked at, so many equal teachers in a class cost time.
    Other indexes are FAISS's, on the CPU; they rank exactly what they find, but may miss samples. A
    class too small to train its index (39 vectors a centroid) is searched exactly.

    A class's index is built by the first search after an :meth:`add` to the class, from all that
    the class holds. Samples are added and never changed. If the network that embeds them keeps
    training, embed all of them again every few epochs, and make a new gallery.

    The gallery can be pickled and searched inside DataLoader workers, forked or spawned; import
    torch before faiss for that.

    Args:
        dim: Width of the vectors; for ``kl`` the number of logits, 2 at least.
        metric: ``cosine`` or ``kl``.
        temperature: T > 0, for ``kl`` only; the paper's is 3.
        index: ``"Flat"``, or the FAISS factory string of every class's index, ``"IVF1024,Flat"``
            for example. Of a million rows of 256, ``"IVF2000,PQ64x4fs,RFlat"`` was the fastest
            that was tried.
        parameters: FAISS parameter string for it, ``"nprobe=16"`` or
            ``"nprobe=32,k_factor_rf=10"`` for example.
        device: Where a flat index lies, ``cpu`` or ``cuda[:n]`` for example; the vectors as given
            stay on the CPU.

    Raises:
        ValueError: If an argument is out of range, FAISS refuses ``index`` or ``parameters``, an
            index does not take plain vectors or compares by another metric, or torch does not see
            the device.
        ImportError: If FAISS is not installed and ``index`` is not ``"Flat"``.

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
        self.metric = choice("metric", metric, METRICS)
        self.temperature = number("temperature", temperature, above=0)
        if metric == "kl" and self.dim < 2:
            raise ValueError(
                "dim must be at least 2 for metric='kl', got 1: the softmax of a single logit is "
                "always 1, so that all teachers would be equally near. Give a binary teacher's "
                "logit z as the two columns [0, z], or match embeddings by metric='cosine'"
            )
        self.index, self.parameters, self.device = index, parameters, device
        self._metric = NegativeKL(self.temperature) if metric == "kl" else Cosine()
        width = self.dim + 1 if metric == "kl" else self.dim
        self._spec = IndexSpec(width, index, parameters, device)
        # The columns of every add(), joined when they are first read.
        self._pieces: list[dict[str, Tensor]] = [
            {
                "vectors": torch.empty(0, self.dim),
                "labels": torch.empty(0, dtype=torch.int64),
                "ids": torch.empty(0, dtype=torch.int64),
            }
        ]
        self._sizes: dict[int, int] = {}
        self._indexes: dict[int, ClassIndex] = {}
        self._by_id: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return sum(self._sizes.values())

    def __repr__(self) -> str:
        return (
            f"RetrievalGallery(dim={self.dim}, metric={self.metric!r}, index={self.index!r}, "
            f"samples={len(self)}, classes={len(self._sizes)})"
        )

    @property
    def sizes(self) -> dict[int, int]:
        """The number of samples by class."""
        return dict(sorted(self._sizes.items()))

    def add(
        self,
        vectors: Tensor,
        labels: Tensor,
        ids: Tensor | None = None,
        *,
        features: Features | Mapping[str, Any] | None = None,
    ) -> None:
        """Adds teacher samples, in as many calls as you like.

        Args:
            vectors: Embeddings, or logits for ``kl``, ``(N, dim)``, any float dtype.
            labels: Classes ``(N,)``, int64.
            ids: What ``search`` returns for them, ``(N,)`` int64, >= 0 and never twice. By default
                they count on from the largest so far, which is the position in the teacher's data
                set if all of it is added in order.
            features: The teacher's features of these samples, or a dict of their names, kept on
                the CPU for :meth:`features` (without ``index``, which the ids replace). Give them
                in every call or in none.

        Raises:
            ValueError: If shapes disagree, a vector is not finite or (for ``cosine``) zero, an id
                comes twice or is negative, or ``features`` are unlike those of earlier calls. The
                gallery is then unchanged.
            TypeError: If a tensor has the wrong dtype.
        """
        vectors = usable_vectors(vectors, "vectors", self.dim, directed=self.metric == "cosine")
        count = len(vectors)
        labels = whole_numbers(labels, "labels", count)
        piece = {"vectors": vectors, "labels": labels, "ids": self._new_ids(ids, count)}
        piece |= self._new_features(features, count)
        if not count:
            return
        # Copied: the caller may go on to write into what was given.
        piece = {name: part.clone() for name, part in piece.items()}
        self._pieces = [*self._pieces, piece] if len(self) else [piece]
        self._by_id = None
        for label, members in by_class(labels):
            self._sizes[label] = self._sizes.get(label, 0) + len(members)
            self._indexes.pop(label, None)

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
                not finite or (for ``cosine``) is zero, or a FAISS index fails on its class.
            TypeError: If a tensor has the wrong dtype.
        """
        if not len(self):
            raise ValueError("the gallery is empty: add() teacher samples before a search")
        given = self._queries(queries)
        labels = whole_numbers(labels, "labels", len(given))
        missing = sorted(set(labels.tolist()) - self._sizes.keys())
        if missing:
            raise ValueError(
                f"labels name classes without a teacher sample: {missing}; the gallery has "
                f"{sorted(self._sizes)}: leave those students out, or add teachers"
            )
        k = whole("k", k)
        scores = torch.empty(len(given), k, dtype=torch.float64)
        ids = torch.empty(len(given), k, dtype=torch.int64)
        held = self._held()
        for label, members in by_class(labels):
            scores[members], ids[members] = self._index(label).search(
                given[members], held["vectors"], held["ids"], k
            )
        return scores.float().to(queries.device), ids.to(queries.device)

    def scores(self, queries: Tensor, ids: Tensor) -> Tensor:
        """Returns the exact float64 scores ``(Q, M)`` of queries ``(Q, dim)`` and ids ``(M,)``.

        Raises:
            ValueError: As :meth:`search`, or if an id is unknown.
        """
        given = self._queries(queries)
        vectors = self._held()["vectors"][self._rows(ids)]
        product = self._metric.queries(given) @ self._metric.rows(vectors).T
        return product.to(queries.device)

    def ids(self, label: int) -> Tensor:
        """Returns the ids of a class in rising order, ``(N,)`` int64; none for an unknown class."""
        held = self._held()
        return held["ids"][held["labels"] == label].sort().values

    def features(self, ids: Tensor) -> Features:
        """Returns what :meth:`add` kept of the samples ``ids (M,)``, with the ids as ``index``.

        Raises:
            ValueError: If an id is unknown or no features were kept.
        """
        rows = self._rows(ids)
        columns = {name: part for name, part in self._held().items() if "." in name}
        if not columns:
            raise ValueError(
                "the gallery holds no features: pass add(..., features=teacher_features)"
            )
        kept = {name: part[rows].to(ids.device) for name, part in columns.items()}
        maps = sorted(name for name in kept if name.startswith("features.intermediate"))
        return Features(
            logits=kept.get("features.logits"),
            embedding=kept.get("features.embedding"),
            intermediate=tuple(kept[name] for name in maps),
            index=ids,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the gallery to one file, with a version and a checksum.

        The file is replaced in one step: a reader meanwhile, or after a crash, finds the whole old
        file or the whole new one.

        Raises:
            ValueError: If ``path`` is no regular file.
            OSError: If the file or its folder cannot be written, or the disk is full.
        """
        file.write(path, self._state())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str = "cpu") -> RetrievalGallery:
        """Reads a gallery that :meth:`save` wrote, also in structkd 0.1.0.

        The checksum detects damage, not tampering: load only files that you trust.

        Raises:
            ValueError: If the file is of another kind or version, cut short, or damaged.
            FileNotFoundError: If there is none.
        """
        state = file.read(path)
        if "classes" in state:
            state = _as_of_now(state)
        gallery = cls.__new__(cls)
        gallery.__setstate__({**state, "device": device})
        return gallery

    def __getstate__(self) -> dict[str, Any]:
        state = self._state()
        # Spawned workers take tensors by file descriptor: one that dies meanwhile, as this copy of
        # an index does, frees its number for the next.
        state["indexes"] = {label: part.numpy() for label, part in state["indexes"].items()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = ("metric", "temperature", "index", "parameters", "device")
        RetrievalGallery.__init__(self, state["dim"], **{name: state[name] for name in names})
        self._pieces = [state["samples"]]
        for label, rows in by_class(state["samples"]["labels"]):
            self._sizes[label] = len(rows)
            if label in state["indexes"]:
                self._index(label, state["indexes"][label])

    def _state(self) -> dict[str, Any]:
        """Returns all of it, with the index of every class that FAISS searches as bytes."""
        names = ("dim", "metric", "temperature", "index", "parameters", "device")
        some = {} if self._spec.is_flat else {c: self._index(c).content() for c in self._sizes}
        indexes = {label: part for label, part in some.items() if part is not None}
        return {**{n: getattr(self, n) for n in names}, "samples": self._held(), "indexes": indexes}

    def _index(self, label: int, content: Any = None) -> ClassIndex:
        """Returns the index of a class; builds it, or reads it from ``content``, if it is new."""
        if label not in self._indexes:
            held = self._held()
            rows = (held["labels"] == label).nonzero()[:, 0]
            self._indexes[label] = ClassIndex(
                self._spec, self._metric, rows, held["vectors"], content
            )
        return self._indexes[label]

    def _held(self) -> dict[str, Tensor]:
        """Returns all samples by column."""
        if len(self._pieces) > 1:
            self._pieces = [
                {n: torch.cat([piece[n] for piece in self._pieces]) for n in self._pieces[0]}
            ]
        return self._pieces[0]

    def _queries(self, queries: Tensor) -> Tensor:
        return usable_vectors(queries, "queries", self.dim, directed=self.metric == "cosine")

    def _rows(self, ids: Tensor) -> Tensor:
        """Returns the rows of known ids."""
        ids = whole_numbers(ids, "ids")
        if self._by_id is None:
            known, order = self._held()["ids"].sort()
            self._by_id = known, order
        known, order = self._by_id
        place = torch.searchsorted(known, ids).clamp(max=max(len(known) - 1, 0))
        _refuse_ids(ids[known[place] != ids] if len(known) else ids, "ids are not in the gallery:")
        return order[place]

    def _new_ids(self, ids: Tensor | None, count: int) -> Tensor:
        """Returns ids for ``count`` new samples after checking them; none count on."""
        held = torch.cat([piece["ids"] for piece in self._pieces])
        if ids is None:
            following = int(held.max()) + 1 if len(held) else 0
            return torch.arange(following, following + count)
        ids = whole_numbers(ids, "ids", count)
        if count and int(ids.min()) < 0:
            raise ValueError(f"ids must be >= 0 (-1 means none), got {int(ids.min())}")
        ordered = ids.sort().values
        again = torch.cat([ordered[1:][ordered[1:] == ordered[:-1]], ids[torch.isin(ids, held)]])
        _refuse_ids(again, "ids must be new and distinct, got again:")
        return ids

    def _new_features(
        self, features: Features | Mapping[str, Any] | None, count: int
    ) -> dict[str, Tensor]:
        """Returns the columns of ``count`` samples' features after checking them."""
        held = {name: part for name, part in self._pieces[0].items() if "." in name}
        if len(self) and bool(held) != (features is not None):
            come, before = ("none", "with") if features is None else ("some", "without")
            raise ValueError(
                "features must come with every add() or with none, "
                f"got {come} after {len(self)} samples {before} them"
            )
        if features is None:
            return {}
        features = named_features(features, "features")
        given = {"features.logits": features.logits, "features.embedding": features.embedding}
        given |= {f"features.intermediate.{i:03d}": m for i, m in enumerate(features.intermediate)}
        columns = {name: part.detach().cpu() for name, part in given.items() if part is not None}
        if not columns:
            raise ValueError("features must hold logits, an embedding or maps, got none of them")
        for name, part in columns.items():
            if len(part) != count:
                raise ValueError(f"{name} must hold {count} samples, got {describe(part)}")
        kept, come_now = (
            {name: describe(part[:0]) for name, part in some.items()} for some in (held, columns)
        )
        if kept and kept != come_now:
            raise ValueError(
                f"features must be like those of earlier calls, {kept}, got {come_now}"
            )
        return columns


def _as_of_now(state: dict[str, Any]) -> dict[str, Any]:
    """Returns the state that a file of structkd 0.1.0 holds; its FAISS indexes are built anew.

    They counted rows that may have been removed, which have the id -1.
    """
    kept = state["ids"] >= 0
    samples = {name: state[name][kept] for name in ("vectors", "labels", "ids")}
    samples |= {f"features.{name}": part[kept] for name, part in state["features"].items()}
    return {**state, "samples": samples, "indexes": {}}


def queries_of(features: Features | Mapping[str, Any] | Tensor, metric: str) -> Tensor:
    """Returns the queries for a gallery of this metric: logits for ``kl``, else embeddings."""
    if isinstance(features, Tensor):
        return features
    if not isinstance(features, Features | Mapping):
        raise TypeError(
            "features must be Features, a dict of their names or a tensor, got "
            f"{describe(features)}"
        )
    field = "logits" if metric == "kl" else "embedding"
    queries: Tensor | None = getattr(named_features(features, "features"), field)
    if queries is None:
        raise ValueError(f"features.{field} is missing, which a {metric!r} gallery reads")
    return queries


def whole_numbers(values: Tensor, name: str, count: int | None = None) -> Tensor:
    """Returns ``(N,)`` int64 on the CPU after checking type and shape."""
    if not isinstance(values, Tensor) or values.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be an int64 tensor, got {describe(values)}")
    if values.dim() != 1 or (count is not None and len(values) != count):
        wanted = "(N,)" if count is None else f"({count},), one a row"
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(values.shape)}")
    return values.detach().long().cpu()


def usable_vectors(vectors: Tensor, name: str, dim: int, *, directed: bool) -> Tensor:
    """Returns rows as float32 on the CPU after checking that a metric can score them.

    ``directed``: a row of zeros, which has no direction, is an error.
    """
    if not isinstance(vectors, Tensor) or not vectors.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {describe(vectors)}")
    if vectors.dim() != 2 or vectors.shape[1] != dim:
        raise ValueError(
            f"{name} must be (N, {dim}), the dim of this gallery, got {describe(vectors)}"
        )
    vectors = vectors.detach().float().cpu().contiguous()
    _refuse_rows(~vectors.isfinite().all(dim=1), name, "hold NaN or infinity")
    if directed:
        _refuse_rows((vectors == 0).all(dim=1), name, "are zero and have no direction")
    return vectors


def _refuse_ids(ids: Tensor, what: str) -> None:
    """Raises with the first of ``ids``, if there are any."""
    if len(ids):
        raise ValueError(f"{what} {ids[:5].tolist()}{'...' if len(ids) > 5 else ''}")


def _refuse_rows(bad: Tensor, name: str, what: str) -> None:
    rows = bad.nonzero()[:, 0].tolist()
    if rows:
        raise ValueError(
            f"{name} must be finite and usable: {len(rows)} row(s) {what}, "
            f"rows {rows[:5]}{'...' if len(rows) > 5 else ''}"
        )
