"""The two similarities of a gallery, as inner products for FAISS and exactly in float64."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from structkd._checks import choice, number

METRICS = ("cosine", "kl")


class Metric(Protocol):
    """A similarity that is an inner product of a database row and a query."""

    def width(self, dim: int) -> int:
        """Returns the width of the inner product's factors for vectors of width ``dim``."""

    def rows(self, vectors: Tensor) -> Tensor:
        """Returns the database factors ``(N, width)``."""

    def queries(self, vectors: Tensor) -> Tensor:
        """Returns the query factors ``(Q, width)``."""

    def scores(self, queries: Tensor, vectors: Tensor) -> Tensor:
        """Returns the similarities of ``(..., dim)`` vectors, broadcast, summed without a matmul.

        The result for a pair does not depend on its place in the batch, so that equal vectors tie.
        """


class Cosine:
    """``<x, y> / (|x| |y|)``."""

    def width(self, dim: int) -> int:
        return dim

    def rows(self, vectors: Tensor) -> Tensor:
        return _unit(vectors)

    def queries(self, vectors: Tensor) -> Tensor:
        return _unit(vectors)

    def scores(self, queries: Tensor, vectors: Tensor) -> Tensor:
        return (_unit(queries) * _unit(vectors)).sum(dim=-1)


class NegativeKL:
    r"""``-KL(p || q)`` of softened logits, p the database's and q the query's.

    ``-KL(p || q) = <p, log q> - sum p log p = <[p, -sum p log p], [log q, 1]>``.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def width(self, dim: int) -> int:
        return dim + 1

    def rows(self, vectors: Tensor) -> Tensor:
        log_p = self._log_softmax(vectors)
        p = log_p.exp()
        return torch.cat([p, -(p * log_p).sum(dim=-1, keepdim=True)], dim=-1)

    def queries(self, vectors: Tensor) -> Tensor:
        log_q = self._log_softmax(vectors)
        return torch.cat([log_q, torch.ones_like(log_q[..., :1])], dim=-1)

    def scores(self, queries: Tensor, vectors: Tensor) -> Tensor:
        # The difference first: near KL = 0 the inner-product form would cancel.
        log_p = self._log_softmax(vectors)
        return (log_p.exp() * (self._log_softmax(queries) - log_p)).sum(dim=-1)

    def _log_softmax(self, logits: Tensor) -> Tensor:
        return torch.log_softmax(logits.double() / self.temperature, dim=-1)


def make_metric(name: str, temperature: float) -> Metric:
    """Returns the metric called ``name`` after checking both arguments."""
    temperature = number("temperature", temperature, above=0)
    return NegativeKL(temperature) if choice("metric", name, METRICS) == "kl" else Cosine()


def _unit(vectors: Tensor) -> Tensor:
    vectors = vectors.double()
    # Twice, as the square of a tiny entry may underflow.
    vectors = vectors / vectors.abs().amax(dim=-1, keepdim=True)
    unit: Tensor = vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return unit
