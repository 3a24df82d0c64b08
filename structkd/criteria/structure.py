"""Dimensional-structure distillation: supervision, SEM and DCM in one criterion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structkd._checks import choice, describe, labels, number, whole
from structkd.criteria._maps import channels, map_pair
from structkd.criteria.base import Criterion, Input, either
from structkd.criteria.correlation import CrossCorrelationLoss
from structkd.criteria.uniformity import SPHERE_SIGMA, UniformityCalibrationLoss
from structkd.distributed import gather_batch
from structkd.features import Features
from structkd.projectors import ConvAdapter, Projector

PROJECTORS = ("linear", "mlp", "none")
REDUCTIONS = ("mean", "sum")
TERMS = ("SRM", "SEM-1", "SEM-2", "DCM-1", "DCM-2")

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


class DSLoss(Criterion):
    r"""Dimensional-structure distillation.

    .. math::
        L = CE + \gamma_1 \, SEM + \gamma_2 \, DCM

    with :class:`CrossCorrelationLoss` (SEM) on the embeddings, :class:`UniformityCalibrationLoss`
    (DCM) on one intermediate map, and the cross-entropy of the student's logits where ``target`` is
    given. The five terms of the paper's ablation are separate in :meth:`terms` and have separate
    switches: ``SRM``, ``SEM-1``, ``SEM-2``, ``DCM-1``, ``DCM-2``.

    ``variant="measured"`` (the default) takes the options that did best on held-out data in our
    sweep, docs/choices.md. ``variant="printed"`` takes the equations as printed: one gamma for
    both, SEM summed over channels, no centring, MLP projectors that raise the width with the
    teacher's frozen, and Eq. 10's sign. Any option that is given overrides the variant's.

    Args:
        student_dim: Width of the student's embedding.
        teacher_dim: Width of the teacher's embedding.
        student_channels: Channels of the student's map, where they differ from the teacher's.
        teacher_channels: Channels of the teacher's map, likewise.
        variant: ``measured`` or ``printed``.
        gamma: Weight >= 0 of SEM and DCM, or a pair with one for each.
        reduction: ``mean`` divides SEM by its number of channels, so that gamma does not depend on
            the width; ``sum`` is Eq. 7.
        lambd: Weight >= 0 of SEM's off-diagonal part.
        center: Centre embeddings over the batch before correlating.
        projector: ``linear`` maps the student onto the teacher's own embedding; ``mlp`` maps both
            to ``projector_dim``; ``none`` compares embeddings as they are.
        projector_dim: Width of the ``mlp`` projection, four times ``teacher_dim`` by default.
        train_teacher_projector: Train the teacher's ``mlp`` projector too.
        sigma: DCM's bandwidth > 0, or ``"median"``.
        normalize: Scale DCM's rows to unit length.
        pool: ``avg`` or ``flatten``, how a map becomes a row.
        cross_sign: ``align`` or ``separate``, the sign of DCM's second term.
        layer: Position in ``Features.intermediate`` of the map that DCM reads.
        form: SEM's form, ``auto``, ``matrix`` or ``gram``.
        srm: Use the cross-entropy where a target is given.
        sem_1: Use SEM's diagonal term.
        sem_2: Use SEM's off-diagonal term.
        dcm_1: Use DCM's self term.
        dcm_2: Use DCM's cross term.
        gather: Compute on the batch of all processes.

    Shape:
        ``Features`` with ``embedding (B, D)`` where SEM is on, ``intermediate`` where DCM is on,
        and the student's ``logits (B, K)`` where a target (class indices ``(B,)`` or probabilities
        ``(B, K)``) is given; output a scalar.

    Raises:
        ValueError: If an option is out of range or unknown, every term is off, or a feature that a
            term needs is missing or of another width.
        TypeError: If student or teacher are no ``Features``.

    References:
        Si et al., *A Dimensional Structure based Knowledge Distillation Method for Cross-Modal
        Learning*, Eq. 12 and Table 6.

    Example:
        >>> feats = Features(logits=torch.randn(8, 10), embedding=torch.randn(8, 64),
        ...                  intermediate=torch.randn(8, 32, 4, 4))
        >>> criterion = DSLoss(student_dim=64, teacher_dim=64, dcm_2=False)
        >>> list(criterion.terms(feats, feats, target=torch.arange(8)))
        ['SRM', 'SEM-1', 'SEM-2', 'DCM-1']
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        student_channels: int | None = None,
        teacher_channels: int | None = None,
        variant: str = "measured",
        gamma: float | tuple[float, float] | None = None,
        reduction: str | None = None,
        lambd: float = 5e-3,
        center: bool | None = None,
        projector: str | None = None,
        projector_dim: int | None = None,
        train_teacher_projector: bool = False,
        sigma: float | str = SPHERE_SIGMA,
        normalize: bool = True,
        pool: str = "avg",
        cross_sign: str | None = None,
        layer: int = -1,
        form: str = "auto",
        srm: bool = True,
        sem_1: bool = True,
        sem_2: bool = True,
        dcm_1: bool = True,
        dcm_2: bool = True,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        defaults = VARIANTS[choice("variant", variant, tuple(VARIANTS))]
        switches = (srm, sem_1, sem_2, dcm_1, dcm_2)
        self.enabled = tuple(name for name, on in zip(TERMS, switches, strict=True) if on)
        if not self.enabled:
            raise ValueError("srm, sem_1, sem_2, dcm_1 and dcm_2 are all False: nothing is left")
        self.gamma = _gamma_pair(defaults["gamma"] if gamma is None else gamma)
        reduction = choice("reduction", reduction or defaults["reduction"], REDUCTIONS)
        kind = choice("projector", projector or defaults["projector"], PROJECTORS)
        student_dim = whole("student_dim", student_dim)
        teacher_dim = whole("teacher_dim", teacher_dim)
        project_s, project_t, width = _projectors(kind, student_dim, teacher_dim, projector_dim)
        self.sem_scale = 1 / width if reduction == "mean" else 1.0
        sem = CrossCorrelationLoss(
            project_s,
            project_t,
            lambd=lambd,
            center=defaults["center"] if center is None else center,
            form=form,
            train_teacher_projector=train_teacher_projector,
            gather=gather,
        )
        dcm = UniformityCalibrationLoss(
            _adapter(student_channels, teacher_channels),
            sigma=sigma,
            normalize=normalize,
            pool=pool,
            cross_sign=cross_sign or defaults["cross_sign"],
            layer=layer,
            gather=gather,
        )
        # A part that is switched off has no parameters for an optimizer to decay.
        self.sem = sem if sem_1 or sem_2 else None
        self.dcm = dcm if dcm_1 or dcm_2 else None

    @classmethod
    def from_features(cls, feats_s: Features, feats_t: Features, **options: Any) -> DSLoss:
        """Builds the criterion for the widths of two example forward passes.

        Args:
            feats_s: Any batch of the student's features.
            feats_t: Any batch of the teacher's.
            **options: Any keyword of the constructor.

        Returns:
            The criterion, on the device of the student's features.

        Raises:
            ValueError: If an embedding is missing, or a map where a DCM term is on.

        Example:
            >>> small, large = torch.randn(4, 64, 8, 8), torch.randn(4, 256, 8, 8)
            >>> feats_s = Features(embedding=small.mean((2, 3)), intermediate=small)
            >>> feats_t = Features(embedding=large.mean((2, 3)), intermediate=large)
            >>> criterion = DSLoss.from_features(feats_s, feats_t)
            >>> criterion(feats_s, feats_t).shape
            torch.Size([])
        """
        feats_s, feats_t = _features(feats_s, "feats_s"), _features(feats_t, "feats_t")
        if options.get("dcm_1", True) or options.get("dcm_2", True):
            map_s, map_t = map_pair(feats_s, feats_t, options.get("layer", -1))
            options.setdefault("student_channels", channels(map_s))
            options.setdefault("teacher_channels", channels(map_t))
        embedding_s, embedding_t = either(feats_s, feats_t, "embedding")
        criterion = cls(embedding_s.shape[1], embedding_t.shape[1], **options)
        return criterion.to(embedding_s.device)

    def terms(
        self, student: Input, teacher: Input, target: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns the enabled terms, gamma included; ``SRM`` only where a target is given."""
        student, teacher = _features(student, "student"), _features(teacher, "teacher")
        found: dict[str, Tensor] = {}
        if target is not None and "SRM" in self.enabled:
            found["SRM"] = self._supervision(student, target)
        if self.sem is not None:
            scale = self.gamma[0] * self.sem_scale
            for name, value in self.sem.terms(student, teacher).items():
                found[name] = scale * value
        if self.dcm is not None:
            for name, value in self.dcm.terms(student, teacher).items():
                found[name] = self.gamma[1] * value
        found = {name: value for name, value in found.items() if name in self.enabled}
        if not found:
            raise ValueError("target is missing and srm is the only term that is on")
        return found

    def _supervision(self, student: Features, target: Tensor) -> Tensor:
        logits = student.logits
        if logits is None:
            raise ValueError(
                "a target was given, but student.logits is missing: pass Features as "
                "FeatureCapture gives them, or leave the cross-entropy to your loop with srm=False"
            )
        self._check_tensor(logits, "student.logits", "logits")
        batch, classes = logits.shape
        if target.is_floating_point():
            if target.shape != logits.shape:
                raise ValueError(
                    f"target probabilities must have shape {tuple(logits.shape)}, "
                    f"got {tuple(target.shape)}"
                )
        else:
            target = labels(target, batch, classes, reader="DSLoss")
        if self.gather:
            logits, target = gather_batch(logits), gather_batch(target)
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits if logits.dtype == torch.float64 else logits.float()
            return F.cross_entropy(logits, target)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, enabled={', '.join(self.enabled)}"


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


def _projectors(
    kind: str, student_dim: int, teacher_dim: int, projector_dim: int | None
) -> tuple[nn.Module | None, nn.Module | None, int]:
    """Returns the student's projector, the teacher's, and the width that they meet in."""
    if kind != "mlp" and projector_dim is not None:
        raise ValueError(f"projector_dim goes with projector='mlp', got projector={kind!r}")
    if kind == "none":
        if student_dim != teacher_dim:
            raise ValueError(
                f"student_dim={student_dim} and teacher_dim={teacher_dim} differ: projector='none' "
                "needs equal widths, use 'linear' or 'mlp'"
            )
        return None, None, teacher_dim
    if kind == "linear":
        return Projector(student_dim, teacher_dim, layers=1), None, teacher_dim
    width = 4 * teacher_dim if projector_dim is None else whole("projector_dim", projector_dim)
    return Projector(student_dim, width), Projector(teacher_dim, width), width


def _adapter(student_channels: int | None, teacher_channels: int | None) -> ConvAdapter | None:
    if (student_channels is None) != (teacher_channels is None):
        raise ValueError(
            f"student_channels and teacher_channels go together, got {student_channels} and "
            f"{teacher_channels}"
        )
    if student_channels is None or teacher_channels is None or student_channels == teacher_channels:
        return None
    return ConvAdapter(student_channels, teacher_channels)
