"""Batches: pairs stay pairs under augmentation, and nothing but seed and epoch decides them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import NO_LABEL, Batch, Batches, Images, MixedBatches, Options
from data.batches import padded_crops, resized_crops
from data.draws import permutation, uniform
from data.poverty import poverty
from tests.examples import layouts
from tests.examples.entries import recipe_views


def still(**changes: Any) -> Options:
    return Options(**{"batch_size": 16, "pad": 0, "flip": False} | changes)


def pixels(images: torch.Tensor) -> Images:
    """Images in memory."""
    count = len(images)
    labels, index = torch.arange(count) % 4, torch.arange(count) + 1000
    read = lambda rows: images.numpy()[rows]  # noqa: E731
    return Images(read, np.arange(count), labels, index, list("abcd"))


def same(one: Batch, two: Batch) -> bool:
    pairs = zip(vars(one).values(), vars(two).values(), strict=True)
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


def joined(*parts: Batch) -> Batch:
    found = {}
    for name in vars(parts[0]):
        values = [getattr(part, name) for part in parts]
        found[name] = None if values[0] is None else torch.cat(values)
    return Batch(**found)


# Draws.


def test_draws_are_splitmix64() -> None:
    # Steele et al. (2014) in Python's whole numbers; state 0 gives 0xE220A8397B1DCDAF first.
    mask = (1 << 64) - 1

    def mixed(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    assert mixed(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    state = 0
    for part in (1, 2):
        state = mixed((state + 0x9E3779B97F4A7C15 + part) & mask)
    start = mixed(mixed(5) ^ (state >> 1))
    steps = [mixed((start + n * 0x9E3779B97F4A7C15) & mask) for n in range(1, 7)]
    found = uniform((1, 2), torch.tensor([9, 5]), 6)
    assert found[1].tolist() == [(bits >> 40) / 2**24 for bits in steps]
    many = uniform((3,), torch.arange(200), 500)
    assert many.mean().item() == pytest.approx(0.5, abs=0.005)
    assert many.var().item() == pytest.approx(1 / 12, abs=0.002)
    assert not torch.equal(uniform((0, 1), torch.arange(3), 4), uniform((1, 0), torch.arange(3), 4))


# Crops.


def test_both_modalities_of_a_scene_get_the_same_crop_and_flip() -> None:
    rich = pixels(torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).repeat(32, 1, 1, 1))
    options = still(batch_size=32, pad=2, flip=True)
    together = next(Batches(options, poor=rich, rich=rich).epoch(0))
    assert torch.equal(together.poor, together.rich)
    apart = next(Batches(options, poor=rich, rich=rich, together=False).epoch(0))
    assert not torch.equal(apart.poor, apart.rich)
    assert torch.equal(apart.poor, together.poor)


def test_every_crop_is_a_window_of_the_padded_image_perhaps_mirrored() -> None:
    image = torch.arange(1.0, 65).view(1, 1, 8, 8)
    padded = torch.nn.functional.pad(image[0, 0], (2, 2, 2, 2))
    windows = [padded[y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
    windows += [window.flip(1) for window in windows]
    draws = uniform((0,), torch.arange(200), 5)
    crops = padded_crops(image.repeat(200, 1, 1, 1), draws, pad=2, flip=True)
    seen = {next(n for n, w in enumerate(windows) if torch.equal(crop[0], w)) for crop in crops}
    assert len(seen) > 40


def test_resized_crops_lie_inside_and_keep_the_size() -> None:
    ramp = torch.arange(20.0).view(1, 1, 1, 20).expand(64, 1, 16, 20).contiguous()
    crops = resized_crops(ramp, uniform((4,), torch.arange(64), 5), flip=False)
    assert crops.shape == (64, 1, 16, 20)
    spans = crops[:, 0, 8].amax(1) - crops[:, 0, 8].amin(1)
    assert crops.min() >= 0
    assert crops.max() <= 19
    assert spans.min() < 10 < spans.max()


def test_the_border_is_the_mean_and_a_constant_band_is_nothing() -> None:
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    images[:, 1] = 77  # a dead detector
    poor = pixels(images)
    assert poor.statistics.constant == [1]
    for batch in Batches(still(pad=4), poor=poor).epoch(0):
        assert not batch.poor[:, 1].any()
        assert batch.poor.abs().max() < 3  # no border far from the mean


# Epochs.


def test_an_epoch_visits_each_image_once_in_an_order_of_its_own() -> None:
    batches = Batches(still(batch_size=8), poor=recipe_views().poor)
    first, second = (torch.cat([b.index for b in batches.epoch(n)]) for n in (0, 1))
    assert first.sort().values.tolist() == list(range(80))
    assert not torch.equal(first, second)
    assert torch.equal(first, torch.cat([b.index for b in batches.epoch(0)]))
    other = Batches(still(batch_size=8), poor=recipe_views().poor, seed=1)
    assert not torch.equal(first, torch.cat([b.index for b in other.epoch(0)]))
    assert permutation((0, 1), 5).sort().values.tolist() == list(range(5))


def test_an_incomplete_last_batch_is_left_out_of_training_only() -> None:
    poor = recipe_views().poor.chosen(torch.arange(10))
    batches = Batches(still(batch_size=4), poor=poor)
    assert [len(b.target) for b in batches.epoch(0)] == [4, 4]
    assert [len(b.target) for b in batches.still(4)] == [4, 4, 2]
    assert [len(b.target) for b in Batches(still(batch_size=40), poor=poor).epoch(0)] == [10]


@pytest.mark.parametrize("drawn", [{"pad": 2, "flip": True}, {"crop": "resized"}])
def test_streamed_rows_are_the_same_for_any_number_of_workers_and_processes(
    drawn: dict[str, Any], tmp_path: Path
) -> None:
    for part, count in (("train", 15), ("test", 2)):
        layouts.classes_of(tmp_path / part, ["cat", "dog"], count, size=32)
    lazy = recipe_views("folder", tmp_path)
    assert lazy.poor.pixels is None
    options = still(batch_size=10, **drawn)
    loaded = lazy.held(options)
    assert loaded.poor.pixels is not None
    assert lazy.rich.fingerprint == loaded.rich.fingerprint
    whole = list(Batches(options, poor=lazy.poor, rich=lazy.rich).epoch(3))
    assert len(whole) == 3
    others = [
        list(Batches(options, poor=views.poor, rich=views.rich, **more).epoch(3))
        for views, more in ((lazy, {"workers": 1}), (lazy, {"workers": 2}), (loaded, {}))
    ]
    parts = [
        list(Batches(options, poor=lazy.poor, rich=lazy.rich, share=(rank, 2)).epoch(3))
        for rank in (0, 1)
    ]
    others.append([joined(*both) for both in zip(*parts, strict=True)])
    for other in others:
        assert all(same(*both) for both in zip(whole, other, strict=True))


def test_options_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="multiple of the 3 processes, got 16"):
        Batches(still(), poor=recipe_views().poor, share=(0, 3))
    with pytest.raises(ValueError, match="poor images, rich ones or both"):
        Batches(still())


# Few labels.


def test_few_labels_come_in_every_batch_and_alone_for_the_lone_student() -> None:
    views = recipe_views(labels=8)
    known = views.poor.known()
    for share, wanted in ((0.0, None), (1 / 3, 4), (1.0, 12)):
        batches = Batches(still(batch_size=12), poor=views.poor, rich=views.rich, labelled=share)
        seen = []
        for batch in batches.epoch(0):
            assert len(batch.index) == 12
            assert torch.equal(batch.target, known[batch.index])
            seen.append(int((batch.target != NO_LABEL).sum()))
        assert len(seen) == len(batches) == 6  # as many as with all labels
        assert wanted is None or seen == [wanted] * 6
    many = recipe_views(labels=40)  # chance gives half a batch: nothing to mend
    plain, mixed = (
        list(Batches(still(), poor=many.poor, labelled=share).epoch(1)) for share in (0.0, 1 / 3)
    )
    assert all(same(*both) for both in zip(plain, mixed, strict=True))


def test_labels_come_in_whole_passes_and_to_every_process() -> None:
    views, options = recipe_views(labels=8), still(batch_size=12)
    batches = Batches(options, poor=views.poor, labelled=1 / 3)
    rows = torch.cat([batch.index[batch.target != NO_LABEL] for batch in batches.epoch(0)])
    assert rows.bincount().unique().tolist() == [0, 3]  # 24 places for 8 images
    parts = [
        list(Batches(options, poor=views.poor, labelled=1 / 3, share=(rank, 2)).epoch(0))
        for rank in range(2)
    ]
    for whole, *both in zip(batches.epoch(0), *parts, strict=True):
        assert same(whole, joined(*both))


def test_an_image_that_comes_again_in_an_epoch_is_cropped_anew() -> None:
    views = recipe_views(labels=4)
    batches = Batches(still(batch_size=4, pad=4), poor=views.poor, rich=views.rich, labelled=1)
    seen = list(batches.epoch(0))
    assert len({tuple(sorted(batch.index.tolist())) for batch in seen}) == 1
    first = [batch.poor[batch.index.argmin()].numpy().tobytes() for batch in seen]
    assert len(set(first)) > len(seen) / 2
    assert all(same(*both) for both in zip(seen, batches.epoch(0), strict=True))


# Mixed batches: own images and free pairs.


def mixed(size: int = 16, pairs: torch.Tensor | None = None, **more: Any) -> MixedBatches:
    views = recipe_views("unpaired-tiny")
    some = torch.arange(len(views.rich)) if pairs is None else pairs
    own = Batches(still(batch_size=size), poor=views.poor, labelled=1.0, **more)
    both = {"poor": views.pseudo.chosen(some), "rich": views.rich.chosen(some)}
    return MixedBatches.of(own, Batches(still(batch_size=size), **both, **more))


def test_a_mixed_batch_is_half_own_images_and_half_pairs_in_as_many_steps() -> None:
    views, batches = recipe_views("unpaired-tiny"), mixed()
    own, made = set(views.poor.index.tolist()), views.rich.index.tolist()
    seen = list(batches.epoch(0))
    assert len(seen) == len(batches) == 2
    for batch in seen:
        assert (len(batch.poor), len(batch.rich), len(batch.target)) == (16, 8, 16)
        assert batch.paired.tolist() == list(range(8, 16))
        index = views.poor.index[batch.index[:8]].tolist()
        assert set(index) <= own
        for row, image_p, image_t in zip(batch.index[8:], batch.poor[8:], batch.rich, strict=True):
            for images, image in ((views.pseudo, image_p), (views.rich, image_t)):
                raw = images.statistics.normalise(images.take(row[None]).float())
                torch.testing.assert_close(image, raw[0])
    assert not own & set(made)


def test_a_mixed_epoch_can_be_made_again_and_processes_part_both_halves() -> None:
    whole = list(mixed().epoch(1))
    assert all(same(*both) for both in zip(whole, mixed().epoch(1), strict=True))
    assert not same(whole[0], next(mixed().epoch(0)))
    shares = [list(mixed(share=(rank, 2)).epoch(1)) for rank in (0, 1)]
    for batch, one, two in zip(whole, *shares, strict=True):
        for half in (slice(0, 4), slice(4, 8)):
            parts = torch.cat([one.index[half], two.index[half]])
            assert torch.equal(parts, batch.index[2 * half.start : 2 * half.stop])
        assert torch.equal(torch.cat([one.rich, two.rich]), batch.rich)


def test_few_pairs_come_again_as_often_as_the_steps_need() -> None:
    batches = mixed(8, torch.arange(8))
    seen = torch.cat([batch.index[4:] for batch in batches.epoch(0)])
    assert len(batches) == 5
    assert len(seen) == 20
    orders = [tuple(part.tolist()) for part in seen[:16].split(8)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(8))
    assert orders[0] != orders[1]


def test_an_odd_batch_has_no_half() -> None:
    with pytest.raises(ValueError, match="--batch-size must be a multiple of 2 where one half"):
        mixed(5)


# What makes images poor.

PLAIN = torch.full((64, 3, 32, 32), 100, dtype=torch.uint8)
INDEX = torch.arange(64)


@pytest.mark.parametrize("text", ["noise:0.5", "noise:0.3-0.9", "lowres:3", "blur:1.5", "grey",
                                  "bands:1,0", "bands:0@2750"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_poor_image_depends_on_its_place_alone(text: str, dtype: torch.dtype) -> None:
    images = torch.randint(0, 256, (40, 3, 17, 23), dtype=torch.uint8)
    images = images if dtype == torch.uint8 else images / 255
    before, made = images.clone(), poverty(text)
    whole, some = made(images, INDEX[:40]), torch.tensor([31, 7, 19])
    assert torch.equal(made(images[some], INDEX[some]), whole[some])
    assert torch.equal(images, before)
    assert whole.dtype == (torch.uint8 if "@" in text else dtype)
    assert str(made) == text


@pytest.mark.parametrize("amount", [0.1, 0.5, 0.9])
def test_noise_turns_the_given_share_black_or_white_in_all_channels(amount: float) -> None:
    noisy, count = poverty(f"noise:{amount}")(PLAIN, INDEX), 64 * 32 * 32
    deviation = (amount / 2 * (1 - amount / 2) / count) ** 0.5
    for value in (0, 255):
        share = (noisy[:, 0] == value).float().mean().item()
        assert share == pytest.approx(amount / 2, abs=4 * deviation)
    assert set(noisy.unique().tolist()) == {0, 100, 255}
    assert torch.equal(noisy[:, 0], noisy[:, 1])
    assert len({image.numpy().tobytes() for image in noisy}) == 64


def test_a_range_of_noise_gives_every_image_an_amount_of_its_own() -> None:
    images, index = torch.full((300, 1, 32, 32), 128, dtype=torch.uint8), torch.arange(300)
    shares = (poverty("noise:0.3-0.9")(images, index) != images).double().mean(dim=(1, 2, 3))
    assert 0.3 - 0.06 < float(shares.min()) < 0.35  # four deviations of 1,024 draws
    assert 0.85 < float(shares.max()) < 0.9 + 0.06
    assert float(shares.mean()) == pytest.approx(0.6, abs=0.04)


def test_views_of_eight_bits_round_as_the_numbers_say() -> None:
    pixel = torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1)
    grey = poverty("grey")(pixel, INDEX[:1])
    assert int(grey) == round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    assert poverty("bands:2,0")(pixel, INDEX[:1]).flatten().tolist() == [50, 200]
    bands = torch.tensor([0.0, 1375.0, 2750.0, 9000.0]).view(1, 4, 1, 1)
    shown = poverty("bands:3,2,1,0@2750")(bands, INDEX[:1])
    assert shown.flatten().tolist() == [255, 255, 128, 0]
    checks = ((torch.arange(32)[:, None] + torch.arange(32)) % 2 * 200).byte().expand(1, 1, -1, -1)
    assert poverty("lowres:8")(checks, INDEX[:1]).unique().tolist() == [100]


@pytest.mark.parametrize(
    ("text", "word"),
    [("noise:much", "much"), ("noise:0.9-0.3", "0.3"), ("noise:1.3", "1.3"), ("noise", "number"),
     ("blur:x", "x"), ("blur:0", "sigma"), ("bands:3,b", "b"), ("bands:-1", "-1"),
     ("bands:1@-5", "WHITE"), ("lowres", "number"), ("lowres:0.5", "0.5"), ("grey:2", "no number"),
     ("gray", "did you mean 'grey'"), ("", "unknown view")],
)  # fmt: skip
def test_a_view_that_cannot_be_is_refused_when_it_is_read(text: str, word: str) -> None:
    with pytest.raises(ValueError, match=f"--view {text}") as refused:
        poverty(text)
    assert word in str(refused.value)
    assert "as in" in str(refused.value)


def test_a_view_of_other_images_is_named() -> None:
    for text in ("grey", "bands:4"):
        with pytest.raises(ValueError, match=f"--view {text} does not fit these images"):
            poverty(text)(PLAIN[:, :1], INDEX)


def test_labels_and_limits_lie_between_a_class_and_all() -> None:
    for option, count in (("limit", 3), ("limit", 81), ("labels", 3), ("labels", 81)):
        with pytest.raises(ValueError, match=rf"--{option} must lie between 4 .* got {count}"):
            recipe_views(**{option: count})
    part = recipe_views(limit=20, labels=8)
    assert (len(part.poor), int((part.poor.known() != NO_LABEL).sum())) == (20, 8)
    assert part.rich.labels.bincount().tolist() == [5] * 4


def test_rows_of_a_batch_are_on_the_device_and_hold_what_training_may_know() -> None:
    views = recipe_views(labels=8)
    batch = Batches(still(), poor=views.poor, rich=views.rich).first()
    assert torch.equal(batch.target, views.poor.known()[:16])
    assert batch.poor.dtype == batch.rich.dtype == torch.float32
    assert batch.to("cpu").paired is None
