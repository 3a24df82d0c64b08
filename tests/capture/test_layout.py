"""What a capture gives is channels first, whatever the backbone's layout."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from structkd import FeatureCapture
from tests.devices import drawn


def images(height: int, width: int | None = None) -> Tensor:
    return drawn(2, 3, height, width or height)


def timm_net(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **options).eval()


# A Swin with few layers and channels: it takes long to draw the weights of a whole one.
SWIN = {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 4, 8)}


@pytest.mark.parametrize(
    ("name", "options", "size", "shape", "embedding"),
    [
        ("resnet18", {}, 64, (256, 4, 4), 512),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, **SWIN}, 64, (96, 4, 4), 192),
        ("swinv2_tiny_window8_256", {"img_size": 64, **SWIN}, 64, (96, 4, 4), 192),
        ("swinv2_cr_tiny_ns_224", {"img_size": 64, **SWIN}, 64, (96, 4, 4), 192),
        ("mambaout_femto", {}, 64, (192, 4, 4), 1152),
        ("convnext_atto", {}, 64, (160, 4, 4), 320),
        ("vit_tiny_patch16_224", {"img_size": 64}, 64, (192, 4, 4), 192),
        ("deit_tiny_distilled_patch16_224", {"img_size": 64}, 64, (192, 4, 4), 192),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "depth": 3}, 28, (384, 2, 2), 384),
        ("mixer_s32_224", {"img_size": 64}, 64, (512, 2, 2), 512),
        ("levit_128s", {}, 224, (256, 7, 7), 384),
        ("cait_xxs24_224", {"img_size": 64, "depth": 4}, 64, (192, 4, 4), 192),
        ("efficientformer_l1", {}, 224, (224, 14, 14), 448),
    ],
)
def test_timm_models_need_no_names(name, options, size, shape, embedding) -> None:
    with torch.no_grad():
        feats = FeatureCapture(timm_net(name, **options))(images(size))
    assert feats.logits.shape == (2, 5)
    assert feats.embedding.shape == (2, embedding)
    assert feats.intermediate[0].shape == (2, *shape)
    assert not feats.absent


def test_a_vits_patches_lie_on_their_grid_without_the_prefix() -> None:
    net = timm_net("deit_tiny_distilled_patch16_224", img_size=(32, 64))
    raw = {}
    net.blocks[10].register_forward_hook(lambda m, a, out: raw.update(tokens=out))
    with torch.no_grad():
        feats = FeatureCapture(net)(images(32, 64))
    grid = raw["tokens"][:, 2:]  # class and distillation token
    for row in range(2):
        for column in range(4):
            got = feats.intermediate[0][:, :, row, column]
            torch.testing.assert_close(got, grid[:, 4 * row + column])


def test_a_layer_before_the_class_token_keeps_all_patches() -> None:
    net = timm_net("vit_tiny_patch16_224", img_size=64)
    with torch.no_grad():
        feats = FeatureCapture(net, intermediate=["patch_embed", "norm"])(images(64))
    assert [tuple(m.shape) for m in feats.intermediate] == [(2, 192, 4, 4)] * 2


def test_nhwc_is_permuted_and_not_reshaped() -> None:
    net = timm_net("swin_tiny_patch4_window7_224", img_size=(64, 128), **SWIN)
    raw = {}
    net.layers[2].register_forward_hook(lambda m, a, out: raw.update(map=out))
    with torch.no_grad():
        feats = FeatureCapture(net)(images(64, 128))
    assert feats.intermediate[0].shape == (2, 96, 4, 8)
    torch.testing.assert_close(feats.intermediate[0], raw["map"].permute(0, 3, 1, 2))


def test_an_inner_block_of_a_channels_last_network_is_told_by_its_layers() -> None:
    net = timm_net("swin_tiny_patch4_window7_224", img_size=64, **SWIN)
    with torch.no_grad():
        feats = FeatureCapture(net, intermediate="layers.1.blocks.0")(images(64))
    assert feats.intermediate[0].shape == (2, 48, 8, 8)


def test_torchvisions_channels_last_networks() -> None:
    net = torchvision.models.swin_t(num_classes=5).eval()
    with torch.no_grad():
        feats = FeatureCapture(net, intermediate=["features.3", "features.5"])(images(64))
        assert [tuple(m.shape) for m in feats.intermediate] == [(2, 192, 8, 8), (2, 384, 4, 4)]
        convnext = torchvision.models.convnext_tiny(num_classes=5).eval()
        feats = FeatureCapture(convnext, intermediate="features.5")(images(64))
    assert feats.intermediate[0].shape == (2, 384, 4, 4)


def test_every_stage_of_a_timm_model() -> None:
    with torch.no_grad():
        feats = FeatureCapture(timm_net("resnet18"), intermediate="all")(images(64))
    assert [m.shape[1] for m in feats.intermediate] == [64, 64, 128, 256, 512]
    with pytest.raises(ValueError, match=r"'all' needs a network whose stages are known.*name the"):
        FeatureCapture(nn.Sequential(nn.Linear(2, 2)), intermediate="all")


@pytest.mark.parametrize("name", ["coat_tiny", "hrnet_w18_small", "twins_svt_small"])
def test_an_embedding_is_had_where_the_default_map_is_not(name: str) -> None:
    net = timm_net(name)
    classifier = next(n for n, m in net.named_modules() if m is net.get_classifier())
    with torch.no_grad():
        feats = FeatureCapture(net, embedding=f"{classifier}:input")(images(224))
    assert feats.embedding.dim() == 2
    assert feats.intermediate == ()
    assert "name a layer yourself" in feats.absent["intermediate"]


def test_a_network_with_several_classifiers_says_what_it_lacks() -> None:
    with torch.no_grad():
        feats = FeatureCapture(timm_net("crossvit_9_240"))(images(240))
    assert feats.logits.shape == (2, 5)
    assert feats.intermediate == ()
    assert "list" in feats.absent["intermediate"]


class Audio(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 6, 3)
        self.act = nn.ReLU()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.conv(x)).mean(2))


def test_audio_maps_are_told_by_their_convolution_or_stated() -> None:
    x = torch.randn(2, 1, 12)
    with torch.no_grad():
        feats = FeatureCapture(Audio(), intermediate="conv")(x)
        assert feats.intermediate[0].shape == (2, 6, 1, 10)
        stated = FeatureCapture(Audio(), intermediate="act", layout="NCL")(x)
        assert stated.intermediate[0].shape == (2, 6, 1, 10)
        with pytest.raises(ValueError, match=r"'act' gives float32 \(2, 6, 10\).*layout='NCL'"):
            FeatureCapture(Audio(), intermediate="act")(x)


def test_an_mlps_features_are_rows() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    feats = FeatureCapture(net, intermediate=["0", "1"], embedding="2:input")(torch.randn(4, 5))
    assert [tuple(m.shape) for m in feats.intermediate] == [(4, 8), (4, 8)]


def test_a_foreign_channels_last_map_is_stated() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keep = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.keep(x).mean((1, 2))

    x = torch.randn(2, 5, 7, 3)
    feats = FeatureCapture(Last(), intermediate="keep", layout="NHWC")(x)
    torch.testing.assert_close(feats.intermediate[0], x.permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "NHCW"}, "layout must be one of NCHW, NHWC"),
        ({"layout": ["NCHW", "NC"]}, r"one for every intermediate layer, got 2 for 1 layer"),
        ({"layout": "NCL"}, r"layout='NCL' was stated for layer '0', which gives float32 \(2, 4,"),
    ],
)
def test_a_wrong_layout_is_named(options, message) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match=message):
        FeatureCapture(net, intermediate="0", **options)(images(8))


def test_tokens_out_of_order_are_refused() -> None:
    net = timm_net("hiera_tiny_224")
    with torch.no_grad():
        assert "order" in FeatureCapture(net)(images(224)).absent["intermediate"]
