"""Cross-correlation of projected embeddings: the semantic enhancement module (SEM)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from structkd._checks import choice, number, whole
from structkd.criteria._fields import either
from structkd.criteria._gram import FORMS, cross_product_energy, off_diagonal, takes_gram
from structkd.criteria._moments import Columns, inverse_scale, moments
from structkd.criteria._terms import checked_terms
from structkd.criteria.base import Criterion
from structkd.distributed import gather_batch, shard_sizes
from structkd.features import Features
from structkd.projectors import Projector

PROJECTORS = ("linear", "mlp", "none")
REDUCTIONS = ("mean", "sum")
TERMS = ("SEM-1", "SEM-2")

_CROSSOVER = 4
# Modules that treat every row by itself. Batch norm does not, and of others nobody knows.
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
    printed, so its weight goes with ``1 / d`` unless ``reduction="mean"``. Terms: ``SEM-1``
    (diagonal), ``SEM-2``. A channel that is zero (constant, if centred) over the batch correlates
    with nothing: C is 0 there.

    The loss has two exact forms. ``matrix`` builds the d x d matrix. ``gram`` uses
    :math:`\|C\|_F^2 = \langle Z_s Z_s^T, Z_t Z_t^T \rangle_F` on column-normalised Z, which needs
    B x B only; its B x B part is accumulated in float64, because the off-diagonal sum is a
    difference of near-equal numbers near the optimum. ``auto`` takes the cheaper one.

    The gradient of a column grows as one over its length, so that a channel that is nearly dead
    has a very large one. ``floor`` :math:`\epsilon > 0` bounds it: lengths become
    :math:`\sqrt{\|z_i\|^2 + \epsilon \, mean_j \|z_j\|^2}`, and C_ii stays a little below 1.

    Args:
        student_projector: Module ``(B, D_s) -> (B, d)``; none means identity.
        teacher_projector: Module ``(B, D_t) -> (B, d)``. It is frozen, as Eq. 12 minimises over the
            student's side only, unless ``train_teacher_projector``; so it shares no parameter with
            the student's then.
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
            unknown, the projectors share parameters of which one side would be frozen, or
            ``train_teacher_projector`` has no projector to train.

    References:
        Si et al., *A Dimensional Structure based Knowledge Distillation Method for Cross-Modal
        Learning*, Eq. 6-7. The form is Zbontar et al., *Barlow Twins*, 2021.

    Example:
        >>> criterion = CrossCorrelationLoss(nn.Linear(16, 32), lambd=0.01, center=True)
        >>> loss = criterion(torch.randn(8, 16), torch.randn(8, 32))
        >>> loss.shape
        torch.Size([])
    """

    reads = ("embedding",)
    couples = True
    sums_over_ranks = True
    min_batch = 2
    build_options = ("projector", "projector_dim")

    def __init__(
        self,
        student_projector: nn.Module | None = None,
        teacher_projector: nn.Module | None = None,
        *,
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
        self.enabled = checked_terms(terms, TERMS)
        self.reduction = choice("reduction", reduction, REDUCTIONS)
        self.lambd = number("lambd", lambd, at_least=0)
        self.center = center
        self.form = choice("form", form, FORMS)
        self.floor = number("floor", floor, at_least=0)
        _check_projectors(student_projector, teacher_projector, train_teacher_projector)
        self.student_projector = student_projector or nn.Identity()
        self.teacher_projector = teacher_projector or nn.Identity()
        self.teacher_projector.requires_grad_(train_teacher_projector)

    @classmethod
    def arguments(
        cls, feats_s: Features, feats_t: Features, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Returns projectors for the widths of two example passes.

        :meth:`from_features` takes two options for them. ``projector="linear"`` (the default) maps
        the student onto the teacher's own embedding, where widths agree too: nothing says that
        channel i of one network stands for channel i of the other. ``"mlp"`` maps both to
        ``projector_dim``, four times the teacher's width by default; ``"none"`` compares
        embeddings as they are.
        """
        if "student_projector" in options or "teacher_projector" in options:
            for name in cls.build_options:
                if name in options:
                    raise ValueError(
                        f"{name} builds projectors, but student_projector or teacher_projector was "
                        "given: leave one of them out"
                    )
            return {}
        embedding_s, embedding_t = either(feats_s, feats_t, "embedding")
        kind = choice("projector", options.get("projector", "linear"), PROJECTORS)
        width_s, width_t, width = embedding_s.shape[1], embedding_t.shape[1], None
        if options.get("projector_dim") is not None:
            width = whole("projector_dim", options["projector_dim"])
            if kind != "mlp":
                raise ValueError(f"projector_dim goes with projector='mlp', got projector={kind!r}")
        if kind == "none":
            if width_s != width_t:
                raise ValueError(
                    f"the embeddings are {width_s} and {width_t} wide: projector='none' needs "
                    "equal widths, use 'linear' or 'mlp'"
                )
            return {}
        if kind == "linear":
            return {"student_projector": Projector(width_s, width_t, layers=1)}
        width = width or 4 * width_t
        return {
            "student_projector": Projector(width_s, width),
            "teacher_projector": Projector(width_t, width),
        }

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        embedding_s, embedding_t = either(student, teacher, "embedding")
        sizes = [len(embedding_s)]
        if self.gather:
            sizes = shard_sizes(sizes[0], embedding_s.device)
        self._check_batch(sum(sizes))
        by_row = _is_row_wise(self.student_projector) and _is_row_wise(self.teacher_projector)
        if self.gather and not by_row:
            embedding_s = gather_batch(embedding_s, sizes)
            embedding_t = gather_batch(embedding_t, sizes)
        gather = self.gather and by_row  # what is left to bring together
        projected_s = self.student_projector(embedding_s)
        projected_t = self.teacher_projector(embedding_t)
        if projected_s.shape[1] != projected_t.shape[1]:
            raise ValueError(
                "student and teacher embeddings must have one width after projection, got "
                f"{projected_s.shape[1]} and {projected_t.shape[1]}; pass student_projector="
                f"structkd.Projector({embedding_s.shape[1]}, {projected_t.shape[1]})"
            )
        if takes_gram(self.form, projected_s, _CROSSOVER, rows=sum(sizes)):
            if gather:
                projected_s = gather_batch(projected_s, sizes)
                projected_t = gather_batch(projected_t, sizes)
            diagonal, off = _gram_form(
                _unit_columns(projected_s, self.center, self.floor),
                _unit_columns(projected_t, self.center, self.floor),
            )
        else:
            columns = [Columns(projected_s.T, projected_t.T)]
            ((found,),) = moments(columns, center=self.center, gather=gather)
            scale_s = inverse_scale(found.spread_s, self.floor)
            scale_t = inverse_scale(found.var_t, self.floor)
            correlation = found.cross * scale_s[:, None] * scale_t
            diagonal = correlation.diagonal()
            off = off_diagonal(correlation).square().sum()
        scale = 1 / projected_s.shape[1] if self.reduction == "mean" else 1.0
        terms = {
            "SEM-1": scale * (1 - diagonal).square().sum(),
            "SEM-2": scale * self.lambd * off,
        }
        return {name: terms[name] for name in self.enabled}

    def extra_repr(self) -> str:
        return (
            f"reduction={self.reduction!r}, lambd={self.lambd}, center={self.center}, "
            f"form={self.form!r}, floor={self.floor}, terms={self.enabled}"
        )


def _check_projectors(
    student: nn.Module | None, teacher: nn.Module | None, train_teacher: bool
) -> None:
    if train_teacher and teacher is None:
        raise ValueError(
            "train_teacher_projector=True, but there is no teacher_projector to train; pass one, "
            "or from_features(..., projector='mlp')"
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
    return all(type(module) in _ROW_WISE for module in projector.modules())


def _unit_columns(projected: Tensor, center: bool, floor: float) -> Tensor:
    """Scales columns to unit length; columns with nothing in them become zero, not noise."""
    length = torch.linalg.vector_norm(projected, dim=0)
    grain = torch.zeros_like(length)
    if center:
        # What is left of a constant column is the rounding of its mean: some 5 eps for 10,000 rows.
        grain = 16 * torch.finfo(projected.dtype).eps * length.detach()
        projected = projected - projected.mean(dim=0)
        length = torch.linalg.vector_norm(projected, dim=0)
    # Written so that NaN stays NaN: a comparison with it is false.
    empty = length <= grain
    square = torch.where(empty, 0, torch.where(empty, 1, length).square())
    return torch.where(empty, 0, projected * inverse_scale(square, floor))


def _gram_form(unit_s: Tensor, unit_t: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the diagonal of C and the sum of squares off it, without the matrix C."""
    dtype = unit_s.dtype
    unit_s, unit_t = unit_s.double(), unit_t.double()
    diagonal = (unit_s * unit_t).sum(dim=0)
    off = cross_product_energy(unit_s, unit_t) - diagonal.square().sum()
    # Rounding can leave the difference just below zero; NaN passes through clamp.
    return diagonal.to(dtype), off.clamp_min(0).to(dtype)
