"""What a loop hands on as images: one batch for both networks, or a pair of batches."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from structkd._checks import describe


def images_of_both(
    given: object, for_teacher: Callable[[Tensor], Tensor], wanted: str
) -> tuple[Tensor, Tensor]:
    """Returns the student's images and the teacher's.

    Args:
        given: A batch, or a pair (the student's, the teacher's).
        for_teacher: Makes the teacher's images of a batch that is normalised for the student.
        wanted: What is allowed, for the error.

    Raises:
        ValueError: If the images are neither.
    """
    if isinstance(given, Tensor):
        return given, for_teacher(given)
    if isinstance(given, tuple | list):
        if len(given) == 2 and all(isinstance(part, Tensor) for part in given):
            return given[0], given[1]
        came = f"{len(given)} of ({', '.join(describe(part) for part in given)})"
    else:
        came = describe(given)
    raise ValueError(f"{wanted}, batches of the same samples; as images came {came}")
