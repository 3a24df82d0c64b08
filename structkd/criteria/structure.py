"""Dimensional-structure distillation: its parts, and the labels if asked, in one criterion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from structkd._checks import choice, describe, number
from structkd.criteria._fields import Input
from structkd.criteria._terms import checked_terms
from structkd.criteria.base import Criterion
from structkd.criteria.correlation import TERMS as SEM_TERMS
from structkd.criteria.correlation import CrossCorrelationLoss
from structkd.criteria.dense import TERMS as DENSE_TERMS
from structkd.criteria.dense import DenseStructureLoss
from structkd.criteria.supervision import SupervisionLoss
from structkd.criteria.uniformity import TERMS as DCM_TERMS
from structkd.criteria.uniformity import UniformityCalibrationLoss
from structkd.features import Features

# What each variant stands for; docs/choices.md has the sweep behind "measured".
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "measured": {
        "gamma": (5.0, 0.02, 20.0),
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

_PARTS = (CrossCorrelationLoss, UniformityCalibrationLoss, DenseStructureLoss)
_TERMS = SEM_TERMS + DCM_TERMS + DENSE_TERMS


class DSLoss(Criterion):
    r"""Dimensional-structure distillation.

    .. math::
        L = SRM + \gamma_1 \, SEM + \gamma_2 \, DCM + \gamma_3 \, Dense

    with :class:`CrossCorrelationLoss` (SEM) on the embeddings, :class:`UniformityCalibrationLoss`
    (DCM) on one intermediate map, :class:`DenseStructureLoss` (Dense, not the paper's) on the
    positions of all captured stages, and :class:`SupervisionLoss` (SRM) on the labels where
    ``srm=True``. SRM + SEM + DCM is the paper's Eq. 12 whole. All terms are separate in
    :meth:`terms`: ``SRM``, ``SEM-1``, ``SEM-2``, ``DCM-1``, ``DCM-2``, ``Dense-1``, ``Dense-2``.

    Every option belongs to one part, which the constructor takes ready made. :meth:`from_features`
    builds the parts and takes all of their options by name, with

    * ``aligned=False`` (the default): pairs show one scene, but not pixel for pixel, or nobody
      knows. SEM and DCM are built, which compare samples as wholes;
    * ``aligned=True``: student and teacher see the same pixels, as two bands or qualities of one
      image do. The dense part is built instead. ``terms`` that name those of SEM and DCM as well
      bring these in beside it;
    * ``variant="measured"`` (the default): the options that did best on held-out data in our sweep,
      docs/choices.md: gamma 5 on the mean over SEM's channels and 0.02 on DCM, centred embeddings,
      a linear projector, the sign of the prose. The dense part has gamma 20;
    * ``variant="printed"``: the equations as printed: one gamma of 0.1 for both, SEM summed over
      channels, no centring, MLP projectors that raise the width with the teacher's frozen, and
      Eq. 10's sign. It has no dense part;
    * ``terms``: the terms to take. A part without any is not built, and has no parameters for an
      optimizer to decay.

    Any option that is given goes before the variant's. Where the dense part has an option of the
    same name as another part (``lambd``, ``floor``, ``layer``, ``adapter``), it means the dense
    part's under ``aligned=True``; give the other part ready made, ``dcm=...``, to set its own.

    Args:
        sem: The part on embeddings, or None for none.
        dcm: The part on a map, or None for none.
        dense: The part on positions, or None for none.
        gamma: Weight >= 0 of every part, or one for each: a pair (SEM, DCM), and with a dense part
            a triple (SEM, DCM, Dense).
        srm: Add the labels' cross-entropy. The target may then mark rows without a label by -100,
            which the other parts use all the same.
        gather: Compute every part on the batch of all processes.

    Shape:
        ``Features`` with ``embedding (B, D)`` where SEM is on, ``intermediate`` where DCM or Dense
        is on, and the student's ``logits (B, K)`` where SRM is: then the target is class indices
        ``(B,)`` or probabilities ``(B, K)``. Output a scalar.

    Raises:
        ValueError: If ``gamma`` is out of range, no part is left, an option belongs to a part that
            is not built, or a feature that a part needs is missing or of another width.
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
        >>> same_pixels = DSLoss.from_features(feats_s, feats_t, aligned=True)
        >>> list(same_pixels.terms(feats_s, feats_t))
        ['Dense-1', 'Dense-2']
        >>> parts = DSLoss(sem=CrossCorrelationLoss(torch.nn.Linear(64, 256)), gamma=0.1)
        >>> parts(feats_s, feats_t).shape
        torch.Size([])
    """

    couples = True
    build_options = (
        "aligned",
        "variant",
        *dict.fromkeys(name for kind in _PARTS for name in kind.options() if name != "gather"),
    )

    def __init__(
        self,
        sem: CrossCorrelationLoss | None = None,
        dcm: UniformityCalibrationLoss | None = None,
        dense: DenseStructureLoss | None = None,
        *,
        gamma: float | tuple[float, ...],
        srm: bool = False,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        for name, part, kind in zip(
            ("sem", "dcm", "dense"), (sem, dcm, dense), _PARTS, strict=True
        ):
            if part is not None and not isinstance(part, kind):
                raise TypeError(f"{name} must be a {kind.__name__} or None, got {describe(part)}")
        self.gamma = _gammas(gamma, 2 if dense is None else 3)
        self.srm = SupervisionLoss() if srm else None
        self.sem = sem
        self.dcm = dcm
        self.dense = dense
        parts = [part for part in (self.srm, sem, dcm, dense) if part is not None]
        if not parts:
            raise ValueError("sem, dcm and dense are None and srm is False: nothing is left")
        self.reads = tuple(field for part in parts for field in part.reads)  # type: ignore[misc]
        for each in parts:
            each.gather = each.gather or gather

    @classmethod
    def arguments(
        cls, feats_s: Features, feats_t: Features, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Returns the parts for the widths of two example passes, and the variant's gamma."""
        aligned = options.get("aligned", False)
        name = choice("variant", options.get("variant", "measured"), tuple(VARIANTS))
        variant = dict(VARIANTS[name])
        if "student_projector" in options or "teacher_projector" in options:
            del variant["projector"]
        default: tuple[str, ...] = DENSE_TERMS if aligned else SEM_TERMS + DCM_TERMS
        if options.get("adapter") == "closed_form":
            default = tuple(term for term in default if term != "Dense-2")
        terms = checked_terms(options.get("terms", default), _TERMS)
        _check_alignment(aligned, name, terms, options)
        found: dict[str, Any] = {}
        taken: set[str] = set()
        # The dense part first: what it takes, no other part does.
        for part, kind, own in (
            ("dense", DenseStructureLoss, DENSE_TERMS),
            ("sem", CrossCorrelationLoss, SEM_TERMS),
            ("dcm", UniformityCalibrationLoss, DCM_TERMS),
        ):
            takes = [
                option
                for option in kind.options()
                if option not in ("terms", "gather") and option not in taken
            ]
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
                taken.update(takes if part == "dense" else ())
            elif aligned and given:
                raise ValueError(
                    f"{', '.join(given)} belong to the {kind.__name__}, which aligned=True leaves "
                    f"out: name some of {', '.join(own)} in terms, or leave them out too"
                )
        gamma = variant["gamma"]
        if isinstance(gamma, tuple) and options.get("dense", found.get("dense")) is None:
            gamma = gamma[:2]
        return {**found, "gamma": gamma}

    def terms(
        self, student: Input, teacher: Input, target: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns the terms of all parts, gamma included."""
        student, teacher = _features(student, "student"), _features(teacher, "teacher")
        found: dict[str, Tensor] = {}
        parts = (self.srm, self.sem, self.dcm, self.dense)
        for part, weight in zip(parts, (1.0, *self.gamma), strict=False):
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


def _check_alignment(
    aligned: object, variant: str, terms: tuple[str, ...], options: Mapping[str, Any]
) -> None:
    """Raises where an option asks for a dense part that ``aligned`` does not bring, or for none."""
    if not isinstance(aligned, bool):
        raise TypeError(f"aligned must be True or False, got {describe(aligned)}")
    if aligned:
        if variant == "printed":
            raise ValueError(
                "variant='printed' has no dense terms: leave aligned=True out, or the variant"
            )
        if "dense" not in options and not set(terms) & set(DENSE_TERMS):
            raise ValueError(
                f"aligned=True brings in the dense terms, but terms={list(terms)} names none of "
                f"{', '.join(DENSE_TERMS)}: leave one of them out"
            )
        return
    others = {name for kind in _PARTS[:2] for name in kind.options()}
    asked = [name for name in DenseStructureLoss.options() if name in options]
    asked = [name for name in asked if name not in others]
    asked += ["adapter"] if isinstance(options.get("adapter"), str) else []  # DCM's is a module
    asked += [term for term in terms if term in DENSE_TERMS]
    if asked:
        raise ValueError(
            f"{', '.join(asked)} belong to the dense part, for student and teacher that see the "
            "same pixels: say aligned=True if yours do"
        )


def _gammas(gamma: float | tuple[float, ...], count: int) -> tuple[float, ...]:
    if isinstance(gamma, tuple | list):
        if len(gamma) != count:
            form = "a pair (SEM, DCM)" if count == 2 else "a triple (SEM, DCM, Dense)"
            raise ValueError(f"gamma must be a number or {form}, got {gamma}")
        return tuple(number(f"gamma[{i}]", value, at_least=0) for i, value in enumerate(gamma))
    return (number("gamma", gamma, at_least=0),) * count
