from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from structkd.matching.dataset import MatchedDataset, RematchSchedule
from structkd.matching.sembridge import Match
from tests.reference import matching as reference


def _sets(count: int = 12) -> tuple[TensorDataset, TensorDataset]:
    labels = torch.zeros(count, dtype=torch.int64)
    students = TensorDataset(torch.arange(count), labels)
    return students, TensorDataset(100 + torch.arange(count), labels)


def test_items_are_student_teacher_label():
    students, teachers = _sets()
    ids = torch.arange(12).flip(0)
    pairs = MatchedDataset(students, teachers, Match(ids, torch.zeros(12), torch.ones(12)))
    assert len(pairs) == 12
    poor, rich, label = pairs[3]
    assert (int(poor), int(rich), int(label)) == (3, 108, 0)
    assert torch.equal(pairs.ids, ids)
    pairs.update(torch.zeros(12, dtype=torch.int64))
    assert int(pairs[3][1]) == 100
    assert ids[0] == 11  # the caller's tensor is its own


@pytest.mark.parametrize(
    ("context", "persistent"), [("fork", True), ("fork", False), ("spawn", True)]
)
def test_update_reaches_workers(context, persistent):
    students, teachers = _sets()
    pairs = MatchedDataset(students, teachers, torch.arange(12))
    loader = DataLoader(
        pairs,
        batch_size=4,
        num_workers=1,
        persistent_workers=persistent,
        multiprocessing_context=context,
        timeout=60,
    )

    def epoch() -> list[int]:
        return torch.cat([rich for _, rich, _ in loader]).tolist()

    assert epoch() == list(range(100, 112))
    pairs.update(torch.arange(12).flip(0))
    assert epoch() == list(range(111, 99, -1))
    pairs.update(torch.full((12,), 5))
    assert epoch() == [105] * 12


def test_update_reaches_a_running_epoch():
    students, teachers = _sets(40)
    pairs = MatchedDataset(students, teachers, torch.zeros(40, dtype=torch.int64))
    loader = DataLoader(pairs, batch_size=1, num_workers=1, prefetch_factor=2, timeout=60)
    batches = iter(loader)
    next(batches)
    pairs.update(torch.full((40,), 7))
    rest = [int(rich) for _, rich, _ in batches]
    assert set(rest) <= {100, 107}
    assert rest[-30:] == [107] * 30


@pytest.mark.parametrize(
    ("match", "error", "message"),
    [
        (torch.zeros(11, dtype=torch.int64), ValueError, r"match must have shape \(12,\)"),
        (torch.full((12,), 12), ValueError, r"positions 0..11 of teacher_set, got values in 12"),
        (torch.full((12,), -1), ValueError, "positions 0..11"),
        (torch.zeros(12), TypeError, "match must be an int64"),
        ([0] * 12, TypeError, "match must be an int64"),
    ],
)
def test_wrong_matches(match, error, message):
    with pytest.raises(error, match=message):
        MatchedDataset(*_sets(), match)
    pairs = MatchedDataset(*_sets(), torch.arange(12))
    with pytest.raises(error, match=message):
        pairs.update(match)
    assert torch.equal(pairs.ids, torch.arange(12))


def test_iterable_sets_are_refused():
    with pytest.raises(TypeError, match="teacher_set must be a map-style data set"):
        MatchedDataset([(0, 0)], iter([(0, 0)]), torch.zeros(1, dtype=torch.int64))


def test_pairs_of_two_classes_are_refused_multi_labels_not():
    match = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="class 1 is matched with teacher sample 0 of class 2"):
        MatchedDataset([("s", 1)], [("t", torch.tensor(2))], match)[0]
    several = torch.tensor([0.0, 1.0, 1.0])
    assert MatchedDataset([("s", 1)], [("t", several)], match)[0] == ("s", "t", 1)


@pytest.mark.parametrize(
    ("start", "step", "growth", "printed"),
    [
        (30, 30, 5, [30, 60, 95, 135]),
        (45, 15, 5, [45, 60, 80, 105, 135]),
        (15, 30, 5, [15, 45, 80, 120, 165]),
    ],
    ids=["EU", "CN", "GL"],
)
def test_published_epochs(start, step, growth, printed):
    schedule = RematchSchedule(start, step, growth, times=len(printed))
    assert schedule.epochs(200) == printed
    assert [epoch for epoch in range(200) if epoch in schedule] == printed


def test_the_formula_goes_on_where_the_lists_stop():
    assert RematchSchedule(30, 30, 5).epochs(200)[4:] == [180]
    assert RematchSchedule(45, 15, 5).epochs(200)[5:] == [170]
    assert RematchSchedule(15, 30, 5).epochs(216)[5:] == [215]


@given(st.integers(0, 50), st.integers(1, 30), st.integers(0, 9), st.integers(1, 8))
def test_schedule_is_the_sum(start, step, growth, times):
    schedule = RematchSchedule(start, step, growth, times=times)
    expected = [reference.rematch_epoch(t, start, step, growth) for t in range(times)]
    assert schedule.epochs(10_000) == expected
    assert schedule.epochs(expected[-1]) == expected[:-1]


@pytest.mark.parametrize(
    "arguments", [(-1, 5, 0), (0, 0, 0), (0, 5, -1), (0.5, 5, 0), (0, True, 0)]
)
def test_wrong_schedules(arguments):
    with pytest.raises((ValueError, TypeError), match=r"start|step|growth"):
        RematchSchedule(*arguments)
