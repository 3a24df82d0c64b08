"""Cases of pixels: a criterion on logits of pixels is its 2-D self on rows, taken in a loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from structkd import ChannelWiseLoss, DiceLoss, Features, LogitMSELoss
from tests.cases import adversarial, dskd, logits
from tests.cases.case import Case, Example, generator, normal, pick, shaped
from tests.reference import logits as reference
from tests.reference import maps

HEIGHT, WIDTH = 2, 3


def _of_rows(case: Case) -> Case:
    """Returns a 2-D case whose rows are laid out as the pixels of images."""

    def laid_out(example: Example) -> Example:
        side = lambda f: f if f.logits is None else f.replace(logits=_images(f.logits))  # noqa: E731
        target = example.target
        return replace(
            example,
            student=side(example.student),
            teacher=side(example.teacher),
            target=None if target is None else target.view(-1, HEIGHT, WIDTH),
        )

    def rows(features: Features) -> Features:
        return features if features.logits is None else features.replace(
            logits=torch.stack(list(_pixels(features.logits)))
        )  # fmt: skip

    def oracle(example: Example) -> Tensor:
        target = torch.stack(
            [label for image in example.target for line in image for label in line]
        )
        return case.oracle(
            replace(
                example,
                student=rows(example.student),
                teacher=rows(example.teacher),
                target=target,
            )
        )

    def zero(seed: int) -> Example:
        found = case.zero(seed)
        many = lambda value: torch.cat([value] * 6)[: 4 * HEIGHT * WIDTH]  # noqa: E731
        return laid_out(
            replace(
                found,
                student=found.student.replace(logits=many(found.student.logits)),
                teacher=found.teacher.replace(logits=many(found.teacher.logits)),
                target=many(found.target),
            )
        )

    return replace(
        case,
        name=f"{case.name}-pixels",
        make=lambda seed, batch: laid_out(case.make(seed, batch * HEIGHT * WIDTH)),
        oracle=oracle,
        zero=zero if case.zero else None,
    )


def _images(rows: Tensor) -> Tensor:
    """Lays rows out as images whose channels are last in memory or not, by their number."""
    images = rows.view(-1, HEIGHT, WIDTH, rows.shape[1]).permute(0, 3, 1, 2)
    return images if rows.shape[1] % 2 else images.contiguous()


def _pixels(images: Tensor) -> Iterator[Tensor]:
    for image in images:
        for y in range(image.shape[1]):
            for x in range(image.shape[2]):
                yield image[:, y, x]


def _regression(form: str, oracle: Callable[[Tensor, Tensor], Tensor], ignore: float | None):
    def make(seed: int, batch: int) -> Example:
        rng = generator(seed)
        channels = pick(rng, 1, 3)
        student, teacher = (normal(rng, batch, channels, 2, 3) for _ in range(2))
        target = normal(rng, batch, *([channels] if pick(rng, 0, 1) else []), 2, 3)
        # The first two pixels stay: log needs a variance.
        gone = torch.rand(target.shape, generator=rng) < 0.3
        gone.flatten()[:2] = False
        gone[..., 0, :] = False
        target[gone] = float("nan") if ignore is None else ignore
        criterion = LogitMSELoss(form=form, ignore=float("nan") if ignore is None else ignore)
        return Example(criterion, Features(logits=student), Features(logits=teacher), target)

    def definition(example: Example) -> Tensor:
        gone = example.target.isnan() if ignore is None else example.target == ignore
        student, teacher = example.student.logits, example.teacher.logits
        gone = (gone if gone.dim() == 4 else gone[:, None]).expand_as(student)
        kept = lambda value: value[~gone][:, None]  # noqa: E731
        if form == "log":
            total, spread = maps.mean_square(kept(student), kept(teacher)), []
            for c in range(student.shape[1]):
                values = list(teacher[:, c][~gone[:, c]])
                mean = sum(values) / len(values)
                spread.append(sum((v - mean) ** 2 for v in values) / len(values))
            return torch.log(total / (sum(spread) / len(spread)) + 0.01)
        return oracle(kept(student), kept(teacher))

    return make, ("logits",), definition


def _dice(classes: int, smooth: float):
    def make(seed: int, batch: int) -> Example:
        rng = generator(seed)
        values = normal(rng, batch, classes, 2, 3)
        target = torch.randint(0, max(2, classes - 1), (batch, 2, 3), generator=rng)
        target[:, 0, 0] = -100
        target[0, 1, 1] = 1
        return Example(DiceLoss(smooth=smooth), Features(logits=values), Features(), target)

    def oracle(example: Example) -> Tensor:
        rows = torch.stack(list(_pixels(example.student.logits)))
        return reference.dice(rows, example.target.flatten(), smooth)

    return make, ("logits",), oracle


def _channel_wise(source: str):
    def make(seed: int, batch: int) -> Example:
        rng = generator(seed)
        width = pick(rng, 1, 3)
        wide = width if source == "logits" else pick(rng, 1, 3)
        values = normal(rng, batch, width, 2, 3), normal(rng, batch, wide, 2, 3)
        student, teacher = (Features(**{source: value}) for value in values)
        torch.manual_seed(seed)
        criterion = ChannelWiseLoss(2.0, source=source)
        return Example(shaped(criterion, student, teacher).double(), student, teacher)

    def oracle(example: Example) -> Tensor:
        student, teacher = (
            f.logits if source == "logits" else f.intermediate[0]
            for f in (example.student, example.teacher)
        )
        conv = getattr(example.criterion.adapter, "conv", None)
        if conv is not None:
            student = maps.convolve(student, conv.weight, conv.bias)
        return reference.channel_wise(student, teacher, 2.0)

    return make, (source,), oracle


def _same(seed: int) -> Example:
    values = Features(logits=normal(generator(seed), 2, 3, 4, 4))
    return Example(ChannelWiseLoss().double(), values, values)


_ON_LOGITS = (*logits.CASES, *adversarial.CASES, *dskd.CASES)
# The true gradient of a logarithm of the error grows as errors shrink.
_LOG_HALF = (1e-2, 1.0, 1e2)

CASES = [
    *(_of_rows(case) for case in _ON_LOGITS if case.reads == ("logits",)),
    Case("dice", *_dice(4, 0.0), reads_teacher=False),
    Case("dice-binary", *_dice(1, 0.7), reads_teacher=False),
    Case("cwd-logits", *_channel_wise("logits"), zero=_same),
    Case("cwd-maps", *_channel_wise("intermediate")),
    Case("logits-nan", *_regression("squared", reference.logit_mse, None)),
    Case(
        "logits-absolute", *_regression("absolute", lambda s, t: reference.logit_mse(s, t, 1), 7.0)
    ),
    Case("logits-log", *_regression("log", maps.log_share, None), half_scales=_LOG_HALF),
]
