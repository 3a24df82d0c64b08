"""What the memory of contrastive distillation promises beyond the shared contract."""

from __future__ import annotations

import pytest
import torch

from structkd import Features
from structkd.criteria.contrastive import ContrastiveRepresentationLoss

SIZE = 20


def _make(**options) -> ContrastiveRepresentationLoss:
    torch.manual_seed(0)
    options = {"embedding_dim": 4, "negatives": 9, **options}
    return ContrastiveRepresentationLoss(3, 5, SIZE, **options)


def _batch(step: int, size: int = 6, dtype: torch.dtype = torch.float32):
    rng = torch.Generator().manual_seed(step)
    index = torch.randperm(SIZE, generator=rng)[:size]
    student = torch.randn(size, 3, generator=rng, dtype=dtype)
    teacher = torch.randn(size, 5, generator=rng, dtype=dtype)
    return Features(embedding=student, index=index), Features(embedding=teacher)


def _train(criterion: ContrastiveRepresentationLoss, optimizer, steps: range) -> list[float]:
    values = []
    for step in steps:
        optimizer.zero_grad()
        value = criterion(*_batch(step))
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    return values


def _sgd(criterion: ContrastiveRepresentationLoss) -> torch.optim.Optimizer:
    return torch.optim.SGD(criterion.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.peer
def test_equals_torchdistill() -> None:
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    criterion = _make().double()
    peer = mid_level.CRDLoss("s", "e", "t", 4, SIZE, 9, SIZE, eps=0.0).double()
    peer.memory_v1.copy_(criterion.bank_s)
    peer.memory_v2.copy_(criterion.bank_t)
    for step in range(3):
        student, teacher = _batch(step, dtype=torch.float64)
        picked = torch.cat([student.index[:, None], criterion.sample_negatives(6)], dim=1)
        unit = torch.nn.functional.normalize
        theirs = peer(
            {
                "s": {"output": unit(criterion.head_s(student.embedding), dim=1)},
                "e": {"input": {"pos_idx": student.index, "contrast_idx": picked}},
            },
            {"t": {"output": unit(criterion.head_t(teacher.embedding), dim=1)}},
        )
        # It leaves a vector of one element; its own sampler (contrast_idx=None) fails on a
        # missing attribute, so ours draws for both.
        torch.testing.assert_close(criterion(student, teacher), theirs.squeeze())
    torch.testing.assert_close(peer.memory_v1, criterion.bank_s)
    torch.testing.assert_close(peer.memory_v2, criterion.bank_t)
