"""Planned matching: a transport plan a class, rounded to one teacher a student."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from structkd.matching._store import by_class
from structkd.matching.gallery import RetrievalGallery
from structkd.transport import LagrangianPlanner

BLOCK = 1024  # students that are planned together


def planned(
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
            cost = cost_of(score, gallery.metric)
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


def cost_of(scores: Tensor, metric: str) -> Tensor:
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
