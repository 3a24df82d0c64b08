"""Segmentation networks of the packages that people have, through captures and the Distiller."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

import structkd
from structkd import Distiller, FeatureCapture

CLASSES = 3


def _criterion() -> structkd.Criterion:
    return structkd.DenseStructureLoss() + structkd.KDLoss() + 3 * structkd.ChannelWiseLoss()


def _unet(encoder: str = "resnet18", classes: int = CLASSES, **options: object) -> nn.Module:
    smp = pytest.importorskip("segmentation_models_pytorch")
    return smp.Unet(encoder, encoder_weights=None, classes=classes, **options)


def _torchvision(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision").models.segmentation
    return getattr(models, name)(weights=None, weights_backbone=None, num_classes=CLASSES)


def _segformer() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        num_labels=CLASSES,
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 24, 32],
        decoder_hidden_size=16,
        num_attention_heads=[1, 1, 1, 2],
    )
    return transformers.SegformerForSemanticSegmentation(config)


# The network, the channels of its stages, and its stride.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[int], int]] = {
    "smp": (_unet, [64, 128, 256, 512, 256, 128, 64, 32, 16], 1),
    "smp-timm": (
        lambda: _unet("tu-resnet10t", encoder_depth=3, decoder_channels=(32, 16, 8)),
        [64, 64, 128, 32, 16, 8],
        1,
    ),
    "deeplab": (
        lambda: _torchvision("deeplabv3_mobilenet_v3_large"),
        [960],
        1,
    ),
    "fcn": (lambda: _torchvision("fcn_resnet50"), [256, 512, 1024, 2048], 1),
    "lraspp": (lambda: _torchvision("lraspp_mobilenet_v3_large"), [40, 960], 1),
    "segformer": (_segformer, [8, 16, 24, 32], 4),
}


def _images(channels: int = 3, side: int = 64) -> Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NETWORKS)
def test_captures_read_what_segmentation_networks_give(name: str) -> None:
    build, widths, stride = NETWORKS[name]
    with torch.no_grad(), FeatureCapture(build().eval(), intermediate="all") as capture:
        feats = capture(_images())
    assert feats.logits.shape == (2, CLASSES, 64 // stride, 64 // stride)
    assert [value.shape[1] for value in feats.intermediate] == widths
    assert all(value.dim() == 4 for value in feats.intermediate)
    assert feats.embedding is None


@pytest.mark.parametrize("name", ["smp", "lraspp", "segformer"])
def test_two_steps_of_training(name: str) -> None:
    torch.manual_seed(0)
    build, _, stride = NETWORKS[name]
    distiller = Distiller(
        build(), build(), _criterion(), layers={"intermediate": "all"}, example=_images()
    )
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
    target = torch.randint(0, CLASSES, (2, 64, 64))
    target[0, :9] = -100
    supervised = structkd.SupervisionLoss() + structkd.DiceLoss()
    values = []
    for _ in range(2):
        output, terms = distiller(_images(), target, x_teacher=_images() + 1)
        assert list(terms) == ["Dense-1", "Dense-2", "KD", "CWD"]
        logits = output if isinstance(output, Tensor) else output.get("logits", output.get("out"))
        assert logits.shape[2:] == (64 // stride, 64 // stride)
        task = supervised({"logits": logits}, {}, target)
        loss = task + sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[1] != values[0]
    assert torch.tensor(values).isfinite().all()


def test_only_some_images_have_a_pair_and_only_some_pixels_a_label() -> None:
    criterion = _criterion() + structkd.SupervisionLoss() + structkd.DKDLoss()
    layers = {"intermediate": "encoder.layer2"}, {"intermediate": "segformer.stages.1"}
    distiller = Distiller(
        _unet(), _segformer(), criterion, layers=layers[0], teacher_layers=layers[1]
    )
    target = torch.full((2, 64, 64), -100)
    target[1, 3, 4] = 2
    pair = torch.tensor([1])
    _, terms = distiller(_images(), target, x_teacher=_images()[pair], paired=pair)
    sum(terms.values()).backward()
    assert all(value.isfinite() for value in terms.values())
    assert float(terms["SRM"].detach()) > 0
    _, terms = distiller(_images(), target, x_teacher=_images()[:0], paired=pair[:0])
    assert float(sum(terms.values()).detach()) == 0


def test_no_embedding_is_asked_for() -> None:
    distiller = Distiller(_unet(), _segformer(), structkd.KDLoss())
    _, terms = distiller(_images(), x_teacher=_images())
    assert terms["KD"].isfinite()


def test_an_adversary_takes_its_shape_from_pixels() -> None:
    criterion = structkd.AdversarialLogitsLoss()
    distiller = Distiller(_segformer(), _segformer(), criterion, example=_images())
    _, terms = distiller(_images(), torch.zeros(2, 64, 64).long(), x_teacher=_images())
    assert all(value.isfinite() for value in terms.values())


def test_one_binary_channel() -> None:
    criterion = [structkd.KDLoss(form="sigmoid"), structkd.SupervisionLoss, structkd.DiceLoss]
    distiller = Distiller(_unet(classes=1), _unet(classes=1), criterion)
    _, terms = distiller(_images(), torch.ones(2, 64, 64).long(), x_teacher=_images())
    assert list(terms) == ["KD", "SRM", "Dice"]


@pytest.mark.parametrize(
    "name", ["resnet10t", "convnext_atto", "vit_tiny_patch16_224", "mobilenetv3_small_050"]
)
def test_encoders_that_give_lists_of_maps_are_captured_by_their_stages(name: str) -> None:
    options = {"img_size": 64} if name.startswith("vit") else {}
    net = timm.create_model(name, features_only=True, out_indices=(1, 2), **options).eval()
    with torch.no_grad(), FeatureCapture(net, intermediate="all") as capture:
        feats = capture(_images())
        wanted = net(_images())
    assert [value.shape for value in feats.intermediate] == [value.shape for value in wanted]
    assert "list" in feats.absent["logits"]


def test_networks_that_tell_no_stages_are_told_the_likely_ones() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1))
    with pytest.raises(ValueError, match=r"whose stages are known.*intermediate=\["):
        FeatureCapture(net, intermediate="all")
