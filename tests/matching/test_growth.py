"""A gallery that changes: many small adds, remove and update, against one that is built anew."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from structkd import Features
from structkd.matching import _faiss
from structkd.matching._store import Column
from structkd.matching.gallery import RetrievalGallery

DIM = 4


class Work(TorchDispatchMode):
    """Counts the numbers that operations write to new memory; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        held = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for part in tree_leaves(result):
            if isinstance(part, Tensor) and _memory(part) not in held:
                self.numbers += part.numel()
        return result


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _work_of_adds(calls: int, rows: int, *, shuffled: bool) -> int:
    gallery = RetrievalGallery(DIM, metric="kl")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randperm(calls * rows, generator=generator)
    with Work() as work:
        for call in range(calls):
            vectors = torch.ones(rows, DIM)
            gallery.add(
                vectors,
                torch.arange(rows) % 3,
                ids[call * rows : (call + 1) * rows] if shuffled else None,
                features=Features(logits=vectors, embedding=vectors),
            )
    assert len(gallery) == calls * rows
    return work.numbers


@pytest.mark.parametrize("shuffled", [False, True], ids=["ids in order", "ids in any order"])
def test_many_small_adds_cost_what_their_rows_cost(shuffled):
    few, many = (_work_of_adds(calls, 10, shuffled=shuffled) for calls in (100, 800))
    # Quadratic work would be 64 times as much. N log N is 8 * log(8000) / log(1000).
    assert many <= 8 * math.log(8000) / math.log(1000) * 1.3 * few
    # One add of all rows at once, beside 800 of ten: a constant apart.
    assert many <= 12 * _work_of_adds(1, 8000, shuffled=shuffled)


def test_a_shared_column_is_copied_before_it_is_written():
    column = Column(torch.zeros(2, 3))
    first = column.share()
    column.append(torch.ones(1, 3))
    column.write(torch.tensor([0]), torch.full((1, 3), 5.0))
    second = column.share()
    column.write(torch.tensor([0]), torch.full((1, 3), 7.0))
    assert first.tolist() == [[0.0] * 3] * 2
    assert second[0].tolist() == [5.0] * 3
    assert len(second) == 3
    assert second.untyped_storage().nbytes() == 9 * 4  # no room to spare in a file
    assert column.value[0].tolist() == [7.0] * 3


def test_a_copy_that_changes_leaves_the_original():
    gallery = RetrievalGallery(2)
    gallery.add(torch.eye(2), torch.tensor([0, 0]), features=Features(logits=torch.eye(2)))
    state = gallery.__getstate__()
    copy = RetrievalGallery.__new__(RetrievalGallery)
    copy.__setstate__(state)  # as a worker that shares the memory
    copy.update(torch.tensor([0]), torch.ones(1, 2), features=Features(logits=torch.ones(1, 2)))
    copy.add(torch.ones(1, 2), torch.tensor([0]), features=Features(logits=torch.ones(1, 2)))
    assert torch.equal(gallery.features(torch.tensor([0, 1])).logits, torch.eye(2))
    assert gallery.search(torch.eye(2)[:1], torch.tensor([0]))[1].item() == 0
    assert len(gallery) == 2


def test_what_inference_mode_added_can_be_changed_outside():
    gallery = RetrievalGallery(2)
    with torch.inference_mode():
        for _ in range(3):
            gallery.add(
                torch.eye(2), torch.tensor([0, 1]), features=Features(embedding=torch.eye(2))
            )
    gallery.update(
        torch.tensor([2]), torch.ones(1, 2), features=Features(embedding=torch.ones(1, 2))
    )
    kept = gallery.features(torch.tensor([2])).embedding
    (kept * torch.ones(2, requires_grad=True)).sum().backward()
    assert kept.tolist() == [[1.0, 1.0]]


# Remove and update.

_STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "remove", "update", "move"]), st.integers(0, 2**20)),
    min_size=1,
    max_size=12,
)


def _changed(gallery: RetrievalGallery, steps) -> dict[int, tuple[Tensor, int]]:
    """Applies random changes; returns what the gallery should hold by id."""
    held: dict[int, tuple[Tensor, int]] = {}
    following = 0
    for kind, seed in steps:
        generator = torch.Generator().manual_seed(seed)
        count = int(torch.randint(1, 9, (), generator=generator))
        vectors = torch.randn(count, DIM, generator=generator)
        labels = torch.randint(3, (count,), generator=generator)
        if kind == "add":
            ids = list(range(following, following + count))
            if seed % 2:  # the caller's ids, of which some may have been removed before
                ids = [i for i in torch.randperm(60, generator=generator).tolist() if i not in held]
                ids = ids[:count]
                vectors, labels = vectors[: len(ids)], labels[: len(ids)]
            given = torch.tensor(ids, dtype=torch.int64) if seed % 2 else None
            gallery.add(vectors, labels, given, features=Features(embedding=2 * vectors))
            following = max([following, *(i + 1 for i in ids)])
        else:
            order = torch.randperm(len(held), generator=generator)[:count].tolist()
            ids = [list(held)[place] for place in order]
            vectors, labels = vectors[: len(ids)], labels[: len(ids)]
            some = torch.tensor(ids, dtype=torch.int64)
            if kind == "remove":
                gallery.remove(some)
                for i in ids:
                    del held[i]
                continue
            if kind == "update":
                labels = torch.tensor([held[i][1] for i in ids], dtype=torch.int64)
            if len(held) == 0:
                continue
            gallery.update(
                some,
                vectors,
                features=Features(embedding=2 * vectors),
                labels=labels if kind == "move" else None,
            )
        held |= {i: (v, int(c)) for i, v, c in zip(ids, vectors, labels, strict=True)}
    return held


@pytest.mark.parametrize("on_torch", [False, True], ids=["faiss", "torch"])
@pytest.mark.parametrize("metric", ["cosine", "kl"])
@given(steps=_STEPS)
@settings(max_examples=40, deadline=None)
def test_after_any_changes_it_is_as_built_anew(metric, on_torch, steps):
    with pytest.MonkeyPatch.context() as patch:
        if on_torch:
            patch.setattr(_faiss, "TORCH_DEVICES", ("cpu",))
        gallery = RetrievalGallery(DIM, metric=metric)
        held = _changed(gallery, steps)
        copy = pickle.loads(pickle.dumps(gallery))
        fresh = RetrievalGallery(DIM, metric=metric)
        if held:
            ids = torch.tensor(list(held))
            vectors = torch.stack([vector for vector, _ in held.values()])
            labels = torch.tensor([label for _, label in held.values()])
            fresh.add(vectors, labels, ids, features=Features(embedding=2 * vectors))
        queries = torch.randn(30, DIM, generator=torch.Generator().manual_seed(1))
        for one in (gallery, copy):
            assert len(one) == len(held)
            assert one.sizes == fresh.sizes
            for label in range(3):
                assert torch.equal(one.ids(label), fresh.ids(label))
            if not held:
                continue
            wanted = torch.tensor(sorted(fresh.sizes))[torch.arange(30) % len(fresh.sizes)]
            for mine, theirs in zip(
                one.search(queries, wanted, 4), fresh.search(queries, wanted, 4), strict=True
            ):
                assert torch.equal(mine, theirs)
            assert torch.equal(one.scores(queries, ids), fresh.scores(queries, ids))
            assert torch.equal(one.features(ids).embedding, 2 * vectors)


@pytest.mark.parametrize(
    "index",
    ["Flat", "SQ8", "HNSW16", "IVF4,Flat", "PCA14,IVF4,SQ8", "PCA14,SQ8", "IVF4,PQ4x4fs,RFlat"],
)
def test_every_kind_of_index_follows(index, tmp_path):
    vectors = torch.randn(900, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(900) // 800  # the second class is too small to be trained
    gallery = RetrievalGallery(16, index=index, parameters="nprobe=4" if "IVF" in index else "")
    gallery.add(vectors, labels)
    gone, moved = torch.arange(0, 900, 3), torch.arange(1, 900, 30)
    gallery.remove(gone)
    places = -vectors[moved] + 0.1
    gallery.update(moved, places)
    gallery.add(vectors[:5], labels[:5])
    assert len(gallery) == 605
    assert gallery.ids(0).tolist()[-5:] == [900, 901, 902, 903, 904]
    gallery.save(tmp_path / "gallery")
    exact = RetrievalGallery(16)
    kept = torch.tensor([i for i in range(900) if i % 3])
    now = vectors.index_copy(0, moved, places)
    exact.add(now[kept], labels[kept], kept)
    exact.add(vectors[:5], labels[:5], torch.arange(900, 905))
    for one in (gallery, RetrievalGallery.load(tmp_path / "gallery")):
        assert one.sizes == exact.sizes
        ids = one.search(now, labels, 5)[1]
        assert not torch.isin(ids, gone).any()
        assert ids[:, 0].ge(0).all()
        recall = (ids[:, 0] == exact.search(now, labels)[1][:, 0]).float().mean()
        assert recall >= (1.0 if index == "Flat" else 0.9)
        # A sample is found by what it is now.
        assert (one.search(places, labels[moved])[1][:, 0] == moved).float().mean() >= 0.9


def test_a_removed_class_is_gone_and_default_ids_go_on():
    gallery = RetrievalGallery(2)
    gallery.add(torch.eye(2), torch.tensor([0, 1]))
    gallery.remove(torch.tensor([1]))
    assert gallery.sizes == {0: 1}
    with pytest.raises(ValueError, match=r"without a teacher sample: \[1\]"):
        gallery.search(torch.eye(2), torch.tensor([0, 1]))
    gallery.add(torch.eye(2), torch.tensor([1, 1]))
    assert gallery.ids(1).tolist() == [2, 3]


def test_an_emptied_gallery_takes_other_features():
    gallery = RetrievalGallery(2)
    gallery.add(torch.eye(2), torch.tensor([0, 1]), features=Features(logits=torch.eye(2)))
    gallery.remove(torch.tensor([1, 0]))
    assert len(gallery) == 0
    with pytest.raises(ValueError, match="gallery is empty"):
        gallery.search(torch.eye(2), torch.tensor([0, 1]))
    gallery.add(torch.eye(2), torch.tensor([0, 1]), features=Features(embedding=torch.ones(2, 5)))
    assert gallery.ids(1).tolist() == [3]
    assert gallery.features(torch.tensor([3])).embedding.shape == (1, 5)


def test_features_stay_where_none_are_given():
    gallery = RetrievalGallery(2)
    gallery.add(torch.eye(2), torch.tensor([0, 1]), features=Features(logits=torch.eye(2)))
    gallery.update(torch.tensor([0]), torch.tensor([[1.0, 2.0]]))
    assert torch.equal(gallery.features(torch.tensor([0, 1])).logits, torch.eye(2))


def test_nothing_removed_stays_in_the_file(tmp_path):
    gallery = RetrievalGallery(3)
    marked = torch.tensor([[123456.0, 654321.0, 777777.0]])
    gallery.add(torch.cat([torch.ones(1, 3), marked]), torch.tensor([0, 0]))
    gallery.save(tmp_path / "before")
    gallery.remove(torch.tensor([1]))
    gallery.save(tmp_path / "after")
    content = marked.numpy().tobytes()
    assert content in (tmp_path / "before").read_bytes()
    assert content not in (tmp_path / "after").read_bytes()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda g: g.remove(torch.tensor([0, 9])), ValueError, r"not in the gallery: \[9\]"),
        (lambda g: g.remove(torch.tensor([-1])), ValueError, r"not in the gallery: \[-1\]"),
        (lambda g: g.remove(torch.tensor([1, 1])), ValueError, r"distinct, got again: \[1\]"),
        (lambda g: g.remove([1]), TypeError, "ids must be an int64"),
        (lambda g: g.update(torch.tensor([9]), torch.ones(1, 2)), ValueError, "not in the gal"),
        (lambda g: g.update(torch.tensor([1, 1]), torch.ones(2, 2)), ValueError, "distinct"),
        (lambda g: g.update(torch.tensor([1]), torch.ones(2, 2)), ValueError, "one row for each"),
        (lambda g: g.update(torch.tensor([1]), torch.ones(1, 3)), ValueError, r"\(N, 2\)"),
        (lambda g: g.update(torch.tensor([1]), torch.zeros(1, 2)), ValueError, "no direction"),
        (
            lambda g: g.update(torch.tensor([1]), torch.ones(1, 2), labels=torch.ones(2).long()),
            ValueError,
            r"labels must have shape \(1,\)",
        ),
        (
            lambda g: g.update(
                torch.tensor([1]), torch.ones(1, 2), features=Features(logits=torch.ones(1, 2))
            ),
            ValueError,
            "got some after 2 samples without them",
        ),
    ],
)
def test_a_wrong_change_leaves_the_gallery(change, error, message):
    gallery = RetrievalGallery(2)
    gallery.add(torch.eye(2), torch.tensor([0, 1]))
    with pytest.raises(error, match=message):
        change(gallery)
    assert gallery.search(torch.eye(2), torch.tensor([0, 1]))[1].tolist() == [[0], [1]]
    assert gallery.search(torch.eye(2), torch.tensor([0, 1]))[0].tolist() == [[1.0], [1.0]]
