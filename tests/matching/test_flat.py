"""The index that torch searches, against FAISS's and the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structkd.matching import _faiss, _flat
from structkd.matching._flat import TorchFlat
from structkd.matching.gallery import RetrievalGallery

CPU = torch.device("cpu")


@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 40),
    k=st.integers(1, 40),
    block=st.integers(1, 17),
)
@settings(max_examples=40, deadline=None)
def test_blocks_find_what_faiss_finds(seed, count, k, block):
    faiss = pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(seed)
    # Small whole numbers: float32 holds every product exactly, and ties abound.
    rows = torch.randint(-4, 5, (count, 5), generator=generator).float().numpy()
    queries = torch.randint(-4, 5, (9, 5), generator=generator).float().numpy()
    k = min(k, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_flat, "ROWS", block)
        patch.setattr(_flat, "_SCORES", 4 * block)
        mine, theirs = TorchFlat(5, CPU), faiss.IndexFlatIP(5)
        for index in (mine, theirs):
            index.add(rows[: count // 2])
            index.add(rows[count // 2 :])
        scores, places = mine.search(queries, k)
        assert (scores == theirs.search(queries, k)[0]).all()
        assert ((queries[:, None] * rows[places]).sum(-1) == scores).all()
        assert all(len(set(row)) == k for row in places.tolist())


def test_removed_rows_move_the_others_up():
    index = TorchFlat(2, CPU)
    rows = torch.arange(12.0).reshape(6, 2)
    index.add(rows.numpy())
    assert index.remove_ids(torch.tensor([4, 0]).numpy()) == 2
    assert index.ntotal == 4
    assert index.reconstruct_n(1, 3).tolist() == rows[[2, 3, 5]].tolist()


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9"
)
def test_tf32_is_off_for_the_search_alone(monkeypatch):
    seen = []
    best = _flat._best

    def spy(*args):
        seen.append((torch.backends.cuda.matmul.fp32_precision, torch.is_autocast_enabled("cpu")))
        return best(*args)

    monkeypatch.setattr(_flat, "_best", spy)
    index = TorchFlat(2, CPU)
    index.add(torch.eye(2).numpy())
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with torch.autocast("cpu", torch.bfloat16):
            index.search(torch.eye(2).numpy(), 1)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert seen == [("ieee", False)]


def _draw(near: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 8, generator=generator)
    scale = 1e-6 if near else 1.0
    vectors = base + scale * torch.randn(500, 8, generator=generator)
    vectors[400:] = vectors[:100]  # equal ones
    return vectors, base + torch.randn(60, 8, generator=generator)


@pytest.mark.parametrize("near", [False, True], ids=["spread", "nearly equal"])
@pytest.mark.parametrize("metric", ["cosine", "kl"])
def test_a_gallery_on_torch_is_the_one_on_faiss(monkeypatch, metric, near):
    vectors, queries = _draw(near)
    labels = torch.arange(500) % 3
    faiss_gallery = RetrievalGallery(8, metric=metric)
    faiss_gallery.add(vectors, labels)
    monkeypatch.setattr(_faiss, "TORCH_DEVICES", ("cpu",))
    monkeypatch.setattr(_faiss, "load_faiss", lambda: pytest.fail("a flat gallery loads no FAISS"))
    monkeypatch.setattr(_flat, "ROWS", 64)
    gallery = RetrievalGallery(8, metric=metric)
    gallery.add(vectors, labels)
    assert isinstance(gallery._classes[0].index, TorchFlat)
    for mine, theirs in zip(
        gallery.search(queries, torch.arange(60) % 3, 7),
        faiss_gallery.search(queries, torch.arange(60) % 3, 7),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


def test_the_stand_in_on_torch_gives_way_to_the_trained_index(monkeypatch):
    monkeypatch.setattr(_faiss, "TORCH_DEVICES", ("cpu",))
    vectors = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    gallery = RetrievalGallery(8, index="IVF4,Flat", parameters="nprobe=4")
    gallery.add(vectors[:100], torch.zeros(100).long())
    assert isinstance(gallery._classes[0].index, TorchFlat)
    gallery.add(vectors[100:], torch.zeros(300).long())
    assert gallery.is_trained
    found = gallery.search(vectors, torch.zeros(400).long())[1][:, 0]
    assert torch.equal(found, torch.arange(400))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("near", [False, True], ids=["spread", "nearly equal"])
@pytest.mark.parametrize("metric", ["cosine", "kl"])
def test_a_gallery_on_the_gpu_is_the_one_on_the_cpu(tmp_path, metric, near):
    vectors, queries = _draw(near)
    labels, wanted = torch.arange(500) % 3, (torch.arange(60) % 3).cuda()
    there, here = (RetrievalGallery(8, metric=metric, device=d) for d in ("cuda", "cpu"))
    for gallery in (there, here):
        gallery.add(vectors, labels)
        gallery.remove(torch.arange(0, 500, 7))
    there.save(tmp_path / "gallery")
    wanted_found = here.search(queries, wanted.cpu(), 7)
    for gallery in (there, RetrievalGallery.load(tmp_path / "gallery", device="cuda")):
        found = gallery.search(queries.cuda(), wanted, 7)
        for mine, theirs in zip(found, wanted_found, strict=True):
            assert torch.equal(mine.cpu(), theirs)
