"""Two processes through the Distiller equal one process, for every criterion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from structkd import Distiller
from structkd.criteria import CRITERIA
from tests.devices import ACCELERATOR
from tests.processes import start

BATCH, STEPS, CLASSES = 8, 5, 4

NAMES = list(CRITERIA)
OPTIONS = {
    "ChannelWiseLoss": {"source": "intermediate"},
    "ContrastiveRepresentationLoss": {"dataset_size": 16, "negatives": 8},
    "SemanticCalibrationLoss": {"batch_size": BATCH},
    "AdversarialLogitsLoss": {"weight": 0.1},
    "AdversarialFeatureLoss": {"weight": 0.1},
    "RelationalLoss": {"weight": 0.1},
    "DistilVPRLoss": {"weight": 0.1},
}


def worlds(processes: int) -> list[object]:
    """So many processes on the CPU, and two on the accelerator where there is one."""
    found: list[object] = [pytest.param((processes, "cpu"), id=str(processes))]
    if ACCELERATOR:
        found.append(pytest.param((2, ACCELERATOR), id="accelerator", marks=pytest.mark.gpu))
    return found


class Net(nn.Module):
    """Two stages without batch norm: each sample by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.second = nn.Conv2d(width, 8, 3, padding=1, stride=2)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).tanh()).tanh()
        return self.fc(x.mean((2, 3)))


def make(name: str, device: str = "cpu") -> tuple[Distiller, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    student, teacher = Net(5).double(), Net(6).double()
    poor, rich = torch.randn(2, STEPS, BATCH, 3, 4, 4, dtype=torch.float64)
    target = torch.randint(0, CLASSES, (STEPS, BATCH))
    spec = {"type": name, "gather": True, **OPTIONS.get(name, {})}
    layers = {"intermediate": ["first", "second"], "embedding": "fc:input"}
    whole = Distiller(student, teacher, [spec], example=(poor[0], rich[0]), layers=layers)
    return whole.to(device), poor.to(device), rich.to(device), target.to(device)


def train(name: str, rank: int, world: int, device: str = "cpu") -> dict[str, Tensor]:
    whole, poor, rich, target = make(name, device)
    if world > 1 and rank:  # what a rank starts from must not matter under DDP
        with torch.no_grad():
            for parameter in whole.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * rank)
    module: nn.Module = DistributedDataParallel(whole) if world > 1 else whole
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.05, momentum=0.9)
    rows = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    index = torch.arange(BATCH, device=device)
    for step in range(STEPS):
        output, terms = module(
            poor[step, rows], target[step, rows], x_teacher=rich[step, rows], index=index[rows]
        )
        loss = F.cross_entropy(output, target[step, rows]) + sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        whole.step_epoch()
    return {key: value for key, value in whole.state_dict().items() if torch.is_tensor(value)}


def _worker(rank: int, world: int, names: list[str], device: str, out: str) -> None:
    results = {name: train(name, rank, world, device) for name in names}
    torch.save(results, f"{out}.{rank}")


@pytest.fixture(scope="module", params=worlds(2))
def ranks(request, tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    world, device = request.param
    folder: Path = tmp_path_factory.mktemp(f"ddp{world}")
    start(_worker, folder, world, world, NAMES, device, str(folder / "state"), device=device)
    saved = [folder / f"state.{r}" for r in range(world)]
    return [torch.load(file, weights_only=True, map_location="cpu") for file in saved]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_rank_ends_where_one_process_does(ranks, name: str) -> None:
    wanted = train(name, 0, 1)
    for results in ranks:
        assert results[name].keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(
                results[name][key], value, rtol=1e-10, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}"
            )


def _together(rank: int, out: str) -> None:
    from timm.utils import ModelEmaV3

    whole, poor, rich, target = make("DSLoss")
    whole.float()
    average = ModelEmaV3(whole, decay=0.5)
    module = torch.compile(DistributedDataParallel(whole), backend="aot_eager")
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.05)
    rows = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            output, terms = module(
                poor[step, rows].float(),
                target[step, rows],
                x_teacher=rich[step, rows].float(),
            )
            loss = F.cross_entropy(output, target[step, rows]) + sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(whole)
    torch.save(
        [whole.state_dict(), average.module.state_dict(), float(loss.detach())], f"{out}.{rank}"
    )


@pytest.mark.slow
def test_average_compile_autocast_and_processes_at_once(tmp_path: Path) -> None:
    start(_together, tmp_path, 2, str(tmp_path / "state"))
    first, second = (torch.load(tmp_path / f"state.{r}", weights_only=True) for r in range(2))
    for mine, theirs in zip(first[:2], second[:2], strict=True):
        assert all(not value.isnan().any() for value in mine.values())
        for key, value in mine.items():
            torch.testing.assert_close(theirs[key], value, rtol=0, atol=0)
    assert not torch.equal(first[0]["student.fc.weight"], first[1]["student.fc.weight"])
