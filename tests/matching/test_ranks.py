"""Matching under several processes: every rank has the match that one process makes."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from structkd import ConvergenceWarning, LagrangianPlanner, MatchedDataset, RetrievalGallery
from structkd.matching.sembridge import Match, SemBridgeMatcher
from tests.processes import start

STUDENTS, TEACHERS, DIM, WORLD = 43, 60, 5, 2
PLANNERS = ("none", "rows", "both", "capacity")
# Of every rank, the share of the students.
SHARES = {
    "even": (1, 1),
    "uneven": (1, 3),
    "one has none": (1, 0),
    "all on the last": (0, 1),
}


def _matcher(planner: str, epsilon: float = 0.05) -> SemBridgeMatcher:
    generator = torch.Generator().manual_seed(0)
    gallery = RetrievalGallery(DIM, metric="kl")
    gallery.add(2 * torch.randn(TEACHERS, DIM, generator=generator), torch.arange(TEACHERS) % 3)
    made = None if planner == "none" else LagrangianPlanner(epsilon, planner)
    return SemBridgeMatcher(gallery, made, 8, capacity=1.5)


def _students() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    queries = 2 * torch.randn(STUDENTS, DIM, generator=generator)
    return queries, torch.randint(3, (STUDENTS,), generator=generator)


def _own(shares: tuple[int, ...], rank: int) -> slice:
    """The students that a rank holds, one after the other."""
    ends = [0, *torch.tensor(shares).cumsum(0).tolist()]
    return slice(*(round(end / ends[-1] * STUDENTS) for end in (ends[rank], ends[rank + 1])))


def _parts(match: Match) -> list:
    return [match.ids, match.scores, match.weights, match.index, match.converged]


def _worker(rank: int, folder: str) -> None:
    queries, labels = _students()
    found: dict = {}
    for planner in PLANNERS:
        matcher = _matcher(planner)
        for name, shares in SHARES.items():
            own = _own(shares, rank)
            found[planner, name] = _parts(matcher.match_all(queries[own], labels[own]))
        # As a DistributedSampler deals them: strided, shuffled, the first again at the end.
        order = torch.randperm(STUDENTS, generator=torch.Generator().manual_seed(2))
        order = torch.cat([order, order[: -STUDENTS % WORLD]])
        own = order[rank::WORLD]
        match = matcher.match_all(queries[own], labels[own], own)
        found[planner, "sampler"] = _parts(match)
        pairs = MatchedDataset([(0, 0)] * STUDENTS, [(0, 0)] * TEACHERS, torch.arange(STUDENTS))
        pairs.update(match)
        found[planner, "data set"] = pairs.ids
        # An epoch that drops its last batch sees some students on no rank.
        seen = own[own % 5 != 0]
        match = matcher.match_all(queries[seen], labels[seen], seen)
        found[planner, "some"] = _parts(match)
        none = matcher.match_all(queries[:0], labels[:0])
        found[planner, "nobody"] = _parts(none)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        slow = _matcher("capacity")
        slow.planner = LagrangianPlanner(1e-3, "capacity", max_iterations=1)
        own = _own(SHARES["even"], rank)
        found["converged"] = slow.match_all(queries[own], labels[own]).converged
    found["told"] = sum(issubclass(one.category, ConvergenceWarning) for one in told)
    found["errors"] = _errors(rank, queries, labels)
    torch.save(found, Path(folder) / f"rank{rank}.pt")


def _errors(rank: int, queries: Tensor, labels: Tensor) -> list[str]:
    """What every rank raises where the first hands in something wrong."""
    raised = []
    for planner in ("none", "capacity"):
        for change in ("nan", "class", "index"):
            wrong = rank == 0
            given, classes, index = queries.clone(), labels.clone(), None
            if wrong and change == "nan":
                given[0, 0] = torch.nan
            if wrong and change == "class":
                classes[0] = 7
            if wrong and change == "index":
                index = torch.arange(STUDENTS)
            try:
                _matcher(planner).match_all(given, classes, index)
                raised.append("nothing")
            except (ValueError, RuntimeError) as error:
                raised.append(f"{type(error).__name__}: {error}")
    return raised


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    start(_worker, folder, WORLD, str(folder))
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(WORLD)]


def _same(found: list, wanted: list) -> None:
    for one, other in zip(found, wanted, strict=True):
        if isinstance(other, Tensor):
            assert torch.equal(one, other)
        else:
            assert one == other


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("shares", [*SHARES, "nobody"])
def test_every_rank_has_the_match_of_one_process(ranks, planner, shares):
    queries, labels = _students()
    if shares == "nobody":
        queries, labels = queries[:0], labels[:0]
    wanted = _parts(_matcher(planner).match(queries, labels))
    for found in ranks:
        _same(found[planner, shares], wanted)


@pytest.mark.parametrize("planner", PLANNERS)
def test_a_samplers_shares_come_back_in_the_data_sets_order(ranks, planner):
    queries, labels = _students()
    wanted = _matcher(planner).match(queries, labels)
    for found in ranks:
        _same(found[planner, "sampler"], [*_parts(wanted)[:3], torch.arange(STUDENTS), True])
        assert torch.equal(found[planner, "data set"], wanted.ids)


@pytest.mark.parametrize("planner", PLANNERS)
def test_students_on_no_rank_are_left_out(ranks, planner):
    queries, labels = _students()
    seen = torch.tensor([i for i in range(STUDENTS) if i % 5])
    wanted = _matcher(planner).match(queries[seen], labels[seen])
    for found in ranks:
        _same(found[planner, "some"], [*_parts(wanted)[:3], seen, True])


def test_one_rank_tells_that_a_plan_did_not_converge(ranks):
    assert [found["converged"] for found in ranks] == [False] * len(ranks)
    assert [found["told"] for found in ranks] == [1, *[0] * (len(ranks) - 1)]


def test_where_one_rank_fails_all_raise(ranks):
    elsewhere = "RuntimeError: matching failed on rank(s) [0], whose own error says why"
    for r, found in enumerate(ranks):
        for nan, missing, index in (found["errors"][:3], found["errors"][3:]):
            assert "NaN or infinity" in nan if r == 0 else nan == elsewhere
            # Seen once the students are gathered, by every rank.
            assert "without a teacher sample: [7]" in missing
            assert index.startswith("ValueError: index must be given by all ranks or by none")
