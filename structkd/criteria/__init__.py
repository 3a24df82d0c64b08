"""The criteria by name, and how a config describes one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from structkd._checks import describe, near
from structkd.criteria.adversarial import AdversarialFeatureLoss, AdversarialLogitsLoss
from structkd.criteria.alignment import SemanticAlignmentLoss
from structkd.criteria.base import Criterion, CriterionSum
from structkd.criteria.calibration import SemanticCalibrationLoss
from structkd.criteria.contrastive import ContrastiveRepresentationLoss
from structkd.criteria.coral import CORALLoss
from structkd.criteria.correlation import CrossCorrelationLoss
from structkd.criteria.dense import DenseStructureLoss
from structkd.criteria.flow import FlowMatrixLoss
from structkd.criteria.logits import (
    CurriculumTemperatureLoss,
    DKDLoss,
    KDLoss,
    LogitMSELoss,
    LogitStandardizationLoss,
)
from structkd.criteria.maps import (
    AttentionTransferLoss,
    ChannelWiseLoss,
    NeuronSelectivityLoss,
)
from structkd.criteria.regression import FitNetLoss, VariationalInformationLoss
from structkd.criteria.relations import (
    CorrelationCongruenceLoss,
    DistilVPRLoss,
    RelationalLoss,
)
from structkd.criteria.structure import DSLoss
from structkd.criteria.supervision import DiceLoss, SupervisionLoss
from structkd.criteria.uniformity import UniformityCalibrationLoss

CRITERIA: Mapping[str, type[Criterion]] = {
    "AdversarialFeatureLoss": AdversarialFeatureLoss,
    "AdversarialLogitsLoss": AdversarialLogitsLoss,
    "AttentionTransferLoss": AttentionTransferLoss,
    "CORALLoss": CORALLoss,
    "ChannelWiseLoss": ChannelWiseLoss,
    "ContrastiveRepresentationLoss": ContrastiveRepresentationLoss,
    "CorrelationCongruenceLoss": CorrelationCongruenceLoss,
    "CrossCorrelationLoss": CrossCorrelationLoss,
    "CurriculumTemperatureLoss": CurriculumTemperatureLoss,
    "DKDLoss": DKDLoss,
    "DSLoss": DSLoss,
    "DenseStructureLoss": DenseStructureLoss,
    "DiceLoss": DiceLoss,
    "DistilVPRLoss": DistilVPRLoss,
    "FitNetLoss": FitNetLoss,
    "FlowMatrixLoss": FlowMatrixLoss,
    "KDLoss": KDLoss,
    "LogitMSELoss": LogitMSELoss,
    "LogitStandardizationLoss": LogitStandardizationLoss,
    "NeuronSelectivityLoss": NeuronSelectivityLoss,
    "RelationalLoss": RelationalLoss,
    "SemanticAlignmentLoss": SemanticAlignmentLoss,
    "SemanticCalibrationLoss": SemanticCalibrationLoss,
    "SupervisionLoss": SupervisionLoss,
    "UniformityCalibrationLoss": UniformityCalibrationLoss,
    "VariationalInformationLoss": VariationalInformationLoss,
}

Spec: TypeAlias = Criterion | type[Criterion] | Mapping[str, Any] | str | Sequence[Any]

# Entries of a criterion's dict beside its options.
_RESERVED = ("type", "weight", "name")


def build_criterion(spec: Spec) -> Criterion:
    """Makes a criterion from a config.

    A dict holds the constructor's arguments: ``{"type": "KDLoss", "temperature": 2.0}`` is
    ``KDLoss(temperature=2.0)``. ``weight`` beside them is the criterion's weight in a sum, as in
    ``0.5 * KDLoss()``, and ``name`` its name there, by which ``state_dict`` goes. An option that is
    itself a dict with a ``type`` is made first.

    Args:
        spec: A criterion, taken as it is; a class of criteria, or the name of one of structkd's; a
            dict of the type and its options; or a list of these, which is their sum.

    Returns:
        The criterion; a :class:`CriterionSum` for a list or where a weight or name is given.

    Raises:
        ValueError: If a type is no criterion (the near names are listed), or a list is empty.
        TypeError: If an option is unknown, the criterion's constructor has an option of its own
            that is called ``weight``, ``name`` or ``type``, or the spec is of none of these kinds.

    Example:
        >>> specs = [dict(type="CORALLoss"), dict(type="KDLoss", temperature=2.0, weight=0.5)]
        >>> build_criterion(specs).weights
        {'CORALLoss': 1.0, 'KDLoss': 0.5}
    """
    if isinstance(spec, list | tuple):
        if not spec:
            raise ValueError("criterion is an empty list: name at least one criterion")
        return CriterionSum.of(*(build_criterion(part) for part in spec))
    if isinstance(spec, Criterion):
        return spec
    if isinstance(spec, str | type):
        return build_criterion({"type": spec})
    if not isinstance(spec, Mapping):
        raise TypeError(
            "criterion must be a Criterion, a class of criteria or its name, a dict with its type, "
            f"or a list of these, got {describe(spec)}"
        )
    options: dict[str, Any] = {
        name: build_criterion(value) if isinstance(value, Mapping) and "type" in value else value
        for name, value in spec.items()
    }
    if "type" not in options:
        raise ValueError(f"a criterion's dict needs its type, got the entries {sorted(options)}")
    kind = _class_of(options.pop("type"))
    weight, name = options.pop("weight", None), options.pop("name", None)
    known = inspect.signature(kind).parameters
    takes_any = any(option.kind is option.VAR_KEYWORD for option in known.values())
    for reserved in _RESERVED:
        if reserved in known:
            raise TypeError(
                f"{kind.__name__} has an option {reserved!r} of its own, which in a dict is the "
                "criterion's in a sum: give it another name, or pass the criterion as an object"
            )
    for option in options:
        if option not in known and not takes_any:
            raise TypeError(f"{kind.__name__} has no option {option!r}; {near(option, known)}")
    criterion = kind(**options)
    if weight is None and name is None:
        return criterion
    name = name or kind.__name__
    return CriterionSum({name: criterion}, {name: 1.0 if weight is None else weight})


def _class_of(kind: object) -> type[Criterion]:
    if isinstance(kind, type):
        if not issubclass(kind, Criterion):
            raise TypeError(f"criterion must be a class of structkd.Criterion, got {kind.__name__}")
        return kind
    name = str(kind).removeprefix("structkd.")
    if name not in CRITERIA:
        raise ValueError(f"type={kind!r} is no criterion of structkd; {near(name, CRITERIA)}")
    return CRITERIA[name]
