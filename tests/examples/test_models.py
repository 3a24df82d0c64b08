"""The registered networks: the benchmark's sizes, and what timm's tools look for."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision

import models
from models import resnet
from structkd import FeatureCapture

# Parameters at 100 classes, as the benchmark's own code has them.
COUNTS = {
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "crd_vgg8": 3_965_028,
    "crd_vgg13": 9_462_180,
    "crd_shufflenet_v1": 949_258,
    "crd_shufflenet_v2": 1_355_528,
    "crd_mobilenet_v2": 812_836,
}
# Channels and reduction of every stage.
STAGES = {
    "resnet8": [(16, 1), (32, 2), (64, 4)],
    "resnet14": [(16, 1), (32, 2), (64, 4)],
    "resnet20": [(16, 1), (32, 2), (64, 4)],
    "resnet8x0_5": [(8, 1), (16, 2), (32, 4)],
    "resnet8x4": [(64, 1), (128, 2), (256, 4)],
    "resnet32x4": [(64, 1), (128, 2), (256, 4)],
    "crd_vgg8": [(128, 2), (256, 4), (512, 8), (512, 8)],
    "crd_vgg13": [(128, 2), (256, 4), (512, 8), (512, 8)],
    "crd_shufflenet_v1": [(240, 2), (480, 4), (960, 8)],
    "crd_shufflenet_v2": [(116, 2), (232, 4), (464, 8)],
    "crd_mobilenet_v2": [(12, 2), (16, 4), (48, 8), (160, 16)],
}
every_network = pytest.mark.parametrize("name", STAGES)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_crd_benchmarks(name: str) -> None:
    model = timm.create_model(name, num_classes=100)
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name]


@every_network
def test_stages_and_embedding_are_where_feature_info_says(name: str) -> None:
    model = models.create(name, num_classes=7, in_chans=8).eval()
    assert [(i["num_chs"], i["reduction"]) for i in model.feature_info] == STAGES[name]
    for size in (32, 48, 96):
        images = torch.randn(1, 8, size, size)
        names = models.stage_names(model)
        with torch.no_grad(), FeatureCapture(model, intermediate=names) as capture:
            feats = capture(images)
            last = model.forward_features(images)
        for (chs, reduction), features in zip(STAGES[name], feats.intermediate, strict=True):
            assert features.shape == (1, chs, size // reduction, size // reduction)
        assert feats.embedding.shape == (1, model.num_features)
        assert feats.logits.shape == (1, 7)
        assert last.shape[1:] == (model.num_features, *feats.intermediate[-1].shape[2:])
        torch.testing.assert_close(model.forward_head(last, pre_logits=True), feats.embedding)
        torch.testing.assert_close(model.forward_head(last), feats.logits)
        torch.testing.assert_close(model.get_classifier()(feats.embedding), feats.logits)


@every_network
def test_every_parameter_is_trained_and_nothing_is_overwritten(name: str) -> None:
    model = models.create(name, num_classes=5, in_chans=13)
    with FeatureCapture(model, intermediate=models.stage_names(model)) as capture:
        feats = capture(torch.randn(3, 13, 32, 32))  # raises where a map was written in place
    loss = feats.logits.square().sum() + sum(m.square().mean() for m in feats.intermediate)
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert without == []


@pytest.mark.parametrize("size", [28, 32, 64])
def test_kinds_of_classifier_for_small_images(size: int) -> None:
    images = torch.randn(2, 3, size, size)
    dense = models.create("densenet22", num_classes=7, in_chans=3)
    with FeatureCapture(dense, intermediate=models.stage_names(dense)) as capture:
        feats = capture(images)
    assert feats.intermediate[0].shape[2] == size // 2  # ImageNet's stem has a quarter
    for stage, features in zip(dense.feature_info, feats.intermediate, strict=True):
        assert features.shape[1:3] == (stage["num_chs"], size // stage["reduction"])
    assert feats.logits.shape == (2, 7)
    vit = models.create("vit_small4", num_classes=7, in_chans=3)
    assert vit.forward_features(images).shape == (2, (size // 4) ** 2 + 1, 64)
    assert vit(images).shape == (2, 7)


@pytest.mark.parametrize("in_chans", [3, 10])
def test_shufflenet_is_torchvisions(in_chans: int) -> None:
    model = models.create("shufflenet_v2_x0_5", num_classes=7, in_chans=in_chans).eval()
    images = torch.randn(2, in_chans, 64, 64)
    with FeatureCapture(model, intermediate=models.stage_names(model)) as capture:
        feats = capture(images)
    for stage, features in zip(model.feature_info, feats.intermediate, strict=True):
        size = 64 // stage["reduction"]
        assert features.shape == (2, stage["num_chs"], size, size)
    assert feats.embedding.shape == (2, model.num_features) == (2, 1024)
    torch.testing.assert_close(model.forward_head(model.forward_features(images)), feats.logits)
    original = torchvision.models.shufflenet_v2_x0_5(num_classes=7)
    if in_chans == 3:
        original.load_state_dict(model.state_dict())
        torch.testing.assert_close(original.eval()(images), feats.logits)


@every_network
def test_the_classifier_can_be_reset(name: str) -> None:
    model = models.create(name, num_classes=5, in_chans=1).eval()
    model.reset_classifier(3)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 3)
    assert model.get_classifier().out_features == 3
    model.reset_classifier(0)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, model.num_features)
    with pytest.raises(ValueError, match="global_pool must be 'avg'"):
        model.reset_classifier(3, "max")
    with pytest.raises(ValueError, match="pretrained must be False"):
        timm.create_model(name, pretrained=True)


def test_any_other_timm_name_works() -> None:
    model = models.create("resnet10t", num_classes=5, in_chans=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    assert models.stage_names(model)[-1] == "layer4"


def test_an_unknown_name_lists_near_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'resnet8x5'; near names: .*resnet8x4"):
        models.create("resnet8x5", num_classes=5, in_chans=3)


def test_what_a_network_cannot_be() -> None:
    with pytest.raises(ValueError, match="depth must be 6n"):
        resnet.CifarResNet(10, (16, 16, 32, 64))
    with pytest.raises(ValueError, match="Linear has no known stages"):
        models.stage_names(torch.nn.Linear(2, 2))
