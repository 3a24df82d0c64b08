"""Cross-correlation of projected embeddings: the semantic enhancement module (SEM)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from structkd._checks import choice, number, terms_of, whole
from structkd.criteria.base import Criterion, either
from structkd.criteria.moments import Columns, moments
from structkd.criteria.numerics import (
    FORMS,
    cross_product_energy,
    inverse_scale,
    is_rounding,
    parted,
    takes_gram,
)
from structkd.distributed import Shards
from structkd.features import Features
from structkd.projectors import Projector, project

PROJECTORS = ("linear", "mlp", "none")
REDUCTIONS = ("mean", "sum")
TERMS = ("SEM-1", "SEM-2")

_CROSSOVER = 4
# Modules known to treat every row by itself. Batch norm does not, and others may not.
_ROW_WISE = (
    *(nn.Identity, nn.Linear, nn.LayerNorm, nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh),
    *(nn.Sequential, Projector),
)


class CrossCorrelationLoss(Criterion):
    r"""Makes every embedding channel match the teacher's and differ from its other channels.

    With projected embeddings :math:`z_s, z_t` of shape ``(B, d)``,

    .. math::
        C_{ij} = \frac{\langle z_{s,i}, z_{t,j} \rangle}{\|z_{s,i}\| \, \|z_{t,j}\|}, \qquad
        L = \sum_i (1 - C_{ii})^2 + \lambda \sum_{i \neq j} C_{ij}^2

    where :math:`z_{\cdot,i}` is a column over the batch. The loss is a sum over ``d`` channels, as
    printed, so the weight that suits it changes with ``1 / d`` unless ``reduction="mean"``. Terms:
    ``SEM-1`` (diagonal), ``SEM-2``. A channel that is zero (constant, if centred) over the batch
    correlates with nothing: C is 0 there.

    The loss has two exact forms. ``matrix`` builds the d x d matrix. ``gram`` uses
    :math:`\|C\|_F^2 = \langle Z_s Z_s^T, Z_t Z_t^T \rangle_F` on column-normalised Z, which needs
    B x B only; its B x B part is accumulated in float64, because the off-diagonal sum is a
    difference of near-equal numbers near the optimum. ``auto`` takes the cheaper one.

    The gradient of a column grows as one over its length, so that a channel that is nearly dead
    has a very large one. ``floor`` :math:`\epsilon > 0` bounds it: lengths become
    :math:`\sqrt{\|z_i\|^2 + \epsilon \, mean_j \|z_j\|^2}`, and C_ii stays a little below 1.

    Args:
        projector: What brings both embeddings to one width, shaped at the first call. ``linear``
            maps the student onto the teacher's own embedding, where widths agree too: nothing says
            that channel i of one network stands for channel i of the other. ``mlp`` maps both to
            ``projector_dim``; ``none`` compares embeddings as they are.
        projector_dim: d of ``mlp``, four times the teacher's width by default.
        student_projector: A module of your own ``(B, D_s) -> (B, d)`` in place of ``projector``.
        teacher_projector: Likewise ``(B, D_t) -> (B, d)``; a side without one is left as it is. The
            teacher's projector is frozen, as Eq. 12 minimises over the student's side only, unless
            ``train_teacher_projector``; so it shares no parameter with the student's then.
        reduction: ``mean`` divides by ``d``, so that a weight means the same at any width; ``sum``
            is Eq. 7.
        lambd: Weight of the off-diagonal part, >= 0.
        center: Subtract the column means first, which makes C the Pearson correlation of Barlow
            Twins; the paper does not.
        form: ``auto``, ``matrix`` or ``gram``.
        train_teacher_projector: Leave the teacher's projector trainable.
        floor: :math:`\epsilon >= 0`; 0 is the equation as printed.
        terms: Which of ``SEM-1`` and ``SEM-2`` to take.
        gather: Correlate over the batch of all processes. The matrix form all-reduces its sums, the
            Gram form gathers rows; so does a projector whose rows depend on each other, as batch
            norm makes them. The gradients of the projectors' parameters are to be averaged over
            the processes, as ``DistributedDataParallel`` around a Distiller does.

    Shape:
        student ``(B, D_s)``, teacher ``(B, D_t)``, any float dtype, B >= 2; output a scalar in
        float32 (float64 for float64 inputs).

    Raises:
        ValueError: If the projected widths differ, ``lambd`` or ``floor`` is negative, an option is
            unknown or has no meaning with the others, or the projectors share parameters of which
            one side would be frozen.

    References:
        Si et al., *A Dimensional Structure based Knowledge Distillation Method for Cross-Modal
        Learning*, Eq. 6-7. The form is Zbontar et al., *Barlow Twins*, 2021.

    Example:
        >>> criterion = CrossCorrelationLoss(lambd=0.01, center=True)
        >>> loss = criterion(torch.randn(8, 16), torch.randn(8, 32))
        >>> loss.shape
        torch.Size([])
    """

    reads = ("embedding",)
    over_ranks = "sums"
    min_batch = 2

    def __init__(
        self,
        *,
        projector: str | None = None,
        projector_dim: int | None = None,
        student_projector: nn.Module | None = None,
        teacher_projector: nn.Module | None = None,
        reduction: str = "sum",
        lambd: float = 5e-3,
        center: bool = False,
        form: str = "auto",
        floor: float = 0.0,
        train_teacher_projector: bool = False,
        terms: Sequence[str] = TERMS,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        self.enabled = terms_of(terms, TERMS)
        self.reduction = choice("reduction", reduction, REDUCTIONS)
        self.lambd = number("lambd", lambd, at_least=0)
        self.center = center
        self.form = choice("form", form, FORMS)
        self.floor = number("floor", floor, at_least=0)
        own = student_projector is not None or teacher_projector is not None
        if own and (projector is not None or projector_dim is not None):
            raise ValueError(
                "projector and projector_dim say which projectors to make, but student_projector "
                "or teacher_projector was given: leave one of them out"
            )
        self.projector: str | None = None
        self.projector_dim = None
        if not own:
            self.projector = choice("projector", projector or "linear", PROJECTORS)
        if self.projector == "linear":
            student_projector = Projector(layers=1)
        elif self.projector == "mlp":
            student_projector, teacher_projector = Projector(), Projector()
        if projector_dim is not None:
            self.projector_dim = whole("projector_dim", projector_dim)
            if self.projector != "mlp":
                raise ValueError(
                    f"projector_dim needs projector='mlp', got projector={self.projector!r}"
                )
        _check_projectors(student_projector, teacher_projector, train_teacher_projector)
        self.train_teacher_projector = train_teacher_projector
        self.student_projector = nn.Identity() if student_projector is None else student_projector
        self.teacher_projector = nn.Identity() if teacher_projector is None else teacher_projector
        for parameter in self.teacher_projector.parameters():
            parameter.requires_grad = train_teacher_projector  # as an attribute: it may be lazy

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None, shards: Shards
    ) -> dict[str, Tensor]:
        rows_s, rows_t = either(student, teacher, "embedding")
        alone = Shards.alone(shards.total)
        if not (_is_row_wise(self.student_projector) and _is_row_wise(self.teacher_projector)):
            rows_s, rows_t, shards = shards.gather(rows_s), shards.gather(rows_t), alone
        width = self.projector_dim or (4 if self.projector == "mlp" else 1) * rows_t.shape[1]
        projected_t = project(self.teacher_projector, rows_t, width)
        projected_s = project(self.student_projector, rows_s, projected_t.shape[1])
        if projected_s.shape[1] != projected_t.shape[1]:
            raise ValueError(
                "student and teacher embeddings must have one width after projection, got "
                f"{projected_s.shape[1]} and {projected_t.shape[1]}; leave projector='linear', the "
                f"default, or give student_projector=structkd.Projector({projected_t.shape[1]})"
            )
        if takes_gram(self.form, projected_s, _CROSSOVER, rows=shards.total):
            projected_s, projected_t = shards.gather(projected_s), shards.gather(projected_t)
            diagonal, off = _gram_form(
                _unit_columns(projected_s, self.center, self.floor),
                _unit_columns(projected_t, self.center, self.floor),
            )
        else:
            columns = [Columns(projected_s.T, projected_t.T)]
            ((found,),) = moments(columns, shards, center=self.center)
            scale_s = inverse_scale(found.spread_s, self.floor)
            correlation = found.cross * scale_s[:, None] * inverse_scale(found.var_t, self.floor)
            diagonal, off = parted(correlation)
        scale = 1 / projected_s.shape[1] if self.reduction == "mean" else 1.0
        terms = {
            "SEM-1": scale * (1 - diagonal).square().sum(),
            "SEM-2": scale * self.lambd * off,
        }
        return {name: terms[name] for name in self.enabled}


def off_diagonal_energy(left: Tensor, right: Tensor, diagonal: Tensor) -> Tensor:
    """Returns the sum of squares of ``left^T right`` off its known diagonal, without building it.

    Args:
        left: ``(n, d)``.
        right: ``(n, d)``, with n well below d.
        diagonal: The product's diagonal ``(d,)``.
    """
    # Rounding can leave the difference just below zero; NaN passes through clamp.
    return (cross_product_energy(left, right) - diagonal.square().sum()).clamp_min(0)


def _check_projectors(
    student: nn.Module | None, teacher: nn.Module | None, train_teacher: bool
) -> None:
    if train_teacher and teacher is None:
        raise ValueError(
            "train_teacher_projector=True, but there is no teacher_projector to train; pass one, "
            "or projector='mlp'"
        )
    if student is None or teacher is None or train_teacher:
        return
    own = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in own for parameter in teacher.parameters()):
        raise ValueError(
            "student_projector and teacher_projector share parameters, so that freezing the "
            "teacher's would freeze the student's: pass copy.deepcopy(projector) as "
            "teacher_projector, or train_teacher_projector=True"
        )


def _is_row_wise(projector: nn.Module) -> bool:
    # By exact type: what a subclass changes is not known.
    return all(
        type(module) in _ROW_WISE or isinstance(module, nn.LazyLinear)
        for module in projector.modules()
    )


def _unit_columns(projected: Tensor, center: bool, floor: float) -> Tensor:
    """Scales columns to unit length; a column of rounding errors alone becomes zero."""
    length = torch.linalg.vector_norm(projected, dim=0)
    empty = length <= 0
    if center:
        projected = projected - projected.mean(dim=0)
        before, length = length.detach(), torch.linalg.vector_norm(projected, dim=0)
        empty = is_rounding(length, before)
    square = torch.where(empty, 0, torch.where(empty, 1, length).square())
    return torch.where(empty, 0, projected * inverse_scale(square, floor))


def _gram_form(unit_s: Tensor, unit_t: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the diagonal of C and the sum of squares off it, without the matrix C."""
    dtype = unit_s.dtype
    unit_s, unit_t = unit_s.double(), unit_t.double()
    diagonal = (unit_s * unit_t).sum(dim=0)
    return diagonal.to(dtype), off_diagonal_energy(unit_s, unit_t, diagonal).to(dtype)
