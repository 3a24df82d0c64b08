"""Batches: pairs stay pairs under augmentation, and an epoch visits each image once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from crossmodal.batches import Batches
from crossmodal.data import ImagePairs, Statistics

RAW = Statistics(torch.zeros(1), torch.ones(1))


def coordinates(count: int = 32) -> ImagePairs:
    """Every pixel of an image has another value, and the poor image is the clean one plus 100."""
    clean = torch.arange(1, 65, dtype=torch.uint8).reshape(1, 1, 8, 8).repeat(count, 1, 1, 1)
    labels, index = torch.arange(count) % 4, torch.arange(count) + 1000
    return ImagePairs(clean, clean + 100, labels, index, list("abcd"), "coordinates", 0.5)


def test_both_modalities_get_the_same_crop_and_flip() -> None:
    (batch,) = Batches(coordinates(), 32, statistics=RAW, shuffle=True, pad=2, flip=True)
    inside = batch.clean > 0
    assert torch.equal(inside, batch.poor > 0)
    assert torch.equal(batch.clean[inside] + 100, batch.poor[inside])


def test_every_image_is_a_window_of_the_padded_one_perhaps_mirrored() -> None:
    padded = torch.nn.functional.pad(coordinates(1).clean[0, 0], (2, 2, 2, 2)).float()
    windows = [padded[y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
    windows += [window.flip(1) for window in windows]
    (batch,) = Batches(coordinates(), 32, statistics=RAW, pad=2, flip=True)
    seen = [
        next(n for n, window in enumerate(windows) if torch.equal(image[0], window))
        for image in batch.clean
    ]
    assert len(set(seen)) > 10
    assert min(seen) < 25 <= max(seen)  # some straight, some mirrored


def test_no_flip_unless_asked() -> None:
    (batch,) = Batches(coordinates(), 32, statistics=RAW)
    assert torch.equal(batch.clean, coordinates().clean.float())


def test_an_epoch_visits_each_image_once_in_a_new_order() -> None:
    pairs = coordinates()
    batches = Batches(pairs, 8, statistics=RAW, shuffle=True)
    first, second = (torch.cat([batch.index for batch in batches]) for _ in range(2))
    assert first.sort().values.tolist() == list(range(32))
    assert not torch.equal(first, second)
    again = torch.cat([b.index for b in Batches(pairs, 8, statistics=RAW, shuffle=True)])
    assert torch.equal(first, again)


def test_labels_follow_their_images() -> None:
    pairs = coordinates()
    for batch in Batches(pairs, 8, statistics=RAW, shuffle=True):
        assert torch.equal(batch.target, pairs.labels[batch.index])


def test_an_incomplete_last_batch_is_left_out_of_training_only() -> None:
    assert [len(b.target) for b in Batches(coordinates(10), 4, statistics=RAW)] == [4, 4, 2]
    shuffled = Batches(coordinates(10), 4, statistics=RAW, shuffle=True)
    assert [len(b.target) for b in shuffled] == [4, 4]
    assert len(shuffled) == 2
    small = Batches(coordinates(3), 4, statistics=RAW, shuffle=True)
    assert [len(b.target) for b in small] == [3]


def test_images_are_normalised_and_contiguous_on_the_cpu() -> None:
    pairs = coordinates()
    (batch,) = Batches(pairs, 32, statistics=pairs.statistics)
    assert batch.clean.mean().item() == pytest.approx(0, abs=1e-5)
    assert batch.clean.std().item() == pytest.approx(1, abs=1e-5)
    # The poor image takes the clean one's statistics.
    shift = (batch.poor - batch.clean) * pairs.statistics.std
    assert torch.allclose(shift, torch.full_like(shift, 100), atol=1e-3)
    assert batch.poor.is_contiguous()


def test_fresh_noise_changes_every_epoch_and_spares_the_border() -> None:
    batches = Batches(coordinates(), 32, statistics=RAW, pad=2, fresh_noise=True)
    (first,), (second,) = list(batches), list(batches)
    border = first.clean == 0
    assert (first.poor[border] == 0).all()
    changed = (first.poor != first.clean)[~border]
    assert set(first.poor[~border][changed].unique().tolist()) == {0.0, 255.0}
    assert changed.float().mean().item() == pytest.approx(0.5, abs=0.06)
    assert not torch.equal(first.poor, second.poor)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Batches(coordinates(), 0, statistics=RAW)
    with pytest.raises(ValueError, match="pad must be at least 0"):
        Batches(coordinates(), 4, statistics=RAW, pad=-1)
    sensor = replace(coordinates(), amount=None)
    with pytest.raises(ValueError, match="fresh_noise"):
        Batches(sensor, 4, statistics=RAW, fresh_noise=True)
