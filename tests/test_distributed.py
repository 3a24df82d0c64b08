"""With gather=True, two processes compute what one process computes on the whole batch."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import structkd
from structkd import Criterion, FeatureCapture, Features
from structkd.distributed import gather_batch, world_size

WORLD, BATCH = 2, 8


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, width, 3, padding=1)
        self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer(x).relu().mean((2, 3)))


def _ds(**options: object) -> Criterion:
    return structkd.DSLoss(5, 6, student_channels=5, teacher_channels=6, gather=True, **options)


CRITERIA: dict[str, Callable[[], Criterion]] = {
    "ds-measured": lambda: _ds(),
    "ds-printed": lambda: _ds(variant="printed"),
    "sem-linear": lambda: structkd.CrossCorrelationLoss(nn.Linear(5, 6), gather=True),
    "sem-mlp": lambda: structkd.CrossCorrelationLoss(structkd.Projector(5, 6), gather=True),
    "dcm": lambda: structkd.UniformityCalibrationLoss(structkd.ConvAdapter(5, 6), gather=True),
    "coral": lambda: structkd.CORALLoss(gather=True),
}


def _setup(name: str) -> tuple[Net, Net, Criterion, Tensor, Tensor]:
    torch.manual_seed(0)
    student, teacher = Net(6 if name == "coral" else 5).double(), Net(6).double()
    criterion = CRITERIA[name]().double()
    images = torch.randn(BATCH, 3, 4, 4, dtype=torch.float64)
    return student, teacher, criterion, images, torch.arange(BATCH) % 4


def _run(
    name: str, student: nn.Module, teacher: Net, criterion: nn.Module, rows: slice
) -> tuple[Tensor, dict[str, Tensor]]:
    _, _, _, images, target = _setup(name)
    feats_s = FeatureCapture(student, intermediate="layer", embedding="fc:input")(images[rows])
    with torch.no_grad():
        feats_t = FeatureCapture(teacher, intermediate="layer", embedding="fc:input")(images[rows])
    loss = criterion(feats_s, feats_t, target[rows])
    # DDP averages only once every parameter has a gradient: the cross-entropy reaches them all.
    (loss + 0 * feats_s.logits.sum()).backward()
    grads = {
        f"{part}.{key.removeprefix('module.')}": parameter.grad
        for part, module in (("student", student), ("criterion", criterion))
        for key, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    return loss.detach(), grads


def _start(worker: Callable[..., None], folder: Path, *args: object) -> None:
    """Runs ``worker(rank, *args)`` in every process of a new group."""
    rendezvous = f"file://{folder / 'rendezvous'}"
    mp.start_processes(_process, (worker, rendezvous, args), nprocs=WORLD, start_method="spawn")


def _process(rank: int, worker: Callable[..., None], rendezvous: str, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=rendezvous,
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    worker(rank, *args)
    dist.barrier()
    dist.destroy_process_group()
    # Gloo's threads may outlive Python's shutdown, which then aborts a process whose work is done.
    os._exit(0)


def _worker(rank: int, names: list[str], out: str) -> None:
    share = BATCH // WORLD
    results = {}
    for name in names:
        for wrapped in (False, True):
            student, teacher, criterion, _, _ = _setup(name)
            ddp = DistributedDataParallel(student)
            trains = any(p.requires_grad for p in criterion.parameters())
            loss_module = DistributedDataParallel(criterion) if wrapped and trains else criterion
            rows = slice(rank * share, (rank + 1) * share)
            results[name, wrapped] = _run(name, ddp, teacher, loss_module, rows)
    if rank == 0:
        torch.save(list(results.items()), out)


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("ddp")
    out = folder / "results.pt"
    _start(_worker, folder, list(CRITERIA), str(out))
    return dict(torch.load(out, weights_only=True))


@pytest.mark.parametrize("wrapped", [False, True], ids=["criterion-bare", "criterion-ddp"])
@pytest.mark.parametrize("name", list(CRITERIA))
def test_value_and_gradient_equal_the_single_process(distributed, name, wrapped) -> None:
    student, teacher, criterion, _, _ = _setup(name)
    value, grads = _run(name, student, teacher, criterion, slice(None))
    shared_value, shared_grads = distributed[name, wrapped]
    torch.testing.assert_close(shared_value, value)
    assert shared_grads.keys() == grads.keys()
    for key, want in grads.items():
        torch.testing.assert_close(shared_grads[key], want, msg=lambda m, k=key: f"{k}: {m}")


def _small_batch_worker(rank: int, out: str) -> None:
    criterion = structkd.CORALLoss(gather=True)
    feats = Features(embedding=torch.full((1, 3), float(rank)))
    value = criterion(feats, Features(embedding=torch.zeros(1, 3)))
    if rank == 0:
        Path(out).write_text(str(float(value)))


def test_one_sample_a_process_is_enough_where_the_whole_batch_counts(tmp_path) -> None:
    out = tmp_path / "value"
    _start(_small_batch_worker, tmp_path, str(out))
    # Rows (0, 0, 0) and (1, 1, 1): every covariance entry is 1/2, and 9 * (1/2)^2 / (4 * 9) = 1/16.
    assert float(out.read_text()) == pytest.approx(1 / 16)


def test_one_process_gathers_nothing() -> None:
    shard = torch.ones(2, 3, requires_grad=True)
    assert world_size() == 1
    assert gather_batch(shard) is shard
