"""Frobenius products of tall-times-wide matrices without building the wide square."""

from __future__ import annotations

from torch import Tensor

FORMS = ("auto", "matrix", "gram")


def takes_gram(form: str, embedding: Tensor, crossover: int, rows: int | None = None) -> bool:
    """Tells whether one of ``FORMS`` means the Gram form for embeddings ``(B, d)``.

    Args:
        form: ``auto`` takes the cheaper one.
        embedding: Of the batch and the width in question.
        rows: B, where these are a part of the batch only.
        crossover: The ``d / B`` from which the Gram form was measured to be the cheaper one, by
            benchmarks/forms.py. It is above 1 because the Gram form computes in float64.
    """
    if form != "auto":
        return form == "gram"
    batch, width = embedding.shape
    # Apple's GPUs have no float64, which the Gram form needs.
    return width > crossover * (batch if rows is None else rows) and embedding.device.type != "mps"


def cross_product_energy(left: Tensor, right: Tensor) -> Tensor:
    """Returns ``||left^T right||_F^2 = <left left^T, right right^T>_F`` for ``(B, d)`` inputs.

    In float64 inputs the two Gram matrices are ``B x B`` and ``d x d`` is never built.
    """
    return (left @ left.T * (right @ right.T)).sum()


def off_diagonal(square: Tensor) -> Tensor:
    """Returns the off-diagonal elements of a square matrix as ``(d - 1, d)``, without a mask."""
    width = square.shape[0]
    return square.flatten()[1:].view(width - 1, width + 1)[:, :-1] if width > 1 else square[:0]
