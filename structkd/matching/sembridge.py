"""Matching of student samples with teacher samples of their class."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from structkd._checks import describe, number, whole
from structkd.distributed import rank, world_size
from structkd.features import Features
from structkd.gallery import RetrievalGallery
from structkd.gallery.gallery import queries_of, usable_vectors, whole_numbers
from structkd.gallery.search import by_class
from structkd.transport import LagrangianPlanner

BLOCK = 1024  # students that are planned together

# Queries, classes, and positions in the data set if those are known; all on the CPU.
Students: TypeAlias = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True, eq=False)
class Match:
    """One teacher sample for every student sample.

    Attributes:
        ids: The teacher's ids in the gallery, ``(B,)`` int64.
        scores: The gallery's score of every pair, ``(B,)`` float32.
        weights: The share 0..1 of the student's mass that the plan sends to its match, ``(B,)``
            float32; 1 where the nearest is taken without a plan.
        converged: Whether all plans converged. Where not, the limits hold all the same, but the
            sum of the scores may be short of what the planner could reach.
        index: The students' positions in their data set, rising, ``(B,)`` int64, where they were
            given; None where the match has the students in the caller's order.
    """

    ids: Tensor
    scores: Tensor
    weights: Tensor
    converged: bool = True
    index: Tensor | None = None


class ConvergenceWarning(UserWarning):
    """A plan stopped at ``max_iterations`` before it reached the planner's tolerance."""


class SemBridgeMatcher(nn.Module):
    r"""Gives every student sample a teacher sample of its class, so that unpaired data distils.

    Without a planner it is the nearest in the class, as published: by cosine of the embeddings (the
    first matching), or by KL of the logits (dynamic matching), whichever the gallery has. While a
    student is unsure, the nearest by KL are the few teacher samples that are unsure too: in our
    runs 6 % of them served all students, and accuracy fell (docs/unpaired.md).

    With a planner, a few teacher samples no longer serve every student. The columns of the plan are
    the candidates that FAISS finds for the students of a class, its costs are -score (1 - cosine,
    or KL), and every student is a row of equal mass. ``capacity`` and ``both`` planners are rounded
    to one teacher a student, in rounds: every free student asks for the open teacher with most of
    its mass, and a teacher takes those that bring it most until it is full. No teacher then serves
    more than :math:`\lceil \mathrm{capacity} \cdot n / m \rceil` of the ``n`` students of a class
    with ``m`` teachers. Where the candidates cannot take all students, more are looked up. A
    ``rows`` planner has no such limit: its match is the nearest, its weight the softmax.

    More than 1024 students of a class are planned in blocks, on what the earlier left open.

    As a module it returns the matched teacher's features from the gallery, in the students' order.
    It has no parameters, and the gallery is no part of its ``state_dict``: save that by itself.

    Args:
        gallery: The teacher samples, with features if the module is to be called.
        planner: None, or the planner of the matching; its epsilon is in units of the score.
        candidates: Candidates >= 1 a student that FAISS proposes to the planner.
        capacity: How many times its even share a teacher may serve, >= 1. Where there are fewer
            students than teachers, one student each. Under ``both`` the share is even: 1 is used.

    Raises:
        TypeError, ValueError: If an argument has the wrong type or range.

    References:
        Wei et al., *Asymmetric Cross-Modal Knowledge Distillation: Bridging Modalities with Weak
        Semantic Consistency*, AAAI 2026, Student-Friendly Matching. The planned matching is ours.

    Example:
        >>> import structkd
        >>> teacher = Features(logits=torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]]))
        >>> gallery = RetrievalGallery(2, metric="kl")
        >>> gallery.add(teacher.logits, torch.tensor([0, 0, 1]), features=teacher)
        >>> matcher = SemBridgeMatcher(gallery)
        >>> student, target = Features(logits=torch.tensor([[1.1, 0.0]])), torch.tensor([0])
        >>> matcher(student, target).index
        tensor([1])
        >>> loss = structkd.KDLoss()(student, matcher(student, target))
    """

    def __init__(
        self,
        gallery: RetrievalGallery,
        planner: LagrangianPlanner | None = None,
        candidates: int = 32,
        *,
        capacity: float = 2.0,
    ) -> None:
        super().__init__()
        if not isinstance(gallery, RetrievalGallery):
            raise TypeError(f"gallery must be a RetrievalGallery, got {describe(gallery)}")
        if planner is not None and not isinstance(planner, LagrangianPlanner):
            raise TypeError(f"planner must be a LagrangianPlanner, got {describe(planner)}")
        self.gallery = gallery
        self.planner = planner
        self.candidates = whole("candidates", candidates)
        self.capacity = number("capacity", capacity, at_least=1)

    @torch.no_grad()
    def match(self, features: Features | Mapping[str, Any] | Tensor, labels: Tensor) -> Match:
        """Chooses a teacher sample for every student sample.

        Args:
            features: The students' features or a dict of their names, of which a ``kl`` gallery
                reads the logits and a ``cosine`` gallery the embedding; or that tensor,
                ``(B, dim)``.
            labels: Their classes, ``(B,)`` int64.

        Returns:
            The match, on the device of the features.

        Raises:
            ValueError: If the field is missing, or as :meth:`RetrievalGallery.search` raises.

        Warns:
            ConvergenceWarning: Once, if a plan did not converge.
        """
        match = self._match(queries_of(features, self.gallery.metric), labels)
        self._warn(match.converged)
        return match

    @torch.no_grad()
    def match_all(
        self,
        features: Features | Mapping[str, Any] | Tensor,
        labels: Tensor,
        index: Tensor | None = None,
    ) -> Match:
        """Matches the students of all processes: each hands in its own, all get the whole match.

        It is the match that one process would make of all students, to the last bit, and the same
        on every rank, so that each can give it to its own :class:`MatchedDataset`. All ranks must
        call it, with galleries of the same content; a rank may have any number of students, none
        too. The queries are gathered, and every rank matches all of them. Without a process group
        it matches what it is given.

        Args:
            features: This rank's students, as in :meth:`match`.
            labels: Their classes, ``(B,)`` int64.
            index: Their positions in the student's data set, ``(B,)`` int64 >= 0, by all ranks or
                by none. A ``DistributedSampler`` gives strided positions, and some twice: the first
                rank's counts. Without it the students are taken in the order of the ranks.

        Returns:
            The match of all students by rising ``index``, or in the order of the ranks. A position
            that no rank hands in is not in it: :meth:`MatchedDataset.update` leaves its match.

        Raises:
            ValueError: As :meth:`match`, or if an index is negative or given by some ranks only.
            RuntimeError: If another rank failed, so that no rank waits for it.

        Warns:
            ConvergenceWarning: Once, on rank 0, if a plan did not converge on any rank.

        Example:
            >>> gallery = RetrievalGallery(2)
            >>> gallery.add(torch.eye(2), torch.tensor([0, 0]))
            >>> students, place = torch.tensor([[0.1, 0.9], [0.8, 0.1]]), torch.tensor([4, 2])
            >>> match = SemBridgeMatcher(gallery).match_all(students, torch.tensor([0, 0]), place)
            >>> match.index, match.ids
            (tensor([2, 4]), tensor([0, 1]))
        """
        parts = _of_all_ranks(lambda: self._checked(features, labels, index))
        without = [r for r, (_, _, place) in enumerate(parts) if place is None]
        if 0 < len(without) < len(parts):
            raise ValueError(
                f"index must be given by all ranks or by none, got none from rank(s) {without}"
            )
        queries = torch.cat([part[0] for part in parts])
        labels = torch.cat([part[1] for part in parts])
        places = [place for _, _, place in parts if place is not None]
        whole = None
        if places:
            place = torch.cat(places)
            order = _first_of_each(place)
            queries, labels, whole = queries[order], labels[order], place[order]
        match = self._match(queries, labels)
        if rank() == 0:
            self._warn(match.converged)
        device = queries_of(features, self.gallery.metric).device
        ids, scores, weights = (
            part.to(device) for part in (match.ids, match.scores, match.weights)
        )
        index = None if whole is None else whole.to(device)
        return Match(ids, scores, weights, match.converged, index)

    @torch.no_grad()
    def forward(self, student: Features | Mapping[str, Any] | Tensor, target: Tensor) -> Features:
        """Returns the features of the matched teacher samples, ``index`` being their ids.

        Args:
            student: As in :meth:`match`.
            target: The students' classes, ``(B,)`` int64.

        Raises:
            ValueError: As :meth:`match`, or if the gallery holds no features.
        """
        return self.gallery.features(self.match(student, target).ids)

    def _checked(
        self, features: Features | Mapping[str, Any] | Tensor, labels: Tensor, index: Tensor | None
    ) -> Students:
        """Returns this rank's students after checking them."""
        queries = usable_vectors(
            queries_of(features, self.gallery.metric),
            "queries",
            self.gallery.dim,
            directed=self.gallery.metric == "cosine",
        )
        labels = whole_numbers(labels, "labels", len(queries))
        if index is not None:
            index = whole_numbers(index, "index", len(queries))
            if len(index) and int(index.min()) < 0:
                raise ValueError(f"index must hold positions >= 0, got {int(index.min())}")
        return queries, labels, index

    def _match(self, queries: Tensor, labels: Tensor) -> Match:
        if self.planner is None:
            return self._nearest(queries, labels)
        if self.planner.constraint == "rows":
            return self._by_row(self.planner, queries, labels)
        _, found = self._found(queries, labels, self.candidates)
        load = self.capacity if self.planner.constraint == "capacity" else 1.0
        ids, scores, weights, converged = _planned(
            self.gallery,
            self.planner,
            load,
            self.candidates,
            queries.detach().cpu(),
            labels.detach().cpu(),
            found.cpu(),
        )
        device = queries.device
        return Match(ids.to(device), scores.to(device), weights.to(device), converged)

    def _warn(self, converged: bool) -> None:
        if converged or self.planner is None:
            return
        planner = self.planner
        looser = f", the matcher's capacity (now {self.capacity:g})" * (
            planner.constraint == "capacity"
        )
        warnings.warn(
            f"a plan did not converge to tolerance={planner.tolerance:g} in max_iterations="
            f"{planner.max_iterations}: no teacher serves more than its share, but the matches may "
            f"be further away than they need be. Raise the planner's max_iterations, its epsilon "
            f"(now {planner.epsilon:g}){looser} or its tolerance",
            ConvergenceWarning,
            stacklevel=4,  # the caller of match() and of its no_grad
        )

    def _nearest(self, queries: Tensor, labels: Tensor) -> Match:
        scores, ids = self._found(queries, labels, 1)
        return Match(ids[:, 0], scores[:, 0], torch.ones_like(scores[:, 0]))

    def _by_row(self, planner: LagrangianPlanner, queries: Tensor, labels: Tensor) -> Match:
        scores, ids = self._found(queries, labels, self.candidates)
        if not len(ids):
            return Match(ids[:, 0], scores[:, 0], scores[:, 0])
        found = ids >= 0
        cost = _cost_of(scores, self.gallery.metric).masked_fill(~found, 0)
        weights = planner(cost, row_mass=cost.new_ones(len(cost)), mask=found).plan[:, 0]
        return Match(ids[:, 0], scores[:, 0], weights)

    def _found(self, queries: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores, ids = self.gallery.search(queries, labels, k)
        lost = int((ids[:, 0] < 0).sum())
        if lost:
            raise ValueError(
                f"the index {self.gallery.index!r} found no teacher for {lost} student(s): give "
                "the gallery parameters that look further, a larger nprobe for example"
            )
        return scores, ids


def _first_of_each(place: Tensor) -> Tensor:
    """Returns where every position comes first, by rising position."""
    ordered, order = place.sort(stable=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return order[is_first]


def _of_all_ranks(own: Callable[[], Students]) -> list[Students]:
    """Returns what ``own()`` returns on every rank, in their order.

    Raises:
        RuntimeError: Where it fails on another rank; that rank raises its own error. So no rank
            waits for one that has given up.
    """
    if world_size() == 1:
        return [own()]
    part: Students | None = None
    error: Exception | None = None
    try:
        part = own()
    except Exception as raised:
        error = raised
    parts: list[Students | None] = [None] * world_size()
    dist.all_gather_object(parts, part)
    if error is not None:
        raise error
    failed = [place for place, other in enumerate(parts) if other is None]
    if failed:
        raise RuntimeError(f"matching failed on rank(s) {failed}, whose own error says why")
    return [other for other in parts if other is not None]


def _planned(
    gallery: RetrievalGallery,
    planner: LagrangianPlanner,
    load: float,
    candidates: int,
    queries: Tensor,
    labels: Tensor,
    found: Tensor,
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Returns ids, scores, weights (each ``(B,)``) and whether all plans converged.

    Args:
        gallery: The teachers.
        planner: With the constraint ``both`` or ``capacity``.
        load: How many times its even share a teacher may serve.
        candidates: How many of a student's nearest were looked up first.
        queries: The students ``(B, dim)``, on the CPU as all of these.
        labels: Their classes ``(B,)``.
        found: The ids of those nearest, ``(B, candidates)``.
    """
    ids = torch.empty(len(queries), dtype=torch.int64)
    scores, weights = torch.empty(2, len(queries), dtype=torch.float32)
    converged = True
    for label, members in by_class(labels):
        teachers = gallery.ids(label)
        left = torch.full_like(teachers, math.ceil(load * len(members) / len(teachers)))
        blocks = math.ceil(len(members) / BLOCK)
        for block in range(blocks):
            part = members[block::blocks]
            columns = _columns(gallery, candidates, queries[part], label, found[part], left)
            score = gallery.scores(queries[part], teachers[columns])
            cost = _cost_of(score, gallery.metric)
            limit = left[columns] / len(part)
            # The plan in float32, which is twice as fast; its rounding asks exact costs.
            if planner.constraint == "both":
                plan = planner(cost.float(), column_mass=limit / limit.sum())
            else:
                plan = planner(cost.float(), capacity=limit)
            row_dual, column_dual = plan.potentials
            # The log of the plan: its smallest entries underflow, and still have an order.
            wish = row_dual[:, None] + column_dual - cost
            chosen = _round(wish, left[columns])
            left[columns] -= torch.bincount(chosen, minlength=len(columns))
            ids[part] = teachers[columns[chosen]]
            scores[part] = score.gather(1, chosen[:, None])[:, 0].float()
            share = plan.plan.gather(1, chosen[:, None])[:, 0] * len(part)
            weights[part] = share.clamp(0, 1).float()
            converged = converged and bool(plan.converged)
    return ids, scores, weights, converged


def _cost_of(scores: Tensor, metric: str) -> Tensor:
    """Returns the cost of a score: KL, or 1 - cosine."""
    return -scores if metric == "kl" else 1 - scores


def _columns(
    gallery: RetrievalGallery,
    count: int,
    queries: Tensor,
    label: int,
    found: Tensor,
    left: Tensor,
) -> Tensor:
    """Returns positions in the class of open candidates that can take all the queries."""
    teachers = gallery.ids(label)
    while count < len(teachers):
        wanted = torch.zeros_like(left, dtype=torch.bool)
        wanted[torch.searchsorted(teachers, found[found >= 0])] = True
        if int(left[wanted].sum()) >= len(queries):
            return (wanted & (left > 0)).nonzero()[:, 0]
        count *= 2
        labels = torch.full((len(queries),), label)
        found = gallery.search(queries, labels, min(count, len(teachers)))[1]
    return left.nonzero()[:, 0]


def _round(wish: Tensor, left: Tensor) -> Tensor:
    """Gives every row one column, at most ``left (M,)`` rows each, by ``wish (N, M)``.

    In every round each free row asks for the open column it wishes most, and a column takes the
    rows that wish it most; so a round fills a column or is the last.
    """
    left = left.clone()
    chosen = torch.empty(len(wish), dtype=torch.int64)
    free = torch.arange(len(wish))
    while len(free):
        strength, column = wish[free].masked_fill(left == 0, -torch.inf).max(dim=1)
        order = strength.argsort(descending=True, stable=True)
        order = order[column[order].argsort(stable=True)]
        asked = column[order]
        place = torch.arange(len(asked)) - torch.searchsorted(asked, asked)
        taken = place < left[asked]
        chosen[free[order[taken]]] = asked[taken]
        left -= torch.bincount(asked[taken], minlength=len(left))
        free = free[order[~taken]]
    return chosen
