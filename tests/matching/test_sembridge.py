from __future__ import annotations

import math
import warnings

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import structkd
from structkd import Features, RetrievalGallery
from structkd.matching import sembridge
from structkd.matching.sembridge import ConvergenceWarning, SemBridgeMatcher
from structkd.transport import LagrangianPlanner
from tests.reference import matching as reference


def _draw(seed: int = 0, teachers: int = 40, students: int = 30, dim: int = 5, classes: int = 3):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(teachers, dim, generator=generator) * 2
    labels = torch.arange(teachers) % classes
    queries = torch.randn(students, dim, generator=generator) * 2
    return vectors, labels, queries, torch.randint(classes, (students,), generator=generator)


def _gallery(vectors, labels, metric="kl", **options) -> RetrievalGallery:
    gallery = RetrievalGallery(vectors.shape[1], metric=metric, **options)
    feats = Features(logits=vectors, embedding=vectors * 2, intermediate=vectors[:, :, None, None])
    gallery.add(vectors, labels, features=feats)
    return gallery


def _planner(constraint: str, epsilon: float = 0.05) -> LagrangianPlanner:
    return LagrangianPlanner(epsilon, constraint)


@pytest.mark.parametrize("metric", ["kl", "cosine"])
@given(seed=st.integers(0, 2**31))
@settings(max_examples=8, deadline=None)
def test_nearest_is_the_published_loop(metric, seed):
    vectors, labels, queries, target = _draw(seed)
    field = "logits" if metric == "kl" else "embedding"
    match = SemBridgeMatcher(_gallery(vectors, labels, metric)).match(
        Features(**{field: queries}), target
    )
    table = reference.score_table(metric, vectors, queries)
    scores, ids = reference.nearest(table, labels, target)
    assert match.ids.tolist() == [row[0] for row in ids]
    torch.testing.assert_close(
        match.scores, torch.tensor([row[0] for row in scores]), rtol=1e-5, atol=1e-6
    )
    assert match.weights.tolist() == [1.0] * len(queries)


@pytest.mark.filterwarnings("ignore::structkd.ConvergenceWarning")
@pytest.mark.parametrize("constraint", ["rows", "both", "capacity"])
@given(seed=st.integers(0, 2**31), students=st.integers(1, 60), candidates=st.integers(1, 12))
@settings(max_examples=10, deadline=None)
def test_planned_matches_share_the_class_and_respect_the_capacity(
    constraint, seed, students, candidates
):
    vectors, labels, queries, target = _draw(seed, students=students)
    matcher = SemBridgeMatcher(
        _gallery(vectors, labels), _planner(constraint), candidates, capacity=1.5
    )
    match = matcher.match(queries, target)
    assert torch.equal(labels[match.ids], target)
    assert ((match.weights >= 0) & (match.weights <= 1 + 1e-6)).all()
    table = torch.tensor(reference.score_table("kl", vectors, queries))
    torch.testing.assert_close(
        match.scores, table.gather(1, match.ids[:, None])[:, 0], rtol=1e-4, atol=1e-6
    )
    if constraint == "rows":
        return
    load = 1.5 if constraint == "capacity" else 1.0
    for label in target.unique().tolist():
        served = match.ids[target == label].bincount()
        most = math.ceil(load * int((target == label).sum()) / int((labels == label).sum()))
        assert int(served.max()) <= most


def test_rows_weights_are_the_softmax_over_the_candidates():
    vectors, labels, queries, target = _draw()
    gallery = _gallery(vectors, labels)
    match = SemBridgeMatcher(gallery, _planner("rows", 0.1), candidates=6).match(queries, target)
    scores, ids = gallery.search(queries, target, 6)
    assert torch.equal(match.ids, ids[:, 0])
    torch.testing.assert_close(match.weights, (scores / 0.1).softmax(dim=1)[:, 0])


def test_a_hub_no_longer_serves_everybody():
    # One teacher is nearest to all students.
    hub, others = torch.zeros(1, 2), torch.tensor([[4.0, 0.0], [0.0, 4.0], [5.0, 0.0], [0.0, 5.0]])
    vectors = torch.cat([hub, others])
    queries = 0.1 * torch.randn(20, 2, generator=torch.Generator().manual_seed(1))
    target = torch.zeros(20, dtype=torch.int64)
    gallery = _gallery(vectors, torch.zeros(5, dtype=torch.int64))
    assert SemBridgeMatcher(gallery).match(queries, target).ids.unique().tolist() == [0]
    # Two candidates hold 2 x 8 < 20 students, so the search must widen.
    planned = SemBridgeMatcher(gallery, _planner("capacity"), candidates=2, capacity=2.0)
    assert planned.match(queries, target).ids.bincount(minlength=5).max() == 8
    even = SemBridgeMatcher(gallery, _planner("both"), candidates=2).match(queries, target)
    assert even.ids.bincount(minlength=5).tolist() == [4] * 5


@pytest.mark.filterwarnings("ignore::structkd.ConvergenceWarning")
def test_planned_cost_is_near_the_exact_assignment():
    vectors, _, queries, _ = _draw(3, teachers=30, students=30)
    same = torch.zeros(30, dtype=torch.int64)
    gallery = _gallery(vectors, same)
    match = SemBridgeMatcher(gallery, _planner("both", 0.005), candidates=30).match(queries, same)
    cost = -gallery.scores(queries, torch.arange(30))
    exact = ot.emd2([], [], cost.numpy()) * 30
    planned = float(-match.scores.double().sum())
    nearest = float(cost.min(dim=1).values.sum())
    assert match.ids.unique().numel() == 30
    assert nearest <= exact <= planned + 1e-5
    assert planned <= 1.05 * exact


def test_blocks_keep_the_capacity(monkeypatch):
    monkeypatch.setattr(sembridge, "BLOCK", 16)
    vectors, labels, queries, target = _draw(5, students=90)
    matcher = SemBridgeMatcher(_gallery(vectors, labels), _planner("capacity"), 4, capacity=1.0)
    match = matcher.match(queries, target)
    assert torch.equal(labels[match.ids], target)
    for label in range(3):
        students, teachers = int((target == label).sum()), int((labels == label).sum())
        assert match.ids[target == label].bincount().max() <= math.ceil(students / teachers)


@pytest.mark.filterwarnings("ignore::structkd.ConvergenceWarning")
def test_weights_far_below_rounding_still_rank():
    # With a tiny epsilon all but one entry of a row underflow to zero.
    vectors, labels, queries, target = _draw(6)
    planner = LagrangianPlanner(1e-4, "capacity", max_iterations=20)
    gallery = _gallery(vectors, labels)
    match = SemBridgeMatcher(gallery, planner, capacity=1.0).match(queries, target)
    exact = 0.0
    for label in range(3):
        cost = -gallery.scores(queries[target == label], gallery.ids(label))
        exact += float(cost[linear_sum_assignment(cost)].sum())
    # Entries that all were zero would leave the order to chance: 1.57 times the exact cost.
    assert -float(match.scores.sum()) <= 1.25 * exact


@pytest.mark.parametrize("call", ["match", "match_all", "forward"])
@pytest.mark.parametrize("constraint", ["both", "capacity"])
def test_a_plan_that_did_not_converge_is_told_once(constraint, call):
    vectors, labels, queries, target = _draw(6)
    planner = LagrangianPlanner(1e-3, constraint, max_iterations=2)
    matcher = SemBridgeMatcher(_gallery(vectors, labels), planner, capacity=1.0)
    with pytest.warns(ConvergenceWarning, match="max_iterations=2: .* epsilon.*now 0.001") as told:
        getattr(matcher, call)(queries, target)  # three classes, three plans
    assert len(told) == 1
    assert ("capacity (now 1)" in str(told[0].message)) == (constraint == "capacity")
    if call != "forward":
        assert told[0].filename == __file__


@pytest.mark.parametrize("planner", [None, *map(_planner, ("rows", "both", "capacity"))])
def test_a_plan_that_converged_is_not_told(planner):
    vectors, labels, queries, target = _draw(6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        match = SemBridgeMatcher(_gallery(vectors, labels), planner).match(queries, target)
    assert match.converged


@pytest.mark.parametrize("planner", [None, *map(_planner, ("rows", "both", "capacity"))])
def test_without_processes_match_all_is_match(planner):
    vectors, labels, queries, target = _draw(8)
    matcher = SemBridgeMatcher(_gallery(vectors, labels), planner)
    plain, whole = matcher.match(queries, target), matcher.match_all(queries, target)
    assert whole.index is None
    # By position, and a position that comes again is its first.
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    again = torch.cat([order, order[:5]])
    given = queries[again].clone()
    given[30:] += 1
    placed = matcher.match_all(given, target[again], 3 * again)
    assert torch.equal(placed.index, 3 * torch.arange(30))
    for match in (whole, placed):
        for name in ("ids", "scores", "weights"):
            assert torch.equal(getattr(match, name), getattr(plain, name)), name


def test_wrong_index_of_match_all():
    vectors, labels, queries, target = _draw()
    matcher = SemBridgeMatcher(_gallery(vectors, labels))
    with pytest.raises(ValueError, match=r"index must have shape \(30,\)"):
        matcher.match_all(queries, target, torch.arange(29))
    with pytest.raises(ValueError, match="index must hold positions >= 0, got -1"):
        matcher.match_all(queries, target, torch.arange(30) - 1)
    with pytest.raises(TypeError, match="index must be an int64"):
        matcher.match_all(queries, target, torch.arange(30.0))


def test_forward_returns_the_matched_teachers_features():
    vectors, labels, queries, target = _draw()
    matcher = SemBridgeMatcher(_gallery(vectors, labels))
    student = Features(logits=queries.requires_grad_(), embedding=queries * 1.0)
    teacher = matcher(student, target)
    ids = matcher.match(student, target).ids
    assert torch.equal(teacher.index, ids)
    assert torch.equal(teacher.logits, vectors[ids])
    assert torch.equal(teacher.embedding, 2 * vectors[ids])
    assert teacher.intermediate[0].shape == (30, 5, 1, 1)
    assert not teacher.logits.requires_grad
    criterion = structkd.KDLoss() + 0.5 * structkd.CORALLoss()
    criterion(student, matcher(student, target)).backward()
    assert queries.grad.abs().sum() > 0
    assert not list(matcher.parameters())
    assert not matcher.state_dict()


def test_permuting_the_students_permutes_the_match():
    vectors, labels, queries, target = _draw(7)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    matcher = SemBridgeMatcher(_gallery(vectors, labels), _planner("capacity"))
    straight, permuted = (
        matcher.match(queries, target),
        matcher.match(queries[order], target[order]),
    )
    assert torch.equal(permuted.ids, straight.ids[order])


@pytest.mark.parametrize("planner", [None, *map(_planner, ("rows", "both", "capacity"))])
def test_no_students(planner):
    vectors, labels, _, _ = _draw()
    matcher = SemBridgeMatcher(_gallery(vectors, labels), planner)
    match = matcher.match(torch.empty(0, 5), torch.empty(0, dtype=torch.int64))
    assert match.ids.shape == match.scores.shape == match.weights.shape == (0,)


@pytest.mark.parametrize("planner", [None, *map(_planner, ("rows", "both", "capacity"))])
def test_errors_of_the_search_come_through(planner):
    vectors, labels, queries, target = _draw()
    matcher = SemBridgeMatcher(_gallery(vectors, labels), planner)
    with pytest.raises(ValueError, match=r"without a teacher sample: \[9\]"):
        matcher.match(queries, target.masked_fill(target == 1, 9))
    with pytest.raises(ValueError, match=r"queries must be \(N, 5\)"):
        matcher.match(queries[:, :3], target)
    with pytest.raises(ValueError, match="NaN or infinity"):
        matcher.match(queries.masked_fill(queries > 0, torch.nan), target)
    with pytest.raises(ValueError, match="gallery is empty"):
        SemBridgeMatcher(RetrievalGallery(5), planner).match(queries, target)


def test_a_dict_of_their_names_is_taken_where_features_are():
    vectors, labels, queries, target = _draw()
    gallery = RetrievalGallery(5, metric="kl")
    gallery.add(vectors, labels, features={"logits": vectors, "intermediate": vectors})
    matcher = SemBridgeMatcher(gallery)
    expected, found = (matcher(given, target) for given in (queries, {"logits": queries}))
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.intermediate[0], expected.logits)
    with pytest.raises(ValueError, match="features has no field 'logit'; near names: logits"):
        matcher({"logit": queries}, target)


def test_wrong_arguments():
    vectors, labels, queries, target = _draw()
    gallery = _gallery(vectors, labels)
    with pytest.raises(ValueError, match=r"features.logits is missing.*'kl' gallery"):
        SemBridgeMatcher(gallery).match(Features(embedding=queries), target)
    with pytest.raises(TypeError, match=r"features must be Features, a dict of .* got list"):
        SemBridgeMatcher(gallery).match([1.0], target)
    with pytest.raises(TypeError, match="gallery must be a RetrievalGallery"):
        SemBridgeMatcher(vectors)
    with pytest.raises(TypeError, match="planner must be a LagrangianPlanner"):
        SemBridgeMatcher(gallery, "rows")
    with pytest.raises(ValueError, match="candidates must be at least 1"):
        SemBridgeMatcher(gallery, candidates=0)
    with pytest.raises(ValueError, match="capacity"):
        SemBridgeMatcher(gallery, capacity=0.5)
    bare = RetrievalGallery(5, metric="kl")
    bare.add(vectors, labels)
    with pytest.raises(ValueError, match="holds no features"):
        SemBridgeMatcher(bare)(queries, target)
