"""The gallery against the published loop, its samples and its checks."""

from __future__ import annotations

import multiprocessing
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from structkd import Features, RetrievalGallery
from tests.reference import matching as reference

METRICS = ("cosine", "kl")
by_metric = pytest.mark.parametrize("metric", METRICS)


def _draw(seed: int, teachers: int = 60, students: int = 20, dim: int = 6, classes: int = 3):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(teachers, dim, generator=generator) * 3
    queries = torch.randn(students, dim, generator=generator) * 3
    labels = torch.cat(
        [torch.arange(classes), torch.randint(classes, (teachers - classes,), generator=generator)]
    )
    return vectors, labels, queries, torch.randint(classes, (students,), generator=generator)


def _filled(metric: str, vectors, labels, **options) -> RetrievalGallery:
    gallery = RetrievalGallery(vectors.shape[1], metric=metric, **options)
    gallery.add(vectors, labels)
    return gallery


@by_metric
@given(seed=st.integers(0, 2**31), k=st.integers(1, 5))
@settings(max_examples=10, deadline=None)
def test_search_is_the_published_loop(metric, seed, k):
    vectors, labels, queries, wanted = _draw(seed)
    scores, ids = _filled(metric, vectors, labels).search(queries, wanted, k)
    table = reference.score_table(metric, vectors, queries)
    expected_scores, expected_ids = reference.nearest(table, labels, wanted, k)
    for row in range(len(queries)):
        assert ids[row, : len(expected_ids[row])].tolist() == expected_ids[row]
        torch.testing.assert_close(
            scores[row, : len(expected_ids[row])],
            torch.tensor(expected_scores[row]),
            rtol=1e-6,
            atol=1e-12,
        )


@by_metric
def test_near_ties_below_float32_are_ranked_exactly(metric):
    # All teachers within 1e-5 of one another: their scores differ by less than float32 holds.
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 8, generator=generator)
    vectors = base + 1e-5 * torch.randn(300, 8, generator=generator)
    labels = torch.zeros(300, dtype=torch.int64)
    queries = base + torch.randn(20, 8, generator=generator)
    gallery = _filled(metric, vectors, labels)
    _, ids = gallery.search(queries, labels[:20], 1)
    table = reference.score_table(metric, vectors, queries)
    expected = reference.nearest(table, labels, labels[:20])[1]
    best = torch.tensor([max(row) for row in table], dtype=torch.float64)
    found = torch.tensor(table, dtype=torch.float64).gather(1, ids)[:, 0]
    torch.testing.assert_close(found, best, rtol=0, atol=1e-15)
    assert (ids[:, 0] == torch.tensor(expected)[:, 0]).float().mean() > 0.9


@by_metric
def test_equal_teachers_tie_to_the_lowest_id(metric):
    vectors = torch.ones(100, 4) * torch.tensor([1.0, 2.0, 3.0, 4.0])
    gallery = RetrievalGallery(4, metric=metric)
    gallery.add(vectors, torch.zeros(100, dtype=torch.int64), torch.arange(100).flip(0) + 7)
    _, ids = gallery.search(torch.randn(5, 4), torch.zeros(5, dtype=torch.int64), 2)
    assert ids.tolist() == [[7, 8]] * 5


@by_metric
@given(seed=st.integers(0, 2**31), duplicate=st.booleans())
@settings(max_examples=10, deadline=None)
def test_permuting_the_gallery_permutes_nothing_but_ids(metric, seed, duplicate):
    vectors, labels, queries, wanted = _draw(seed)
    if duplicate:
        vectors = vectors[torch.arange(len(vectors)) // 4 * 4]
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))
    straight = RetrievalGallery(6, metric=metric)
    straight.add(vectors, labels, order)
    permuted = RetrievalGallery(6, metric=metric)
    back = order.argsort()
    permuted.add(vectors[back], labels[back], torch.arange(len(vectors)))
    scores, ids = straight.search(queries, wanted, 3)
    scores_permuted, ids_permuted = permuted.search(queries, wanted, 3)
    assert torch.equal(ids, ids_permuted)
    assert torch.equal(scores, scores_permuted)


@by_metric
@given(seed=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_matches_share_the_class(metric, seed):
    vectors, labels, queries, wanted = _draw(seed)
    _, ids = _filled(metric, vectors, labels).search(queries, wanted, 3)
    found = ids >= 0
    assert torch.equal(labels[ids[found]], wanted[:, None].expand_as(ids)[found])


@by_metric
@pytest.mark.parametrize("shuffled", [False, True], ids=["default ids", "ids in any order"])
@given(seed=st.integers(0, 2**31), size=st.integers(1, 30))
@settings(max_examples=10, deadline=None)
def test_added_in_pieces_is_added_at_once(metric, shuffled, seed, size):
    vectors, labels, queries, wanted = _draw(seed)
    ids = torch.randperm(60, generator=torch.Generator().manual_seed(seed)) if shuffled else None
    feats = Features(embedding=2 * vectors)
    pieces, whole = (RetrievalGallery(6, metric=metric) for _ in range(2))
    whole.add(vectors, labels, ids, features=feats)
    for start in range(0, 60, size):
        part = torch.arange(start, min(start + size, 60))
        own = None if ids is None else ids[part]
        pieces.add(vectors[part], labels[part], own, features=feats.rows(part))
        pieces.search(vectors[:1], labels[:1])  # its index is of what there was by then
    for one, other in zip(
        pieces.search(queries, wanted, 2), whole.search(queries, wanted, 2), strict=True
    ):
        assert torch.equal(one, other)
    assert pieces.sizes == whole.sizes == dict(enumerate(labels.bincount().tolist()))
    assert len(pieces) == 60
    asked = torch.tensor([17, 3, 59])
    assert torch.equal(pieces.features(asked).embedding, whole.features(asked).embedding)
    assert torch.equal(pieces.scores(queries, asked), whole.scores(queries, asked))


def test_many_small_adds_take_no_time():
    # A gallery that copied what it holds at each would write 15 GB here.
    gallery, vectors = RetrievalGallery(64), torch.ones(20, 64)
    feats, labels = Features(embedding=torch.ones(20, 192)), torch.zeros(20).long()
    started = time.perf_counter()
    for _ in range(600):
        gallery.add(vectors, labels, features=feats)
    assert len(gallery) == 12_000
    assert gallery.features(torch.tensor([11_999])).embedding.shape == (1, 192)
    assert time.perf_counter() - started < 5


def test_what_inference_mode_added_trains_outside():
    gallery = RetrievalGallery(2)
    with torch.inference_mode():
        for _ in range(2):
            gallery.add(
                torch.eye(2), torch.tensor([0, 1]), features=Features(embedding=torch.eye(2))
            )
        gallery.search(torch.eye(2), torch.tensor([0, 1]))
    gallery.add(torch.eye(2), torch.tensor([0, 1]), features=Features(embedding=torch.eye(2)))
    kept = gallery.features(torch.tensor([2])).embedding
    (kept * torch.ones(2, requires_grad=True)).sum().backward()
    assert gallery.search(torch.eye(2), torch.tensor([0, 1]))[1].tolist() == [[0], [1]]


def test_scores_are_those_of_the_search():
    vectors, labels, queries, wanted = _draw(4)
    gallery = _filled("kl", vectors, labels)
    scores, ids = gallery.search(queries, wanted, 1)
    table = gallery.scores(queries, torch.arange(60))
    assert table.dtype == torch.float64
    torch.testing.assert_close(table.gather(1, ids).float(), scores)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes(dtype):
    vectors, labels, queries, wanted = _draw(5)
    gallery = _filled("kl", vectors.to(dtype), labels)
    same = _filled("kl", vectors.to(dtype).float(), labels)
    ids = gallery.search(queries.to(dtype), wanted, 1)[1]
    assert torch.equal(ids, same.search(queries.to(dtype).float(), wanted, 1)[1])


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e4])
def test_extreme_scales(scale):
    vectors, labels, queries, wanted = _draw(6)
    plain = _filled("cosine", vectors, labels).search(queries, wanted, 1)[1]
    scaled = _filled("cosine", vectors * scale, labels).search(queries * scale, wanted, 1)
    assert torch.equal(scaled[1], plain)
    logits = _filled("kl", vectors * max(scale, 1e-3), labels)
    scores, ids = logits.search(queries * max(scale, 1e-3), wanted, 1)
    assert scores.isfinite().all()
    assert (ids >= 0).all()


def test_the_callers_memory_is_its_own():
    vectors, labels, queries, wanted = _draw(7)
    gallery = RetrievalGallery(6)
    kept = vectors.clone()
    gallery.add(vectors, labels, features=Features(embedding=vectors))
    vectors.zero_()
    assert torch.equal(gallery.features(torch.arange(60)).embedding, kept)
    expected = _filled("cosine", kept, labels).search(queries, wanted, 2)
    assert torch.equal(gallery.search(queries, wanted, 2)[0], expected[0])


# Edge cases.


def test_k_beyond_the_class_pads():
    gallery = RetrievalGallery(2)
    gallery.add(torch.eye(2), torch.tensor([0, 1]))
    scores, ids = gallery.search(torch.ones(1, 2), torch.tensor([0]), 3)
    assert ids.tolist() == [[0, -1, -1]]
    assert scores[0, 1:].tolist() == [-torch.inf, -torch.inf]


def test_class_without_teacher():
    gallery = _filled("cosine", torch.eye(2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"classes without a teacher sample: \[5\]"):
        gallery.search(torch.ones(2, 2), torch.tensor([0, 5]))


def test_empty_gallery():
    with pytest.raises(ValueError, match="gallery is empty"):
        RetrievalGallery(2).search(torch.ones(1, 2), torch.tensor([0]))


def test_no_queries():
    gallery = _filled("cosine", torch.eye(2), torch.tensor([0, 1]))
    scores, ids = gallery.search(torch.empty(0, 2), torch.empty(0, dtype=torch.int64), 3)
    assert scores.shape == ids.shape == (0, 3)


@pytest.mark.parametrize(
    ("queries", "labels", "error", "message"),
    [
        (torch.ones(1, 3), torch.tensor([0]), ValueError, r"queries must be \(N, 2\).*\(1, 3\)"),
        (torch.ones(2), torch.tensor([0]), ValueError, r"queries must be \(N, 2\)"),
        (torch.zeros(1, 2), torch.tensor([0]), ValueError, "zero and have no direction"),
        (torch.full((1, 2), torch.nan), torch.tensor([0]), ValueError, "NaN or infinity"),
        (torch.full((1, 2), torch.inf), torch.tensor([0]), ValueError, "NaN or infinity"),
        (torch.ones(1, 2, dtype=torch.int64), torch.tensor([0]), TypeError, "floating-point"),
        (torch.ones(1, 2), torch.tensor([0.0]), TypeError, "labels must be an int64"),
        (torch.ones(1, 2), torch.tensor([0, 1]), ValueError, r"labels must have shape \(1,\)"),
    ],
)
def test_wrong_queries_and_vectors(queries, labels, error, message):
    gallery = _filled("cosine", torch.eye(2), torch.tensor([0, 1]))
    with pytest.raises(error, match=message):
        gallery.search(queries, labels)
    with pytest.raises(error, match=message.replace("queries", "vectors")):
        gallery.add(queries, labels)
    assert len(gallery) == 2


def test_zero_logits_are_a_uniform_distribution():
    gallery = _filled("kl", torch.zeros(1, 3), torch.tensor([0]))
    scores, ids = gallery.search(torch.zeros(1, 3), torch.tensor([0]))
    assert ids.item() == 0
    assert scores.item() == 0


@pytest.mark.parametrize(
    ("ids", "message"),
    [([5, 5], r"got again: \[5\]"), ([0, 9], r"got again: \[0\]"), ([-1, 9], "must be >= 0")],
)
def test_duplicate_and_negative_ids(ids, message):
    gallery = _filled("cosine", torch.eye(2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=message):
        gallery.add(torch.eye(2), torch.tensor([0, 1]), torch.tensor(ids))
    assert len(gallery) == 2


def test_default_ids_count_on():
    gallery = RetrievalGallery(2)
    gallery.add(torch.eye(2), torch.tensor([0, 0]), torch.tensor([3, 40]))
    gallery.add(torch.eye(2), torch.tensor([0, 1]))
    assert gallery.ids(0).tolist() == [3, 40, 41]
    assert gallery.ids(1).tolist() == [42]
    assert gallery.ids(2).tolist() == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": "dot"}, ValueError, "metric must be one of cosine, kl"),
        ({"metric": "kl", "temperature": 0}, ValueError, "temperature"),
        ({"dim": 0}, ValueError, "dim must be at least 1"),
        ({"dim": 1, "metric": "kl"}, ValueError, r"dim .*at least 2 .*'kl'.*\[0, z\].*cosine"),
        ({"parameters": "nprobe=2"}, ValueError, "parameters must be empty for index='Flat'"),
        ({"index": None}, TypeError, "index must be a string, got NoneType"),
        ({"device": "tpu"}, (ValueError, RuntimeError), "tpu"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        RetrievalGallery(**{"dim": 4, **options})


# Stored features.


def test_features_come_back_by_id():
    gallery = RetrievalGallery(2)
    maps = torch.arange(24.0).reshape(3, 2, 2, 2)
    feats = Features(embedding=torch.eye(3), intermediate=(maps, maps + 1))
    gallery.add(
        torch.ones(3, 2), torch.tensor([0, 1, 0]), torch.tensor([30, 10, 20]), features=feats
    )
    found = gallery.features(torch.tensor([10, 20, 10]))
    assert torch.equal(found.embedding, torch.eye(3)[[1, 2, 1]])
    assert torch.equal(found.intermediate[1], maps[[1, 2, 1]] + 1)
    assert found.logits is None
    assert found.index.tolist() == [10, 20, 10]
    with pytest.raises(ValueError, match=r"not in the gallery: \[11\]"):
        gallery.features(torch.tensor([10, 11]))


def test_features_in_every_call_or_none():
    with_features = RetrievalGallery(2)
    feats = Features(logits=torch.eye(2))
    with_features.add(torch.eye(2), torch.tensor([0, 1]), features=feats)
    with pytest.raises(ValueError, match="got none after 2 samples with them"):
        with_features.add(torch.eye(2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="like those of earlier calls"):
        with_features.add(
            torch.eye(2), torch.tensor([0, 1]), features=Features(logits=torch.ones(2, 5))
        )
    with pytest.raises(ValueError, match=r"features.logits must hold 2 samples"):
        with_features.add(
            torch.eye(2), torch.tensor([0, 1]), features=Features(logits=torch.ones(3, 2))
        )
    assert len(with_features) == 2
    without = _filled("cosine", torch.eye(2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="got some after 2 samples without them"):
        without.add(torch.eye(2), torch.tensor([0, 1]), features=feats)
    with pytest.raises(ValueError, match="holds no features"):
        without.features(torch.tensor([0]))


# Workers.


class Searching(Dataset):
    """Searches a gallery inside the worker."""

    def __init__(self, gallery: RetrievalGallery, queries: torch.Tensor) -> None:
        self.gallery, self.queries = gallery, queries

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        labels = torch.zeros(len(self.queries), dtype=torch.int64)
        return self.gallery.search(self.queries, labels)[1]


@pytest.mark.parametrize(("context", "workers"), [("fork", 2), ("spawn", 1)])
@pytest.mark.parametrize("index", ["Flat", "IVF8,Flat"])
def test_search_in_workers_does_not_hang(context, workers, index):
    vectors = torch.randn(2000, 16)
    gallery = RetrievalGallery(16, index=index)
    classes = torch.arange(2000) // 1900
    gallery.add(vectors, classes, features=Features(embedding=vectors))
    data = Searching(gallery, vectors[:500])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        here = data[0]  # starts this process's FAISS and torch threads before the fork
        loader = DataLoader(
            data, batch_size=None, num_workers=workers, multiprocessing_context=context, timeout=60
        )
        found = list(loader)
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 4
    assert all(torch.equal(ids, here) for ids in found)


def _search_and_put(queue, data: Searching) -> None:
    queue.put(data[0].sum().item())


@pytest.mark.parametrize("index", ["Flat", "IVF8,Flat"])
def test_search_after_a_plain_fork_does_not_hang(index):
    vectors = torch.randn(20_000, 16)
    gallery = _filled("cosine", vectors, torch.zeros(20_000).long(), index=index)
    data = Searching(gallery, vectors[:500])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = data[0].sum().item()
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        process = context.Process(target=_search_and_put, args=(queue, data), daemon=True)
        process.start()
        assert queue.get(timeout=60) == expected
        process.join(timeout=60)
    finally:
        torch.set_num_threads(threads)
