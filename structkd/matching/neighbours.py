"""The mean of several matched teacher samples as a student's target."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from structkd._checks import describe, number, whole
from structkd.features import Features
from structkd.matching._inputs import queries_of
from structkd.matching.gallery import RetrievalGallery


class NeighbourMatcher(nn.Module):
    r"""Gives every student sample the mean of its k nearest teacher samples of its class.

    One other image of the class is a noisy target: what the teacher says of *it*. The mean over
    several keeps what they share, which is what the class looks like to the teacher near this
    student. With :math:`\mathcal{N}_b` the k nearest in the class of student b,

    .. math::
        t_b = \tau \log \frac{1}{k} \sum_{j \in \mathcal{N}_b} \mathrm{softmax}(t_j / \tau),
        \qquad e_b = \frac{1}{k} \sum_{j \in \mathcal{N}_b} e_j

    so that :math:`\mathrm{softmax}(t_b / \tau)` is the mean softened prediction: a
    :class:`KDLoss` of this temperature distils from it exactly. k = 1 is
    :class:`SemBridgeMatcher` without a planner. A class with fewer than k samples gives all of
    its own. Maps are left out: those of other images do not add up pixel by pixel.

    Args:
        gallery: The teacher samples, with logits, an embedding or both as features. For targets
            that teach, of :func:`reliable_teachers` alone.
        neighbours: k >= 1; the whole class where it is large.
        temperature: tau > 0, that of the criterion.

    Raises:
        TypeError, ValueError: If an argument has the wrong type or range.

    References:
        Ours, after the matching of Wei et al., *Asymmetric Cross-Modal Knowledge Distillation*,
        AAAI 2026.

    Example:
        >>> import structkd
        >>> teacher = Features(logits=torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 3.0]]))
        >>> gallery = RetrievalGallery(2, metric="kl")
        >>> gallery.add(teacher.logits, torch.tensor([0, 0, 1]), features=teacher)
        >>> matcher = NeighbourMatcher(gallery, 2, temperature=1.0)
        >>> found = matcher(Features(logits=torch.tensor([[1.0, 0.0]])), torch.tensor([0]))
        >>> found.logits.softmax(1)  # the mean of (0.88, 0.12) and (0.50, 0.50)
        tensor([[0.6904, 0.3096]])
    """

    def __init__(
        self, gallery: RetrievalGallery, neighbours: int = 8, *, temperature: float = 4.0
    ) -> None:
        super().__init__()
        if not isinstance(gallery, RetrievalGallery):
            raise TypeError(f"gallery must be a RetrievalGallery, got {describe(gallery)}")
        self.gallery = gallery
        self.neighbours = whole("neighbours", neighbours)
        self.temperature = number("temperature", temperature, above=0)

    @torch.no_grad()
    def match(self, features: Features | Tensor, labels: Tensor) -> Tensor:
        """Returns the ids of the neighbours, ``(B, k)`` int64, nearest first and -1 for none.

        Args:
            features: The students' features, of which a ``kl`` gallery reads the logits and a
                ``cosine`` gallery the embedding; or that tensor, ``(B, dim)``.
            labels: Their classes, ``(B,)`` int64.

        Raises:
            ValueError: As :meth:`RetrievalGallery.search`: a class that only the students have is
                named.
        """
        queries = queries_of(features, self.gallery.metric)
        _, ids = self.gallery.search(queries, labels, self.neighbours)
        return ids

    @torch.no_grad()
    def targets(self, ids: Tensor) -> Features:
        """Returns the mean of what the gallery keeps of ``ids (B, k)``, where -1 does not count.

        Raises:
            ValueError: If an id is unknown, a row has none, or the gallery holds neither logits nor
                an embedding.
        """
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64:
            raise TypeError(f"ids must be int64 (B, k), as match() gives them, got {describe(ids)}")
        found = ids >= 0
        if not bool(found.any(dim=1).all()):
            raise ValueError("each row of ids must name a teacher sample, got one of -1 alone")
        kept = self.gallery.features(ids[found])
        if kept.logits is None and kept.embedding is None:
            raise ValueError(
                "the gallery holds neither logits nor an embedding: add them, "
                "gallery.add(..., features=Features(logits=..., embedding=...))"
            )
        count = found.sum(dim=1)
        row = torch.arange(len(ids), device=ids.device).repeat_interleave(count)
        logits = embedding = None
        if kept.logits is not None:
            share = torch.log_softmax(kept.logits.double() / self.temperature, dim=1)
            logits = self.temperature * _log_mean(share, row, count).to(kept.logits.dtype)
        if kept.embedding is not None:
            total = kept.embedding.new_zeros(len(ids), kept.embedding.shape[1], dtype=torch.float64)
            total.index_add_(0, row, kept.embedding.double())
            embedding = (total / count[:, None]).to(kept.embedding.dtype)
        return Features(logits=logits, embedding=embedding)

    @torch.no_grad()
    def forward(self, student: Features | Tensor, target: Tensor) -> Features:
        """Returns the targets of students, logits and embedding as far as the gallery has them.

        Args:
            student: As in :meth:`match`.
            target: The students' classes, ``(B,)`` int64.

        Raises:
            ValueError: As :meth:`match` and :meth:`targets`.
        """
        return self.targets(self.match(student, target))

    def extra_repr(self) -> str:
        return f"neighbours={self.neighbours}, temperature={self.temperature}"


def _log_mean(log_p: Tensor, row: Tensor, count: Tensor) -> Tensor:
    """Returns the log of the mean of ``exp(log_p)`` over the entries ``(N, K)`` of every row."""
    padded = log_p.new_full(
        (len(count), int(count.max()) if len(count) else 0, log_p.shape[1]), -math.inf
    )
    start = count.cumsum(0) - count
    padded[row, torch.arange(len(row), device=row.device) - start[row]] = log_p
    return padded.logsumexp(dim=1) - count[:, None].to(log_p.dtype).log()
