"""With gather=True, two processes compute what one process computes on the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import structkd
from structkd import Criterion, FeatureCapture, Features
from structkd.distributed import average_gradients, gather_batch, world_size
from tests.processes import start

WORLD, BATCH = 2, 8


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, width, 3, padding=1)
        self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer(x).relu().mean((2, 3)))


def _ds(**options: object) -> Criterion:
    feats_s, feats_t = (
        Features(embedding=torch.ones(2, width), intermediate=torch.ones(2, width, 4, 4))
        for width in (5, 6)
    )
    return structkd.DSLoss.from_features(feats_s, feats_t, gather=True, **options)


def _dense(width_s: int = 5, **options: object) -> Criterion:
    return structkd.DenseStructureLoss(width_s, 6, gather=True, **options)


def _sem(**options: object) -> Criterion:
    return structkd.CrossCorrelationLoss(nn.Linear(5, 6), gather=True, **options)


CRITERIA: dict[str, Callable[[], Criterion]] = {
    "ds-measured": lambda: _ds(),
    "ds-printed": lambda: _ds(variant="printed"),
    "ds-aligned": lambda: _ds(aligned=True),
    "sem-linear": lambda: _sem(),
    "sem-centred": lambda: _sem(center=True, floor=0.01),
    "sem-gram": lambda: _sem(center=True, form="gram"),
    "sem-mlp": lambda: structkd.CrossCorrelationLoss(structkd.Projector(5, 6), gather=True),
    "dcm": lambda: structkd.UniformityCalibrationLoss(structkd.ConvAdapter(5, 6), gather=True),
    "dense": _dense,
    "dense-squared": lambda: _dense(diagonal="squared", floor=0.0),
    # A student wider than the teacher: the convolution meets positions, not sums.
    "dense-wide": lambda: _dense(7),
    "dense-closed": lambda: _dense(adapter="closed_form", split=False),
    "dense-split": lambda: _dense(adapter="closed_form", split=True),
    "coral": lambda: structkd.CORALLoss(gather=True),
}


def _setup(name: str) -> tuple[Net, Net, Criterion, Tensor, Tensor]:
    torch.manual_seed(0)
    width = {"coral": 6, "dense-wide": 7}.get(name, 5)
    student, teacher = Net(width).double(), Net(6).double()
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
    if not isinstance(criterion, DistributedDataParallel):
        average_gradients(criterion)
    grads = {
        f"{part}.{key.removeprefix('module.')}": parameter.grad
        for part, module in (("student", student), ("criterion", criterion))
        for key, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    return loss.detach(), grads


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
    start(_worker, folder, WORLD, list(CRITERIA), str(out))
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


UNEVEN = [name for name in CRITERIA if name.startswith(("sem-", "dense", "ds-"))]
SHARES = ([1, 7], [2, 5, 1])  # batch sizes a rank


def _uneven(name: str, sizes: list[int], rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    """One rank's part of a batch of maps that are parameters, so that no network is in the way."""
    student, _, criterion, _, _ = _setup(name)
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    rng = torch.Generator().manual_seed(1)
    width = student.fc.in_features
    maps = [torch.randn(BATCH, c, 3, 4, generator=rng, dtype=torch.float64) for c in (width, 6)]
    own = maps[0][rows].clone().requires_grad_()
    feats_s = Features(embedding=own.mean((2, 3)), intermediate=own)
    teacher = maps[1][rows]
    value = criterion(feats_s, Features(embedding=teacher.mean((2, 3)), intermediate=teacher))
    value.backward()
    average_gradients(criterion)
    grads = {key: p.grad for key, p in criterion.named_parameters() if p.grad is not None}
    # A loop with DDP divides by the number of processes.
    return value.detach(), {**grads, "maps": own.grad / world_size()}


def _uneven_worker(rank: int, sizes: list[int], out: str) -> None:
    torch.save({name: _uneven(name, sizes, rank) for name in UNEVEN}, f"{out}.{rank}")


@pytest.fixture(scope="module", params=SHARES, ids=str)
def uneven(request, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    sizes = request.param
    folder = tmp_path_factory.mktemp("uneven")
    start(_uneven_worker, folder, len(sizes), sizes, str(folder / "rank"))
    return [torch.load(folder / f"rank.{r}", weights_only=True) for r in range(len(sizes))]


@pytest.mark.parametrize("name", UNEVEN)
def test_shares_of_other_sizes_change_nothing(uneven, name: str) -> None:
    value, grads = _uneven(name, [BATCH], 0)
    exact = {"rtol": 1e-10, "atol": 1e-12}
    for rank in uneven:
        torch.testing.assert_close(rank[name][0], value, **exact)
        for key, want in grads.items():
            if key != "maps":
                torch.testing.assert_close(rank[name][1][key], want, **exact)
    together = torch.cat([rank[name][1]["maps"] for rank in uneven])
    torch.testing.assert_close(together, grads["maps"], **exact)


def _count_worker(rank: int, out: str) -> None:
    counted = {"calls": 0}
    reduce = dist.all_reduce

    def counting(*args: object, **kwargs: object) -> object:
        counted["calls"] += 1
        return reduce(*args, **kwargs)

    dist.all_reduce = counting
    stages = [torch.randn(2 + rank, c, 4, 4, requires_grad=True) for c in (3, 5, 6)]
    criterion = structkd.DenseStructureLoss([3, 5, 6], [4, 4, 4], gather=True)
    value = criterion(stages, [torch.randn(2 + rank, 4, 4, 4) for _ in stages])
    forward = counted["calls"]
    value.backward()
    dist.all_reduce = reduce
    if rank == 0:
        Path(out).write_text(f"{forward} {counted['calls'] - forward}")


def test_dense_structure_needs_two_reduces_forward_and_one_backward(tmp_path) -> None:
    out = tmp_path / "count"
    start(_count_worker, tmp_path, WORLD, str(out))
    assert out.read_text() == "2 1"


def _small_batch_worker(rank: int, out: str) -> None:
    criterion = structkd.CORALLoss(gather=True)
    feats = Features(embedding=torch.full((1, 3), float(rank)))
    value = criterion(feats, Features(embedding=torch.zeros(1, 3)))
    if rank == 0:
        Path(out).write_text(str(float(value)))


def test_one_sample_a_process_is_enough_where_the_whole_batch_counts(tmp_path) -> None:
    out = tmp_path / "value"
    start(_small_batch_worker, tmp_path, WORLD, str(out))
    # Rows (0, 0, 0) and (1, 1, 1): every covariance entry is 1/2, and 9 * (1/2)^2 / (4 * 9) = 1/16.
    assert float(out.read_text()) == pytest.approx(1 / 16)


def test_one_process_gathers_nothing() -> None:
    shard = torch.ones(2, 3, requires_grad=True)
    assert world_size() == 1
    assert gather_batch(shard) is shard
