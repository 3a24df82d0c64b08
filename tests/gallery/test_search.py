"""The searches of a class: torch's flat one against the definition, and FAISS's indexes."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structkd import RetrievalGallery
from structkd.gallery import search
from tests.reference import matching as reference


@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 40),
    k=st.integers(1, 40),
    block=st.integers(1, 17),
)
@settings(max_examples=40, deadline=None)
def test_blocks_find_what_a_table_of_all_has(seed, count, k, block):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randint(-4, 5, (count, 5), generator=generator) + 0.5  # ties abound
    queries = torch.randint(-4, 5, (9, 5), generator=generator) + 0.5
    labels, wanted = torch.zeros(count).long(), torch.zeros(9).long()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_CHUNK", 5 * block)
        patch.setattr(search, "_SCORES", 4 * block)
        gallery = RetrievalGallery(5, metric="kl")
        gallery.add(vectors, labels)
        scores, ids = gallery.search(queries, wanted, k)
    table = reference.score_table("kl", vectors, queries)
    expected, _ = reference.nearest(table, labels, wanted, k)
    for row, best in enumerate(expected):
        found = ids[row][ids[row] >= 0].tolist()
        assert len(set(found)) == len(found) == min(k, count)
        # The KL of a teacher with itself is 0 but for the rounding of its terms.
        torch.testing.assert_close(
            scores[row, : len(best)], torch.tensor(best), rtol=1e-6, atol=1e-12
        )
        # Equal teachers stand by id.
        for one, other in pairwise(found):
            assert one < other or not torch.equal(vectors[one], vectors[other])


def test_a_flat_gallery_needs_no_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    search.load_faiss.cache_clear()
    try:
        gallery = RetrievalGallery(2)
        gallery.add(torch.eye(2), torch.tensor([0, 0]))
        assert gallery.search(torch.eye(2), torch.tensor([0, 0]))[1].tolist() == [[0], [1]]
        with pytest.raises(ImportError, match="needs FAISS: pip install faiss-cpu"):
            RetrievalGallery(4, index="HNSW8")
    finally:
        search.load_faiss.cache_clear()


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9"
)
def test_tf32_and_autocast_are_away_for_the_search_alone():
    # bfloat16 keeps 3 digits, and these teachers differ in the 6th.
    vectors = torch.ones(50, 8) + 1e-6 * torch.randn(50, 8)
    gallery = RetrievalGallery(8)
    gallery.add(vectors, torch.zeros(50).long())
    wanted = gallery.search(torch.randn(9, 8), torch.zeros(9).long(), 3)[1].shape
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with torch.autocast("cpu", torch.bfloat16):
            queries = torch.randn(9, 8)
            found = gallery.search(queries, torch.zeros(9).long(), 3)[1]
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert found.shape == wanted
    assert torch.equal(found, gallery.search(queries, torch.zeros(9).long(), 3)[1])


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9"
)
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_lower_precision_of_matmuls_is_away_on_the_cpu_too(precision):
    # "medium" is bfloat16 on CPUs that multiply in it: the bound of a flat search knows float32.
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        asked = [backend.fp32_precision for backend in backends]
        with search._true_float32(torch.device("cpu")):
            assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
        assert [backend.fp32_precision for backend in backends] == asked
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


# FAISS's indexes.


def _clustered(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, 16, generator=torch.Generator().manual_seed(99))
    cluster = torch.randint(20, (count,), generator=generator)
    return centres[cluster] + 0.3 * torch.randn(count, 16, generator=generator)


def test_a_small_class_is_searched_exactly_until_its_index_can_be_trained():
    labels, queries = torch.zeros(1500).long(), _clustered(50, seed=1)
    vectors = _clustered(1500)
    gallery = RetrievalGallery(16, index="IVF20,Flat", parameters="nprobe=2")
    exact = RetrievalGallery(16)
    for part in (slice(0, 779), slice(779, 1500)):
        for one in (gallery, exact):
            one.add(vectors[part], labels[part])
        found, wanted = (one.search(queries, labels[:50], 3)[1] for one in (gallery, exact))
        if part.start == 0:  # 39 for each of 20 centroids are 780
            assert torch.equal(found, wanted)
    assert 0.7 <= (found == wanted).float().mean() < 1


@pytest.mark.parametrize(
    "index",
    [
        "HNSW16",
        "SQ8",
        "SQfp16",
        "IVF4,Flat",
        "IVF4,PQ4x4",
        "PCA8,IVF4,PQ4x4",
        "OPQ4_8,PQ4x4",
        "L2norm,Flat",
        "Flat,RFlat",
        "IVF4,PQ4x4fs,RFlat",
    ],
)
@pytest.mark.parametrize("metric", ["cosine", "kl"])
def test_indexes_rank_exactly_what_they_find(index, metric):
    width = 16 if metric == "cosine" else 15  # kl has a factor more
    count = 10_000 if "OPQ" in index else 700
    vectors, labels = _clustered(count)[:, :width], torch.arange(count) // (count - 100)
    gallery = RetrievalGallery(width, metric=metric, index=index)
    gallery.add(vectors[: count // 2], labels[: count // 2])
    gallery.add(vectors[count // 2 :], labels[count // 2 :])
    queries, wanted = _clustered(40, seed=1)[:, :width], torch.arange(40) % 2
    scores, ids = gallery.search(queries, wanted, 3)
    assert (labels[ids] == wanted[:, None])[ids >= 0].all()
    assert (ids[:, 0] >= 0).all()
    for query, best, found in zip(queries, scores.tolist(), ids.tolist(), strict=True):
        assert best == sorted(best, reverse=True)
        table = gallery.scores(query[None], torch.tensor([i for i in found if i >= 0]))[0]
        torch.testing.assert_close(
            torch.tensor(best)[: len(table)], table.float(), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index": "Nope"}, "index must be a FAISS factory string"),
        ({"index": "LSH"}, "index must be a FAISS factory string for inner products"),
        ({"index": "IMI2x4,Flat"}, "index must be a FAISS factory string for inner products"),
        ({"index": "BFlat"}, "index must be a FAISS factory string"),
        ({"index": "IVF4,Flat", "parameters": "nprobes=2"}, "parameters must be a FAISS param"),
        # What takes no vectors without ids, wherever it stands.
        *(({"index": index}, "IDMap.* takes no vectors without ids: leave IDMap out")
          for index in ("IDMap,Flat", "IDMap2,Flat", "Flat,IDMap", "IDMap,IVF4,Flat",
                        "PCA8,IDMap,Flat", "IDMap,PCA8,Flat", "IDMap,HNSW16")),
        # What compares by another metric than it was asked for.
        *(({"index": index}, "compares by Euclidean distance")
          for index in ("HNSW16_PQ4", "ZnLattice2x2_4", "PCA8,HNSW16_PQ4")),
        ({"index": "NSG16"}, "index='NSG16' does not take vectors by themselves"),
        ({"index": "HNSW8", "device": "cuda"}, "device must be 'cpu' for index='HNSW8'.*'Flat'"),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)  # fmt: skip
def test_an_index_that_cannot_serve_is_refused_when_the_gallery_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        RetrievalGallery(16, **options)


def test_an_index_that_fails_on_its_class_leaves_the_gallery_as_it_was():
    # The coarse quantiser would train on 4 centroids, and needs 16.
    gallery = RetrievalGallery(16, index="IVF4(PQ2x4),Flat")
    labels = torch.zeros(700).long()
    for count in (100, 700):
        gallery.add(_clustered(700)[len(gallery) : count], labels[len(gallery) : count])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"index='IVF4\(PQ2x4\),Flat' .*700 samples"):
            gallery.search(_clustered(1), labels[:1])
    assert gallery.sizes == {0: 700}
    assert gallery.ids(0).tolist() == list(range(700))


# Devices.


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_said():
    with pytest.raises(ValueError, match="device='cuda', but torch has no such device here"):
        RetrievalGallery(4, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("near", [False, True], ids=["spread", "nearly equal"])
@pytest.mark.parametrize("metric", ["cosine", "kl"])
def test_a_gallery_on_the_gpu_is_the_one_on_the_cpu(tmp_path, metric, near):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 8, generator=generator)
    vectors = base + (1e-6 if near else 1.0) * torch.randn(500, 8, generator=generator)
    vectors[400:] = vectors[:100]  # equal ones
    queries = base + torch.randn(60, 8, generator=generator)
    labels, wanted = torch.arange(500) % 3, torch.arange(60) % 3
    there, here = (RetrievalGallery(8, metric=metric, device=d) for d in ("cuda", "cpu"))
    for gallery in (there, here):
        gallery.add(vectors, labels)
    there.save(tmp_path / "gallery")
    expected = here.search(queries, wanted, 7)
    for gallery in (there, RetrievalGallery.load(tmp_path / "gallery", device="cuda")):
        found = gallery.search(queries.cuda(), wanted.cuda(), 7)
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.equal(mine.cpu(), theirs)
