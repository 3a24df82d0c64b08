"""The CRD benchmark's networks: their published sizes, and stages that lie where they say."""

from __future__ import annotations

import pytest
import timm
import torch

import models
from structkd import FeatureCapture

# Parameters at 100 classes, as the benchmark's own code has them; the are these, rounded.
COUNTS = {
    "crd_vgg8": (3_965_028, 3.97),
    "crd_vgg13": (9_462_180, 9.46),
    "crd_shufflenet_v1": (949_258, 0.95),
    "crd_shufflenet_v2": (1_355_528, 1.36),
    "crd_mobilenet_v2": (812_836, 0.81),
}
STAGES = {
    "crd_vgg8": [(128, 2), (256, 4), (512, 8), (512, 8)],
    "crd_vgg13": [(128, 2), (256, 4), (512, 8), (512, 8)],
    "crd_shufflenet_v1": [(240, 2), (480, 4), (960, 8)],
    "crd_shufflenet_v2": [(116, 2), (232, 4), (464, 8)],
    "crd_mobilenet_v2": [(12, 2), (16, 4), (48, 8), (160, 16)],
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_crd_benchmarks(name: str) -> None:
    model = timm.create_model(name, num_classes=100)
    exact, millions = COUNTS[name]
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == exact
    assert round(found / 1e6, 2) == millions


@pytest.mark.parametrize("name", STAGES)
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


@pytest.mark.parametrize("name", STAGES)
def test_every_parameter_is_trained_and_nothing_is_overwritten(name: str) -> None:
    model = models.create(name, num_classes=5, in_chans=13)
    with FeatureCapture(model, intermediate=models.stage_names(model)) as capture:
        feats = capture(torch.randn(3, 13, 32, 32))  # raises where a map was written in place
    loss = feats.logits.square().sum() + sum(m.square().mean() for m in feats.intermediate)
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert without == []


@pytest.mark.parametrize("name", STAGES)
def test_the_classifier_can_be_reset(name: str) -> None:
    model = models.create(name, num_classes=5, in_chans=1).eval()
    model.reset_classifier(3)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 3)
    model.reset_classifier(0)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, model.num_features)
    with pytest.raises(ValueError, match="pretrained must be False"):
        timm.create_model(name, pretrained=True)
