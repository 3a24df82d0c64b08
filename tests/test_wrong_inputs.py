"""What a user may type wrong: one line that names the argument and says what is allowed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, tensor

import structkd
from structkd import views
from structkd.diagnostics import predictable_share

LAYERS = {"intermediate": "1", "embedding": "4:input", "logits": "4"}


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def network(width: int = 8, classes: int = 10, bands: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(bands, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, classes),
    )  # fmt: skip


def distiller(criterion: Any = "KDLoss", teacher: Any = None, **options: Any) -> Any:
    options = {"layers": LAYERS} | options
    return structkd.Distiller(network(), teacher or network(16), criterion, **options)


def kd(student: Any, teacher: Any, *target: Any) -> Any:
    return structkd.KDLoss()({"logits": student}, {"logits": teacher}, *target)


def dkd(*target: Any) -> Any:
    return structkd.DKDLoss()({"logits": drawn(4, 10)}, {"logits": drawn(4, 10)}, *target)


def filled(embeddings: Any, **options: Any) -> None:
    structkd.RetrievalGallery(8, **options).add(embeddings, torch.zeros(4, dtype=torch.int64))


def planned(cost: Any, **options: Any) -> Any:
    return structkd.LagrangianPlanner(**{"epsilon": 0.1} | options)(cost)


X = drawn(4, 3, 8, 8)
Wrong = dict[str, tuple[Callable[[], Any], str, str]]  # what is done; words of the answer

OPTIONS: Wrong = {
    "no temperature": (lambda: structkd.KDLoss(temperature=0), "temperature", "> 0"),
    "nan": (lambda: structkd.KDLoss(temperature=float("nan")), "temperature", "finite"),
    "text of YAML": (lambda: structkd.KDLoss(temperature="1e-3"), "temperature", "1.0e-3"),
    "another option": (lambda: structkd.KDLoss(tau=4), "tau", "KDLoss"),
    "variant": (lambda: structkd.DSLoss(variant="printd"), "variant", "measured, printed"),
    "terms": (lambda: structkd.DSLoss(terms=["SEM-3"]), "terms", "SEM-1"),
    "gamma": (lambda: structkd.DSLoss(gamma=-1), "gamma", ">= 0"),
    "lambd": (lambda: structkd.DenseStructureLoss(lambd=-1), "lambd", ">= 0"),
    "form": (lambda: structkd.FitNetLoss(form="l2"), "form", "squared, log"),
    "weight below 0": (lambda: -1 * structkd.KDLoss(), "weight", ">= 0"),
    "weight nan": (lambda: float("nan") * structkd.KDLoss(), "weight", "finite"),
    "number in a sum": (lambda: structkd.KDLoss() + 3, "KDLoss", "int"),
    "empty memory": (
        lambda: structkd.ContrastiveRepresentationLoss(dataset_size=0), "dataset_size", "at least 1"
    ),
    "width": (lambda: structkd.Projector(0), "out_dim", "at least 1"),
    "metric": (lambda: structkd.RetrievalGallery(8, metric="l3"), "metric", "cosine"),
    "index": (lambda: filled(drawn(4, 8), index="Falt"), "index", "Falt"),
    "epsilon": (lambda: planned(drawn(4, 4), epsilon=0), "epsilon", "> 0"),
    "constraint": (lambda: planned(drawn(4, 4), constraint="row"), "constraint", "rows"),
    "schedule": (lambda: structkd.RematchSchedule(start=0, step=0), "step", "at least 1"),
    "no steps": (lambda: structkd.falling(0, 0), "total", "at least 1"),
}  # fmt: skip

SPECS: Wrong = {
    "criterion": (lambda: distiller("DSLos"), "DSLos", "DSLoss"),
    "type": (lambda: distiller({"type": "KDLos"}), "type", "KDLoss"),
    "without type": (lambda: distiller({"temperature": 2}), "type", "temperature"),
    "option": (lambda: distiller({"type": "KDLoss", "temprature": 2}), "temprature", "temperature"),
    "number": (lambda: distiller(3), "criterion", "int"),
    "empty list": (lambda: distiller([]), "criterion", "list"),
    "layer": (lambda: distiller("DSLoss", layers=LAYERS | {"embedding": "fc"}), "embedding", "fc"),
    "entry of layers": (lambda: distiller(layers={"intermediates": "1"}), "layers", "intermediate"),
    "capture": (lambda: structkd.FeatureCapture(network(), intermediate="9"), "intermediate", "9"),
    "path for a teacher": (lambda: distiller(teacher="t.pt"), "teacher", "torch.load"),
}  # fmt: skip

TENSORS: Wrong = {
    "classes": (lambda: kd(drawn(4, 10), drawn(4, 9)), "logits", "10 and 9"),
    "rows": (lambda: kd(drawn(4, 10), drawn(5, 10)), "logits", "5"),
    "pixels beside rows": (lambda: kd(drawn(4, 10, 8, 8), drawn(4, 10)), "logits", "(B, K, H, W)"),
    "whole numbers": (lambda: kd(drawn(4, 10).long(), drawn(4, 10)), "student.logits", "int64"),
    "field": (
        lambda: structkd.KDLoss()({"logit": drawn(4, 9)}, {"logits": drawn(4, 9)}), "logit",
        "logits",
    ),
    "field that is missing": (
        lambda: structkd.KDLoss()({"embedding": drawn(4, 9)}, {"logits": drawn(4, 9)}),
        "student.logits", "Features",
    ),
    "no labels": (lambda: dkd(), "target", "-100"),
    "label out of range": (lambda: dkd(tensor([1, 2, 3, 10])), "target", "0..9"),
    "labels as floats": (lambda: dkd(drawn(4)), "target", "int64"),
    "labels too few": (lambda: dkd(tensor([1, 2, 3])), "target", "(4,)"),
    "one sample": (
        lambda: structkd.CrossCorrelationLoss()(
            {"embedding": drawn(1, 8)}, {"embedding": drawn(1, 8)}
        ),
        "batch", "drop_last",
    ),
    "stages": (
        lambda: structkd.DenseStructureLoss()(
            {"intermediate": [drawn(4, 8, 4, 4)]}, {"intermediate": [drawn(4, 8, 4, 4)] * 2}
        ),
        "intermediate", "1 and 2",
    ),
    "teacher's rows": (lambda: distiller()(X, x_teacher=X[:3]), "teacher", "batch size 3"),
    "other classes": (
        lambda: distiller(teacher=network(16, 9))(X, x_teacher=X), "logits", "10 and 9"
    ),
    "rows with a pair": (
        lambda: distiller()(X, x_teacher=X[:3], paired=tensor([True, False, True, False])),
        "x_teacher", "paired",
    ),
    "no index": (
        lambda: distiller({"type": "ContrastiveRepresentationLoss", "dataset_size": 9})(
            X, x_teacher=X
        ),
        "index", "index=index",
    ),
    "amount": (lambda: views.salt_and_pepper(X.sigmoid(), 1.5), "amount", "<= 1"),
    "images in a list": (lambda: views.salt_and_pepper([1, 2], 0.5), "images", "(B, C, H, W)"),
    "gallery's width": (lambda: filled(drawn(4, 7)), "vectors", "8"),
    "nan in a gallery": (lambda: filled(drawn(4, 8) * torch.nan), "vectors", "finite"),
    "cost of one dimension": (lambda: planned(drawn(4)), "cost", "4"),
    "cost of whole numbers": (lambda: planned(drawn(4, 4).long()), "cost", "int64"),
    "other samples": (
        lambda: predictable_share(drawn(4, 8), drawn(5, 8)), "intermediate", "batch size 5"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS | SPECS | TENSORS)
def test_the_library(case: str) -> None:
    does, name, allowed = (OPTIONS | SPECS | TENSORS)[case]
    with pytest.raises((ValueError, TypeError)) as caught:
        does()
    said = str(caught.value)
    assert name in said
    assert allowed in said
    assert "\n" not in said


SCRIPTS = {
    "train.py mnits": ("recipe", "did you mean 'mnist'"),
    "train.py mnist --criterion DSLos": ("--criterion", "DSLoss"),
    "train.py mnist --criterion gone.py:Loss": ("--criterion", "gone.py"),
    "train.py mnist --view nois:0.3": ("--view", "noise"),
    "train.py mnist --labels 3": ("--labels", "10"),
    "train.py mnist --epochs 0": ("--epochs", "at least 1"),
    "train.py mnist --lr 0": ("--lr", "positive"),
    "train.py mnist --student resnet9x": ("--student", "resnet8x4"),
    "train.py mnist --size 7": ("--size", "leave it out"),
    "train.py cifar10 --data gone": ("gone", "unpacked folder"),
    "train.py pairs": ("--rich DIR", "--poor DIR"),
    "train.py folders": ("pairs", "unpaired.py"),
    "unpaired.py mnist --rows alon": ("--rows", "alone"),
    "segment.py scenes": ("--rich", "DIR"),
    "segment.py floods --data . --layers x": ("--layers", "encoder"),
    "papers tabel3": ("command", "table3"),
    "papers labels mnist --labels x": ("--labels", "100"),
    "data chek mnist": ("check", "RECIPE"),
}


@pytest.mark.usefixtures("digits_are_parsed_once")
@pytest.mark.parametrize("line", SCRIPTS)
def test_the_scripts(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    script, *arguments = line.split()
    name = script.removesuffix(".py") if script.endswith(".py") else f"{script}.__main__"
    assert importlib.import_module(name).main(arguments) == 2
    *_, said = capsys.readouterr().err.splitlines()
    for word in SCRIPTS[line]:
        assert word in said
