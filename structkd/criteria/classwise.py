"""Distributions by class as the target, where no sample of one set belongs to one of the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structkd._checks import NO_LABEL, describe, labels, number
from structkd.criteria._fields import missing
from structkd.criteria._rows import labelled_mean
from structkd.criteria.base import Criterion
from structkd.features import Features
from structkd.projectors import Projector

_OF = "the number of classes in the teacher's set"


class ClassMeanKDLoss(Criterion):
    r"""Soft-label distillation from what the teacher says of a class on average.

    With the teacher's logits :math:`t_j` and labels :math:`c_j` of its whole set,

    .. math::
        P_c = \frac{1}{|\{j : c_j = c\}|} \sum_{j : c_j = c} \mathrm{softmax}(t_j / \tau), \qquad
        L = \frac{\tau^2}{|\mathcal{Y}|} \sum_{b \in \mathcal{Y}}
            KL\left(P_{y_b} \,\|\, \mathrm{softmax}(s_b / \tau)\right)

    over the rows that have a label: a softened label, smoothed by which classes the teacher takes
    for which. It reads no teacher's features, so that none runs. Term: ``ClassKD``.

    Args:
        logits: The teacher's of its whole set, ``(M, K)``, floating point.
        labels: Its classes ``(M,)`` int64; rows of -100 do not count.
        temperature: tau > 0.
        gather: Take the mean over the labelled rows of all processes.

    Shape:
        the student's logits ``(B, K)``, any float dtype; target ``(B,)`` int64 in ``[0, K)`` or
        -100; output a scalar in float32 (float64 for float64 inputs).

    Raises:
        ValueError: If the target is missing, out of range or (on the CPU; elsewhere the loss is
            NaN) of a class that the teacher's set does not have, or class counts differ.
        TypeError: If a tensor has the wrong dtype.

    References:
        Tran et al., ICML 2026, arXiv 2606.10504, argue for aligning distributions and not samples;
        this is the simplest form of it on predictions, and ours.

    Example:
        >>> criterion = ClassMeanKDLoss(torch.eye(3), torch.arange(3), temperature=1.0)
        >>> criterion(torch.eye(3), Features(), torch.arange(3)).abs() < 1e-6
        tensor(True)
    """

    reads = ("logits",)
    reads_teacher: ClassVar[bool] = False
    same_on_all_ranks: ClassVar[tuple[str, ...]] = ("log_mean", "present")
    log_mean: Tensor
    present: Tensor

    def __init__(
        self, logits: Tensor, labels: Tensor, *, temperature: float = 4.0, gather: bool = False
    ) -> None:
        super().__init__(gather=gather)
        self.temperature = number("temperature", temperature, above=0)
        rows = _finite(logits, "logits")
        shares = _one_hot(labels, rows, rows.shape[1])
        count = shares.sum(dim=0)
        log_p = torch.log_softmax(rows / self.temperature, dim=1)
        mean = (shares.T @ log_p.exp()) / count[:, None].clamp_min(1)
        mean[count == 0] = 1 / len(count)  # never read, but finite
        self.register_buffer("log_mean", mean.log().to(_wide(logits)))
        self.register_buffer("present", _flags(count))

    @classmethod
    def arguments(
        cls, feats_s: Features, feats_t: Features, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Says what it is made of, which example passes do not hold."""
        _check_given(cls.__name__, "logits", options)
        return {}

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        name = type(self).__name__
        if student.logits is None:
            raise ValueError(missing(name, "student.logits", student, "logits"))
        batch, classes = student.logits.shape
        if classes != len(self.log_mean):
            raise ValueError(
                f"student.logits must score the teacher's {len(self.log_mean)} classes, "
                f"got {classes}"
            )
        index, labelled = labels(target, batch, classes, reader=name, of=_OF)
        present = self.present > 0
        _check_present(index, labelled, present)
        log_t = self.log_mean.to(student.logits.dtype)[index]
        log_s = F.log_softmax(student.logits / self.temperature, dim=1)
        costs = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim=1)
        costs = torch.where(present[index], costs, torch.nan)
        return {"ClassKD": self.temperature**2 * labelled_mean(costs, labelled, gather=self.gather)}

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, classes={len(self.log_mean)}"


class ClassCORALLoss(Criterion):
    r"""CORAL class by class, with a teacher's set of other samples.

    With :math:`\mu_c, \Sigma_c` the teacher's mean and covariance over the samples of class c of
    its whole set, and :math:`\hat\mu_c, \hat\Sigma_c` the student's over the :math:`n_c` rows of
    the batch that have this label, n in all,

    .. math::
        L = \sum_c \frac{n_c}{n} \left( \frac{1}{4 d^2} \|\hat\Sigma_c - \Sigma_c\|_F^2
            + \frac{w}{d} \|\hat\mu_c - \mu_c\|^2 \right)

    A class with one row in the batch has no covariance and is compared in its mean alone. One with
    a few has a rough one, whose scatter the loss counts as distance: use large batches, or
    ``gather``. It reads no teacher's features, so that none runs. Memory is K d^2 for the teacher,
    and K d (d + B) for the student. Terms: ``ClassCORAL-covariance`` and ``ClassCORAL-mean``.

    Args:
        embedding: The teacher's of its whole set, ``(M, d)``, floating point.
        labels: Its classes ``(M,)`` int64; rows of -100 do not count.
        student_projector: Module ``(B, D_s) -> (B, d)`` that brings the student's embedding to the
            teacher's width, a linear :class:`Projector` from :meth:`from_features` where widths
            differ; none means that they agree.
        mean_weight: w >= 0; 0 is CORAL's second moments alone.
        gather: Take the moments over the rows of all processes.

    Shape:
        the student's embedding ``(B, D_s)``, any float dtype; target ``(B,)`` int64, a class of the
        teacher's or -100; output a scalar in float32 (float64 for float64 inputs).

    Raises:
        ValueError: If the target is missing, out of range or (on the CPU; elsewhere the loss is
            NaN) of a class that the teacher's set does not have, or widths differ.
        TypeError: If a tensor has the wrong dtype.

    References:
        Sun & Saenko, *Deep CORAL*, 2016, Eq. 1, taken by class; Tran et al., ICML 2026, arXiv
        2606.10504, argue for aligning distributions and not samples.

    Example:
        >>> rows, classes = torch.randn(8, 3), torch.arange(8) % 2
        >>> criterion = ClassCORALLoss(rows, classes)
        >>> float(criterion(rows.flip(0), Features(), classes.flip(0))) < 1e-10
        True
    """

    reads = ("embedding",)
    reads_teacher: ClassVar[bool] = False
    couples = True
    same_on_all_ranks: ClassVar[tuple[str, ...]] = ("means", "covariances", "present")
    means: Tensor
    covariances: Tensor
    present: Tensor

    def __init__(
        self,
        embedding: Tensor,
        labels: Tensor,
        student_projector: nn.Module | None = None,
        *,
        mean_weight: float = 1.0,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        self.mean_weight = number("mean_weight", mean_weight, at_least=0)
        self.student_projector = student_projector
        rows = _finite(embedding, "embedding")
        shares = _one_hot(labels, rows, None)
        count = shares.sum(dim=0)
        if bool((count == 1).any()):
            alone = (count == 1).nonzero()[:, 0].tolist()
            raise ValueError(
                f"embedding must hold at least 2 samples of a class, which has no covariance "
                f"otherwise, got 1 of class(es) {alone}: mark these rows with -100"
            )
        # Class by class: all at once would take K M d numbers.
        parts = [_moments(rows[own > 0], own[own > 0, None]) for own in shares.T]
        means, covariances = (
            torch.cat(part).to(_wide(embedding)) for part in zip(*parts, strict=True)
        )
        self.register_buffer("means", means)
        self.register_buffer("covariances", covariances)
        self.register_buffer("present", _flags(count))

    @classmethod
    def arguments(
        cls, feats_s: Features, feats_t: Features, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Returns a linear projector where the student's width is not the teacher's."""
        _check_given(cls.__name__, "embedding", options)
        if "student_projector" in options or feats_s.embedding is None:
            return {}
        widths = feats_s.embedding.shape[1], options["embedding"].shape[1]
        return {} if widths[0] == widths[1] else {"student_projector": Projector(*widths, layers=1)}

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        name, rows = type(self).__name__, student.embedding
        if rows is None:
            raise ValueError(missing(name, "student.embedding", student, "embedding"))
        if self.student_projector is not None:
            rows = self.student_projector(rows)
        classes, width = self.means.shape
        if rows.shape[1] != width:
            raise ValueError(
                f"student.embedding must be {width} wide as the teacher's, got {rows.shape[1]}; "
                f"pass student_projector=structkd.Projector({rows.shape[1]}, {width}, layers=1)"
            )
        index, labelled = labels(target, len(rows), classes, reader=name, of=_OF)
        present = self.present > 0
        _check_present(index, labelled, present)
        shares = F.one_hot(index, classes).to(rows.dtype) * labelled[:, None]
        count = shares.sum(dim=0)
        lost = (count > 0) & ~present
        share = (count / count.sum().clamp_min(1)).masked_fill(lost, torch.nan)
        means, covariances = _moments(rows, shares)
        apart = (means - self.means.to(rows.dtype)).square().sum(dim=1) / width
        spread = (covariances - self.covariances.to(rows.dtype)).square().sum(dim=(1, 2))
        spread = spread / (4 * width**2)
        return {
            "ClassCORAL-covariance": torch.where(count > 1, share * spread, 0).sum(),
            "ClassCORAL-mean": self.mean_weight * torch.where(count > 0, share * apart, 0).sum(),
        }

    def extra_repr(self) -> str:
        return f"classes={len(self.means)}, mean_weight={self.mean_weight}"


def _moments(rows: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Returns means ``(K, d)`` and covariances ``(K, d, d)`` of rows by class.

    Args:
        rows: ``(B, d)``.
        shares: 1 where a row is of a class, ``(B, K)``, else 0. A class of no row has mean 0.
    """
    count = shares.sum(dim=0)
    means = (shares.T @ rows) / count.clamp_min(1)[:, None]
    # About its own class's mean before the product, which would lose the digits otherwise.
    centred = (rows - shares @ means) * shares.T[:, :, None]
    spread = centred.transpose(1, 2) @ centred
    return means, spread / (count - 1).clamp_min(1)[:, None, None]


def _finite(rows: Tensor, name: str) -> Tensor:
    """Returns a teacher's rows in float64."""
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {describe(rows)}")
    if rows.dim() != 2:
        raise ValueError(f"{name} must be 2-D, a row for each of the teacher's samples, got "
                         f"{describe(rows)}")  # fmt: skip
    if not bool(rows.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return rows.detach().double()


def _wide(rows: Tensor) -> torch.dtype:
    """Returns the dtype to keep a teacher's statistics in, whatever precision it ran in."""
    return torch.promote_types(rows.dtype, torch.float32)


def _flags(count: Tensor) -> Tensor:
    """Returns 1 where a class has a sample, else 0.

    Numbers, not truths: torch's average of weights with its buffers subtracts them.
    """
    return (count > 0).float()


def _one_hot(given: Tensor, rows: Tensor, classes: int | None) -> Tensor:
    """Returns 1 where a row is of a class, ``(M, K)`` float64; classes as they come by default."""
    if not isinstance(given, Tensor):
        raise TypeError(f"labels must be an int64 tensor (M,), got {describe(given)}")
    if classes is None and given.numel():
        classes = max(int(given.max()) + 1, 1)
    index, labelled = labels(
        given, len(rows), classes or 1, reader="the teacher's set", of=_OF, name="labels"
    )
    if not bool(labelled.any()):
        raise ValueError(f"labels must name a class of one sample at least, got {NO_LABEL} alone")
    return F.one_hot(index, classes or 1).double() * labelled[:, None]


def _check_given(name: str, rows: str, options: Mapping[str, Any]) -> None:
    lacking = [option for option in (rows, "labels") if options.get(option) is None]
    if lacking:
        raise ValueError(
            f"{name} needs {' and '.join(f'{option}=...' for option in lacking)}: the teacher's "
            f"{rows} and classes of its whole set, from a pass over it"
        )


def _check_present(index: Tensor, labelled: Tensor, present: Tensor) -> None:
    if index.device.type != "cpu" or torch.compiler.is_compiling():
        return
    lacking = sorted(set(index[labelled & ~present[index]].tolist()))
    if lacking:
        raise ValueError(
            f"target names class(es) {lacking} of which the teacher's set has no sample: give "
            f"these rows {NO_LABEL} here, or the teacher samples of the class"
        )
