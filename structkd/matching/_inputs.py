"""Checks of what a caller hands to a gallery or a data set of matches."""

from __future__ import annotations

import torch
from torch import Tensor

from structkd._checks import describe
from structkd.features import Features


def queries_of(features: Features | Tensor, metric: str) -> Tensor:
    """Returns what a gallery of this metric is asked with: logits for ``kl``, else embeddings."""
    if isinstance(features, Tensor):
        return features
    if not isinstance(features, Features):
        raise TypeError(f"features must be Features or a tensor, got {describe(features)}")
    field = "logits" if metric == "kl" else "embedding"
    queries: Tensor | None = getattr(features, field)
    if queries is None:
        raise ValueError(f"features.{field} is missing, which a {metric!r} gallery reads")
    return queries


def whole_numbers(values: Tensor, name: str, count: int | None = None) -> Tensor:
    """Returns ``(N,)`` int64 on the CPU after checking type and shape."""
    if not isinstance(values, Tensor) or values.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be an int64 tensor, got {describe(values)}")
    if values.dim() != 1 or (count is not None and len(values) != count):
        wanted = "(N,)" if count is None else f"({count},), one a row"
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(values.shape)}")
    return values.detach().long().cpu()


def usable_vectors(vectors: Tensor, name: str, dim: int, *, directed: bool) -> Tensor:
    """Returns rows as float32 on the CPU after checking that a metric can score them.

    ``directed``: a row of zeros is refused, for it has no direction.
    """
    if not isinstance(vectors, Tensor) or not vectors.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {describe(vectors)}")
    if vectors.dim() != 2 or vectors.shape[1] != dim:
        raise ValueError(
            f"{name} must be (N, {dim}), the dim of this gallery, got {describe(vectors)}"
        )
    vectors = vectors.detach().float().cpu().contiguous()
    _refuse_rows(~vectors.isfinite().all(dim=1), name, "hold NaN or infinity")
    if directed:
        _refuse_rows((vectors == 0).all(dim=1), name, "are zero and have no direction")
    return vectors


def twice(values: Tensor) -> Tensor:
    """Returns the values that come again."""
    ordered = values.sort().values
    return ordered[1:][ordered[1:] == ordered[:-1]]


def refuse_ids(ids: Tensor, what: str) -> None:
    """Raises with the first of ``ids``, if there are any."""
    if len(ids):
        raise ValueError(f"{what} {ids[:5].tolist()}{'...' if len(ids) > 5 else ''}")


def _refuse_rows(bad: Tensor, name: str, what: str) -> None:
    rows = bad.nonzero()[:, 0].tolist()
    if rows:
        raise ValueError(
            f"{name} must be finite and usable: {len(rows)} row(s) {what}, "
            f"rows {rows[:5]}{'...' if len(rows) > 5 else ''}"
        )
