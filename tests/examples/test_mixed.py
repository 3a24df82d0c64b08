"""Mixed batches: half own images, half free pairs, as many steps as without the pairs."""

from __future__ import annotations

import pytest
import torch

from crossmodal.data import Batches, MixedBatches
from tests.examples.tiny import opened, recipe


def made(size: int = 16, **more: object) -> MixedBatches:
    views = opened("unpaired-tiny")
    alone = Batches(recipe(batch_size=size), poor=views.poor, labelled=1.0, **more)
    pairs = Batches(recipe(batch_size=size), poor=views.pseudo, rich=views.rich, **more)
    return MixedBatches.of(alone, pairs)


def test_a_batch_is_half_own_images_and_half_pairs_in_as_many_steps() -> None:
    mixed = made()
    batches = list(mixed.epoch(0))
    assert len(batches) == len(mixed) == len(mixed.alone) == 2
    for batch in batches:
        assert (len(batch.poor), len(batch.pairs.poor), len(batch.pairs.rich)) == (8, 8, 8)
        assert batch.rich is None


def test_pairs_are_the_same_image_in_both_modalities_and_cropped_alike() -> None:
    views = opened("unpaired-tiny")
    rich, pseudo = views.rich, views.pseudo
    for batch in made().epoch(3):
        parts = (getattr(batch.pairs, name) for name in ("index", "poor", "rich"))
        for row, image_p, image_t in zip(*parts, strict=True):
            for images, image in ((pseudo, image_p), (rich, image_t)):
                raw = images.statistics.normalise(images.take(row[None]).float())
                torch.testing.assert_close(image, raw[0])


def test_an_epoch_can_be_made_again_and_another_has_other_images() -> None:
    mixed = made()

    def rows(epoch: int) -> list[list[int]]:
        return [
            [*batch.index.tolist(), *batch.pairs.index.tolist()] for batch in mixed.epoch(epoch)
        ]

    assert rows(1) == rows(1) != rows(0)


def test_few_pairs_come_again_as_often_as_the_steps_need() -> None:
    views = opened("unpaired-tiny")
    some = torch.arange(8)
    alone = Batches(recipe(batch_size=8), poor=views.poor)
    pairs = Batches(
        recipe(batch_size=8), poor=views.pseudo.chosen(some), rich=views.rich.chosen(some)
    )
    mixed = MixedBatches.of(alone, pairs)
    seen = torch.cat([batch.pairs.index for batch in mixed.epoch(0)])
    assert len(mixed) == 5
    assert seen.bincount(minlength=8).tolist() != [0] * 8
    assert len(seen) == 20
    orders = [tuple(part.tolist()) for part in seen[:16].split(8)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(8))
    assert orders[0] != orders[1]


def test_processes_part_both_halves() -> None:
    whole = list(made().epoch(0))
    shares = [list(made(share=(rank, 2)).epoch(0)) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        for part in ("index", "pairs"):
            read = (lambda b: b.index) if part == "index" else (lambda b: b.pairs.index)
            assert torch.equal(torch.cat([read(share[step]) for share in shares]), read(batch))


def test_an_odd_batch_has_no_half() -> None:
    with pytest.raises(ValueError, match="batch_size must be a multiple of 2 where one half"):
        made(5)
