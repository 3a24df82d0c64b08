"""Dimensional-structure distillation: SEM and DCM, and the labels if asked, in one criterion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from structkd._checks import choice, describe, number
from structkd.criteria._terms import checked_terms
from structkd.criteria.base import Criterion, Input
from structkd.criteria.correlation import TERMS as SEM_TERMS
from structkd.criteria.correlation import CrossCorrelationLoss
from structkd.criteria.supervision import SupervisionLoss
from structkd.criteria.uniformity import TERMS as DCM_TERMS
from structkd.criteria.uniformity import UniformityCalibrationLoss
from structkd.features import Features

# What each variant stands for; docs/choices.md has the sweep behind "measured".
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "measured": {
        "gamma": (5.0, 0.02),
        "reduction": "mean",
        "center": True,
        "projector": "linear",
        "cross_sign": "align",
    },
    "printed": {
        "gamma": 0.1,
        "reduction": "sum",
        "center": False,
        "projector": "mlp",
        "cross_sign": "separate",
    },
}

_PARTS = (CrossCorrelationLoss, UniformityCalibrationLoss)


class DSLoss(Criterion):
    r"""Dimensional-structure distillation.

    .. math::
        L = SRM + \gamma_1 \, SEM + \gamma_2 \, DCM

    with :class:`CrossCorrelationLoss` (SEM) on the embeddings, :class:`UniformityCalibrationLoss`
    (DCM) on one intermediate map, and :class:`SupervisionLoss` (SRM) on the labels where
    ``srm=True``, which is the paper's Eq. 12 whole. The terms of its ablation are separate in
    :meth:`terms`: ``SRM``, ``SEM-1``, ``SEM-2``, ``DCM-1``, ``DCM-2``.

    Every option belongs to one part, which the constructor takes ready made. :meth:`from_features`
    builds the parts and takes all of their options by name, with

    * ``variant="measured"`` (the default): the options that did best on held-out data in our sweep,
      docs/choices.md: gamma 5 on the mean over SEM's channels and 0.02 on DCM, centred embeddings,
      a linear projector, the sign of the prose;
    * ``variant="printed"``: the equations as printed: one gamma of 0.1 for both, SEM summed over
      channels, no centring, MLP projectors that raise the width with the teacher's frozen, and
      Eq. 10's sign;
    * ``terms``: the terms to take, of ``SEM-1``, ``SEM-2``, ``DCM-1`` and ``DCM-2``. A part without
      any is not built, and has no parameters for an optimizer to decay.

    Any option that is given goes before the variant's.

    Args:
        sem: The part on embeddings, or None for none.
        dcm: The part on a map, or None for none.
        gamma: Weight >= 0 of SEM and DCM, or a pair with one for each.
        srm: Add the labels' cross-entropy. The target may then mark rows without a label by -100,
            which SEM and DCM use all the same.
        gather: Compute every part on the batch of all processes.

    Shape:
        ``Features`` with ``embedding (B, D)`` where SEM is on, ``intermediate`` where DCM is on,
        and the student's ``logits (B, K)`` where SRM is: then the target is class indices ``(B,)``
        or probabilities ``(B, K)``. Output a scalar.

    Raises:
        ValueError: If ``gamma`` is out of range, no part is left, or a feature that a part needs is
            missing or of another width.
        TypeError: If a part is of another class, or student or teacher are no ``Features``.

    References:
        Si et al., *A Dimensional Structure based Knowledge Distillation Method for Cross-Modal
        Learning*, Eq. 12 and Table 6.

    Example:
        >>> import torch
        >>> small, large = torch.randn(8, 64, 4, 4), torch.randn(8, 256, 4, 4)
        >>> feats_s = Features(embedding=small.mean((2, 3)), intermediate=small)
        >>> feats_t = Features(embedding=large.mean((2, 3)), intermediate=large)
        >>> criterion = DSLoss.from_features(feats_s, feats_t, lambd=0.01)
        >>> list(criterion.terms(feats_s, feats_t))
        ['SEM-1', 'SEM-2', 'DCM-1', 'DCM-2']
        >>> parts = DSLoss(sem=CrossCorrelationLoss(torch.nn.Linear(64, 256)), gamma=0.1)
        >>> parts(feats_s, feats_t).shape
        torch.Size([])
    """

    couples = True
    build_options = (
        "variant",
        *dict.fromkeys(name for kind in _PARTS for name in kind.options() if name != "gather"),
    )

    def __init__(
        self,
        sem: CrossCorrelationLoss | None = None,
        dcm: UniformityCalibrationLoss | None = None,
        *,
        gamma: float | tuple[float, float],
        srm: bool = False,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        for name, part, kind in (
            ("sem", sem, CrossCorrelationLoss),
            ("dcm", dcm, UniformityCalibrationLoss),
        ):
            if part is not None and not isinstance(part, kind):
                raise TypeError(f"{name} must be a {kind.__name__} or None, got {describe(part)}")
        if sem is None and dcm is None and not srm:
            raise ValueError("sem and dcm are None and srm is False: nothing is left")
        self.gamma = _gamma_pair(gamma)
        self.srm = SupervisionLoss() if srm else None
        self.sem = sem
        self.dcm = dcm
        parts: list[Criterion] = [part for part in (self.srm, sem, dcm) if part is not None]
        self.reads = tuple(field for part in parts for field in part.reads)  # type: ignore[misc]
        for each in parts:
            each.gather = each.gather or gather

    @classmethod
    def arguments(
        cls, feats_s: Features, feats_t: Features, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Returns the parts for the widths of two example passes, and the variant's gamma."""
        name = choice("variant", options.get("variant", "measured"), tuple(VARIANTS))
        variant = dict(VARIANTS[name])
        if "student_projector" in options or "teacher_projector" in options:
            del variant["projector"]
        found: dict[str, Any] = {"gamma": variant.pop("gamma")}
        terms = checked_terms(options.get("terms", SEM_TERMS + DCM_TERMS), SEM_TERMS + DCM_TERMS)
        for part, kind, own in (
            ("sem", CrossCorrelationLoss, SEM_TERMS),
            ("dcm", UniformityCalibrationLoss, DCM_TERMS),
        ):
            takes = [option for option in kind.options() if option not in ("terms", "gather")]
            given = {option: options[option] for option in takes if option in options}
            if part in options:
                if given:
                    raise ValueError(
                        f"{', '.join(given)} belong to the {kind.__name__} that from_features "
                        f"builds, but {part} was given: set them there"
                    )
                continue
            chosen = tuple(term for term in terms if term in own)
            if chosen:
                preset = {option: variant[option] for option in takes if option in variant}
                found[part] = kind.from_features(
                    feats_s, feats_t, terms=chosen, **{**preset, **given}
                )
        return found

    def terms(
        self, student: Input, teacher: Input, target: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns the terms of all parts, gamma included."""
        student, teacher = _features(student, "student"), _features(teacher, "teacher")
        found: dict[str, Tensor] = {}
        weights = (1.0, *self.gamma)
        for part, weight in zip((self.srm, self.sem, self.dcm), weights, strict=True):
            if part is not None:
                for name, value in part.terms(student, teacher, target).items():
                    found[name] = weight * value
        return found

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}"


def _features(given: object, name: str) -> Features:
    if not isinstance(given, Features):
        raise TypeError(f"{name} must be Features, got {describe(given)}")
    return given


def _gamma_pair(gamma: float | tuple[float, float]) -> tuple[float, float]:
    if isinstance(gamma, tuple | list):
        if len(gamma) != 2:
            raise ValueError(f"gamma must be a number or a pair (SEM, DCM), got {gamma}")
        return number("gamma[0]", gamma[0], at_least=0), number("gamma[1]", gamma[1], at_least=0)
    value = number("gamma", gamma, at_least=0)
    return value, value
