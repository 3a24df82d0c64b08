"""One criterion under the shared contract: how to build it, feed it and check it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from structkd import Criterion, Features
from structkd.criteria.base import _mapped


@dataclass(frozen=True)
class Example:
    """A criterion with a batch that it can read."""

    criterion: Criterion
    student: Features
    teacher: Features
    target: Tensor | None = None


@dataclass(frozen=True)
class Case:
    """What the shared contract needs to know of a criterion.

    Attributes:
        name: Unique name of the case; several cases may test one class.
        make: ``make(seed, batch)`` builds the criterion and a float64 batch; sizes vary with seed.
            The criterion comes in float64 too.
        reads: The fields whose gradient is checked: ``logits``, ``embedding``, ``intermediate``.
        oracle: ``oracle(example) -> scalar`` in float64 with plain loops, written from the paper.
        min_batch: The smallest batch that the criterion takes.
        order_free: Permuting the batch does not change the value.
        scales: Factors on the inputs for which value and gradient must be finite in float32.
        half_scales: The same in bfloat16 and float16; only factors whose true gradient fits.
        gradcheck: The gradient with respect to the student is the value's (not reversed, sampled).
        reads_teacher: It looks at the teacher's features.
        pure: Calling twice gives the same value (no memory is updated, nothing is sampled).
        zero: ``zero(seed) -> Example`` whose value is 0, where the criterion has such an optimum.
    """

    name: str
    make: Callable[[int, int], Example]
    reads: tuple[str, ...]
    oracle: Callable[[Example], Tensor]
    min_batch: int = 1
    order_free: bool = True
    scales: tuple[float, ...] = (1e-4, 1e-2, 1.0, 1e2, 1e4)
    half_scales: tuple[float, ...] = (1e-4, 1e-2, 1.0, 1e2, 1e4)
    gradcheck: bool = True
    reads_teacher: bool = True
    pure: bool = True
    zero: Callable[[int], Example] | None = field(default=None)


def moved(example: Example, device: str) -> Example:
    """Returns an example on a device; its criterion moves there itself, as modules do."""

    def there(features: Features) -> Features:
        index = None if features.index is None else features.index.to(device)
        return _mapped(features, lambda value: value.to(device)).replace(index=index)

    return Example(
        example.criterion.to(device),
        there(example.student),
        there(example.teacher),
        None if example.target is None else example.target.to(device),
    )


def on(case: Case, device: str) -> Case:
    """Returns a case on a device; its definition is worked out on the CPU, which is faster there.

    Random numbers stay the CPU's, so that both devices see the same batch.
    """

    def oracle(example: Example) -> Tensor:
        back = replace(example, criterion=copy.deepcopy(example.criterion))
        return case.oracle(moved(back, "cpu")).to(device)

    return replace(
        case,
        make=lambda seed, batch: moved(case.make(seed, batch), device),
        oracle=oracle,
        zero=None if case.zero is None else lambda seed: moved(case.zero(seed), device),
    )


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def pick(rng: torch.Generator, low: int, high: int) -> int:
    """Returns a whole number in ``[low, high]``."""
    return int(torch.randint(low, high + 1, (), generator=rng))


def shaped(criterion: Criterion, student: Features, teacher: Features) -> Criterion:
    """Lets a criterion take its shape from features, in float64 as they are."""
    pixels = () if student.logits is None else student.logits.shape[2:]
    labels = torch.full((len(next(_tensors(student))), *pixels), -100)
    criterion.eval()
    with torch.no_grad():
        criterion.terms(student, teacher, labels)
    return criterion.train()


def value_and_gradient(criterion: Criterion, student: Tensor, teacher: Tensor):
    student = student.clone().requires_grad_()
    value = criterion(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def _tensors(features: Features) -> Iterator[Tensor]:
    yield from (v for v in (features.logits, features.embedding) if v is not None)
    yield from features.intermediate
