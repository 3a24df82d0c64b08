"""Salt-and-pepper noise: its statistics, and that a sample's draw is its own."""

from __future__ import annotations

import pytest
import torch

from crossmodal.noise import fresh_salt_and_pepper, salt_and_pepper

GREY = torch.full((64, 3, 32, 32), 100, dtype=torch.uint8)
INDICES = torch.arange(64)


@pytest.mark.parametrize("amount", [0.1, 0.5, 0.9])
def test_the_given_fraction_turns_black_or_white_equally_often(amount: float) -> None:
    noisy = salt_and_pepper(GREY, amount, seed=0, indices=INDICES)
    pixels = 64 * 32 * 32
    black, white = ((noisy[:, 0] == value).sum().item() / pixels for value in (0, 255))
    sigma = (amount / 2 * (1 - amount / 2) / pixels) ** 0.5
    assert black == pytest.approx(amount / 2, abs=4 * sigma)
    assert white == pytest.approx(amount / 2, abs=4 * sigma)
    assert set(noisy.unique().tolist()) == {0, 100, 255}


def test_all_channels_share_one_draw() -> None:
    noisy = salt_and_pepper(GREY, 0.5, seed=0, indices=INDICES)
    assert torch.equal(noisy[:, 0], noisy[:, 1])
    assert torch.equal(noisy[:, 0], noisy[:, 2])


def test_the_ends_of_the_range() -> None:
    assert torch.equal(salt_and_pepper(GREY, 0.0, seed=0, indices=INDICES), GREY)
    everything = salt_and_pepper(GREY, 1.0, seed=0, indices=INDICES)
    assert set(everything.unique().tolist()) == {0, 255}


def test_a_samples_noise_depends_on_its_index_alone() -> None:
    whole = salt_and_pepper(GREY, 0.5, seed=3, indices=INDICES)
    some = torch.tensor([40, 7, 19])
    assert torch.equal(salt_and_pepper(GREY[some], 0.5, seed=3, indices=some), whole[some])


def test_samples_and_seeds_differ() -> None:
    noisy = salt_and_pepper(GREY, 0.5, seed=0, indices=INDICES)
    assert len({image.numpy().tobytes() for image in noisy}) == 64
    # Neither may seed s of sample i be seed i of sample s.
    other = salt_and_pepper(GREY[:2], 0.5, seed=1, indices=torch.tensor([0, 1]))
    assert not torch.equal(other[0], noisy[0])
    assert not torch.equal(other[0], noisy[1])


def test_the_images_are_left_alone() -> None:
    images = GREY.clone()
    salt_and_pepper(images, 0.5, seed=0, indices=INDICES)
    assert torch.equal(images, GREY)


@pytest.mark.parametrize("amount", [-0.1, 1.1, float("nan")])
def test_an_amount_that_is_no_fraction(amount: float) -> None:
    with pytest.raises(ValueError, match="amount is the fraction of pixels"):
        salt_and_pepper(GREY, amount, seed=0, indices=INDICES)


def test_images_of_another_kind() -> None:
    with pytest.raises(TypeError, match="uint8"):
        salt_and_pepper(GREY.float(), 0.5, seed=0, indices=INDICES)
    with pytest.raises(ValueError, match="indices"):
        salt_and_pepper(GREY, 0.5, seed=0, indices=INDICES[:3])


def test_fresh_noise_has_the_same_statistics_and_changes() -> None:
    images = GREY.permute(0, 2, 3, 1)
    generator = torch.Generator().manual_seed(0)
    first = fresh_salt_and_pepper(images, 0.5, generator)
    second = fresh_salt_and_pepper(images, 0.5, generator)
    for value in (0, 255):
        assert (first == value).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(first[..., 0], first[..., 2])
    assert not torch.equal(first, second)
