"""Dimensional-structure distillation: its parts, and the labels if asked, in one criterion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from structkd._checks import choice, describe, number, terms_of
from structkd.criteria.base import Criterion, Input
from structkd.criteria.correlation import TERMS as SEM_TERMS
from structkd.criteria.correlation import CrossCorrelationLoss
from structkd.criteria.supervision import SupervisionLoss
from structkd.criteria.uniformity import TERMS as DCM_TERMS
from structkd.criteria.uniformity import UniformityCalibrationLoss
from structkd.distributed import Shards
from structkd.features import named_features

# What each variant stands for; docs/choices.md has the sweeps behind "measured" and both gammas.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "measured": {
        "gamma": (5.0, 0.02),
        "sem": {"reduction": "mean", "center": True, "projector": "linear"},
        "dcm": {"cross_sign": "align"},
    },
    "printed": {
        "gamma": (0.01, 0.01),
        "sem": {"reduction": "sum", "center": False, "projector": "mlp"},
        "dcm": {"cross_sign": "separate"},
    },
}


class DSLoss(Criterion):
    r"""Dimensional-structure distillation, the paper's loss.

    .. math::
        L = SRM + \gamma_1 \, SEM + \gamma_2 \, DCM

    with :class:`CrossCorrelationLoss` (SEM) on the embeddings, :class:`UniformityCalibrationLoss`
    (DCM) on one intermediate map, and :class:`SupervisionLoss` (SRM) on the labels where
    ``srm=True``, which makes it Eq. 12 whole. All terms are separate in :meth:`terms`: ``SRM``,
    ``SEM-1``, ``SEM-2``, ``DCM-1``, ``DCM-2``. For pairs that are aligned to the pixel see
    :class:`DenseStructureLoss`, which is not the paper's.

    Args:
        variant: How to make the parts that are not given. ``measured``, the default, has the
            options that did best on held-out data in our sweep, docs/choices.md: gamma 5 on the
            mean over SEM's channels and 0.02 on DCM, centred embeddings, a linear projector, the
            sign of the prose. ``printed`` has the equations as printed: one gamma for both, 0.01 as
            the paper gives none, SEM summed over channels, no centring, MLP projectors that raise
            the width with the teacher's frozen, and Eq. 10's sign.
        gamma: Weight >= 0 of both parts, or a pair (SEM, DCM); the variant's by default.
        terms: The terms of SEM and DCM to take; a part without any is not made. All by default.
        sem: The part on embeddings, with options of its own.
        dcm: The part on a map, likewise.
        srm: Add the labels' cross-entropy. The target may then mark rows without a label by -100,
            which the other parts use all the same.
        gather: Compute every part on the batch of all processes. A part that is given has its own
            ``gather``.

    Shape:
        ``Features`` with ``embedding (B, D)`` where SEM is on, ``intermediate`` where DCM is on,
        and the student's ``logits (B, K)`` where SRM is: then the target is class indices ``(B,)``
        or probabilities ``(B, K)``. Output a scalar.

    Raises:
        ValueError: If ``gamma`` is out of range, a term is unknown, ``gather`` is on and a given
            part's is not, or a feature that a part needs is missing.
        TypeError: If a part is of another class, or student or teacher are no ``Features``.

    References:
        Si et al., *A Dimensional Structure based Knowledge Distillation Method for Cross-Modal
        Learning*, Eq. 12 and Table 6.

    Example:
        >>> import torch
        >>> small, large = torch.randn(8, 64, 4, 4), torch.randn(8, 256, 4, 4)
        >>> feats_s = dict(embedding=small.mean((2, 3)), intermediate=small)
        >>> feats_t = dict(embedding=large.mean((2, 3)), intermediate=large)
        >>> loss = DSLoss()(feats_s, feats_t)
        >>> criterion = DSLoss(sem=CrossCorrelationLoss(lambd=0.01), gamma=0.1)
        >>> list(criterion.terms(feats_s, feats_t))
        ['SEM-1', 'SEM-2', 'DCM-1', 'DCM-2']
    """

    over_ranks = "gathered"

    def __init__(
        self,
        *,
        variant: str = "measured",
        gamma: float | Sequence[float] | None = None,
        terms: Sequence[str] = SEM_TERMS + DCM_TERMS,
        sem: CrossCorrelationLoss | None = None,
        dcm: UniformityCalibrationLoss | None = None,
        srm: bool = False,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        self.variant = choice("variant", variant, tuple(VARIANTS))
        preset = VARIANTS[self.variant]
        self.gamma = _gammas(preset["gamma"] if gamma is None else gamma)
        self.enabled = terms_of(terms, SEM_TERMS + DCM_TERMS)
        self.srm = SupervisionLoss(gather=gather) if srm else None
        self.sem = _part("sem", CrossCorrelationLoss, sem, self.enabled, SEM_TERMS, preset, gather)
        self.dcm = _part(
            "dcm", UniformityCalibrationLoss, dcm, self.enabled, DCM_TERMS, preset, gather
        )
        parts = [part for part in (self.srm, self.sem, self.dcm) if part is not None]
        self.reads = tuple(field for part in parts for field in part.reads)

    def terms(
        self,
        student: Input,
        teacher: Input,
        target: Tensor | None = None,
        *,
        shards: Shards | None = None,
    ) -> dict[str, Tensor]:
        """Returns the terms of all parts, gamma included."""
        student, teacher = named_features(student, "student"), named_features(teacher, "teacher")
        found: dict[str, Tensor] = {}
        for part, weight in zip((self.srm, self.sem, self.dcm), (1.0, *self.gamma), strict=True):
            if part is not None:
                for name, value in part.terms(student, teacher, target, shards=shards).items():
                    found[name] = weight * value
        return found


def _part(
    name: str,
    kind: type[Any],
    given: Any,
    terms: tuple[str, ...],
    own: tuple[str, ...],
    preset: Mapping[str, Any],
    gather: bool,
) -> Any:
    """Returns the part that is given, the variant's, or None where ``terms`` names none of it."""
    wanted = tuple(term for term in terms if term in own)
    if given is None:
        return kind(**preset[name], terms=wanted, gather=gather) if wanted else None
    if not isinstance(given, kind):
        raise TypeError(f"{name} must be a {kind.__name__} or None, got {describe(given)}")
    if not set(given.enabled) <= set(wanted):
        raise ValueError(
            f"{name} has the terms {', '.join(given.enabled)}, but terms={list(terms)}: choose "
            f"them in {name}=structkd.{kind.__name__}(terms=[...])"
        )
    if gather and not given.gather:
        raise ValueError(
            f"gather=True, but {name} was made without: say structkd.{kind.__name__}(gather=True)"
        )
    return given


def _gammas(gamma: float | Sequence[float]) -> tuple[float, ...]:
    if not isinstance(gamma, tuple | list):
        return (number("gamma", gamma, at_least=0),) * 2
    if len(gamma) != 2:
        raise ValueError(f"gamma must be a number or a pair (SEM, DCM), got {gamma}")
    return tuple(number(f"gamma[{i}]", value, at_least=0) for i, value in enumerate(gamma))
