"""Salt-and-pepper noise: its statistics, and that a sample's draw is its own."""

from __future__ import annotations

import pytest
import torch

from crossmodal.data.poverty import Bands, Grey, Noise, poverty

PLAIN = torch.full((64, 3, 32, 32), 100, dtype=torch.uint8)
INDICES = torch.arange(64)


def salt_and_pepper(
    images: torch.Tensor, amount: float, *, seed: int, indices: torch.Tensor
) -> torch.Tensor:
    return Noise(amount, seed)(images, indices)


@pytest.mark.parametrize("amount", [0.1, 0.5, 0.9])
def test_the_given_fraction_turns_black_or_white_equally_often(amount: float) -> None:
    noisy = salt_and_pepper(PLAIN, amount, seed=0, indices=INDICES)
    pixels = 64 * 32 * 32
    black, white = ((noisy[:, 0] == value).sum().item() / pixels for value in (0, 255))
    sigma = (amount / 2 * (1 - amount / 2) / pixels) ** 0.5
    assert black == pytest.approx(amount / 2, abs=4 * sigma)
    assert white == pytest.approx(amount / 2, abs=4 * sigma)
    assert set(noisy.unique().tolist()) == {0, 100, 255}


def test_all_channels_share_one_draw() -> None:
    noisy = salt_and_pepper(PLAIN, 0.5, seed=0, indices=INDICES)
    assert torch.equal(noisy[:, 0], noisy[:, 1])
    assert torch.equal(noisy[:, 0], noisy[:, 2])


def test_the_ends_of_the_range() -> None:
    assert torch.equal(salt_and_pepper(PLAIN, 0.0, seed=0, indices=INDICES), PLAIN)
    everything = salt_and_pepper(PLAIN, 1.0, seed=0, indices=INDICES)
    assert set(everything.unique().tolist()) == {0, 255}


def test_a_samples_noise_depends_on_its_index_alone() -> None:
    whole = salt_and_pepper(PLAIN, 0.5, seed=3, indices=INDICES)
    some = torch.tensor([40, 7, 19])
    assert torch.equal(salt_and_pepper(PLAIN[some], 0.5, seed=3, indices=some), whole[some])


def test_samples_and_seeds_differ() -> None:
    noisy = salt_and_pepper(PLAIN, 0.5, seed=0, indices=INDICES)
    assert len({image.numpy().tobytes() for image in noisy}) == 64
    # Neither may seed s of sample i be seed i of sample s.
    other = salt_and_pepper(PLAIN[:2], 0.5, seed=1, indices=torch.tensor([0, 1]))
    assert not torch.equal(other[0], noisy[0])
    assert not torch.equal(other[0], noisy[1])


def test_the_images_are_left_alone() -> None:
    images = PLAIN.clone()
    salt_and_pepper(images, 0.5, seed=0, indices=INDICES)
    assert torch.equal(images, PLAIN)


@pytest.mark.parametrize("amount", [-0.1, 1.1, float("nan")])
def test_an_amount_that_is_no_fraction(amount: float) -> None:
    with pytest.raises(ValueError, match="amount is the fraction of pixels"):
        salt_and_pepper(PLAIN, amount, seed=0, indices=INDICES)


def test_images_of_another_kind() -> None:
    with pytest.raises(TypeError, match="uint8"):
        salt_and_pepper(PLAIN.float(), 0.5, seed=0, indices=INDICES)
    with pytest.raises(ValueError, match="index"):
        salt_and_pepper(PLAIN, 0.5, seed=0, indices=INDICES[:3])


def test_fresh_noise_has_the_same_statistics_and_changes() -> None:
    first, second = (Noise(0.5, epoch=epoch)(PLAIN, INDICES) for epoch in (0, 1))
    for value in (0, 255):
        assert (first == value).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert not torch.equal(first, second)


def test_grey_is_the_luma_in_one_channel_and_bands_are_channels() -> None:
    pixel = torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1)
    assert int(Grey()(pixel, INDICES[:1])) == round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    with pytest.raises(ValueError, match="three colours, got 1 channel"):
        Grey()(pixel[:, :1], INDICES[:1])
    assert Bands((2, 0))(pixel, INDICES[:1]).flatten().tolist() == [50, 200]


def test_a_poverty_by_its_name() -> None:
    assert poverty("noise:0.3", 0.1) == Noise(0.3)
    assert poverty("noise", 0.1) == Noise(0.1)
    assert poverty("grey", 0.1) == Grey()
    with pytest.raises(ValueError, match=r"unknown poverty 'gray'; did you mean 'grey'\?"):
        poverty("gray", 0.1)
    with pytest.raises(ValueError, match="'much' is no number"):
        poverty("noise:much", 0.1)
