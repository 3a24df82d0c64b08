"""Two processes with different seeds through timm's flow and mmengine's Runner end up alike."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from tests import processes
from tests.integrations import folders, mm_flow
from tests.integrations.timm_flow import Flow, train

WORLD = 2
# It has parameters and compares the samples of the whole batch.
SPEC = [{"type": "DSLoss", "gather": True}, {"type": "KDLoss", "weight": 0.5}]


def _timm(rank: int, data: Path, output: Path) -> dict[str, torch.Tensor]:
    from structkd.integrations.timm import DistillationTask

    def build(model: nn.Module, criterion: nn.Module, **options: object) -> DistillationTask:
        torch.manual_seed(10 + rank)  # each rank draws another criterion
        return DistillationTask(model, teacher, criterion, distill=SPEC, verbose=False, **options)

    torch.manual_seed(1)
    teacher = timm.create_model("test_resnet", num_classes=4)
    torch.manual_seed(2 + rank)  # and another student
    student = timm.create_model("test_resnet", num_classes=4)
    flow = Flow(data, output / f"{rank}", rank=rank, world=WORLD)
    outcome = train(flow, student, build)
    return dict(outcome.task.distiller.named_parameters())


def _mmpretrain(rank: int, data: Path, output: Path) -> dict[str, torch.Tensor]:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank)}
    cfg = mm_flow.config("distilled_cifar10", data, output / "run", launcher="pytorch")
    cfg.experiment_name = "two"
    cfg.randomness = {"seed": 0, "diff_rank_seed": True}
    cfg.train_dataloader.batch_size = 16 // WORLD
    cfg.model.distill = SPEC
    cfg.model_wrapper_cfg = {"type": "MMDistributedDataParallel", "device_ids": None}  # no GPU
    runner, logged = mm_flow.train(cfg)
    assert "train/loss_SEM-1" in logged
    return dict(runner.model.module.distiller.named_parameters())


def _worker(rank: int, data: Path, output: Path, flow: Callable[..., dict[str, object]]) -> None:
    torch.save(flow(rank, data, output), output / f"{rank}.pth")


@pytest.mark.slow
@pytest.mark.parametrize("flow", [_timm, _mmpretrain], ids=["timm", "mmpretrain"])
def test_the_ranks_agree(flow: Callable[..., dict[str, object]], tmp_path: Path) -> None:
    data = folders.write(tmp_path / "images")
    if flow is _mmpretrain:
        mm_flow.config("distilled_cifar10", data, tmp_path)  # saves the teacher once
    processes.start(_worker, tmp_path, WORLD, data, tmp_path, flow)
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in range(WORLD))
    assert any(name.startswith("criterion.") for name in first)
    assert mm_flow.differing(first, second) == []
