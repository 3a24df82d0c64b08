"""The mean of the nearest in the class, against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import structkd
from structkd import Features, NeighbourMatcher, RetrievalGallery, SemBridgeMatcher
from tests.reference import matching as reference

CLASSES = 3


def _gallery(seed: int, teachers: int = 20, **kept: bool):
    rng = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(teachers, CLASSES, generator=rng)
    embedding = torch.randn(teachers, 4, generator=rng)
    labels = torch.arange(teachers) % CLASSES
    gallery = RetrievalGallery(CLASSES, metric="kl")
    feats = Features(
        logits=logits if kept.get("logits", True) else None,
        embedding=embedding if kept.get("embedding", True) else None,
        intermediate=torch.randn(teachers, 2, 2, 2, generator=rng),
    )
    gallery.add(logits, labels, torch.arange(teachers) + 100, features=feats)
    return gallery, logits, embedding, labels


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), k=st.integers(1, 9), temperature=st.sampled_from([1.0, 4.0]))
def test_it_is_the_mean_of_the_nearest_in_class(seed, k, temperature) -> None:
    gallery, logits, embedding, labels = _gallery(seed)
    rng = torch.Generator().manual_seed(seed + 1)
    queries = 2 * torch.randn(6, CLASSES, generator=rng)
    target = torch.randint(CLASSES, (6,), generator=rng)
    found = NeighbourMatcher(gallery, k, temperature=temperature)(Features(logits=queries), target)
    table = reference.score_table("kl", logits, queries)
    for row in range(6):
        own = [j for j in range(len(labels)) if labels[j] == target[row]]
        nearest = sorted(own, key=lambda j: (-float(table[row][j]), j))[:k]
        wanted = torch.tensor(reference.mean_prediction(logits, nearest, temperature))
        share = (found.logits[row] / temperature).softmax(dim=0)
        torch.testing.assert_close(share, wanted, rtol=1e-4, atol=1e-6)
        mean = sum(embedding[j].double() for j in nearest) / len(nearest)
        torch.testing.assert_close(found.embedding[row], mean.float())
    assert found.intermediate == ()
    assert found.index is None


def test_one_neighbour_is_the_nearest_as_published() -> None:
    gallery, *_ = _gallery(0)
    queries, target = torch.randn(5, CLASSES), torch.tensor([0, 1, 2, 1, 0])
    match = SemBridgeMatcher(gallery).match(queries, target)
    one = NeighbourMatcher(gallery, 1)
    assert torch.equal(one.match(queries, target)[:, 0], match.ids)
    kept = gallery.features(match.ids)
    student = torch.randn(5, CLASSES)
    kd = structkd.KDLoss(4.0)
    torch.testing.assert_close(kd(student, one(queries, target).logits), kd(student, kept.logits))


def test_a_small_class_gives_all_it_has_and_order_does_not_matter() -> None:
    gallery, *_ = _gallery(0, teachers=7)  # classes of 3, 2 and 2
    matcher, target = NeighbourMatcher(gallery, 3), torch.tensor([0, 1, 2])
    ids = matcher.match(torch.randn(3, CLASSES), target)
    assert (ids >= 0).sum(dim=1).tolist() == [3, 2, 2]
    found, turned = matcher.targets(ids), matcher.targets(ids.flip(1))
    torch.testing.assert_close(found.logits, turned.logits)
    torch.testing.assert_close(found.embedding, turned.embedding)
    none = matcher(torch.empty(0, CLASSES), torch.empty(0, dtype=torch.int64))
    assert none.logits.shape == (0, CLASSES)


def test_it_keeps_what_the_gallery_has() -> None:
    for field, other in (("logits", "embedding"), ("embedding", "logits")):
        gallery, *_ = _gallery(0, **{other: False})
        found = NeighbourMatcher(gallery)(torch.randn(2, CLASSES), torch.tensor([0, 1]))
        assert getattr(found, field) is not None
        assert getattr(found, other) is None
    gallery, *_ = _gallery(0, logits=False, embedding=False)
    with pytest.raises(ValueError, match="neither logits nor an embedding"):
        NeighbourMatcher(gallery)(torch.randn(2, CLASSES), torch.tensor([0, 1]))


def test_what_does_not_fit_is_named() -> None:
    gallery, *_ = _gallery(0)
    matcher = NeighbourMatcher(gallery)
    with pytest.raises(ValueError, match=r"classes without a teacher sample: \[7\]"):
        matcher(torch.randn(1, CLASSES), torch.tensor([7]))
    with pytest.raises(ValueError, match=r"features\.logits is missing"):
        matcher(Features(embedding=torch.randn(1, 4)), torch.tensor([0]))
    with pytest.raises(TypeError, match=r"ids must be int64 \(B, k\)"):
        matcher.targets(torch.tensor([100]))
    with pytest.raises(ValueError, match="one of -1 alone"):
        matcher.targets(torch.tensor([[100, -1], [-1, -1]]))
    with pytest.raises(TypeError, match="gallery must be a RetrievalGallery"):
        NeighbourMatcher(None)
    with pytest.raises(ValueError, match="neighbours must be at least 1"):
        NeighbourMatcher(gallery, 0)
