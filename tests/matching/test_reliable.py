"""The teacher samples that are right and sure, and the matches that come of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structkd import LagrangianPlanner, RetrievalGallery, SemBridgeMatcher, reliable_teachers
from tests.reference import matching as reference

CLASSES = 3


def _teachers(seed: int, count: int = 40):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=rng)
    logits = torch.randn(count, CLASSES, generator=rng)
    logits += 2 * torch.nn.functional.one_hot(labels, CLASSES)
    labels[torch.rand(count, generator=rng) < 0.1] = -100
    return logits, labels


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    entropy=st.floats(0, 1),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    at_least=st.integers(0, 3),
)
def test_it_is_the_definition(seed, entropy, temperature, at_least) -> None:
    logits, labels = _teachers(seed)
    options = {"entropy": entropy, "temperature": temperature, "at_least": at_least}
    kept = reliable_teachers(logits, labels, **options)
    assert kept.tolist() == reference.reliable(logits, labels, **options)
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    moved = reliable_teachers(logits[order], labels[order], **options)
    assert sorted(order[moved].tolist()) == kept.tolist()


def test_an_unsure_student_gets_a_sure_teacher_and_each_its_share() -> None:
    logits, labels = _teachers(0, 60)
    labels = labels.clamp_min(0)
    kept = reliable_teachers(logits, labels, entropy=0.4)
    assert 0 < len(kept) < len(logits)
    gallery = RetrievalGallery(CLASSES, metric="kl")
    gallery.add(logits[kept], labels[kept], ids=kept)
    students, classes = torch.zeros(30, CLASSES), torch.arange(30) % CLASSES
    planner = LagrangianPlanner(0.05, "capacity", gradient="none")
    match = SemBridgeMatcher(gallery, planner, capacity=1.0).match(students, classes)
    assert set(match.ids.tolist()) <= set(kept.tolist())
    assert torch.equal(labels[match.ids], classes)
    for label in range(CLASSES):
        teachers, of_class = int((labels[kept] == label).sum()), match.ids[classes == label]
        assert int(torch.bincount(of_class).max()) <= -(-len(of_class) // teachers)


def test_a_class_that_is_never_right_keeps_its_strongest_or_goes() -> None:
    logits, labels = torch.tensor([[5.0, 0.0], [3.0, 2.0], [4.0, 0.0]]), torch.tensor([0, 1, 1])
    assert reliable_teachers(logits, labels).tolist() == [0, 1]
    assert reliable_teachers(logits, labels, at_least=0).tolist() == [0]
    assert reliable_teachers(logits, labels, at_least=9).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"logits": torch.ones(3)}, TypeError, r"logits must be floating point \(M, K\)"),
        ({"logits": torch.full((3, 2), torch.nan)}, ValueError, "logits must be finite"),
        (
            {"target": torch.zeros(2, dtype=torch.int64)},
            ValueError,
            r"target must have shape \(3,\)",
        ),
        ({"target": torch.tensor([0, 1, 2])}, ValueError, r"target must lie in 0\.\.1"),
        ({"target": [0, 1, 1]}, TypeError, "target must be an int64 tensor"),
        ({"entropy": 1.5}, ValueError, "entropy must be"),
        ({"temperature": 0}, ValueError, "temperature must be"),
        ({"at_least": -1}, ValueError, "at_least must be at least 0"),
    ],
)
def test_what_does_not_fit_is_named(change, error, said: str) -> None:
    given = {"logits": torch.ones(3, 2), "target": torch.tensor([0, 1, 1]), **change}
    with pytest.raises(error, match=said):
        reliable_teachers(**given)
