"""Batches: pairs stay pairs under augmentation, and nothing but seed and epoch decides them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from crossmodal.data import Batches, Wanted, open_views
from crossmodal.data.batches import padded_crops, resized_crops
from crossmodal.data.draws import permutation, uniform
from crossmodal.data.images import NO_LABEL
from crossmodal.data.poverty import Noise
from crossmodal.recipes import data_sets
from tests.examples.tiny import opened, pixels, recipe

MASK = (1 << 64) - 1


def splitmix(state: int, count: int) -> list[int]:
    """Steele et al. (2014), in Python's whole numbers."""
    found = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        found.append(z ^ (z >> 31))
    return found


def test_draws_are_splitmix64_and_named_by_key_and_index() -> None:
    from crossmodal.data import draws

    start = draws._mixed(draws._mixed(5) ^ draws.stream(1, 2))
    expected = [(bits >> 40) / 2**24 for bits in splitmix(start, 6)]
    assert uniform((1, 2), torch.tensor([9, 5]), 6)[1].tolist() == expected
    # A reference value of SplitMix64 itself: state 0 gives this first number.
    assert splitmix(0, 1) == [0xE220A8397B1DCDAF]
    many = uniform((3,), torch.arange(200), 500)
    assert many.mean().item() == pytest.approx(0.5, abs=0.005)
    assert many.var().item() == pytest.approx(1 / 12, abs=0.002)
    assert not torch.equal(uniform((0, 1), torch.arange(3), 4), uniform((1, 0), torch.arange(3), 4))


def test_both_modalities_of_a_scene_get_the_same_crop_and_flip() -> None:
    rich = pixels(torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).repeat(32, 1, 1, 1))
    made = recipe(batch_size=32, pad=2, flip=True)
    together = next(Batches(made, poor=rich, rich=rich).epoch(0))
    assert torch.equal(together.poor, together.rich)
    apart = next(Batches(made, poor=rich, rich=rich, together=False).epoch(0))
    assert not torch.equal(apart.poor, apart.rich)
    assert torch.equal(apart.poor, together.poor)


def test_every_image_is_a_window_of_the_padded_one_perhaps_mirrored() -> None:
    image = torch.arange(1.0, 65).view(1, 1, 8, 8)
    padded = torch.nn.functional.pad(image[0, 0], (2, 2, 2, 2))
    windows = [padded[y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
    windows += [window.flip(1) for window in windows]
    draws = uniform((0,), torch.arange(200), 5)
    crops = padded_crops(image.repeat(200, 1, 1, 1), draws, pad=2, flip=True)
    seen = {
        next(n for n, window in enumerate(windows) if torch.equal(crop[0], window))
        for crop in crops
    }
    assert len(seen) > 40


def test_resized_crops_lie_inside_and_keep_the_size() -> None:
    ramp = torch.arange(20.0).view(1, 1, 1, 20).expand(64, 1, 16, 20).contiguous()
    crops = resized_crops(ramp, uniform((4,), torch.arange(64), 5), flip=False)
    assert crops.shape == (64, 1, 16, 20)
    spans = crops[:, 0, 8].amax(1) - crops[:, 0, 8].amin(1)
    assert crops.min() >= 0
    assert crops.max() <= 19
    assert spans.min() < 10 < spans.max()


def test_an_epoch_visits_each_image_once_in_an_order_of_its_own() -> None:
    batches = Batches(recipe(batch_size=8), poor=opened().poor)
    first, second = (torch.cat([b.index for b in batches.epoch(n)]) for n in (0, 1))
    assert first.sort().values.tolist() == list(range(80))
    assert not torch.equal(first, second)
    assert torch.equal(first, permutation((0, 21, 0), 80))


def test_an_incomplete_last_batch_is_left_out_of_training_only() -> None:
    poor = opened().poor.chosen(torch.arange(10))
    batches = Batches(recipe(batch_size=4), poor=poor)
    assert [len(b.target) for b in batches.epoch(0)] == [4, 4]
    assert [len(b.target) for b in batches.still(4)] == [4, 4, 2]
    assert [len(b.target) for b in Batches(recipe(batch_size=40), poor=poor).epoch(0)] == [10]


def test_the_border_is_the_mean_and_a_constant_band_is_nothing() -> None:
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    images[:, 1] = 77  # a dead detector
    poor = pixels(images)
    assert poor.statistics.constant == [1]
    for batch in Batches(recipe(pad=4), poor=poor).epoch(0):
        assert not batch.poor[:, 1].any()
        assert batch.poor.abs().max() < 3  # no border far from the mean
    noisy = poor.made(Noise(0.5)).loaded()
    assert noisy.statistics.constant == []  # noise is drawn over all channels


def test_fresh_noise_changes_every_epoch_and_fixed_noise_does_not() -> None:
    rich = pixels(torch.full((32, 1, 8, 8), 100, dtype=torch.uint8).random_(90, 110))
    poor = replace(rich.made(Noise(0.5)), like=rich)
    fresh = Batches(recipe(batch_size=32, fresh_noise=True), poor=poor, rich=rich)

    def by_row(batch: object) -> torch.Tensor:
        return batch.poor[batch.index.argsort()]

    assert not torch.equal(*(by_row(next(fresh.epoch(n))) for n in (0, 1)))
    still = Batches(recipe(batch_size=32), poor=poor.loaded(), rich=rich)
    assert torch.equal(*(by_row(next(still.epoch(n))) for n in (0, 1)))
    with pytest.raises(ValueError, match="fresh_noise needs noise to draw"):
        Batches(recipe(fresh_noise=True), poor=rich)


@pytest.mark.parametrize("drawn", [{"pad": 4}, {"fresh_noise": True, "pad": 0}])
def test_an_image_that_comes_again_in_an_epoch_is_drawn_anew(drawn: dict[str, object]) -> None:
    rich = pixels(torch.randint(0, 256, (32, 1, 8, 8), dtype=torch.uint8))
    known = torch.full((32,), NO_LABEL)
    known[:4] = rich.labels[:4]
    rich = replace(rich, targets=known)
    poor = replace(rich.made(Noise(0.5)), like=rich)
    batches = Batches(recipe(batch_size=4, flip=False, **drawn), poor=poor, rich=rich, labelled=1)
    seen = list(batches.epoch(0))
    assert [sorted(batch.index.tolist()) for batch in seen] == [[0, 1, 2, 3]] * 8
    first = [batch.poor[batch.index.argmin()] for batch in seen]
    assert len({image.numpy().tobytes() for image in first}) > 6
    again = list(batches.epoch(0))
    assert all(torch.equal(one.poor, other.poor) for one, other in zip(seen, again, strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        for part, count in (("train", 15), ("test", 2)):
            (tmp_path / part / name).mkdir(parents=True)
            for n in range(count):
                image = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(image.numpy()).save(tmp_path / part / name / f"{n}.png")
    return tmp_path


@pytest.mark.parametrize("fields", [{"flip": True}, {"fresh_noise": True}, {"crop": "resized"}])
def test_streamed_rows_are_the_same_for_any_number_of_workers_and_processes(
    folder: Path, fields: dict[str, object]
) -> None:
    lazy = open_views(data_sets()["cifar10"], Wanted(data_dir=folder))
    assert lazy.poor.pixels is None
    made = recipe(batch_size=10, pad=2, **fields)
    whole = list(Batches(made, poor=lazy.poor, rich=lazy.rich).epoch(3))
    assert len(whole) == 3
    others = [
        list(Batches(made, poor=lazy.poor, rich=lazy.rich, workers=n).epoch(3)) for n in (1, 3)
    ]
    loaded = lazy.loaded(made=not made.spoils_late)
    assert lazy.rich.fingerprint == loaded.rich.fingerprint
    others.append(list(Batches(made, poor=loaded.poor, rich=loaded.rich).epoch(3)))
    parts = [
        list(Batches(made, poor=lazy.poor, rich=lazy.rich, share=(rank, 2)).epoch(3))
        for rank in (0, 1)
    ]
    joined = [
        replace(a, rich=torch.cat([a.rich, b.rich]), poor=torch.cat([a.poor, b.poor]),
                index=torch.cat([a.index, b.index]), target=torch.cat([a.target, b.target]))
        for a, b in zip(*parts, strict=True)
    ]  # fmt: skip
    for other in [*others, joined]:
        for one, two in zip(whole, other, strict=True):
            for name in ("rich", "poor", "target", "index"):
                assert torch.equal(getattr(one, name), getattr(two, name)), name


def test_fields_that_do_not_fit() -> None:
    poor = opened().poor
    with pytest.raises(ValueError, match="multiple of the 3 processes, got 16"):
        Batches(recipe(), poor=poor, share=(0, 3))
    with pytest.raises(ValueError, match="accumulate=6 needs as many batches"):
        Batches(recipe(accumulate=6), poor=poor)
    with pytest.raises(ValueError, match="poor images, rich ones or both"):
        Batches(recipe())
