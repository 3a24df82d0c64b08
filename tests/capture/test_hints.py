"""What a capture cannot find it says with what came, and with the likely layers of the network."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import structkd
from structkd import FeatureCapture
from structkd.capture.backbone import likely_layers
from tests.devices import drawn

Pair = namedtuple("Pair", ["scores", "features"])


class Output:
    def __init__(self, **held: Any) -> None:
        for name, value in held.items():
            setattr(self, name, value)


class Net(nn.Module):
    """A network of one's own; ``gives`` makes its output of logits, embedding and map."""

    def __init__(self, gives: Any = lambda logits, row, maps: logits) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.rungs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(3)
        )
        self.score = nn.Linear(8, 10)
        self.gives = gives

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for rung in self.rungs:
            x = rung(x)
        row = x.mean((2, 3))
        return self.gives(self.score(row), row, x)


def image() -> Tensor:
    return drawn(2, 3, 8, 8)


CAPTURE = r"logits='score' \(in a Distiller, layers=dict\(logits='score'\)"
OUTPUTS = {
    "tuple": (
        lambda y, row, maps: (y, row),
        r"tuple \(0: float32 \(2, 10\), 1: float32 \(2, 8\)\)",
    ),
    "list": (lambda y, row, maps: [y, y], r"list \(0: float32 \(2, 10\), 1: float32 \(2, 10\)\)"),
    "namedtuple": (lambda y, row, maps: Pair(y, row), r"Pair \(scores: float32 \(2, 10\)"),
    "dict": (lambda y, row, maps: {"out": y}, r"dict \('out': float32 \(2, 10\)\)"),
    "object": (lambda y, row, maps: Output(scores=y), r"Output \(scores: float32 \(2, 10\)\)"),
    "nested": (lambda y, row, maps: {"a": [y]}, r"dict \('a': list\)"),
    "nothing": (lambda y, row, maps: None, "NoneType"),
    "logits of None": (lambda y, row, maps: {"logits": None}, r"dict \('logits': NoneType\)"),
    "tokens": (lambda y, row, maps: y[:, None], r"float32 \(2, 1, 10\)"),
    "one number": (lambda y, row, maps: y[:, 0], r"float32 \(2,\)"),
    "list of maps": (lambda y, row, maps: [maps, maps], r"list \(0: float32 \(2, 8, 6, 6\)"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_without_logits_is_told_with_what_came_and_the_cure(kind: str) -> None:
    gives, came = OUTPUTS[kind]
    feats = FeatureCapture(Net(gives))(image())
    assert feats.logits is None
    with pytest.raises(ValueError, match=rf"student\.logits.*{came}.*{CAPTURE}"):
        structkd.KDLoss()(feats, feats)
    named = FeatureCapture(Net(gives), logits="score")(image())
    assert named.logits.shape == (2, 10)
    assert "logits" not in named.absent


@pytest.mark.parametrize(
    "gives",
    [
        lambda y, row, maps: y,
        lambda y, row, maps: y[..., None, None],
        lambda y, row, maps: {"logits": y, "aux": maps},
        lambda y, row, maps: Output(logits=y, loss=None),
    ],
    ids=["tensor", "unit sides", "dict", "object"],
)
def test_an_output_with_logits_is_taken(gives: Any) -> None:
    feats = FeatureCapture(Net(gives))(image())
    assert feats.logits.shape == (2, 10)
    assert "logits" not in feats.absent


@pytest.mark.parametrize(
    "gives",
    [
        lambda y, row, maps: maps,
        lambda y, row, maps: {"out": maps, "aux": maps + 1},
        lambda y, row, maps: Output(logits=maps, loss=None),
    ],
    ids=["smp", "torchvision", "transformers"],
)
def test_logits_of_pixels_are_taken(gives: Any) -> None:
    feats = FeatureCapture(Net(gives))(image())
    assert feats.logits.shape == (2, 8, 6, 6)
    named = FeatureCapture(Net(), logits="rungs.2")(image())  # a segmentation head by name
    assert named.logits.shape == (2, 8, 6, 6)


def test_a_named_layer_that_gives_no_logits_is_told() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Linear(36, 2))
    with pytest.raises(ValueError, match=r"'1' must give logits, \(B, K\) or .*logits='2'"):
        FeatureCapture(net, logits="1")(image())


def test_distilled_transformers_two_outputs_are_told_in_training_only() -> None:
    net = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1, num_classes=10)
    net.set_distilled_training(True)
    capture = FeatureCapture(net)
    images = torch.randn(2, 3, 32, 32)
    assert "logits='head'" in capture(images).absent["logits"]
    net.eval()
    assert capture(images).logits.shape == (2, 10)


@pytest.mark.parametrize("kind", ["tuple", "list of maps", "object"])
def test_an_output_without_logits_compiles_where_nobody_reads_them(kind: str) -> None:
    torch.compiler.reset()
    networks = [Net(OUTPUTS[kind][0]) for _ in range(2)]
    distiller = structkd.Distiller(
        *networks, structkd.CORALLoss(), layers={"embedding": "score:input"}
    )
    fast = torch.compile(distiller, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (4, 6):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(
            sum(fast(x, x_teacher=x)[1].values()), sum(distiller(x, x_teacher=x)[1].values())
        )


def test_fields_that_nobody_named_are_told_all_at_once() -> None:
    absent = FeatureCapture(Net())(image()).absent
    for field in ("embedding", "intermediate"):
        assert "no layer was named" in absent[field]
        names = "embedding='score:input', intermediate=['rungs.0', 'rungs.1', 'rungs.2']"
        assert f"{names} (in a Distiller, layers=dict({names})" in absent[field]
    given = FeatureCapture(Net(), embedding="score:input")(image()).absent
    assert "embedding" not in given
    assert "intermediate=['rungs.0'" in given["intermediate"]
    named = {"embedding": "score:input", "intermediate": ["rungs.0", "rungs.1", "rungs.2"]}
    assert not FeatureCapture(Net(), **named)(image()).absent


def test_all_stages_of_a_network_that_tells_none_lists_the_likely_ones() -> None:
    with pytest.raises(ValueError, match=r"feature_info.*intermediate=\['rungs\.0', 'rungs\.1'"):
        FeatureCapture(Net(), intermediate="all")


@pytest.mark.parametrize(
    ("field", "name", "said", "unsaid"),
    [
        ("intermediate", "rungs.3", "rungs.2", "stem"),
        ("intermediate", "module.stem", "near names: stem", "score"),
        ("embedding", "scores:input", "near names: score", "stem"),
        ("intermediate", "layer4", "intermediate=['rungs.0', 'rungs.1', 'rungs.2']", "stem"),
        ("embedding", "avgpool", "embedding='score:input'", "stem"),
        ("logits", "classifier", "logits='score'", "stem"),
        ("logits", "", "", ""),
    ],
)
def test_a_wrong_name_is_told_the_near_ones_or_the_likely(field, name, said, unsaid) -> None:
    if not name:  # an empty name asks for none
        assert FeatureCapture(Net(), **{field: name})(image()).logits is not None
        return
    with pytest.raises(ValueError, match=f"{field}='{name}' is no layer") as error:
        FeatureCapture(Net(), **{field: name})
    assert said in str(error.value)
    assert unsaid not in str(error.value)


def test_all_wrong_names_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"intermediate='layer4'.*embedding='scores'.*logits='x'"):
        FeatureCapture(Net(), intermediate=["stem", "layer4"], embedding="scores", logits="x")


def test_a_map_in_the_place_of_an_embedding_is_told_the_likely_one() -> None:
    with pytest.raises(ValueError, match=r"'stem' must give 2-D.*embedding='score:input'"):
        FeatureCapture(Net(), embedding="stem")(image())


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = torchvision.models.resnet18()
        self.backbone.fc = nn.Identity()
        self.head = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))
        self.aux_head = nn.Linear(512, 3)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, batch_first=True), 3, enable_nested_tensor=False
        )
        self.out = nn.Linear(8, 2)


def conv_head() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 5, 1)
    )


STAGES = [f"layer{position}" for position in range(1, 5)]


@pytest.mark.parametrize(
    ("make", "embedding", "intermediate"),
    [
        (Net, "score:input", ["rungs.0", "rungs.1", "rungs.2"]),
        (torchvision.models.resnet18, "fc:input", STAGES),
        (torchvision.models.resnet101, "fc:input", STAGES),
        (
            torchvision.models.densenet121,
            "classifier:input",
            [f"features.denseblock{position}" for position in range(1, 5)],
        ),
        (torchvision.models.swin_t, "head:input", [f"features.{i}" for i in (1, 3, 5, 7)]),
        (
            torchvision.models.vit_b_32,
            "heads.head:input",
            [f"encoder.layers.encoder_layer_{position}" for position in range(12)],
        ),
        (
            torchvision.models.alexnet,
            "classifier.6:input",
            [f"features.{i}" for i in (0, 3, 6, 8, 10)],
        ),
        (Wrapper, "head.2:input", [f"backbone.{stage}" for stage in STAGES]),
        (Encoder, "out:input", [f"encoder.layers.{position}" for position in range(3)]),
        (
            lambda: timm.create_model("convnext_atto"),
            "head.fc:input",
            [f"stages.{position}" for position in range(4)],
        ),
        (conv_head, "3:input", ["0", "1"]),
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), "2:input", ["0"]),
        (lambda: torch.compile(Net()), "score:input", ["rungs.0", "rungs.1", "rungs.2"]),
        (nn.Flatten, None, None),
    ],
)
def test_likely_layers(make: Any, embedding: str | None, intermediate: list[str] | None) -> None:
    with torch.device("meta"):
        found = likely_layers(make())
    assert found.get("embedding") == embedding
    assert found.get("intermediate") == intermediate
    if embedding is not None and make is not conv_head:
        assert found["logits"] == embedding.removesuffix(":input")


@pytest.mark.parametrize("make", [Net, lambda: torchvision.models.swin_t(num_classes=10), Wrapper])
def test_the_likely_layers_can_be_captured(make: Any) -> None:
    net = make().eval()
    if isinstance(net, Wrapper):
        net.forward = lambda x: net.head(net.backbone(x))
    feats = FeatureCapture(net, **likely_layers(net))(torch.randn(2, 3, 64, 64))
    assert feats.logits.shape == (2, 10)
    assert feats.embedding.dim() == 2
    assert all(each.dim() == 4 for each in feats.intermediate)
