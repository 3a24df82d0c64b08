"""What an unpaired job trains on: two modalities of different samples, told only by class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from crossmodal.data import ImagePairs, load
from crossmodal.sources import stratified

Poor = Literal["noisy", "grey"]
POORS: tuple[Poor, ...] = ("noisy", "grey")

_HALVES_DRAW = 4  # apart from the draws of data.py; the same halves for every seed
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class Unpaired:
    """The images of an unpaired job; every set has one modality (``clean`` is ``poor``).

    Attributes:
        rich: what the teacher learns from.
        pseudo: the same samples made poor, in the same order: the matcher's free pairs.
        poor: what the student learns from; no sample of ``rich``.
        held_out_rich: what the teacher is evaluated on.
        held_out_poor: what the student is evaluated on.
        originals: ``poor`` in the rich modality, in the same order, where the poor images were made
            from them. Only the paired reference may see it: the setting has no such thing.
        poverty: what makes the poor modality poor, for the record.
    """

    rich: ImagePairs
    pseudo: ImagePairs
    poor: ImagePairs
    held_out_rich: ImagePairs
    held_out_poor: ImagePairs
    originals: ImagePairs | None
    poverty: str


def single(images: Tensor, of: ImagePairs) -> ImagePairs:
    """A set of one modality: these images, with all else as in ``of``."""
    return ImagePairs(images, images, of.labels, of.index, of.classes, of.name)


def halves(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Two disjoint halves of all rows, ascending, every class in proportion; a fixed draw."""
    first = torch.from_numpy(stratified(labels.numpy(), len(labels) // 2, draw=_HALVES_DRAW))
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[first] = False
    return first, rest.nonzero()[:, 0]


def grey(images: Tensor) -> Tensor:
    """The luma of uint8 (N, 3, H, W), as uint8 (N, 1, H, W)."""
    if images.shape[1] != 3:
        raise ValueError(
            f"--poor grey needs images of three colours, got {images.shape[1]} channel(s); "
            "fix: --poor noisy"
        )
    weights = torch.tensor(_LUMA).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True).round().to(torch.uint8)


def open_embedded(
    dataset: str,
    poor: Poor,
    *,
    amount: float,
    data_dir: Path | None = None,
    download: bool = False,
    limit: int | None = None,
    evaluate: str = "test",
) -> Unpaired:
    """A paired data set made unpaired: the teacher gets one half clean, the student the other poor.

    Args:
        dataset, amount, data_dir, download, limit: as ``data.load`` takes them.
        poor: ``noisy`` is salt and pepper, ``grey`` the luma alone.
        evaluate: ``test``, or ``val`` with both halves drawn from the rest of the training images.
    """
    train, held_out = (
        load(
            dataset,
            data_dir=data_dir,
            split=split,
            amount=amount,
            limit=limit,
            download=download,
        )
        for split in ("fit" if evaluate == "val" else "train", evaluate)
    )
    teachers, students = (chosen(train, rows) for rows in halves(train.labels))
    if min(len(set(half.labels.tolist())) for half in (teachers, students)) < len(train.classes):
        raise ValueError(
            f"{len(train)} images leave a class of {dataset} without an image in one of the "
            "halves; fix: a larger --limit"
        )

    def made_poor(pairs: ImagePairs) -> ImagePairs:
        return single(grey(pairs.clean) if poor == "grey" else pairs.poor, pairs)

    return Unpaired(
        rich=single(teachers.clean, teachers),
        pseudo=made_poor(teachers),
        poor=made_poor(students),
        held_out_rich=single(held_out.clean, held_out),
        held_out_poor=made_poor(held_out),
        originals=single(students.clean, students),
        poverty="grey" if poor == "grey" else f"noisy {amount:g}",
    )


def chosen(pairs: ImagePairs, rows: Tensor) -> ImagePairs:
    """These rows of a set; one of a single modality stays one."""
    clean = pairs.clean[rows]
    return ImagePairs(
        clean,
        clean if pairs.poor is pairs.clean else pairs.poor[rows],
        pairs.labels[rows],
        pairs.index[rows],
        pairs.classes,
        pairs.name,
        pairs.amount,
    )
