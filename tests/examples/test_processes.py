"""Two processes train as one does: value and gradient, to rounding."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from crossmodal.data import Batch, Batches
from crossmodal.methods import Setup, resolve
from crossmodal.training.engine import Training, accelerator_for, fit
from crossmodal.training.steps import Distilled
from tests.examples.test_engine import Quiet
from tests.examples.tiny import opened, recipe

ROOT = Path(__file__).parents[2]
RUN = """
import sys
from pathlib import Path
from crossmodal import recipes
from crossmodal.data import sources
from tests.examples.test_processes import five_steps
from tests.examples.tiny import CLASSES, ENTRY, half

method, rank, world, path = sys.argv[1:]
sources.open_tiny = lambda folder, download: sources.Source(CLASSES, half(80, 1), half(40, 2))
file = Path(path).with_suffix(f".{rank}.toml")
file.write_text(recipes.FILE.read_text() + ENTRY)
recipes.FILE = file
five_steps(method, int(rank), int(world), Path(path))
"""


class Plain(nn.Module):
    """Three stages without batch norm, whose statistics are each process's own on a CPU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(1, width, 3, 2), nn.Tanh())
        self.layer2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3), nn.Tanh())
        self.fc = nn.Linear(2 * width, 4)
        self.feature_info = [{"module": "layer1"}, {"module": "layer2"}]

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


class Wide(Distilled):
    """In float64."""

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return super().forward(_wide(batch))


def _wide(batch: Batch) -> Batch:
    return replace(batch, rich=batch.rich.double(), poor=batch.poor.double())


def five_steps(method: str, rank: int, world: int, path: Path) -> None:
    views, made = opened(labels=40), recipe(pad=1, flip=True)
    torch.manual_seed(3)
    student, teacher = Plain(4).double(), Plain(8).double()
    batches = Batches(made, poor=views.poor, rich=views.rich, share=(rank, world))
    example = _wide(batches.take(torch.arange(2)))
    step = Wide(student, teacher, resolve(method), example, Setup(80, 16), 0).double()
    accelerator = accelerator_for(made, "cpu")
    assert accelerator.num_processes == world
    fit(Training("x", step, batches, made), accelerator, Quiet())
    if rank == 0:
        torch.save(step.state_dict(), path)


def test_two_processes_equal_one_after_five_steps(tmp_path: Path) -> None:
    method = "kd+ds+rkd"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    found = []
    for world in (1, 2):
        path, processes = tmp_path / f"{world}.pt", []
        for rank in range(world):
            environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}"}
            if world > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                                "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # fmt: skip
            arguments = [sys.executable, "-c", RUN, method, str(rank), str(world), str(path)]
            processes.append(subprocess.Popen(arguments, cwd=ROOT, env=environment))
        assert [process.wait(timeout=120) for process in processes] == [0] * world
        found.append(torch.load(path, weights_only=True))
    one, two = found
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-10, msg=name)
    assert any("distiller.criterion" in name for name in one)


@pytest.mark.slow
def test_a_whole_job_runs_on_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", "examples/train.py", "mnist", "--limit", "200", "--epochs", "2", "--seeds", "1",
               "--method", "alone", "ds", "--device", "cpu", "--out", str(tmp_path)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                   "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [run["method"] for run in runs] == ["alone", "ds"]
    assert done.stdout.count("[1 of 2] alone seed 0  epoch 2/2") == 1
