"""Several processes: side by side in one folder, and one training in two of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import Tensor, nn

import structkd
import train as script
from data import Batches
from progress import Show
from tests.examples import layouts
from tests.examples.entries import outcome, results

HERE = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layouts.write_recipe(tmp_path_factory.mktemp("images"))


def started(*command: object, **environment: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=HERE, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture
def ended() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that do not outlive a test."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()


@pytest.mark.slow
def test_a_kill_two_commands_and_two_jobs_in_one_folder_leave_what_one_command_does(
    images: Path, tmp_path: Path, ended: list[subprocess.Popen[bytes]]
) -> None:
    shared, single = tmp_path / "shared", tmp_path / "single"
    command = ["examples/train.py", images, "--out", shared]
    killed = started(*command)
    ended.append(killed)
    while not list(shared.glob("epochs/student-*/epoch-1")) and killed.poll() is None:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    both = started(*command, "--jobs", "2")
    ended.append(both)
    # The other command is this process, which has all its imports: it waits until those train.
    said = [next((line for line in both.stdout if b"epoch" in line), b"")]
    assert script.main([str(images), "--out", str(shared)]) == 0
    said.append(both.communicate()[0])
    assert both.returncode == 0, said
    assert script.main([str(images), "--out", str(single)]) == 0
    assert len(results(shared)) == 4
    assert outcome(shared) == outcome(single)
    assert "| dense |" in (shared / "results.md").read_text()
    assert not list(shared.glob("epochs/*/epoch-*"))


def test_helpers_end_with_the_process_that_started_them(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    popen, helpers = subprocess.Popen, []

    def sleeping(command: list[str], **more: Any) -> subprocess.Popen[bytes]:
        helpers.append(popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        return helpers[-1]

    def stopping(self: Show, history: list[dict[str, float]]) -> None:
        if self.label.startswith("alone"):
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", sleeping)
    monkeypatch.setattr(Show, "epoch", stopping)
    assert script.main([str(recipe), "--out", str(tmp_path), "--jobs", "2"]) == 130
    assert [helper.poll() for helper in helpers] == [-signal.SIGTERM]


# One training in two processes.


class Plain(nn.Module):
    """Two stages without batch norm, whose statistics are each process's own on a CPU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.Tanh())
        self.layer2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3), nn.Tanh())
        self.fc = nn.Linear(2 * width, 2)
        self.feature_info = [{"module": "layer1"}, {"module": "layer2"}]

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


class Wide(Batches):
    """In float64, with labels for some."""

    def epoch(self, number: int, ids: Tensor | None = None) -> Iterator[Any]:
        for batch in super().epoch(number, ids):
            yield replace(batch, rich=batch.rich.double(), poor=batch.poor.double())


STAGES = {"intermediate": ["layer1", "layer2"]}
CRITERION = "[kd, ds, rkd, dense, crd]"


def few_steps(images: Path, out: Path) -> dict[str, Tensor]:
    """All that is trained, after a few steps on this process's share of every batch."""
    options = script.recipe(str(images), script.Options, out=out, epochs=2, labels=16, ema=0.5)
    job = script.Session(options)
    torch.manual_seed(3)
    student, teacher = Plain(4).double(), Plain(8).double()
    model = structkd.Distiller(
        student, teacher, script.Method.of(CRITERION).build(2, {"samples": 32, "negatives": 4}),
        example=torch.zeros(2, 3, 12, 12).double(), layers=STAGES, teacher_layers=STAGES,
    ).double()  # fmt: skip
    state = PartialState()
    share = (state.process_index, state.num_processes)
    batches = Wide(options, poor=job.views.poor, rich=job.views.rich, share=share, labelled=0.5)
    training = script.Training("x", model, student, batches, options, script.distilled(1.0))
    averaged = script.fit(training, job.show)
    return {**model.state_dict(), **{f"ema.{k}": v for k, v in averaged.state_dict().items()}}


def two_processes(images: Path, out: Path) -> None:
    found = few_steps(images, out / "plain")
    if PartialState().is_main_process:
        torch.save(found, out / "two.pt")
    raise SystemExit(script.main([str(images), "--seeds", "0", "--out", str(out / "job")]))


@pytest.mark.slow
def test_two_processes_train_as_one(
    images: Path, tmp_path: Path, ended: list[subprocess.Popen[bytes]]
) -> None:
    both = started(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, images,
        tmp_path, PYTHONPATH=f"{HERE}{os.pathsep}{HERE / 'examples'}", ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    ended.append(both)
    said = both.communicate(timeout=300)[0].decode()
    assert both.returncode == 0, said
    one, two = few_steps(images, tmp_path / "one"), torch.load(tmp_path / "two.pt")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-10, msg=name)
    # And a whole job: one process writes and speaks.
    assert [run["method"] for run in results(tmp_path / "job")] == ["alone", "dense"]
    assert said.count("alone seed 0  epoch 2/2") == 1
    content = json.loads((tmp_path / "job/results.json").read_text())
    assert len(content["commands"]) == 1


if __name__ == "__main__":
    two_processes(*map(Path, sys.argv[1:]))
