"""The papers' networks that timm lacks, registered with it beside its own.

``resnet8x4`` and ``resnet32x4`` are those of the CRD benchmark (Tian et al., ICLR 2020): a 3x3
stem, three stages of (depth - 2) / 6 basic blocks, strides 1, 2, 2, average pool, ``fc``.
``shufflenet_v2_x0_5`` is torchvision's.
"""

from __future__ import annotations

import difflib
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn
from torchvision.models import ShuffleNetV2

__all__ = [
    "CifarResNet",
    "TimmShuffleNetV2",
    "create",
    "on_device",
    "resnet8",
    "resnet8x0_5",
    "resnet8x4",
    "resnet14",
    "resnet20",
    "resnet32x4",
    "shufflenet_v2_x0_5",
    "stage_names",
]


class _Head:
    """What timm's tools look for behind the features: an average pool and a classifier ``fc``."""

    num_classes: int
    num_features: int
    fc: nn.Module

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new last layer; ``global_pool`` is only ever the average here."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool must be 'avg' or None, got {global_pool!r}")
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Average pool, then the classifier unless ``pre_logits``."""
        x = x.mean((-2, -1))
        return x if pre_logits else self.fc(x)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; its output is never written in place."""

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chs)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_chs != out_chs:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_chs, out_chs, 1, stride, bias=False), nn.BatchNorm2d(out_chs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, H/stride, W/stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class CifarResNet(_Head, nn.Module):
    """A residual network for images of about 32x32, with the parts timm's tools look for.

    Args:
        depth: 6n + 2 layers, so 8, 14, 20, 32, ...
        widths: channels of the stem and of the three stages.
        num_classes: outputs of ``fc``; 0 leaves the pooled embedding.
        in_chans: channels of the images.
    """

    def __init__(
        self,
        depth: int,
        widths: tuple[int, int, int, int],
        num_classes: int = 10,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, ...), got {depth}")
        blocks = (depth - 2) // 6
        stem, *stages = widths
        self.num_features = self.head_hidden_size = stages[-1]
        self.conv1 = nn.Conv2d(in_chans, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.feature_info: list[dict[str, Any]] = []
        in_chs, reduction = stem, 1
        for number, (chs, stride) in enumerate(zip(stages, (1, 2, 2), strict=True), start=1):
            stage = [BasicBlock(in_chs, chs, stride)]
            stage += [BasicBlock(chs, chs, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*stage))
            in_chs, reduction = chs, reduction * stride
            self.feature_info.append(
                {"num_chs": chs, "reduction": reduction, "module": f"layer{number}"}
            )
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the last stage's map (B, num_features, H/4, W/4)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in self.feature_info:
            x = self.get_submodule(stage["module"])(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


class TimmShuffleNetV2(_Head, ShuffleNetV2):
    """torchvision's ShuffleNetV2, whose stages begin at a quarter of the image.

    Args:
        widths: channels of the stem, the three stages and the last convolution.
        num_classes: outputs of ``fc``; 0 leaves the pooled embedding.
        in_chans: channels of the images.
    """

    def __init__(self, widths: list[int], num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__([4, 8, 4], widths)
        if in_chans != 3:
            self.conv1[0] = nn.Conv2d(in_chans, widths[0], 3, 2, 1, bias=False)
        self.num_features = self.head_hidden_size = widths[-1]
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": widths[stage - 1], "reduction": 2 ** (stage + 1), "module": f"stage{stage}"}
            for stage in (2, 3, 4)
        ]
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the last convolution's map (B, num_features, H/32, W/32)."""
        x = self.maxpool(self.conv1(x))
        features: Tensor = self.conv5(self.stage4(self.stage3(self.stage2(x))))
        return features


def create(name: str, *, num_classes: int, in_chans: int) -> nn.Module:
    """``timm.create_model`` for any of its names or ours, from scratch.

    Raises:
        ValueError: no such model; the message has the near names.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)
        hint = f"near names: {', '.join(near)}" if near else "timm.list_models() lists the names"
        raise ValueError(f"unknown model {name!r}; {hint}")
    model: nn.Module = timm.create_model(name, num_classes=num_classes, in_chans=in_chans)
    return model


def memory_format(device: str | torch.device) -> torch.memory_format:
    """channels_last on an accelerator; not on a CPU, where it is unsafe.

    With torch 2.15 and two threads, the backward of a channels_last convolution over an odd number
    of images writes outside its memory on the CPU (batch 19, 8 channels: the process aborts).
    """
    on_cpu = torch.device(device).type == "cpu"
    return torch.contiguous_format if on_cpu else torch.channels_last


def on_device(model: nn.Module, device: str) -> nn.Module:
    """The model on ``device``, in the memory format that its batches come in."""
    model.to(device, memory_format=memory_format(device))  # type: ignore[call-overload]
    return model


def stage_names(model: nn.Module) -> list[str]:
    """Dotted names of a timm model's stages, first to last, from its ``feature_info``."""
    info = getattr(model, "feature_info", None)
    if not info:
        raise ValueError(
            f"{type(model).__name__} has no feature_info to name its stages; use another timm model"
        )
    return [stage["module"] for stage in info]


def _own(pretrained: bool, options: dict[str, Any]) -> dict[str, Any]:
    """The options that are the network's; timm hands every entry point its bookkeeping as well."""
    if pretrained:
        raise ValueError("pretrained must be False: these networks have no published weights")
    bookkeeping = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    return {key: value for key, value in options.items() if key not in bookkeeping}


@register_model
def resnet8x4(pretrained: bool = False, **options: Any) -> CifarResNet:
    """8 layers, stem 32, stages 64-128-256: the paper's student."""
    return CifarResNet(8, (32, 64, 128, 256), **_own(pretrained, options))


@register_model
def resnet32x4(pretrained: bool = False, **options: Any) -> CifarResNet:
    """32 layers, stem 32, stages 64-128-256: the paper's teacher."""
    return CifarResNet(32, (32, 64, 128, 256), **_own(pretrained, options))


@register_model
def resnet8(pretrained: bool = False, **options: Any) -> CifarResNet:
    """8 layers, stem 16, stages 16-32-64."""
    return CifarResNet(8, (16, 16, 32, 64), **_own(pretrained, options))


@register_model
def resnet14(pretrained: bool = False, **options: Any) -> CifarResNet:
    """14 layers, stem 16, stages 16-32-64."""
    return CifarResNet(14, (16, 16, 32, 64), **_own(pretrained, options))


@register_model
def resnet20(pretrained: bool = False, **options: Any) -> CifarResNet:
    """20 layers, stem 16, stages 16-32-64."""
    return CifarResNet(20, (16, 16, 32, 64), **_own(pretrained, options))


@register_model
def resnet8x0_5(pretrained: bool = False, **options: Any) -> CifarResNet:
    """8 layers, stem 8, stages 8-16-32: small enough for a laptop's demo."""
    return CifarResNet(8, (8, 8, 16, 32), **_own(pretrained, options))


@register_model
def shufflenet_v2_x0_5(pretrained: bool = False, **options: Any) -> TimmShuffleNetV2:
    """ShuffleNetV2 of half width: the smallest of SemBridge's backbones."""
    return TimmShuffleNetV2([24, 48, 96, 192, 1024], **_own(pretrained, options))
