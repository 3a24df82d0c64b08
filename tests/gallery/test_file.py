"""A gallery's file: what comes back, what is refused, and what writing it leaves behind."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
import stat
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structkd import Features, RetrievalGallery


def _gallery(count: int = 2, **options) -> RetrievalGallery:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(count, 6, generator=generator)
    gallery = RetrievalGallery(6, **options)
    feats = Features(logits=vectors, intermediate=(vectors[:, :, None, None],))
    gallery.add(vectors, torch.arange(count) % 3 // 2, features=feats)
    return gallery


def _same(one: RetrievalGallery, other: RetrievalGallery) -> None:
    assert repr(one) == repr(other)
    assert one.sizes == other.sizes
    for label in other.sizes:
        queries = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
        wanted = torch.full((9,), label)
        ids = other.ids(label)
        assert torch.equal(one.ids(label), ids)
        for mine, theirs in zip(
            one.search(queries, wanted, 3), other.search(queries, wanted, 3), strict=True
        ):
            assert torch.equal(mine, theirs)
        kept, wanted_kept = one.features(ids), other.features(ids)
        assert torch.equal(kept.logits, wanted_kept.logits)
        assert torch.equal(kept.intermediate[0], wanted_kept.intermediate[0])


@pytest.mark.parametrize("searched", [False, True], ids=["as added", "searched"])
@pytest.mark.parametrize("options", [{}, {"index": "IVF4,Flat", "parameters": "nprobe=2"}])
@pytest.mark.parametrize("metric", ["cosine", "kl"])
def test_files_and_copies_are_the_gallery(tmp_path, metric, options, searched):
    # The second class is too small for its index to be trained.
    gallery = _gallery(430, metric=metric, temperature=2.0, **options)
    if searched:
        gallery.search(torch.ones(1, 6), torch.tensor([0]))
    gallery.save(tmp_path / "gallery")
    copies = [RetrievalGallery.load(tmp_path / "gallery"), pickle.loads(pickle.dumps(gallery))]
    for copy in copies:
        _same(copy, gallery)
        copy.add(torch.ones(1, 6), torch.tensor([7]), features=copy.features(torch.tensor([0])))
        assert copy.ids(7).tolist() == [430]
    assert len(gallery) == 430
    assert [path.name for path in tmp_path.iterdir()] == ["gallery"]


def test_a_trained_index_is_read_and_not_trained_again(tmp_path, monkeypatch):
    faiss = pytest.importorskip("faiss")
    gallery = _gallery(430, index="IVF4,Flat")
    gallery.save(tmp_path / "gallery")
    monkeypatch.setattr(faiss.IndexIVFFlat, "train", lambda *_: pytest.fail("trained"))
    _same(RetrievalGallery.load(tmp_path / "gallery"), gallery)


@pytest.mark.parametrize("index", ["Flat", "IVF2,Flat"])
def test_a_file_of_structkd_0_1_0_is_read(tmp_path, index):
    gallery = _gallery(400)
    rows = torch.arange(400)
    kept = rows % 4 != 3  # of a removed sample that version left a row without an id
    vectors = gallery.features(rows).logits * kept[:, None]
    state = {
        "dim": 6,
        "metric": "cosine",
        "temperature": 3.0,
        "index": index,
        "parameters": "" if index == "Flat" else "nprobe=2",
        "device": "cuda",
        "vectors": vectors,
        "labels": rows % 3 // 2,
        "ids": torch.where(kept, rows, -1),
        "following": 400,
        "features": {"logits": vectors, "intermediate.000": vectors[:, :, None, None]},
        "classes": {0: {"rows": rows, "index": None, "is_final": True, "largest": 1.0}},
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    checksum = hashlib.sha256(payload).digest()
    header = struct.pack("<16sIQ32s", b"structkd-gallery", 2, len(payload), checksum)
    (tmp_path / "gallery").write_bytes(header + payload)
    # All lists are looked through: the same result as the flat one's.
    options = {"index": index, "parameters": state["parameters"]}
    wanted = RetrievalGallery(6, **options)
    feats = gallery.features(rows[kept])
    wanted.add(vectors[kept], (rows % 3 // 2)[kept], rows[kept], features=feats)
    _same(RetrievalGallery.load(tmp_path / "gallery"), wanted)


def test_a_file_of_another_version_is_refused(tmp_path):
    _gallery().save(tmp_path / "gallery")
    content = bytearray((tmp_path / "gallery").read_bytes())
    content[16] = 9
    (tmp_path / "gallery").write_bytes(content)
    with pytest.raises(ValueError, match=r"gallery format 9.*build the gallery anew"):
        RetrievalGallery.load(tmp_path / "gallery")


@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
@settings(max_examples=30, deadline=None)
def test_any_damaged_byte_is_refused(tmp_path_factory, where, flip):
    path = tmp_path_factory.mktemp("gallery") / "file"
    _gallery().save(path)
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= flip
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged|no structkd gallery|gallery format"):
        RetrievalGallery.load(path)


@pytest.mark.parametrize("keep", [0, 10, 50, -1])
def test_cut_file_is_refused(tmp_path, keep):
    path = tmp_path / "file"
    _gallery().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut short|no structkd gallery"):
        RetrievalGallery.load(path)


# Writing it.


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
@pytest.mark.usefixtures("umask")
def test_a_file_has_the_permissions_that_open_gives_or_keeps_its_own(tmp_path):
    path = tmp_path / "gallery"
    _gallery().save(path)
    (tmp_path / "other").open("w").close()
    assert _mode(path) == _mode(tmp_path / "other") == 0o640
    path.chmod(0o606)
    _gallery(30).save(path)
    assert _mode(path) == 0o606
    assert len(RetrievalGallery.load(path)) == 30


@pytest.mark.skipif(not hasattr(os, "symlink") or os.name == "nt", reason="needs symlinks")
@pytest.mark.parametrize("target", ["there", "not there"])
def test_a_symlink_stays_one_and_its_target_is_written(tmp_path, target):
    (tmp_path / "folder").mkdir()
    real, link = tmp_path / "folder" / "gallery", tmp_path / "link"
    link.symlink_to(real)
    if target == "there":
        real.write_bytes(b"old")
    _gallery(30).save(link)
    assert link.is_symlink()
    assert len(RetrievalGallery.load(real)) == 30
    assert [path.name for path in real.parent.iterdir()] == ["gallery"]


def test_the_file_is_closed_before_it_is_renamed(tmp_path, monkeypatch):
    # Windows renames no open file.
    opened, replace, open_file = [], Path.replace, Path.open

    def note(self, *args, **kwargs):
        opened.append(open_file(self, *args, **kwargs))
        return opened[-1]

    def closed(self, target):
        assert opened
        assert all(file.closed for file in opened)
        return replace(self, target)

    monkeypatch.setattr(Path, "open", note)
    monkeypatch.setattr(Path, "replace", closed)
    _gallery().save(tmp_path / "gallery")
    assert (tmp_path / "gallery").exists()


@pytest.mark.parametrize("step", ["write", "rename", "interrupt"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "gallery"
    _gallery().save(path)
    before = path.read_bytes()

    def full(*_):
        if step == "interrupt":
            raise KeyboardInterrupt
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "rename":
        monkeypatch.setattr(Path, "replace", full)
    else:
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeyboardInterrupt if step == "interrupt" else OSError):
        _gallery(30).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["folder", "pipe"])
def test_what_is_no_file_is_not_replaced(tmp_path, name):
    if name == "folder":
        (tmp_path / name).mkdir()
    elif hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / name)
    else:
        pytest.skip("no pipes here")
    with pytest.raises(ValueError, match="path must name a regular file or a new one"):
        _gallery().save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"make a file in .*missing"):
        _gallery().save(tmp_path / "missing" / "gallery")


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere"
)
def test_no_permission_is_said_and_changes_nothing(tmp_path):
    path = tmp_path / "gallery"
    _gallery().save(path)
    before = path.read_bytes()
    path.chmod(0o444)
    with pytest.raises(PermissionError, match="read-only: save under another name"):
        _gallery(30).save(path)
    path.chmod(0o644)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PermissionError, match="make a file in"):
            _gallery(30).save(path)
    finally:
        tmp_path.chmod(0o755)
    assert path.read_bytes() == before
