"""FeatureCapture reads any model by hooks and says what is wrong when it cannot."""

from __future__ import annotations

import gc
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structkd import FeatureCapture
from tests.devices import drawn


class Block(nn.Module):
    def __init__(self, width: int, inplace: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x))


class Net(nn.Module):
    """Nested blocks, a layer that never runs, and one that gives a tuple."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.stages = nn.ModuleList([Block(4, inplace), Block(4, inplace)])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.idle = nn.Linear(4, 4)
        self.pairs = Pair()
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        x, _ = self.pairs(self.pool(x).flatten(1))
        return self.fc(input=x)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def image(batch: int = 2) -> Tensor:
    return drawn(batch, 3, 8, 8)


def test_reads_nested_layers_several_maps_and_a_layers_input() -> None:
    net = Net()
    capture = FeatureCapture(
        net, intermediate=["stem", "stages.0", "stages.1.conv"], embedding="fc:input"
    )
    feats = capture(image())
    stem = net.stem(image())
    first = net.stages[0](stem)
    deep = net.stages[1].conv(first)
    pooled = net.stages[1].relu(deep).mean((2, 3))
    assert len(feats.intermediate) == 3
    for got, want in zip(feats.intermediate, (stem, first, deep), strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(feats.embedding, pooled)
    torch.testing.assert_close(feats.logits, net.fc(pooled))


def test_a_pooled_layer_with_unit_sides_is_flattened() -> None:
    feats = FeatureCapture(Net(), embedding="pool")(image())
    assert feats.embedding.shape == (2, 4)


def test_reads_after_a_forward_pass_that_the_caller_ran() -> None:
    net = Net()
    capture = FeatureCapture(net, embedding="fc:input")
    logits = net(image())
    assert capture.read().logits is logits


def test_gradient_flows_through_what_was_captured() -> None:
    net = Net()
    feats = FeatureCapture(net, intermediate="stages.0")(image())
    feats.intermediate[0].square().sum().backward()
    assert net.stem.weight.grad.abs().sum() > 0
    assert net.fc.weight.grad is None


def test_second_forward_replaces_the_first() -> None:
    net = Net()
    capture = FeatureCapture(net, embedding="fc:input")
    net(image(4))
    net(image(2))
    assert capture.read().embedding.shape == (2, 4)


def test_reading_twice_is_an_error() -> None:
    capture = FeatureCapture(Net(), embedding="fc:input")
    capture(image())
    with pytest.raises(RuntimeError, match=r"no forward pass has run since the last read"):
        capture.read()


def test_a_failed_forward_pass_leaves_nothing_to_read() -> None:
    capture = FeatureCapture(Net(), embedding="fc:input")
    with pytest.raises(RuntimeError):
        capture(torch.randn(2, 7, 8, 8))
    with pytest.raises(RuntimeError, match="nothing to read"):
        capture.read()


def test_memory_is_released_after_reading() -> None:
    net = Net()
    capture = FeatureCapture(net, intermediate="stages.0", embedding="fc:input")
    feats = capture(image())
    alive = [weakref.ref(feats.intermediate[0]), weakref.ref(feats.logits)]
    del feats
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_overwriting_in_place_is_named() -> None:
    capture = FeatureCapture(Net(inplace=True), intermediate="stages.0.conv")
    with pytest.raises(RuntimeError, match=r"'stages.0.conv' was overwritten in place"):
        capture(image())
    after = FeatureCapture(Net(inplace=True), intermediate="stages.0.relu")(image())
    assert (after.intermediate[0] >= 0).all()


def test_overwriting_in_place_under_inference_mode_keeps_the_values() -> None:
    # Inference tensors have no version counter, so the capture copies them.
    net = Net(inplace=True)
    with torch.inference_mode():
        feats = FeatureCapture(net, intermediate="stages.0.conv")(image())
        want = net.stages[0].conv(net.stem(image()))
    torch.testing.assert_close(feats.intermediate[0], want)


def test_a_layer_that_never_fires_is_named() -> None:
    capture = FeatureCapture(Net(), embedding="idle")
    with pytest.raises(RuntimeError, match="'idle' never fired"):
        capture(image())


def test_a_wrong_name_lists_the_near_ones() -> None:
    with pytest.raises(ValueError, match=r"intermediate='stages\.3'.*stages\.1.*stages\.0"):
        FeatureCapture(Net(), intermediate="stages.3")
    with pytest.raises(ValueError, match=r"embedding='fcc:input'.*fc"):
        FeatureCapture(Net(), embedding="fcc:input")
    with pytest.raises(TypeError, match=r"intermediate must name layers by strings, got int"):
        FeatureCapture(Net(), intermediate=[2])
    with pytest.raises(TypeError, match=r"module must be an nn.Module, got function"):
        FeatureCapture(lambda x: x)


def test_a_wrong_name_leaves_no_hook_behind() -> None:
    net = Net()
    with pytest.raises(ValueError, match="no layer"):
        FeatureCapture(net, intermediate=["stem", "nowhere"])
    assert not net.stem._forward_hooks
    assert not net._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"embedding": "stem"}, ValueError, r"'stem' must give 2-D"),
        ({"embedding": "pairs"}, TypeError, r"'pairs' gave tuple"),
    ],
)
def test_an_output_that_does_not_fit_is_named(options, error, message) -> None:
    with pytest.raises(error, match=message):
        FeatureCapture(Net(), **options)(image())


def test_leaving_the_context_removes_every_hook() -> None:
    net = Net()
    with FeatureCapture(net, intermediate="stem", embedding="fc:input") as capture:
        net(image())
    hooks = [
        hook
        for layer in net.modules()
        for hook in (*layer._forward_hooks, *layer._forward_pre_hooks)
    ]
    assert hooks == []
    with pytest.raises(RuntimeError, match="was removed"):
        capture.read()


def test_two_captures_share_a_model() -> None:
    net = Net()
    shallow = FeatureCapture(net, intermediate="stem")
    deep = FeatureCapture(net, intermediate="stages.1")
    net(image())
    assert not torch.equal(shallow.read().intermediate[0], deep.read().intermediate[0])


def test_autocast_captures_the_low_precision_tensor(device: str) -> None:
    with torch.autocast(device, torch.bfloat16):
        feats = FeatureCapture(Net(), intermediate="stem", embedding="fc:input")(image())
    assert feats.intermediate[0].dtype == torch.bfloat16
    assert feats.logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "stage", "classifier"),
    [
        ("resnet18", "layer3", "fc"),
        ("mobilenetv2_050", "blocks.4", "classifier"),
        ("vit_tiny_patch16_224", "blocks.10", "head"),
    ],
)
def test_names_are_optional_on_timm_models(name: str, stage: str, classifier: str) -> None:
    size = {"img_size": 32} if name.startswith("vit") else {}
    net = timm.create_model(name, num_classes=7, **size).eval()
    images = torch.randn(2, 3, 32, 32)
    with FeatureCapture(net) as free, torch.no_grad():
        feats = free(images)
    with FeatureCapture(net, intermediate=stage, embedding=f"{classifier}:input") as named:
        want = named(images)
    torch.testing.assert_close(feats.embedding, want.embedding)
    torch.testing.assert_close(feats.intermediate[0], want.intermediate[0])
    torch.testing.assert_close(feats.logits, net.get_classifier()(feats.embedding))


def test_a_plain_model_without_names_gives_logits_only() -> None:
    feats = FeatureCapture(Net())(image())
    assert feats.logits.shape == (2, 5)
    assert feats.embedding is None
    assert feats.intermediate == ()


def test_logits_by_layer_where_the_output_is_no_tensor() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": F.softmax(self.net(x), dim=1)}

    model = Wrapped()
    assert FeatureCapture(model)(image()).logits is None
    feats = FeatureCapture(model, logits="net.fc")(image())
    torch.testing.assert_close(feats.logits, model.net(image()))
