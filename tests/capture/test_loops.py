"""What real training loops do to a captured network: compile, copy, save, checkpoint, fail."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import timm
import torch
from timm.layers import set_reentrant_ckpt
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from structkd import FeatureCapture
from tests.devices import drawn


class Overwriting(nn.Module):
    """The layer after ``conv`` overwrites its output in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.conv(x)).mean((2, 3)))


def image(size: int = 32) -> Tensor:
    return drawn(2, 3, size, size)


# A block a stage and few channels: nothing here depends on either.
SMALL = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet18", **SMALL, num_classes=5).eval()


def hooks(net: nn.Module) -> list[object]:
    return [
        h
        for m in net.modules()
        for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    ]


def compiled(net: nn.Module, backend: str, **options: object) -> nn.Module:
    torch.compiler.reset()
    return torch.compile(net, backend=backend, **options)


# The order is Dynamo's matter; a Distiller, which reads captures, is compiled by inductor too.
@pytest.mark.parametrize("order", ["capture-first", "compile-first", "compiled-and-run-first"])
def test_compile_in_any_order(order: str) -> None:
    net, layers = Overwriting(), {"intermediate": "relu", "embedding": "fc:input"}
    want = FeatureCapture(net, **layers)(image())
    if order == "capture-first":
        capture = FeatureCapture(net, **layers)
        fast = compiled(net, "aot_eager", fullgraph=True)
    else:
        fast = compiled(net, "aot_eager", fullgraph=True)
        if order == "compiled-and-run-first":
            fast(image())
        capture = FeatureCapture(fast, **layers)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            fast(image())
            got = capture.read()
        torch.testing.assert_close(got.intermediate[0], want.intermediate[0])
        torch.testing.assert_close(got.embedding, want.embedding)
        torch.testing.assert_close(got.logits, want.logits)
    fast(image())
    capture.read().intermediate[0].sum().backward()
    assert net.conv.weight.grad.abs().sum() > 0


def test_a_module_compiled_in_place_and_run_is_captured() -> None:
    torch.compiler.reset()
    net = Overwriting()
    net.compile(backend="aot_eager")
    net(image())
    capture = FeatureCapture(net, intermediate="relu")
    net(image())
    assert capture.read().intermediate[0].shape == (2, 4, 30, 30)


def test_compiled_code_that_overwrites_in_place_gives_the_right_map() -> None:
    net = Overwriting()
    want = net.conv(image())
    capture = FeatureCapture(net, intermediate="conv")
    fast = compiled(net, "aot_eager")
    fast(image())
    torch.testing.assert_close(capture.read().intermediate[0], want)


def test_a_failing_overwrite_leaves_the_network_usable() -> None:
    net = Overwriting()
    capture = FeatureCapture(net, intermediate="conv")
    with pytest.raises(RuntimeError, match="'conv' was overwritten in place"):
        capture(image())
    assert net(image()).shape == (2, 5)
    net(image()).sum().backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, ModelEmaV3, torch.optim.swa_utils.AveragedModel])
def test_a_copys_forward_pass_is_not_the_originals(copied) -> None:
    net = resnet()
    capture = FeatureCapture(net)
    ema = copied(net)
    net.train()
    net(image())
    with torch.no_grad():
        (ema.module if isinstance(ema, ModelEmaV3) else ema)(image(64))
    feats = capture.read()
    assert feats.intermediate[0].shape == (2, 16, 2, 2)
    assert feats.intermediate[0].requires_grad
    feats.intermediate[0].sum().backward()
    assert net.conv1.weight.grad is not None


def test_a_copy_between_forward_and_read() -> None:
    net = resnet()
    capture = FeatureCapture(net)
    net(image())
    twin = copy.deepcopy(net)
    assert capture.read().intermediate[0].shape == (2, 16, 2, 2)
    # The copy's own capture starts clean, and leaves nothing of the first one behind.
    own = FeatureCapture(twin)
    assert own(image(64)).intermediate[0].shape == (2, 16, 4, 4)
    own.remove()
    assert hooks(twin) == []


def test_a_saved_network_knows_nothing_of_its_capture() -> None:
    net = resnet()
    capture = FeatureCapture(net)
    want = net(image())
    file = io.BytesIO()
    torch.save(net, file)
    # Nor when it is pickled, as for a process that is spawned.
    assert b"structkd" not in file.getvalue() + pickle.dumps(net)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(image()), want)
    assert capture.read().logits is want


def test_a_capture_can_be_pickled_and_copied_with_its_network() -> None:
    capture = FeatureCapture(resnet(), intermediate=["layer1", "layer3"])
    for twin in (copy.deepcopy(capture), pickle.loads(pickle.dumps(capture))):
        assert twin.module is not capture.module
        assert len(twin(image()).intermediate) == 2
    with pytest.raises(RuntimeError, match="nothing to read"):
        capture.read()


def test_a_dropped_capture_takes_its_hooks_along() -> None:
    net = resnet()
    for _ in range(5):  # a notebook cell that is run again and again
        capture = FeatureCapture(net)
        capture(image())
    one = len(hooks(net))
    reference = weakref.ref(capture)
    del capture
    gc.collect()
    assert reference() is None
    assert hooks(net) == []
    assert one <= 6


def test_a_failing_layer_poisons_nothing() -> None:
    class Tuple(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    net = nn.Sequential(nn.Flatten(), Tuple())
    capture = FeatureCapture(net, embedding="1")
    with pytest.raises(TypeError, match="'1' gave tuple"):
        capture(image())
    assert len(net(image())) == 2


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", SMALL),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}),
        ("test_efficientnet", {}),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 1, 2, 2)},
        ),
    ],
)
def test_timms_gradient_checkpointing(name: str, size: dict[str, object]) -> None:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=3, drop_path_rate=0.0, **size)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.Dropout):
            layer.eval()
            layer.train = lambda mode=True, layer=layer: layer  # type: ignore[method-assign]
    capture = FeatureCapture(net)

    def gradients() -> list[Tensor]:
        net.zero_grad()
        feats = capture(image(64))
        feats.intermediate[0].square().mean().backward()
        alive = [weakref.ref(feats.intermediate[0])]
        del feats
        gc.collect()
        assert alive[0]() is None, "the map is held after the backward pass"
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    want = gradients()
    net.set_grad_checkpointing(True)
    net.train()
    got = gradients()
    assert len(got) == len(want)
    assert sum(float(g.abs().sum()) for g in got) > 0
    for each, other in zip(got, want, strict=True):
        torch.testing.assert_close(each, other)


def test_reentrant_checkpointing_that_cuts_the_gradient_is_named() -> None:
    net = timm.create_model("resnet18", **SMALL, num_classes=3)
    net.set_grad_checkpointing(True)
    capture = FeatureCapture(net)
    set_reentrant_ckpt(True)
    try:
        with pytest.raises(
            RuntimeError, match=r"'layer3' ran without gradient.*use_reentrant=False"
        ):
            capture(image())
    finally:
        set_reentrant_ckpt(False)
    assert capture(image()).intermediate[0].requires_grad


def test_checkpointing_around_the_named_layer_keeps_the_gradient_either_way() -> None:
    class Outer(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
            self.after = nn.Conv2d(4, 4, 1)
            self.reentrant = reentrant

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.inner, x, use_reentrant=self.reentrant)
            return self.after(x).mean((2, 3))

    for reentrant in (False, True):
        net = Outer(reentrant)
        feats = FeatureCapture(net, intermediate="after")(image().requires_grad_())
        feats.intermediate[0].sum().backward()
        assert net.inner[0].weight.grad is not None


def test_data_parallel_is_refused() -> None:
    with pytest.raises(TypeError, match=r"DataParallel.*DistributedDataParallel"):
        FeatureCapture(nn.DataParallel(resnet()))


def test_a_replica_does_not_report() -> None:
    net = resnet()
    capture = FeatureCapture(net)
    replica = net._replicate_for_data_parallel()
    for key, child in net._modules.items():
        replica._modules[key] = child
    replica(image())
    with pytest.raises(RuntimeError, match="not a copy of it"):
        capture.read()


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_captured_network(strict: bool) -> None:
    net = resnet()
    capture = FeatureCapture(net)
    exported = torch.export.export(net, (image(),), strict=strict)
    torch.testing.assert_close(exported.module()(image()), net(image()))
    capture.read()


def test_a_traced_network_runs_without_its_capture() -> None:
    net = resnet()
    capture = FeatureCapture(net)
    traced = torch.jit.trace(net, image(), check_trace=False)
    with pytest.raises(RuntimeError, match="nothing to read"):
        capture.read()
    torch.testing.assert_close(traced(image()), net(image()))


def test_a_layer_by_itself_does_not_report() -> None:
    net = resnet()
    capture = FeatureCapture(net, embedding="fc:input")
    net(image())
    net.fc(torch.zeros(7, 16))
    assert capture.read().embedding.shape == (2, 16)
