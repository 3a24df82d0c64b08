"""A job that was cut off ends as one that was not, and what is damaged is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train as script
import unpaired
from progress import Show
from store import Checkpoint, Epochs, Store, read_checkpoint, write_atomically
from tests.examples.entries import damage, outcome, results

Runner = Callable[..., int]
Shown = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def finished_jobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def finished(run: Runner, finished_jobs: Path) -> Callable[..., Path]:
    """Leaves a finished job in a folder. It is run once for all tests and copied."""

    def finished(out: Path, *options: str) -> Path:
        kept = finished_jobs / " ".join(options)
        if not kept.exists():
            assert run(*options, out=kept) == 0
        return shutil.copytree(kept, out)

    return finished


def cut(monkeypatch: pytest.MonkeyPatch, label: str, after: int) -> None:
    """Ctrl-C, when so many epochs of the training of that label are kept."""
    original = Show.epoch

    def stopping(self: Show, history: list[dict[str, float]]) -> None:
        original(self, history)
        if self.label.startswith(label) and len(history) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Show, "epoch", stopping)


@pytest.mark.parametrize(
    ("main", "label", "options"),
    [
        (script.main, "teacher", ("--criterion", "kd")),
        (script.main, "[crd, ctkd, semckd]", (
            "--criterion", "[crd, ctkd, semckd]", "--ema", "0.9", "--falling", "--precision",
            "bf16", "--optimizer", "adamw", "--lr", "1e-3")),
        (script.main, "ds", ("--criterion", "ds", "--labels", "8", "--memory", "0", "--workers",
                             "0")),
        (unpaired.main, "matcher", ("--rows", "matching")),
        (unpaired.main, "SemBridge", ("--rows", "SemBridge as published", "--rematch", "60", "60",
                                      "0", "2")),
        (unpaired.main, "random", ("--rows", "random in class")),
        (unpaired.main, "pairs made", ("--rows", "pairs made poor + dense")),
    ],
    ids=["teacher", "memories, EMA, AdamW, bf16", "few labels, streamed", "matcher", "DynM",
         "drawn matches", "free pairs"],
)  # fmt: skip
def test_a_training_that_is_cut_off_goes_on_to_the_same_bits(
    main: Callable[[list[str]], int], label: str, options: tuple[str, ...], recipe: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown,
) -> None:  # fmt: skip
    own = ["--matcher-epochs", "2"] if main is unpaired.main else []
    command = [str(recipe), "--epochs", "3", *own, *options, "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        cut(patch, label, after=1)
        assert main([*command, str(tmp_path / "cut")]) == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert not (tmp_path / "cut/results.json").exists()
    torch.rand(7)  # another process draws from elsewhere
    assert main([*command, str(tmp_path / "cut")]) == 0
    said = capsys.readouterr().out
    assert any(label in line for line in said.splitlines() if "resumes after epoch 1" in line)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    assert not list((tmp_path / "cut/epochs").glob("*/epoch-*"))


@pytest.mark.parametrize("count", [1, 2], ids=["teacher", "student"])
@pytest.mark.parametrize(
    ("kind", "name"), [(Checkpoint, "save"), (Store, "write"), (Epochs, "clear")],
    ids=["weights", "result", "epochs"],
)  # fmt: skip
def test_a_kill_right_after_a_training_loses_nothing_and_leaves_no_epochs(
    kind: type, name: str, count: int, run: Runner, finished: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    options, calls = ("--criterion", "alone"), []
    finished(tmp_path / "whole", *options)

    def killed(*anything: object, **more: object) -> object:
        calls.append(1)
        if len(calls) == count:
            raise KeyboardInterrupt
        return original(*anything, **more)

    original = getattr(kind, name)
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, killed)
        assert run(*options) == 130
    assert run(*options) == 0
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")
    assert not list(tmp_path.glob("out/epochs/*"))


def test_a_student_that_cannot_be_evaluated_failed_and_is_not_trained_again(
    run: Runner, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    def without_room(*anything: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(script.Session, "evaluated", without_room)
        assert run("--criterion", "alone") == 1
    assert "alone seed 0: failed: out of memory" in capsys.readouterr().out
    assert run("--criterion", "alone") == 0
    assert "resumes after epoch 3 of 3" in capsys.readouterr().out


# Damage.


@pytest.fixture
def left(
    run: Runner, finished: Callable[..., Path], finished_jobs: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: Shown,
) -> Path:  # fmt: skip
    """Epochs 2 and 3 of 4 of a student that was cut off, and the result of one that was not."""
    options = ("--criterion", "alone", "--epochs", "4")
    finished(tmp_path / "whole", *options)
    kept = finished_jobs / "cut"
    if not kept.exists():
        with monkeypatch.context() as patch:
            cut(patch, "alone", after=3)
            assert run(*options, out=kept) == 130
    shutil.copytree(kept, tmp_path / "out")
    capsys.readouterr()
    (folder,) = (tmp_path / "out/epochs").glob("student-*")
    return folder


@pytest.mark.parametrize(
    ("kind", "name"),
    [("gone", "manifest.json"), ("empty", "manifest.json"), ("flipped", "pytorch_model.bin"),
     ("cut short", "optimizer.bin"), ("gone", "extra.pt"), ("empty", "random_states_0.pkl")],
)  # fmt: skip
def test_a_damaged_epoch_is_named_and_the_one_before_it_is_taken(
    kind: str, name: str, left: Path, run: Runner, tmp_path: Path, capsys: Shown
) -> None:
    assert sorted(place.name for place in left.glob("epoch-*")) == ["epoch-2", "epoch-3"]
    damage(left / "epoch-3" / name, kind)
    assert run("--criterion", "alone", "--epochs", "4") == 0
    said = capsys.readouterr().out
    assert f"{left / 'epoch-3'} is damaged" in said
    assert "resumes after epoch 2 of 4" in said
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_where_every_epoch_is_damaged_the_row_fails_and_says_what_to_delete(
    left: Path, run: Runner, capsys: Shown
) -> None:
    for place in left.glob("epoch-*"):
        damage(place / "optimizer.bin", "cut short")
    options = ("--criterion", "alone", "kd", "--epochs", "4")
    assert run(*options) == 1
    assert f"fix: delete {left}" in capsys.readouterr().out
    for place in left.glob("epoch-*"):
        damage(place / "optimizer.bin", "gone")
        place.rename(left / f".{place.name}")  # as whoever follows the advice
    assert run(*options) == 0


@pytest.mark.parametrize(
    ("kind", "name"),
    [("cut short", "results.json"), ("empty", "results.json"), ("flipped", "results.json"),
     ("a number", "results.json"), ("cut short", "teacher-*.pt"), ("empty", "teacher-*.pt"),
     ("flipped", "teacher-*.pt"), ("a fact", "teacher-*.pt")],
)  # fmt: skip
def test_a_damaged_file_is_one_line_with_its_cure_and_nothing_is_lost(
    kind: str, name: str, run: Runner, finished: Callable[..., Path], tmp_path: Path, capsys: Shown
) -> None:
    finished(tmp_path / "out", "--criterion", "alone", "--epochs", "1")
    (file,) = (tmp_path / "out").glob(name)
    if kind == "a number":
        file.write_text(file.read_text().replace('"accuracy": ', '"accuracy": 1'))
    elif kind == "a fact":
        file.write_bytes(file.read_bytes().replace(b"modality", b"modalitx"))
    else:
        damage(file, kind)
    before = (tmp_path / "out/results.json").read_bytes()
    capsys.readouterr()
    assert run("--epochs", "1") == 2
    said = capsys.readouterr().err
    assert f"{file} is damaged" in said
    assert "fix: move it away" in said
    assert said.count("\n") == 1
    assert (tmp_path / "out/results.json").read_bytes() == before


def test_damaged_weights_of_a_student_are_made_again_as_the_message_says(
    run: Runner, finished: Callable[..., Path], tmp_path: Path
) -> None:
    made = outcome(finished(tmp_path / "out", "--criterion", "alone"))
    (file,) = (tmp_path / "out").glob("student-*.pt")
    damage(file, "flipped")
    with pytest.raises(ValueError, match=r"is damaged .* again with --fresh") as refused:
        read_checkpoint(file)
    assert str(file) in str(refused.value)
    file.unlink()
    assert run("--criterion", "alone", "--fresh") == 0
    assert outcome(tmp_path / "out") == made


@pytest.mark.parametrize(
    "content", ["[]", '{"runs": 3}', '{"runs": [{"seed": 1}]}',
                '{"runs": [{"method": "kd", "seed": 1, "config": {}}]}'],
)  # fmt: skip
def test_results_of_another_form_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json is damaged .* fix: move it away"):
        Store(tmp_path)


# A full disk. What torch's writer raises depends on how far it came.
FULL = (OSError(28, "No space left on device"), RuntimeError("enforce fail: unexpected pos 576"))


@pytest.mark.parametrize(
    ("error", "name"), [(FULL[0], "student-"), (FULL[1], "extra.pt"), (FULL[1], "optimizer")]
)
def test_on_a_full_disk_the_training_goes_on_and_its_result_is_kept(
    error: Exception, name: str, run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: Shown,
) -> None:  # fmt: skip
    save = torch.save

    def full(content: object, file: object, **more: object) -> None:
        if name in str(getattr(file, "name", file)):
            raise error
        save(content, file, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert run("--criterion", "alone") == 0
    said = capsys.readouterr().out
    assert said.count("could not be") == (1 if name == "student-" else 2)  # once a training
    lost = [line for line in said.splitlines() if "could not be" in line]
    assert all(str(tmp_path / "out") in line for line in lost)
    (found,) = results(tmp_path / "out")
    assert "accuracy" in found


@pytest.mark.parametrize("error", FULL, ids=["system", "torch"])
def test_a_teacher_that_cannot_be_kept_is_one_line(
    error: Exception, run: Runner, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    save = torch.save

    def full(content: object, file: object, **more: object) -> None:
        if "teacher-" in Path(str(file)).name or ".teacher-" in str(file):
            raise error
        save(content, file, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert run("--criterion", "alone") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "the same command resumes" in said
    assert run("--criterion", "alone") == 0
    assert "resumes after epoch 3 of 3" in capsys.readouterr().out


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    def full(file: Path) -> None:
        file.write_bytes(b"a part")
        raise FULL[0]  # the system names no file

    with pytest.raises(OSError, match=r"table\.md could not be written .*No space left"):
        write_atomically(tmp_path / "table.md", full)
    assert not list(tmp_path.glob("*table*"))


def test_results_that_cannot_be_written_are_there_when_the_disk_has_room(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    def full(self: Store, *anything: object) -> None:
        raise FULL[0]

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", full)
        assert run("--criterion", "alone") == 2
    assert "No space left" in capsys.readouterr().err
    assert run("--criterion", "alone") == 0
    assert "alone seed 0: resumes after epoch 3 of 3" in capsys.readouterr().out
    assert len(results(tmp_path / "out")) == 1


@pytest.mark.parametrize("place", ["file", "file/in", "/proc/nowhere"])
def test_a_folder_that_cannot_be_written_is_one_line_before_anything_is_trained(
    place: str, run: Runner, tmp_path: Path, trained: list[str], capsys: Shown
) -> None:
    (tmp_path / "file").touch()
    assert run(out=tmp_path / place) == 2
    said = capsys.readouterr().err
    assert "--out" in said
    assert "fix: name" in said
    assert said.count("\n") == 1
    assert trained == []
