"""Salt-and-pepper noise: its statistics, and that a sample's draw is its own."""

from __future__ import annotations

import math

import pytest
import torch

from crossmodal.data.poverty import Bands, Blur, Grey, Lowres, Noise, poverty

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


def test_a_range_gives_every_image_an_amount_of_its_own() -> None:
    images, index = torch.full((300, 1, 32, 32), 128, dtype=torch.uint8), torch.arange(300)
    noise = Noise(0.3, most=0.9)
    poor = noise(images, index)
    shares = (poor != images).double().mean(dim=(1, 2, 3))
    assert 0.3 - 0.06 < float(shares.min()) < 0.35  # four deviations of 1,024 draws
    assert 0.85 < float(shares.max()) < 0.9 + 0.06
    assert float(shares.mean()) == pytest.approx(0.6, abs=0.04)
    assert torch.equal(noise(images[7:9], index[7:9]), poor[7:9])


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
    assert poverty("noise:0.3-0.9", 0.1) == Noise(0.3, most=0.9)
    assert poverty("grey", 0.1) == Grey()
    with pytest.raises(ValueError, match=r"unknown poverty 'gray'; did you mean 'grey'\?"):
        poverty("gray", 0.1)
    assert poverty("lowres:8", 0.1) == Lowres(8)
    assert poverty("blur:2", 0.1) == Blur(2)
    assert poverty("bands:3,2,1", 0.1) == Bands((3, 2, 1))
    assert poverty("bands:3,2,1@2750", 0.1) == Bands((3, 2, 1), 2750)


@pytest.mark.parametrize("text", ["lowres:4", "grey", "blur:1.5", "bands:2,0", "bands:1@2750"])
def test_a_poverty_is_written_as_it_is_asked_for(text: str) -> None:
    assert str(poverty(text, 0.1)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("noise:much", "'much' is no number"),
        ("noise:0.3-much", "'0.3-much' is no number"),
        ("noise:0.9-0.3", "from the least amount to the most, got 0.9-0.3"),
        ("noise:0.3-1.3", r"lies in \[0, 1\], got 1.3"),
        ("blur:x", "'x' is no number; as in noise:0.5"),
        ("bands:3,b", "'3,b' is no number"),
        ("bands:-1", "places from 0"),
        ("bands:1@-5", "a value above 0"),
        ("lowres", "lowres needs a number"),
        ("lowres:0.5", "a factor of at least 1"),
        ("blur:0", "above 0 pixels"),
        ("grey:2", "grey takes no number"),
    ],
)
def test_a_poverty_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        poverty(text, 0.1)


def test_lowres_keeps_the_mean_of_blocks_and_nothing_finer() -> None:
    images = torch.randint(0, 256, (3, 2, 32, 32), dtype=torch.uint8)
    poor = Lowres(32)(images, INDICES[:3])
    for image, made in zip(images, poor, strict=True):
        for channel, flat in zip(image, made, strict=True):
            assert flat.unique().tolist() == [round(channel.float().mean().item())]
    checks = ((torch.arange(32)[:, None] + torch.arange(32)) % 2 * 200).byte().expand(1, 1, -1, -1)
    assert Lowres(8)(checks, INDICES[:1]).unique().tolist() == [100]
    assert torch.equal(Lowres(1)(images, INDICES[:3]), images)
    assert Lowres(8)(torch.randn(2, 3, 28, 30), INDICES[:2]).shape == (2, 3, 28, 30)


def test_blur_is_the_gaussian_in_float64_with_edges_continued() -> None:
    image = torch.rand(1, 1, 9, 7, dtype=torch.float64) * 1000
    found = Blur(1.2)(image.float(), INDICES[:1])[0, 0]
    steps = range(-4, 5)
    weights = {step: math.exp(-(step**2) / (2 * 1.2**2)) for step in steps}
    norm = sum(weights.values()) ** 2
    for y in range(9):
        for x in range(7):
            expected = sum(
                weights[dy] * weights[dx]
                * image[0, 0, min(max(y + dy, 0), 8), min(max(x + dx, 0), 6)].item()
                for dy in steps for dx in steps
            )  # fmt: skip
            assert found[y, x].item() == pytest.approx(expected / norm, rel=1e-5)


@pytest.mark.parametrize("made", [Lowres(3), Blur(1.5), Bands((1, 0)), Bands((0,), 2750), Grey()])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_poor_image_does_not_depend_on_its_company(made: object, dtype: torch.dtype) -> None:
    images = torch.randint(0, 256, (40, 3, 17, 23), dtype=torch.uint8).to(dtype)
    whole = made(images, INDICES[:40])
    some = torch.tensor([31, 7, 19])
    assert torch.equal(made(images[some], INDICES[some]), whole[some])
    assert whole.dtype == (torch.uint8 if getattr(made, "white", None) else dtype)


def test_bands_as_eight_bits() -> None:
    values = torch.tensor([0.0, 1375.0, 2750.0, 9000.0]).view(1, 4, 1, 1)
    shown = Bands((3, 2, 1, 0), 2750)(values, INDICES[:1])
    assert shown.dtype == torch.uint8
    assert shown.flatten().tolist() == [255, 255, 128, 0]
    with pytest.raises(ValueError, match=r"--poor bands:4 needs 5 channels, the images have 4"):
        Bands((4,))(values, INDICES[:1])
