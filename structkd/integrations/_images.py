"""The images that a loop passes: one batch for both networks, or a pair of batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from structkd._checks import check_rows, describe


def images_of_both(
    given: object, for_teacher: Callable[[Tensor], Tensor], wanted: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the student's images, the teacher's, and which rows have a pair.

    Args:
        given: A batch, a pair (the student's, the teacher's), or with a mask ``(B,)`` bool a triple
            (the student's, the teacher's, the mask), whose teacher's images of other rows do not
            count.
        for_teacher: Makes the teacher's images of a batch that is normalised for the student.
        wanted: What is allowed, for the error.

    Returns:
        The student's, the teacher's of the rows that have a pair, and the positions of these, None
        for all.

    Raises:
        ValueError: If the images are none of these.
    """
    if isinstance(given, Tensor):
        return given, for_teacher(given), None
    if isinstance(given, tuple | list):
        if len(given) in (2, 3) and all(isinstance(part, Tensor) for part in given):
            x, x_teacher, *rest = given
            if not rest:
                return x, x_teacher, None
            (mask,) = rest
            if mask.dtype != torch.bool:
                raise ValueError(
                    f"the mask of rows that have a pair must be bool, got {describe(mask)}"
                )
            return (x, *rows_of(x_teacher, mask))
        came = f"{len(given)} of ({', '.join(describe(part) for part in given)})"
    else:
        came = describe(given)
    raise ValueError(f"{wanted}, batches of the same samples; as images came {came}")


def rows_of(x_teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the images of the rows that a mask names, and their positions."""
    check_rows(mask, "the mask of rows that have a pair", len(x_teacher))
    rows = mask.nonzero()[:, 0]
    return x_teacher[rows.to(x_teacher.device)], rows
