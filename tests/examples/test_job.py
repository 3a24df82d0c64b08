"""The whole job on a tiny set: what it leaves behind, what it reuses, how it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crossmodal import cli, engine, evaluation, models
from crossmodal.store import Checkpoint, Results, key, write_atomically
from structkd.criteria.structure import VARIANTS

ROOT = Path(__file__).parents[2]


def train(out: Path, *more: str) -> int:
    return cli.main(["tiny", "--out", str(out), "--device", "cpu", *more])


def test_the_job_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path, "--method", "alone,kd", "ds", "--seeds", "2", "--limit", "64") == 0
    shown = capsys.readouterr().out
    assert "teacher resnet8, clean images" in shown
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["command"].startswith("python examples/train.py tiny --out")
    assert results["dataset"] == "tiny"
    assert set(results["versions"]) == {"python", "torch", "timm", "numpy", "structkd"}
    runs = {(run["method"], run["seed"]): run for run in results["runs"]}
    assert list(runs) == [(m, s) for m in ("alone", "kd", "ds") for s in (0, 1)]
    for run in runs.values():
        assert 0 <= run["accuracy"] <= 100
        assert run["loss"] == pytest.approx(sum(run["terms"].values()), rel=1e-4)
        assert run["seconds"] > 0
        assert run["config"]["training"]["epochs"] == 2
        assert run["config"]["samples"] == 64
    mean = sum(runs["ds", seed]["accuracy"] for seed in (0, 1)) / 2
    assert f"| ds | {mean:.2f} ±" in (tmp_path / "results.md").read_text()
    for name in ("accuracy", "self_similarity", "tsne"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    left = sorted(path.name.split("-resnet")[0] for path in tmp_path.glob("*.pt"))
    assert left == ["student-alone-seed0", "student-ds-seed0", "student-kd-seed0", "teacher"]
    assert not list(tmp_path.glob(".*"))


def test_finished_runs_are_skipped_and_missing_ones_trained(
    tmp_path: Path, trained: list[str]
) -> None:
    train(tmp_path, "--method", "alone", "--seeds", "2")
    assert trained == ["teacher", "alone 0", "alone 1"]
    before = (tmp_path / "results.json").read_text()
    trained.clear()
    train(tmp_path, "--method", "alone", "kd", "--seeds", "2")
    assert trained == ["kd 0", "kd 1"]
    old, new = (
        json.loads(text)["runs"] for text in (before, (tmp_path / "results.json").read_text())
    )
    assert new[:2] == old
    trained.clear()
    next(tmp_path.glob("student-kd-seed0*")).unlink()  # the figures need it
    train(tmp_path, "--method", "alone", "kd", "--seeds", "2")
    assert trained == ["kd 0"]
    trained.clear()
    train(tmp_path, "--method", "kd", "--seeds", "2", "--fresh")
    assert trained == ["kd 0", "kd 1"]
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == 4


def test_other_settings_train_again_beside_the_old(tmp_path: Path, trained: list[str]) -> None:
    train(tmp_path, "--method", "kd", "--seeds", "1")
    (first,) = tmp_path.glob("teacher-*")
    content = first.read_bytes()
    trained.clear()
    train(tmp_path, "--method", "kd", "--seeds", "1", "--teacher-epochs", "1")
    assert trained == ["teacher", "kd 0"]
    assert len(list(tmp_path.glob("teacher-*"))) == 2
    assert first.read_bytes() == content
    trained.clear()
    # Poorer images change the students, but no teacher.
    train(tmp_path, "--method", "kd", "--seeds", "1", "--amount", "0.7")
    assert trained == ["kd 0"]
    trained.clear()
    train(tmp_path, "--method", "kd", "--seeds", "1", "--evaluate", "val")
    assert trained == ["teacher", "kd 0"]


def test_a_changed_default_trains_again(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, "--method", "kd", "ds", "--seeds", "1")
    trained.clear()
    monkeypatch.setitem(VARIANTS["measured"], "gamma", (1.0, 0.1))
    train(tmp_path, "--method", "kd", "ds", "--seeds", "1")
    assert trained == ["ds 0"]
    train(tmp_path, "--method", "kd", "ds", "--seeds", "1")
    assert trained == ["ds 0"]


def test_a_run_is_written_as_soon_as_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distil = engine.distil

    def stopped(method: str, *rest: object, **options: object) -> engine.Outcome:
        if method == "kd":
            raise KeyboardInterrupt
        return distil(method, *rest, **options)

    monkeypatch.setattr(engine, "distil", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "--method", "alone", "kd", "--seeds", "1")
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert run["method"] == "alone"


def test_a_damaged_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "--method", "alone", "--seeds", "1")
    (path,) = tmp_path.glob("teacher-*")
    for content in (b"junk", path.read_bytes()[:2000], b""):
        path.write_bytes(content)
        capsys.readouterr()
        assert train(tmp_path, "--method", "alone", "--seeds", "1") == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: checkpoint {path} is damaged")
        assert error.count("\n") == 1


def test_a_checkpoint_of_other_settings_under_this_name_is_refused(tmp_path: Path) -> None:
    model = models.create("resnet8", num_classes=4, in_chans=1)
    mine = Checkpoint(tmp_path, "teacher", {"model": "resnet8", "seed": 0})
    other = Checkpoint(tmp_path, "teacher", {"model": "resnet8", "seed": 1})
    mine.save(model)
    assert other.load_into(model) is False
    mine.path.rename(other.path)
    with pytest.raises(ValueError, match="was made with another seed"):
        other.load_into(model)
    mine.save(model)
    with pytest.raises(ValueError, match="does not fit CifarResNet"):
        mine.load_into(models.create("resnet14", num_classes=4, in_chans=1))


def test_a_checkpoint_brings_the_weights_back(tmp_path: Path) -> None:
    saved, loaded = (models.create("resnet8", num_classes=4, in_chans=1) for _ in range(2))
    checkpoint = Checkpoint(tmp_path, "teacher", {"model": "resnet8"})
    checkpoint.save(saved, seconds=1.5)
    assert checkpoint.load_into(loaded)
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


@pytest.mark.parametrize("content", ["{", "[]", '{"runs": [{"seed": 1}]}', '{"runs": 3}'])
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


def test_a_key_stands_for_its_settings() -> None:
    assert key({"a": 1, "b": 2}) == key({"b": 2, "a": 1}) != key({"a": 1, "b": 3})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "unknown data set 'nosuch'; known:"),
        (["tiny", "--method", "dss"], "unknown method 'dss'"),
        (["tiny", "--method", ","], "--method names none"),
        (["tiny", "--student", "resnet8x5"], "unknown model 'resnet8x5'"),
        (["tiny", "--amount", "1.5"], "amount is the fraction of pixels replaced"),
        (["tiny", "--seeds", "0"], "--seeds must be a count"),
        (["tiny", "--seeds", "a,b"], "--seeds must be a count"),
        (["tiny", "--limit", "2"], "limit must lie between"),
        (["tiny", "--epochs", "0"], "epochs must be at least 1"),
        (["tiny", "--device", "nosuch"], "--device 'nosuch' cannot be used"),
        (["cifar10"], "needs a data directory"),
        (["tiny", "--lr", "1e30", "--method", "alone"], "is not finite"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_an_error_that_nobody_raised_on_purpose_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **k: torch.ones(2).view(3).item())
    monkeypatch.setattr(engine, "train_teacher", lambda *a, **k: int("no number"))
    with pytest.raises(ValueError, match="invalid literal"):
        train(tmp_path)


def test_recipes_fill_what_is_not_given() -> None:
    job = cli.parse(["cifar10", "--data", "somewhere"])
    assert (job.teacher, job.student, job.amount) == ("resnet32x4", "resnet8x4", 0.1)
    assert (job.config.epochs, job.teacher_config.epochs, job.config.lr) == (300, 300, 0.1)
    assert job.config.flip
    assert not cli.parse(["mnist"]).config.flip
    assert job.methods == ("alone", "kd", "ds")
    assert job.seeds == (0, 1, 2)
    assert job.out == Path("runs/cifar10")
    short = cli.parse(["cifar10", "--epochs", "20", "--seeds", "4,7"])
    assert (short.config.epochs, short.teacher_config.epochs) == (20, 20)
    assert short.seeds == (4, 7)
    both = cli.parse(["cifar10", "--epochs", "20", "--teacher-epochs", "30", "--fresh-noise"])
    assert (both.config.epochs, both.teacher_config.epochs) == (20, 30)
    assert (both.config.fresh_noise, both.teacher_config.fresh_noise) == (True, False)


def test_torch_is_not_imported_before_its_threads_are_told_to_sleep() -> None:
    check = (
        "import sys, os, crossmodal; print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT / "examples", env=environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "False PASSIVE\n"


def test_the_script_runs_from_the_repository_root() -> None:
    # PYTHONPATH stands in for an installed structkd; crossmodal must be found without it.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "examples/train.py", "nosuch"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    unpaired = "unpaired-mnist, unpaired-cifar10, s2s_eu, s2s_cn, m2s_gl"
    known = f"mnist, cifar10; without pairs: {unpaired}"
    assert done.stderr == f"error: unknown data set 'nosuch'; known: {known}\n"
