"""Which criterion takes which pair of architectures: the tables of docs/architectures.md.

python benchmarks/architectures.py            # prints the tables
"""

from __future__ import annotations

from collections.abc import Iterator

import segmentation_models_pytorch as smp
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from structkd import FeatureCapture, Features
from structkd.criteria import CRITERIA

BATCH, CLASSES, SIDE = 4, 5, 32
_SMALL = {"img_size": SIDE, "num_classes": CLASSES}


def networks() -> dict[str, tuple[nn.Module, dict[str, object]]]:
    """Small networks of every kind, each with the layers to capture."""
    torch.manual_seed(0)
    make = timm.create_model
    tokens = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, **_SMALL}
    blocks = {"intermediate": ["blocks.0", "blocks.1"]}
    mlp = nn.Sequential(
        nn.Flatten(),
        nn.Linear(3 * SIDE * SIDE, 20),
        nn.ReLU(),
        nn.Linear(20, 12),
        nn.ReLU(),
        nn.Linear(12, CLASSES),
    )
    return {
        "CNN": (make("resnet10t", num_classes=CLASSES), {"intermediate": ["layer1", "layer2"]}),
        "ViT": (make("vit_tiny_patch16_224", **tokens), blocks),
        "DeiT, distilled": (make("deit_tiny_distilled_patch16_224", **tokens), blocks),
        "Swin": (
            make(
                "swin_tiny_patch4_window7_224",
                window_size=4,
                patch_size=2,
                embed_dim=16,
                depths=(1, 1, 1),
                num_heads=(1, 2, 4),
                **_SMALL,
            ),
            {"intermediate": ["layers.0", "layers.1"]},
        ),
        "Mixer": (
            MlpMixer(patch_size=8, embed_dim=16, num_blocks=3, **_SMALL),
            blocks,
        ),
        "MLP": (mlp, {"intermediate": ["2", "4"], "embedding": "5:input"}),
    }


def dense_networks() -> dict[str, tuple[nn.Module, dict[str, object]]]:
    """Small segmentation networks, each with the layers to capture."""
    torch.manual_seed(0)
    segformer = SegformerConfig(
        num_labels=CLASSES,
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 24, 32],
        num_attention_heads=[1, 1, 1, 2],
        decoder_hidden_size=16,
    )
    return {
        "U-Net": (
            smp.Unet("resnet18", encoder_weights=None, classes=CLASSES),
            {"intermediate": ["encoder.layer1", "encoder.layer2"]},
        ),
        "DeepLabV3": (
            deeplabv3_mobilenet_v3_large(
                weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=False
            ),
            {"intermediate": ["backbone.3", "backbone.6"]},
        ),
        "SegFormer": (
            SegformerForSemanticSegmentation(segformer),
            {"intermediate": ["segformer.stages.0", "segformer.stages.1"]},
        ),
    }


GROUPS = {"images": networks, "pixels": dense_networks}


def features(seed: int, group: str = "images") -> dict[str, Features]:
    """What each network of a group gives for the images of a seed."""
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    found = {}
    for name, (net, layers) in GROUPS[group]().items():
        for parameter in net.parameters():  # a classifier of zeros would say nothing
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        with torch.no_grad(), FeatureCapture(net.eval(), **layers) as capture:  # type: ignore[arg-type]
            found[name] = capture(images).replace(index=torch.arange(BATCH))
    return found


def criteria() -> list[str]:
    """The names of all public criteria that compare two networks."""
    return [name for name, kind in CRITERIA.items() if kind.reads_teacher]


def outcome(name: str, student: Features, teacher: Features) -> str:
    """Returns "" where value and gradient are there and finite, or the error's text.

    Raises:
        AssertionError: If a criterion goes through without a gradient: silence is no answer.
    """
    options: dict[str, object] = {}
    if name.startswith("Contrastive"):
        options = {"dataset_size": 16, "negatives": 4}
    assert student.logits is not None
    target = torch.arange(BATCH) % CLASSES
    if student.logits.dim() == 4:
        target = target[:, None, None].expand(-1, SIDE, SIDE)
    elif name == "ChannelWiseLoss":
        options = {"source": "intermediate"}
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        leaves.append(tensor.clone().requires_grad_())
        return leaves[-1]

    student = student.replace(
        logits=leaf(student.logits),
        embedding=leaf(student.embedding),
        intermediate=tuple(leaf(value) for value in student.intermediate),
    )
    torch.manual_seed(0)
    try:
        value = CRITERIA[name](**options)(student, teacher, target)
    except ValueError as error:
        return str(error)
    value.backward()
    grads = [tensor.grad for tensor in leaves if tensor.grad is not None]
    assert value.isfinite(), f"{name}: the value is not finite"
    assert any(grad.abs().sum() > 0 for grad in grads), f"{name}: no gradient reaches the student"
    assert all(grad.isfinite().all() for grad in grads), f"{name}: a gradient is not finite"
    return ""


def matrix(group: str = "images") -> Iterator[tuple[str, str, str, str]]:
    """Yields criterion, student's kind, teacher's kind and outcome."""
    students, teachers = features(0, group), features(1, group)
    for name in criteria():
        for kind_s, student in students.items():
            for kind_t, teacher in teachers.items():
                yield name, kind_s, kind_t, outcome(name, student, teacher)


def table(group: str = "images") -> str:
    """Returns the table in Markdown: a row a criterion, a column a student."""
    cells: dict[tuple[str, str], list[str]] = {}
    for name, kind_s, kind_t, said in matrix(group):
        cells.setdefault((name, kind_s), []).extend([kind_t] if said else [])
    kinds = list(GROUPS[group]())
    lines = [
        "| criterion | " + " | ".join(f"{kind} student" for kind in kinds) + " |",
        "|---|" + "---|" * len(kinds),
    ]
    for name in criteria():
        row = [_cell(cells[name, kind], len(kinds)) for kind in kinds]
        lines.append(f"| `{name}` | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _cell(refused: list[str], count: int) -> str:
    if not refused:
        return "all"
    if len(refused) == count:
        return "none"
    return "not " + ", ".join(f"{kind} teacher" for kind in refused)


if __name__ == "__main__":
    for part in GROUPS:
        print(table(part), end="\n\n")
