"""Mixed pairs of backbones through timm's task: one step forward, back and on."""

from __future__ import annotations

import pytest
import timm
import torch

from structkd.integrations.timm import DistillationTask

# Every family is a student once and a teacher once, with fewer layers where timm lets one choose.
SIZES: dict[str, dict[str, object]] = {
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32)},
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 3},
    "mobilenetv3_small_100": {},
    "swin_tiny_patch4_window7_224": {
        "img_size": 64,
        "depths": (2, 2, 2, 2),
        "embed_dim": 24,
        "num_heads": (1, 2, 4, 8),
    },
    "efficientnet_b0": {},
    "mixer_s32_224": {"img_size": 64},
    "convnext_atto": {},
    "deit_tiny_distilled_patch16_224": {"img_size": 64, "depth": 4},
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
    student, teacher = (timm.create_model(name, num_classes=10, **SIZES[name]) for name in names)
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
