from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from structkd.matching.dataset import MatchedDataset, MatchedSample, RematchSchedule
from structkd.matching.sembridge import Match
from tests.reference import matching as reference


def _sets(count: int = 12) -> tuple[TensorDataset, TensorDataset]:
    labels = torch.zeros(count, dtype=torch.int64)
    students = TensorDataset(torch.arange(count), labels)
    return students, TensorDataset(100 + torch.arange(count), labels)


def test_items_are_student_teacher_label_index_match():
    students, teachers = _sets()
    ids = torch.arange(12).flip(0)
    pairs = MatchedDataset(students, teachers, Match(ids, torch.zeros(12), torch.ones(12)))
    assert len(pairs) == 12
    poor, rich, label, index, match = pairs[3]
    assert (int(poor), int(rich), int(label), index, match) == (3, 108, 0, 3, 8)
    assert pairs[-1].index == 11
    with pytest.raises(IndexError):
        pairs[12]
    assert torch.equal(pairs.ids, ids)
    pairs.update(torch.zeros(12, dtype=torch.int64))
    assert int(pairs[3].teacher) == 100
    assert ids[0] == 11  # the caller's tensor is its own


@pytest.mark.parametrize(
    ("context", "persistent", "copied"),
    [
        ("fork", True, False),
        ("fork", False, False),
        ("spawn", True, False),
        ("fork", True, True),
    ],
)
def test_update_reaches_workers(context, persistent, copied):
    students, teachers = _sets()
    pairs = MatchedDataset(students, teachers, torch.arange(12))
    if copied:
        pairs = copy.deepcopy(pairs)
    loader = DataLoader(
        pairs,
        batch_size=4,
        num_workers=1,
        persistent_workers=persistent,
        multiprocessing_context=context,
        timeout=60,
    )

    def epoch() -> list[int]:
        return torch.cat([batch.teacher for batch in loader]).tolist()

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
    rest = [int(batch.teacher) for batch in batches]
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
    assert MatchedDataset([("s", 1)], [("t", several)], match)[0] == ("s", "t", 1, 0, 0)


@pytest.mark.parametrize("none", [-100, torch.tensor(-100), np.int64(-100)])
def test_a_sample_without_a_label_may_have_any_match(none):
    match = torch.zeros(1, dtype=torch.int64)
    assert MatchedDataset([("s", none)], [("t", 2)], match)[0] == ("s", "t", none, 0, 0)
    assert MatchedDataset([("s", 2)], [("t", none)], match)[0] == ("s", "t", 2, 0, 0)


@pytest.mark.parametrize(
    ("student", "student_left"),
    [
        (("poor", 3), "poor"),
        (["poor", 3], "poor"),
        (("poor", 3, "mask", 0.5), ("poor", "mask", 0.5)),
        ({"image": "poor", "label": 3}, {"image": "poor"}),
        ({"image": "poor", "label": 3, "date": 7}, {"image": "poor", "date": 7}),
    ],
)
@pytest.mark.parametrize(
    ("teacher", "teacher_left"),
    [
        (("rich", 3), "rich"),
        (("rich", 3, "mask"), ("rich", "mask")),
        ({"image": "rich", "label": 3}, {"image": "rich"}),
        ({"image": "rich"}, {"image": "rich"}),
        (("rich",), "rich"),
        ("rich", "rich"),
    ],
)
def test_samples_of_any_kind_lose_nothing_but_the_label(
    student, student_left, teacher, teacher_left
):
    match = torch.zeros(1, dtype=torch.int64)
    item = MatchedDataset([student], [teacher], match)[0]
    assert item == (student_left, teacher_left, 3, 0, 0)


def test_the_label_may_be_elsewhere():
    match = torch.zeros(1, dtype=torch.int64)
    pairs = MatchedDataset(
        [("poor", "mask", 3)], [{"x": "rich", "y": 3}], match, label_key=-1, teacher_label_key="y"
    )
    assert pairs[0] == (("poor", "mask"), {"x": "rich"}, 3, 0, 0)
    wrong = MatchedDataset(
        [("poor", "mask", 3)], [{"x": "rich", "y": 4}], match, label_key=2, teacher_label_key="y"
    )
    with pytest.raises(ValueError, match="class 3 is matched with teacher sample 0 of class 4"):
        wrong[0]


@pytest.mark.parametrize(
    ("student", "teacher", "options", "error", "message"),
    [
        (("s",), ("t", 1), {}, ValueError, "student sample 0 holds no label where label_key=None"),
        ({"x": 0}, ("t", 1), {}, ValueError, "student sample 0 holds no label"),
        (("s", 1), ("t", 1), {"label_key": 2}, ValueError, "no label where label_key=2"),
        (("s", 1), ("t", 1), {"label_key": "y"}, TypeError, "label_key='y' is a dict's key"),
        (
            ("s", 1),
            {"x": 0},
            {"teacher_label_key": "y"},
            ValueError,
            "teacher sample 0 holds no label at teacher_label_key='y'",
        ),
        (("s", 1), ("t", 1), {"label_key": 1.0}, TypeError, "label_key must be a place, a key"),
    ],
)
def test_labels_that_are_not_there(student, teacher, options, error, message):
    match = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(error, match=message):
        MatchedDataset([student], [teacher], match, **options)[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_torch_collates_items_by_field(workers):
    students = [(torch.full((2,), float(i)), i % 2, {"row": i}) for i in range(6)]
    teachers = [{"image": torch.full((3,), float(i)), "label": i % 2} for i in range(6)]
    pairs = MatchedDataset(students, teachers, torch.tensor([4, 5, 0, 1, 2, 3]))
    batch = next(iter(DataLoader(pairs, batch_size=3, num_workers=workers, timeout=60 * workers)))
    assert isinstance(batch, MatchedSample)
    image, extra = batch.student
    assert image.shape == (3, 2)
    assert extra["row"].tolist() == [0, 1, 2]
    assert batch.teacher["image"][:, 0].tolist() == [4.0, 5.0, 0.0]
    assert batch.label.tolist() == [0, 1, 0]
    assert batch.index.tolist() == [0, 1, 2]
    assert batch.match.tolist() == [4, 5, 0]


def test_a_match_of_some_students_leaves_the_others():
    def match(ids: list[int], index: list[int]) -> Match:
        return Match(
            torch.tensor(ids),
            torch.zeros(len(ids)),
            torch.ones(len(ids)),
            index=torch.tensor(index),
        )

    pairs = MatchedDataset(*_sets(), match(list(range(12)), list(range(11, -1, -1))))
    assert pairs.ids.tolist() == list(range(11, -1, -1))
    pairs.update(match([5, 6], [0, 3]))
    assert pairs.ids.tolist() == [5, 10, 9, 6, 7, 6, 5, 4, 3, 2, 1, 0]
    with pytest.raises(ValueError, match=r"match.index must hold positions 0..11.*got .* 12..12"):
        pairs.update(match([5], [12]))
    with pytest.raises(ValueError, match="must cover all 12 students, got 2 of them"):
        MatchedDataset(*_sets(), match([5, 6], [0, 3]))


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
    assert [epoch for epoch in np.arange(200) if epoch in schedule] == printed


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
