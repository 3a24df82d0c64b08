"""The table of docs/architectures.md is what the criteria do, and every refusal names its fix."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import structkd
from structkd import Distiller

for package in ("segmentation_models_pytorch", "torchvision", "transformers"):
    pytest.importorskip(package)
from benchmarks import architectures  # noqa: E402

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"


@pytest.fixture(scope="module", autouse=True)
def every_pair_is_tried_once() -> Iterator[None]:
    tried = architectures.matrix
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architectures, "matrix", cache(lambda group: list(tried(group))))
        yield


@pytest.mark.parametrize(("group", "mark"), [("images", "table"), ("pixels", "pixels")])
def test_the_documented_tables_are_true(group: str, mark: str) -> None:
    text = PAGE.read_text()
    documented = text.split(f"<!-- {mark}:begin -->")[1].split(f"<!-- {mark}:end -->")[0]
    assert documented.strip() == architectures.table(group)


def test_every_refusal_says_what_to_do() -> None:
    refusals = {said for *_, said in architectures.matrix("images") if said}
    assert refusals
    for said in refusals:
        assert "compares positions" in said
        assert "capture" in said
    for *_, said in architectures.matrix("pixels"):
        assert not said or "student.embedding" in said


KINDS = ["CNN", "ViT", "DeiT, distilled", "Swin", "Mixer", "MLP"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_distiller_trains_every_kind_of_student(kind: str) -> None:
    (student, layers), teachers = architectures.networks()[kind], architectures.networks()
    images = torch.randn(2, 4, 3, architectures.SIDE, architectures.SIDE)
    for other in KINDS:
        teacher, teacher_layers = teachers[other]
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
