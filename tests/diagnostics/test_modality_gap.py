"""The gap between made poor and real poor images, by moments in plain loops."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structkd import views
from structkd.diagnostics import ModalityGapWarning, modality_gap
from tests.reference.views import grain, moments


def _images(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), scale=st.floats(0.1, 10), shift=st.floats(-2, 2))
def test_it_is_the_definition(seed: int, scale: float, shift: float) -> None:
    pseudo, real = scale * _images(seed, 3, 2, 3, 2) + shift, _images(seed + 1, 4, 2, 3, 2)
    gap = modality_gap(pseudo, real)
    for channel in range(2):
        (mean, variance), (other, others) = moments(pseudo, channel), moments(real, channel)
        wanted = (mean - other) / math.sqrt((variance + others) / 2)
        assert float(gap.mean[channel]) == pytest.approx(wanted, rel=1e-8, abs=1e-10)
        ratio = math.sqrt(variance / others)
        assert float(gap.ratio[channel]) == pytest.approx(ratio, rel=1e-8)
        rough = grain(pseudo, channel) / grain(real, channel)
        assert float(gap.grain[channel]) == pytest.approx(rough, rel=1e-6)
        far = abs(wanted) > 0.25 or not 0.5 <= ratio**2 <= 2 or not 1 / 1.05 <= rough <= 1.05
        assert bool(gap.far[channel]) == far
    mirrored = modality_gap(real, pseudo)
    torch.testing.assert_close(mirrored.mean, -gap.mean)
    torch.testing.assert_close(mirrored.ratio, 1 / gap.ratio)
    torch.testing.assert_close(mirrored.grain, 1 / gap.grain)


def test_it_tells_another_noise_level_and_names_the_channel() -> None:
    rich = _images(0, 60, 3, 8, 8)
    rng = torch.Generator().manual_seed(0)
    real = views.salt_and_pepper(rich / 4 + 0.4, 0.7, generator=rng)
    near = views.salt_and_pepper(rich / 4 + 0.4, 0.68, generator=rng)
    far = torch.cat(
        [near[:, :2], views.salt_and_pepper(rich[:, 2:] / 4 + 0.4, 0.1, generator=rng)], dim=1
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gap = modality_gap(near, real, warn=True)
    assert not gap.far.any()
    assert gap.describe().startswith("the made poor images are near the real ones")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert modality_gap(far, real).far.tolist() == [False, False, True]
    with pytest.warns(ModalityGapWarning, match=r"far from the real ones in channel\(s\) \[2\]"):
        modality_gap(far, real, warn=True)


@pytest.mark.parametrize(
    "made",
    [lambda x: views.blur(x, 1.0), lambda x: views.resolution(x, 2), lambda x: x],
    ids=["blur", "resolution", "sharp"],
)
def test_blur_and_resolution_show_in_the_grain_alone(made) -> None:
    """Smooth scenes, whose moments a slight blur leaves as they are."""
    scenes = views.blur(_images(0, 60, 1, 24, 24), 2.0)
    gap = modality_gap(views.blur(made(scenes), 0.5), views.blur(scenes, 0.5))
    sharp = float((made(scenes) - scenes).abs().max()) == 0
    assert bool(gap.far) == (not sharp)
    assert abs(float(gap.mean)) < 0.05
    assert 0.7 < float(gap.ratio) <= 1
    narrow = modality_gap(scenes[..., :1], scenes[..., :1])
    assert (float(narrow.grain), bool(narrow.far)) == (1.0, False)


def test_constant_channels_and_what_is_not_finite() -> None:
    flat = torch.full((2, 1, 2, 2), 0.5)
    same, other = modality_gap(flat, flat), modality_gap(flat, flat + 1)
    assert (float(same.mean), float(same.ratio), bool(same.far)) == (0.0, 1.0, False)
    assert (float(other.mean), bool(other.far)) == (-math.inf, True)
    assert bool(modality_gap(flat, _images(0, 2, 1, 2, 2)).far)
    assert bool(modality_gap(flat * torch.nan, flat).far)


@pytest.mark.parametrize(
    ("pseudo", "error", "said"),
    [
        (torch.rand(2, 3, 4, 4), ValueError, r"pseudo must have the 1 channel\(s\) of real, got 3"),
        (torch.rand(2, 1, 8, 8), ValueError, r"the size \(4, 4\) of real, got \(8, 8\)"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), TypeError, "pseudo must be a floating-point"),
        (torch.rand(0, 1, 4, 4), ValueError, "both sets need an image, got 0 made and 2 real"),
    ],
)
def test_what_does_not_fit_is_named(pseudo: Tensor, error, said: str) -> None:
    with pytest.raises(error, match=said):
        modality_gap(pseudo, torch.rand(2, 1, 4, 4))
