"""Frobenius products of tall-times-wide matrices without building the wide square."""

from __future__ import annotations

from torch import Tensor

# One float64 Gram matrix costs about this many times what its float32 share of the d x d matrix
# costs per element (benchmarks/forms.py), so the Gram form pays from d > CROSSOVER * B on.
CROSSOVER = 2


def gram_pays(embedding: Tensor) -> bool:
    """Tells whether the Gram form is the cheaper one for embeddings ``(B, d)``."""
    rows, width = embedding.shape
    # Apple's GPUs have no float64, which the Gram form needs.
    return width > CROSSOVER * rows and embedding.device.type != "mps"


def cross_product_energy(left: Tensor, right: Tensor) -> Tensor:
    """Returns ``||left^T right||_F^2 = <left left^T, right right^T>_F`` for ``(B, d)`` inputs.

    In float64 inputs the two Gram matrices are ``B x B`` and ``d x d`` is never built.
    """
    return (left @ left.T * (right @ right.T)).sum()


def off_diagonal(square: Tensor) -> Tensor:
    """Returns the off-diagonal elements of a square matrix as ``(d - 1, d)``, without a mask."""
    width = square.shape[0]
    return square.flatten()[1:].view(width - 1, width + 1)[:, :-1] if width > 1 else square[:0]
