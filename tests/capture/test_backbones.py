"""Mixed pairs of backbones through timm's task: one step forward, back and on."""

from __future__ import annotations

import pytest
import timm
import torch

from structkd.integrations.timm import DistillationTask

# Every family is a student once and a teacher once; None where any image size will do.
SIZES: dict[str, int | None] = {
    "resnet18": None,
    "vit_tiny_patch16_224": 64,
    "mobilenetv3_small_100": None,
    "swin_tiny_patch4_window7_224": 64,
    "efficientnet_b0": None,
    "mixer_s32_224": 64,
    "convnext_atto": None,
    "deit_tiny_distilled_patch16_224": 64,
}
NAMES = list(SIZES)
SPEC = [
    {"type": "DSLoss"},
    {"type": "FitNetLoss"},
    {"type": "AttentionTransferLoss"},
    {"type": "KDLoss"},
]


@pytest.mark.slow
@pytest.mark.parametrize("position", range(len(NAMES)), ids=NAMES)
def test_any_pair_trains(position: int) -> None:
    names = NAMES[position], NAMES[(position + 1) % len(NAMES)]
    torch.manual_seed(0)
    student, teacher = (
        timm.create_model(
            name, num_classes=10, **({"img_size": SIZES[name]} if SIZES[name] else {})
        )
        for name in names
    )
    task = DistillationTask(student, teacher, distill=SPEC, verbose=False)
    module = task.get_trainable_module().train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    for _ in range(2):  # a residual branch that begins at zero lets nothing through at first
        found = task(torch.randn(4, 3, 64, 64), torch.arange(4))
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
    assert all(torch.isfinite(value).all() for value in found.values())
    stuck = [name for name, value in module.named_parameters() if torch.equal(value, before[name])]
    # What the logits do not depend on may stay: no more than a distilled transformer's leftovers.
    assert len(stuck) < 0.1 * len(before), stuck
    assert [name for name in stuck if name.startswith("criterion.")] == []
    with torch.no_grad():
        assert task.get_eval_model().eval()(torch.randn(2, 3, 64, 64)).shape == (2, 10)
