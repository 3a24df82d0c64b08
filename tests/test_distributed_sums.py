"""Criteria that add sums up over the processes equal one process, whatever share each holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import structkd
from structkd import Criterion, Features
from structkd.distributed import average_gradients, world_size
from tests.cases.case import shaped
from tests.devices import ACCELERATOR
from tests.processes import start

BATCH = 8
SHARES = ([4, 4], [1, 7], [2, 5, 1], [0, 8])  # batch sizes a rank
RANKS = [pytest.param((sizes, "cpu"), id=str(sizes)) for sizes in SHARES]
if ACCELERATOR:  # where the ranks must agree
    there = pytest.param(([4, 4], ACCELERATOR), id="accelerator", marks=pytest.mark.gpu)
    RANKS.append(there)


def _dense(**options: object) -> Criterion:
    return structkd.DenseStructureLoss(gather=True, **options)


def _sem(**options: object) -> Criterion:
    projector = nn.Linear(5, 6)
    return structkd.CrossCorrelationLoss(student_projector=projector, gather=True, **options)


def _fitnet_log() -> Criterion:
    return structkd.FitNetLoss(form="log", kernel_size=3, gather=True)


CRITERIA: dict[str, Callable[[], Criterion]] = {
    "ds-measured": lambda: structkd.DSLoss(gather=True),
    "sem": lambda: _sem(),
    "sem-centred": lambda: _sem(center=True, floor=0.01),
    "sem-gram": lambda: _sem(center=True, form="gram"),
    "dense": _dense,
    "dense-squared": lambda: _dense(diagonal="squared", floor=0.0),
    # A student wider than the teacher: the convolution meets positions, not sums.
    "dense-wide": _dense,
    "dense-closed": lambda: _dense(adapter="closed_form", split=False),
    "dense-split": lambda: _dense(adapter="closed_form", split=True),
    "fitnet-log": _fitnet_log,
    # Of pixels, whose labels lie unevenly over the samples.
    "srm-pixels": lambda: structkd.SupervisionLoss(gather=True),
    "dice-pixels": lambda: structkd.DiceLoss(gather=True),
    "dkd-pixels": lambda: structkd.DKDLoss(gather=True),
    "logits-pixels": lambda: structkd.LogitMSELoss(ignore=-100, gather=True),
    "logits-log-pixels": lambda: structkd.LogitMSELoss(form="log", ignore=-100, gather=True),
}


def _labels() -> Tensor:
    """Labels of 12, 10, ..., 2, 0, 0 pixels of the samples."""
    rng = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 5, (BATCH, 12), generator=rng)
    for sample in range(BATCH):
        labels[sample, max(0, 12 - 2 * sample) :] = -100
    return labels.view(BATCH, 3, 4)


def _features(maps: Tensor) -> Features:
    return Features(logits=maps[:, :5], embedding=maps.mean((2, 3)), intermediate=maps)


def _share(
    name: str, sizes: list[int], rank: int, device: str = "cpu"
) -> tuple[Tensor, dict[str, Tensor]]:
    """One rank's part of a batch of maps that are parameters, so that no network is in the way."""
    torch.manual_seed(0)
    criterion = CRITERIA[name]().double()
    examples = [torch.ones(BATCH, c, 3, 4).double() for c in (7 if name == "dense-wide" else 5, 6)]
    shaped(criterion, *map(_features, examples)).to(device)
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    rng = torch.Generator().manual_seed(1)
    widths = (7 if name == "dense-wide" else 5, 6)
    maps = [torch.randn(BATCH, c, 3, 4, generator=rng, dtype=torch.float64) for c in widths]
    own, other = (side[rows].clone().to(device) for side in maps)
    own.requires_grad_()
    value = criterion(_features(own), _features(other), _labels()[rows].to(device))
    value.backward()
    average_gradients(criterion)
    grads = {key: p.grad for key, p in criterion.named_parameters() if p.grad is not None}
    # A loop with DDP divides by the number of processes.
    return value.detach(), {**grads, "maps": own.grad / world_size()}


def _worker(rank: int, sizes: list[int], device: str, out: str) -> None:
    torch.save({name: _share(name, sizes, rank, device) for name in CRITERIA}, f"{out}.{rank}")


@pytest.fixture(scope="module", params=RANKS)
def ranks(request, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    sizes, device = request.param
    folder = tmp_path_factory.mktemp("shares")
    start(_worker, folder, len(sizes), sizes, device, str(folder / "rank"), device=device)
    saved = [folder / f"rank.{r}" for r in range(len(sizes))]
    return [torch.load(file, weights_only=True, map_location="cpu") for file in saved]


@pytest.mark.parametrize("name", list(CRITERIA))
def test_shares_of_any_size_change_nothing(ranks, name: str) -> None:
    value, grads = _share(name, [BATCH], 0)
    exact = {"rtol": 1e-10, "atol": 1e-12}
    for rank in ranks:
        torch.testing.assert_close(rank[name][0], value, **exact)
        for key, want in grads.items():
            if key != "maps":
                torch.testing.assert_close(rank[name][1][key], want, **exact)
    together = torch.cat([rank[name][1]["maps"] for rank in ranks])
    torch.testing.assert_close(together, grads["maps"], **exact)


def _count_worker(rank: int, widths: list[int], build: Callable[[], Criterion], out: str) -> None:
    counted = {"calls": 0}
    reduce = dist.all_reduce

    def counting(*args: object, **kwargs: object) -> object:
        counted["calls"] += 1
        return reduce(*args, **kwargs)

    dist.all_reduce = counting
    stages = [torch.randn(2 + rank, c, 4, 4, requires_grad=True) for c in widths]
    criterion = build()
    value = criterion(stages, [torch.randn(2 + rank, 6, 4, 4) for _ in stages])
    forward = counted["calls"]
    value.backward()
    dist.all_reduce = reduce
    if rank == 0:
        Path(out).write_text(f"{forward} {counted['calls'] - forward}")


@pytest.mark.parametrize(("widths", "build"), [([3, 5, 6], _dense), ([5], _fitnet_log)])
def test_two_reduces_forward_and_one_backward_are_enough(tmp_path: Path, widths, build) -> None:
    out = tmp_path / "count"
    start(_count_worker, tmp_path, 2, widths, build, str(out))
    assert out.read_text() == "2 1"
