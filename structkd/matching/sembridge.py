"""Matching of student samples with teacher samples of their class."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from structkd._checks import describe, number, whole
from structkd.features import Features
from structkd.matching._store import by_class
from structkd.matching.gallery import RetrievalGallery
from structkd.transport import LagrangianPlanner

BLOCK = 1024  # students that are planned together


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
    """

    ids: Tensor
    scores: Tensor
    weights: Tensor
    converged: bool = True


class SemBridgeMatcher(nn.Module):
    r"""Gives every student sample a teacher sample of its class, so that unpaired data distils.

    Without a planner it is the nearest in the class, as published: by cosine of the embeddings (the
    first matching), or by KL of the logits (dynamic matching), whichever the gallery has. While a
    student is unsure, the nearest by KL are the few teacher samples that are unsure too: in our
    runs 6 % of them served everybody, and accuracy fell (docs/unpaired.md).

    With one, a few teacher samples no longer serve every student. The columns of the plan are the
    candidates that FAISS finds for the students of a class, its costs are -score (1 - cosine, or
    KL), and every student is a row of equal mass. ``capacity`` and ``both`` planners are rounded to
    one teacher a student, in rounds: every free student asks for the open teacher with most of its
    mass, and a teacher takes those that bring it most until it is full. No teacher then serves more
    than :math:`\lceil \mathrm{capacity} \cdot n / m \rceil` of the ``n`` students of a class with
    ``m`` teachers. Where the candidates cannot take all students, more are looked up. A ``rows``
    planner has no such limit: its match is the nearest, its weight the softmax.

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
    def match(self, features: Features | Tensor, labels: Tensor) -> Match:
        """Chooses a teacher sample for every student sample.

        Args:
            features: The students' features, of which a ``kl`` gallery reads the logits and a
                ``cosine`` gallery the embedding; or that tensor, ``(B, dim)``.
            labels: Their classes, ``(B,)`` int64.

        Returns:
            The match, on the device of the features.

        Raises:
            ValueError: If the field is missing, or as :meth:`RetrievalGallery.search` raises.
        """
        queries = self._queries(features)
        if self.planner is None:
            return self._nearest(queries, labels)
        if self.planner.constraint == "rows":
            return self._by_row(self.planner, queries, labels)
        return self._planned(self.planner, queries, labels)

    @torch.no_grad()
    def forward(self, student: Features | Tensor, target: Tensor) -> Features:
        """Returns the features of the matched teacher samples, ``index`` being their ids.

        Args:
            student: As in :meth:`match`.
            target: The students' classes, ``(B,)`` int64.

        Raises:
            ValueError: As :meth:`match`, or if the gallery holds no features.
        """
        return self.gallery.features(self.match(student, target).ids)

    def _queries(self, features: Features | Tensor) -> Tensor:
        if isinstance(features, Tensor):
            return features
        if not isinstance(features, Features):
            raise TypeError(f"features must be Features or a tensor, got {describe(features)}")
        field = "logits" if self.gallery.metric == "kl" else "embedding"
        queries: Tensor | None = getattr(features, field)
        if queries is None:
            raise ValueError(
                f"features.{field} is missing, which a {self.gallery.metric!r} gallery reads"
            )
        return queries

    def _nearest(self, queries: Tensor, labels: Tensor) -> Match:
        scores, ids = self._found(queries, labels, 1)
        return Match(ids[:, 0], scores[:, 0], torch.ones_like(scores[:, 0]))

    def _by_row(self, planner: LagrangianPlanner, queries: Tensor, labels: Tensor) -> Match:
        scores, ids = self._found(queries, labels, self.candidates)
        if not len(ids):
            return Match(ids[:, 0], scores[:, 0], scores[:, 0])
        found = ids >= 0
        cost = self._cost(scores).masked_fill(~found, 0)
        weights = planner(cost, row_mass=cost.new_ones(len(cost)), mask=found).plan[:, 0]
        return Match(ids[:, 0], scores[:, 0], weights)

    def _planned(self, planner: LagrangianPlanner, queries: Tensor, labels: Tensor) -> Match:
        device = queries.device
        _, found = self._found(queries, labels, self.candidates)
        queries, labels, found = queries.detach().cpu(), labels.detach().cpu(), found.cpu()
        ids = torch.empty(len(queries), dtype=torch.int64)
        scores, weights = torch.empty(2, len(queries), dtype=torch.float32)
        converged = True
        for label, members in by_class(labels):
            teachers = self.gallery.ids(label)
            load = self.capacity if planner.constraint == "capacity" else 1.0
            left = torch.full_like(teachers, math.ceil(load * len(members) / len(teachers)))
            blocks = math.ceil(len(members) / BLOCK)
            for block in range(blocks):
                part = members[block::blocks]
                columns = self._columns(queries[part], label, found[part], teachers, left)
                score = self.gallery.scores(queries[part], teachers[columns])
                cost = self._cost(score)
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
        return Match(ids.to(device), scores.to(device), weights.to(device), converged)

    def _found(self, queries: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores, ids = self.gallery.search(queries, labels, k)
        lost = int((ids[:, 0] < 0).sum())
        if lost:
            raise ValueError(
                f"the index {self.gallery.index!r} found no teacher for {lost} student(s): give "
                "the gallery parameters that look further, a larger nprobe for example"
            )
        return scores, ids

    def _columns(
        self, queries: Tensor, label: int, found: Tensor, teachers: Tensor, left: Tensor
    ) -> Tensor:
        """Returns positions in ``teachers`` of open candidates that can take all the queries."""
        count = self.candidates
        while count < len(teachers):
            wanted = torch.zeros_like(left, dtype=torch.bool)
            wanted[torch.searchsorted(teachers, found[found >= 0])] = True
            if int(left[wanted].sum()) >= len(queries):
                return (wanted & (left > 0)).nonzero()[:, 0]
            count *= 2
            labels = torch.full((len(queries),), label)
            found = self.gallery.search(queries, labels, min(count, len(teachers)))[1]
        return left.nonzero()[:, 0]

    def _cost(self, scores: Tensor) -> Tensor:
        return -scores if self.gallery.metric == "kl" else 1 - scores


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
