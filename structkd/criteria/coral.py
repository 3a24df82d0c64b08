"""CORAL: alignment of second-order statistics."""

from __future__ import annotations

from torch import Tensor, nn

from structkd._checks import choice
from structkd.criteria.base import Criterion, either, pair
from structkd.criteria.numerics import FORMS, cross_product_energy, takes_gram
from structkd.features import Features
from structkd.projectors import Projector, project

_CROSSOVER = 6


class CORALLoss(Criterion):
    r"""Squared Frobenius distance between the covariances of student and teacher embeddings.

    .. math::
        L = \frac{1}{4 d^2} \|\mathrm{Cov}_s - \mathrm{Cov}_t\|_F^2, \qquad
        \mathrm{Cov}_x = \frac{1}{B-1} \sum_b (x_b - \bar x)(x_b - \bar x)^T

    With centred rows X, Y and D = X - Y, S = X + Y, both forms start from the difference of the
    rows, which keeps its digits where X is near Y. ``matrix`` builds one d x d product:

    .. math:: X^T X - Y^T Y = \tfrac{1}{2} (M + M^T), \qquad M = D^T S

    ``gram`` never does,

    .. math::
        \|X^T X - Y^T Y\|_F^2 = \tfrac{1}{2} \left(
            \langle D D^T, S S^T \rangle_F + \langle S D^T, D S^T \rangle_F \right)

    needs B x B only, in float64. ``auto`` takes the cheaper one. Term: ``CORAL``.

    Args:
        student_projector: Module ``(B, D_s) -> (B, d)`` that brings the student's embedding to the
            teacher's width; by default a linear :class:`Projector` where the widths of the first
            call differ, and nothing where they agree.
        form: ``auto``, ``matrix`` or ``gram``.
        gather: Estimate the covariances on the batch of all processes.

    Shape:
        student ``(B, D_s)``, teacher ``(B, d)``, any float dtype, B >= 2; output a scalar in
        float32 (float64 for float64 inputs).

    Raises:
        ValueError: If the widths differ after projection or ``form`` is unknown.

    References:
        Sun & Saenko, *Deep CORAL: Correlation Alignment for Deep Domain Adaptation*, 2016, Eq. 1-3.

    Example:
        >>> import torch
        >>> x = torch.randn(8, 16)
        >>> float(CORALLoss()(x, x + 3)) < 1e-12  # a shift leaves the covariance as it is
        True
    """

    reads = ("embedding",)
    over_ranks = "gathered"
    min_batch = 2

    def __init__(
        self,
        student_projector: nn.Module | None = None,
        *,
        form: str = "auto",
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        self.student_projector = (
            Projector(layers=1, skip_equal=True) if student_projector is None else student_projector
        )
        self.form = choice("form", form, FORMS)

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        rows_s, rows_t = either(student, teacher, "embedding")
        student = student.replace(
            embedding=project(self.student_projector, rows_s, rows_t.shape[1])
        )
        embedding_s, embedding_t = pair(student, teacher, "embedding")
        return {"CORAL": coral_distance(embedding_s, embedding_t, self.form)}


def coral_distance(rows_s: Tensor, rows_t: Tensor, form: str) -> Tensor:
    """Returns :class:`CORALLoss`'s value for rows ``(B, d)`` of one width, by one of ``FORMS``."""
    batch, width = rows_s.shape
    centred_s = rows_s - rows_s.mean(dim=0)
    centred_t = rows_t - rows_t.mean(dim=0)
    if takes_gram(form, rows_s, _CROSSOVER):
        distance = _gram_form(centred_s, centred_t)
    else:
        # A difference of two covariances would lose the digits of a small distance.
        product = (centred_s - centred_t).T @ (centred_s + centred_t)
        distance = ((product + product.T) / 2).square().sum()
    return distance / (4 * width**2 * (batch - 1) ** 2)


def _gram_form(centred_s: Tensor, centred_t: Tensor) -> Tensor:
    dtype = centred_s.dtype
    centred_s, centred_t = centred_s.double(), centred_t.double()
    gap, total = centred_s - centred_t, centred_s + centred_t
    mixed = total @ gap.T
    distance = 0.5 * (cross_product_energy(gap, total) + (mixed * mixed.T).sum())
    return distance.clamp_min(0).to(dtype)
