"""The table of docs/architectures.md is what the criteria do, and every refusal names its fix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import structkd
from benchmarks import architectures
from structkd import Distiller

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"


def test_the_documented_table_is_true() -> None:
    documented = PAGE.read_text().split("<!-- table:begin -->")[1].split("<!-- table:end -->")[0]
    assert documented.strip() == architectures.table()


def test_every_refusal_says_what_to_do() -> None:
    refusals = {said for *_, said in architectures.matrix() if said}
    assert refusals
    for said in refusals:
        assert "compares positions" in said
        assert "capture" in said


KINDS = ["CNN", "ViT", "DeiT, distilled", "Swin", "Mixer", "MLP"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_distiller_trains_every_kind_of_student(kind: str) -> None:
    student, layers = architectures.networks()[kind]
    images = torch.randn(2, 4, 3, architectures.SIDE, architectures.SIDE)
    for other in KINDS:
        teacher, teacher_layers = architectures.networks()[other]
        whole = Distiller(
            student,
            teacher,
            [structkd.DSLoss, structkd.FitNetLoss, structkd.KDLoss],
            example=images[0],
            layers=layers,
            teacher_layers=teacher_layers,
        )
        whole.zero_grad()
        output, terms = whole(images[0], x_teacher=images[1])
        (output.sum() + sum(terms.values())).backward()
        trained = [p for p in whole.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        whole.detach()
