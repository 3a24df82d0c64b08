"""A run that was cut off ends as one that was not, and what is damaged is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from crossmodal import models
from crossmodal.data import Batches
from crossmodal.recipes import data_sets
from crossmodal.runs import session
from crossmodal.runs.epochs import Epochs
from crossmodal.runs.processes import HELPER
from crossmodal.runs.progress import Show
from crossmodal.runs.store import Checkpoint, Results, digest, key, write_atomically
from crossmodal.tables import write
from crossmodal.training.engine import Training, accelerator_for, fit
from crossmodal.training.steps import fresh
from tests.examples.test_engine import Quiet, Supervised
from tests.examples.tiny import opened, recipe

ROOT = Path(__file__).parents[2]
Train = Callable[..., int]


def outcome(out: Path) -> tuple[dict, dict]:
    """Results by run without their seconds, and the checksums of all weights."""
    runs = json.loads((out / "results.json").read_text())["runs"]
    found = {}
    for run in runs:
        trace = {
            k: v for k, v in run.get("trace", {}).items() if k in ("transport", "matched", "in_use")
        }
        found[run["method"], run["seed"]] = (run.get("accuracy"), run.get("terms"), trace)
    weights = {
        path.name: torch.load(path, weights_only=True)["sha256"] for path in out.glob("*.pt")
    }
    return found, weights


def cut(monkeypatch: pytest.MonkeyPatch, label: str, after: int) -> None:
    """Stops the training of that label when so many epochs of it are kept."""
    original = Show.epoch

    def stopping(self: Show, history: list[dict[str, float]]) -> None:
        original(self, history)
        if self.label.startswith(label) and len(history) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Show, "epoch", stopping)


@pytest.mark.parametrize(
    ("name", "label", "options"),
    [
        ("tiny", "teacher", ("--method", "kd")),
        ("tiny", "crd+ctkd", ("--method", "crd+ctkd", "--ema", "0.9", "--falling", "--flip")),
        ("tiny", "semckd", ("--method", "semckd", "--optimizer", "adamw", "--lr", "0.001")),
        ("tiny", "ds", ("--method", "ds", "--accumulate", "2", "--fresh-noise")),
        ("unpaired-tiny", "matcher", ("--variant", "ssm")),
        ("unpaired-tiny", "kd full", ("--variant", "full-ssm", "--epochs", "6")),
        ("unpaired-tiny", "kd random", ("--variant", "random", "--epochs", "3")),
    ],
)
def test_a_cut_run_ends_bit_for_bit_as_a_whole_one(
    name: str, label: str, options: tuple[str, ...], tmp_path: Path, train: Train,
    trained: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = ("--seeds", "1", *options)
    assert train(*arguments, name=name, out=tmp_path / "whole") == 0
    with monkeypatch.context() as patched:
        cut(patched, label, after=1)
        assert train(*arguments, name=name, out=tmp_path / "cut") == 130
    assert "goes on from the last epoch" in capsys.readouterr().err
    torch.rand(7)
    assert train(*arguments, name=name, out=tmp_path / "cut") == 0
    assert (
        f"{label}" in capsys.readouterr().out.partition("goes on after epoch 1")[0].splitlines()[-1]
    )
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    assert not list((tmp_path / "cut" / "epochs").glob("*/epoch-*"))


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_student_loses_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "examples/train.py", "mnist", "--limit", "200", "--epochs", "3",
               "--seeds", "1", "--method", "ds", "--device", "cpu",
               "--precision", "fp32"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def started(out: str) -> subprocess.Popen[bytes]:
        full = [*command, "--out", str(tmp_path / out)]
        return subprocess.Popen(full, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)

    assert started("whole").wait() == 0
    killed = started("cut")
    while not list((tmp_path / "cut").glob("epochs/student-*/epoch-1")):
        assert killed.poll() is None
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not list((tmp_path / "cut").glob("student-*.pt"))
    assert started("cut").wait() == 0
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_in_one_folder_keep_every_result(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "examples/train.py", "mnist", "--limit", "100", "--epochs", "2",
             "--seeds", "2", "--device", "cpu", "--precision", "fp32", "--out", str(tmp_path),
             "--method", *methods],
            cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
        )
        for methods in (("alone", "kd", "at"), ("alone", "at", "ds"))
    ]  # fmt: skip
    assert [process.wait() for process in both] == [0, 0]
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    found = sorted((run["method"], run["seed"]) for run in runs)
    assert found == [(m, s) for m in ("alone", "at", "ds", "kd") for s in (0, 1)]
    assert (tmp_path / "results.md").read_text().count("| at |") == 2
    assert (tmp_path / "accuracy-2.png").exists()


@pytest.mark.slow
def test_several_jobs_share_the_students(tmp_path: Path) -> None:
    command = [sys.executable, "examples/train.py", "mnist", "--limit", "100", "--epochs", "2",
               "--seeds", "3", "--method", "alone", "--device", "cpu", "--precision", "fp32",
               "--jobs", "2", "--out", str(tmp_path)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert sorted(run["seed"] for run in runs) == [0, 1, 2]
    assert done.stdout.count("%") > 3


# Damage.


def damage(place: Path, kind: str) -> None:
    if kind == "gone":
        place.unlink()
    elif kind == "cut short":
        place.write_bytes(place.read_bytes()[: place.stat().st_size // 2])
    elif kind == "overwritten":
        content = bytearray(place.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 64] = bytes(64)
        place.write_bytes(content)
    else:
        place.write_bytes(b"junk")


@pytest.mark.parametrize("kind", ["gone", "cut short", "overwritten", "junk"])
@pytest.mark.parametrize(
    "file", ["pytorch_model.bin", "optimizer.bin", "manifest.json", "extra.pt"]
)
def test_a_damaged_epoch_is_named_and_the_one_before_it_is_used(
    kind: str, file: str, tmp_path: Path
) -> None:
    views, made = opened(), recipe(epochs=4)
    batches = Batches(made, poor=views.poor)
    told: list[str] = []

    class Cut(Quiet):
        def epoch(self, history: list[dict[str, float]]) -> None:
            if len(history) == 3:
                raise KeyboardInterrupt

    def run(reporter: Quiet) -> nn.Module:
        step = Supervised(fresh("resnet8x0_5", views.poor, 0), "poor")
        training = Training("x", step, batches, made, keeper=Epochs(tmp_path / "e", told.append))
        return fit(training, accelerator_for(made, "cpu"), reporter).network

    with pytest.raises(KeyboardInterrupt):
        run(Cut())
    assert sorted(place.name for place in (tmp_path / "e").iterdir()) == ["epoch-2", "epoch-3"]
    damage(tmp_path / "e" / "epoch-3" / file, kind)
    again = digest(run(Quiet()).state_dict())
    assert len(told) == 1
    assert f"{tmp_path}/e/epoch-3 is damaged" in told[0]
    whole = Supervised(fresh("resnet8x0_5", views.poor, 0), "poor")
    fit(Training("x", whole, batches, made), accelerator_for(made, "cpu"), Quiet())
    assert again == digest(whole.network.state_dict())
    if file == "manifest.json":
        for place in (tmp_path / "e").iterdir():
            damage(place / file, kind)
        with pytest.raises(
            ValueError, match=r"epoch-4 is damaged .*; fix: delete .* to train from"
        ):
            run(Quiet())


@pytest.mark.parametrize("kind", ["cut short", "overwritten", "junk"])
def test_a_damaged_teacher_is_refused(
    kind: str, tmp_path: Path, train: Train, trained: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert train("--method", "alone", "--seeds", "1") == 0
    (path,) = tmp_path.glob("teacher-*.pt")
    damage(path, kind)
    capsys.readouterr()
    assert train("--method", "kd", "--seeds", "1") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: checkpoint {path} is damaged")
    assert error.count("\n") == 1
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [run["method"] for run in runs] == ["alone"]


def test_a_checkpoint_of_other_settings_under_this_name_is_refused(tmp_path: Path) -> None:
    model = models.create("resnet8", num_classes=4, in_chans=1)
    mine, other = (
        Checkpoint(tmp_path, "teacher", {"model": "resnet8", "training": {"seed": seed}})
        for seed in (0, 1)
    )
    mine.save(model)
    assert other.load_into(model) is False
    assert mine.load_into(models.create("resnet8", num_classes=4, in_chans=1))
    mine.path.rename(other.path)
    with pytest.raises(ValueError, match=r"was made with another training\.seed"):
        other.load_into(model)
    mine.save(model)
    with pytest.raises(ValueError, match="does not fit CifarResNet"):
        mine.load_into(models.create("resnet14", num_classes=4, in_chans=1))


def test_resume_refuses_to_start_and_names_what_differs(
    tmp_path: Path, train: Train, trained: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert train("--resume", "--seeds", "1") == 2
    assert "--resume: nothing was kept" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        cut(patched, "teacher", after=1)
        assert train("--seeds", "1", "--method", "kd") == 130
    capsys.readouterr()
    assert train("--resume", "--seeds", "1", "--method", "kd", "--lr", "0.01") == 2
    assert "were made with another training.lr; fix" in capsys.readouterr().err
    assert train("--resume", "--seeds", "1", "--method", "kd") == 0


# The results file.


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "results").glob("*.json")))
def test_committed_results_are_still_read(path: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(path.read_text())
    results = Results(tmp_path)
    runs = results.runs()
    assert results.find(runs[0]["method"], runs[0]["seed"], runs[0]["config"]) == runs[0]
    results.write({"command": "another"})
    assert Results(tmp_path).runs() == runs


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"runs": [{"seed": 1}]}',
        '{"runs": 3}',
        '{"runs": [{"method": "kd", "seed": 1, "config": {}}]}',
    ],
)
def test_a_damaged_results_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json is damaged .* fix: move it away"):
        Results(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# What torch's writer raises on a full disk depends on how far it came.
FULL = (OSError(28, "No space left on device"), RuntimeError("enforce fail: unexpected pos 576"))


@pytest.mark.parametrize("error", FULL, ids=["system", "torch"])
def test_a_full_disk_loses_no_result(
    error: Exception, tmp_path: Path, train: Train, trained: list[str],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    save = torch.save

    def full(content: object, path: Path, **more: object) -> None:
        if "student-" in str(path) or "extra.pt" in str(path):
            raise error
        save(content, path, **more)

    monkeypatch.setattr(torch, "save", full)
    assert train("--method", "alone", "--seeds", "1") == 0
    shown = capsys.readouterr().out
    assert "could not be kept" in shown
    assert "could not be written: " in shown
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert run["accuracy"] >= 0


@pytest.mark.parametrize("error", FULL, ids=["system", "torch"])
def test_a_teacher_that_cannot_be_kept_is_told_in_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(content: object, path: Path) -> None:
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"No space left|torch cannot write .*teacher"):
        Checkpoint(tmp_path, "teacher", {}).save(torch.nn.Linear(2, 2))
    assert list(tmp_path.iterdir()) == []


def test_resume_knows_a_finished_teacher_and_asks_nothing_of_what_is_finished(
    tmp_path: Path, train: Train, trained: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = ("--seeds", "1", "--method", "alone")
    with monkeypatch.context() as patched:
        cut(patched, "alone", after=1)
        assert train(*arguments) == 130
    for place in (tmp_path / "epochs").iterdir():  # as if it was killed between the two
        shutil.rmtree(place)
    assert train(*arguments, "--resume") == 0
    assert trained == ["teacher resnet8", "alone seed 0", "alone seed 0"]
    with monkeypatch.context() as patched:
        cut(patched, "teacher", after=1)
        assert train(*arguments, "--teacher-lr", "0.01") == 130
    capsys.readouterr()
    assert train(*arguments, "--resume") == 0, capsys.readouterr().err


def test_a_helper_is_not_asked_whether_it_resumes(
    tmp_path: Path, train: Train, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HELPER, "any")
    # Its job was looked at by the process that started it, and has since let go of its epochs.
    assert train("--seeds", "1", "--method", "alone", "--resume") == 0
    assert trained == ["teacher resnet8", "alone seed 0"]


def test_helpers_end_with_the_process_that_started_them(
    tmp_path: Path, train: Train, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
    started: list[subprocess.Popen[bytes]] = []

    def helpers(count: int, command: str) -> list[subprocess.Popen[bytes]]:
        started.extend(subprocess.Popen(sleeping) for _ in range(count))
        return started

    monkeypatch.setattr(session, "helpers", helpers)
    cut(monkeypatch, "alone", after=1)
    assert train("--seeds", "2", "--method", "alone", "--jobs", "2") == 130
    assert [helper.poll() for helper in started] == [-signal.SIGTERM]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"cpu, resnet8, batch 16": {}}'])
def test_damaged_choices_of_the_precision_are_named(
    content: str, tmp_path: Path, train: Train, trained: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "precision.json").write_text(content)
    assert train("--precision", "auto", "--method", "alone") == 2
    error = capsys.readouterr().err
    assert "precision.json is damaged" in error
    assert "fix: delete it" in error
    assert trained == []


def test_two_commands_that_end_at_once_both_have_their_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(path: Path, write_to: Callable[[Path], object]) -> None:
        time.sleep(0.2)
        write_atomically(path.with_name(path.name), write_to)

    monkeypatch.setattr(write, "write_atomically", slow)
    path = tmp_path / "results.md"
    ends = [threading.Thread(target=write._put, args=(path, name, name)) for name in ("a", "b")]
    for end in ends:
        end.start()
    for end in ends:
        end.join()
    assert path.read_text().count("Made by") == 2


def test_a_key_stands_for_its_settings() -> None:
    assert key({"a": 1, "b": 2}) == key({"b": 2, "a": 1}) != key({"a": 1, "b": 3})
    assert data_sets()["tiny"].recipe("student", {}, {}).settings["pad"] == 1
