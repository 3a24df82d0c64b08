"""Rich images made poor: each function against plain loops, and its limits named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from structkd import views
from tests.reference import views as reference


def _images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_bands_and_luma_are_mixtures_of_channels() -> None:
    images = _images(2, 4, 3, 2)
    chosen = views.bands(images, [3, 0])
    torch.testing.assert_close(chosen, reference.mixture(images, [[0, 0, 0, 1], [1, 0, 0, 0]]))
    colours = images[:, :3]
    wanted = reference.mixture(colours, [[0.299, 0.587, 0.114]])
    torch.testing.assert_close(views.luma(colours), wanted, rtol=1e-7, atol=0)


def test_a_spectral_response_mixes_bands() -> None:
    images, response = _images(2, 5, 3, 2), _images(3, 5, seed=1)
    wanted = reference.mixture(images, response.tolist())
    torch.testing.assert_close(views.spectral_response(images, response), wanted)
    shares = response / response.sum(dim=1, keepdim=True)
    mixed = views.spectral_response(images, shares)
    assert float(mixed.min()) >= 0
    assert float(mixed.max()) <= 1


def test_salt_and_pepper_replaces_whole_pixels_by_the_share_it_says() -> None:
    images = 0.1 + 0.8 * _images(4, 3, 64, 64)
    draw = lambda seed: views.salt_and_pepper(  # noqa: E731
        images, 0.3, values=(-1.0, 2.0), generator=torch.Generator().manual_seed(seed)
    )
    noisy = draw(0)
    assert torch.equal(noisy, draw(0))
    assert not torch.equal(noisy, draw(1))
    black, white = (noisy == -1).all(dim=1), (noisy == 2).all(dim=1)
    assert float(black.double().mean()) == pytest.approx(0.15, abs=0.01)
    assert float(white.double().mean()) == pytest.approx(0.15, abs=0.01)
    kept = ~(black | white)
    for channel in range(3):
        assert torch.equal(noisy[:, channel][kept], images[:, channel][kept])
    assert torch.equal(views.salt_and_pepper(images, 0.0), images)
    gone = views.salt_and_pepper(images, 1.0)
    assert set(gone.unique().tolist()) == {0.0, 1.0}


def test_a_range_gives_every_image_a_share_of_its_own() -> None:
    images = 0.1 + 0.8 * _images(200, 1, 32, 32)
    draw = lambda amount: views.salt_and_pepper(  # noqa: E731
        images, amount, generator=torch.Generator().manual_seed(0)
    )
    shares = (draw((0.3, 0.9)) != images).double().mean(dim=(1, 2, 3))
    assert float(shares.min()) > 0.3 - 0.06  # four deviations of 1,024 draws
    assert float(shares.max()) < 0.9 + 0.06
    counts = torch.histc(shares.float(), 3, 0.3, 0.9) / len(shares)
    torch.testing.assert_close(counts, torch.full((3,), 1 / 3), atol=0.12, rtol=0)
    assert torch.equal(draw((0.4, 0.4)), draw(0.4))


def test_resolution_is_means_and_lines_between_them() -> None:
    images = _images(1, 2, 4, 6)
    torch.testing.assert_close(views.resolution(images, 2), reference.coarse(images, 2))
    torch.testing.assert_close(views.resolution(images, 1), images)
    everything = views.resolution(images, 100)
    means = images.mean(dim=(2, 3), keepdim=True).expand_as(images)
    torch.testing.assert_close(everything, means)


@pytest.mark.parametrize("sigma", [0.4, 1.1])
def test_blur_is_a_gaussian_with_edges_continued(sigma: float) -> None:
    images = _images(1, 2, 4, 3)
    torch.testing.assert_close(views.blur(images, sigma), reference.gaussian(images, sigma))
    flat = torch.full((1, 1, 5, 5), 0.7, dtype=torch.float64)
    torch.testing.assert_close(views.blur(flat, sigma), flat)


def test_made_images_keep_dtype_and_leave_the_rich_ones() -> None:
    images = _images(2, 3, 4, 4, dtype=torch.float32)
    before = images.clone()
    for made in (
        views.bands(images, [2]),
        views.luma(images),
        views.salt_and_pepper(images, 0.5),
        views.resolution(images, 2),
        views.blur(images, 1.0),
        views.spectral_response(images, torch.ones(2, 3).double()),
    ):
        assert made.dtype == torch.float32
        assert made.shape[::2] == (2, 4)
    assert torch.equal(images, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_white_that_another_view_has_rounded_is_white_still(dtype: torch.dtype) -> None:
    white = torch.ones(1, 13, 4, 4, dtype=dtype)
    made = [views.blur(white, sigma) for sigma in (0.5, 0.8, 1.0, 1.5, 2.0, 3.0)]
    for seed in range(20):
        share = torch.rand(3, 13, generator=torch.Generator().manual_seed(seed))
        made.append(views.spectral_response(white, share / share.sum(dim=1, keepdim=True)))
    assert max(float(images.max()) for images in made) > 1
    for images in made:
        assert set(views.salt_and_pepper(images, 1.0).unique().tolist()) <= {0.0, 1.0}


def test_mixed_says_where_the_pairs_are() -> None:
    own, pseudo = _images(3, 1, 2, 2), _images(2, 1, 2, 2, seed=1)
    x, paired = views.mixed(own, pseudo)
    assert torch.equal(x[paired], pseudo)
    assert torch.equal(x[:3], own)
    alone, none = views.mixed(own, pseudo[:0])
    assert torch.equal(alone, own)
    assert none.tolist() == []


RICH = torch.rand(2, 4, 6, 6)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: views.bands(RICH, [4]), ValueError, r"channels 0\.\.3 of the images.*\[4\]"),
        (lambda: views.bands(RICH, []), ValueError, "at least one"),
        (lambda: views.bands(RICH, [-1]), ValueError, "at least 0, got -1"),
        (lambda: views.bands(RICH, 2), TypeError, r"list of channels, \[2\] for one, got int"),
        (
            lambda: views.salt_and_pepper(RICH, (0.9, 0.3)),
            ValueError,
            "amount must go from least to most, got",
        ),
        (
            lambda: views.salt_and_pepper(RICH, (0.1, 0.2, 0.3)),
            ValueError,
            "amount must be a number, or a pair",
        ),
        (
            lambda: views.salt_and_pepper(RICH, (0.5, 1.5)),
            ValueError,
            "amount must be finite",
        ),
        (
            lambda: views.salt_and_pepper(RICH, 0.5, values=(0, 1, 2)),
            TypeError,
            r"values must be a pair, black and white, got \(0, 1, 2\)",
        ),
        (lambda: views.luma(RICH), ValueError, r"three colours.*\(2, 4, 6, 6\).*bands"),
        (lambda: views.luma(RICH.byte()), TypeError, r"floating-point.*uint8.*float\(\) / 255"),
        (lambda: views.blur(RICH[0], 1), ValueError, r"must be \(B, C, H, W\)"),
        (lambda: views.blur(RICH, 0), ValueError, "sigma must be finite > 0"),
        (lambda: views.resolution(RICH, 0.5), ValueError, "factor must be finite >= 1"),
        (lambda: views.salt_and_pepper(RICH, 1.5), ValueError, "amount must be"),
        (
            lambda: views.salt_and_pepper(RICH - 2, 0.5),
            ValueError,
            r"images must lie in values=0\.\.1.*before the images are normalised",
        ),
        (
            lambda: views.spectral_response(RICH, torch.ones(3, 5)),
            ValueError,
            r"response must be \(channels, 4\).*\(3, 5\)",
        ),
        (lambda: views.spectral_response(RICH, [[1.0]]), TypeError, "response must be"),
        (lambda: views.mixed(RICH[:, :1], RICH), ValueError, r"1 channel\(s\) of own, got 4.*luma"),
        (
            lambda: views.mixed(RICH, RICH[..., :3]),
            ValueError,
            r"the size \(6, 6\) of own, got \(6, 3\).*interpolate",
        ),
        (lambda: views.mixed(RICH, RICH.double()), ValueError, r"share dtype.*pseudo\.to\(own\)"),
    ],
)
def test_what_does_not_fit_is_named(call, error, said: str) -> None:
    with pytest.raises(error, match=said):
        call()
