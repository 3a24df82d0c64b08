"""Criteria said in plain dicts, so that YAML and Python configs can say them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from structkd._checks import describe, near
from structkd.criteria.base import Criterion
from structkd.criteria.sums import CriterionSum
from structkd.features import Features

Spec: TypeAlias = (
    Criterion
    | type[Criterion]
    | Callable[[Features, Features], Criterion]
    | Mapping[str, Any]
    | str
    | Sequence[Any]
)


def criterion_classes() -> dict[str, type[Criterion]]:
    """Returns every public criterion of the library by its name."""
    import structkd

    return {
        name: value
        for name, value in vars(structkd).items()
        if inspect.isclass(value)
        and issubclass(value, Criterion)
        and value not in (Criterion, CriterionSum)
    }


def build_criterion(spec: Spec, feats_s: Features, feats_t: Features) -> Criterion:
    """Builds a criterion from what a config says of it, for two example forward passes.

    Args:
        spec: A criterion, taken as it is; a class of criteria or its name; a function of the two
            features that returns a criterion; a dict ``{"type": name, "weight": 0.5, ...}``, whose
            further entries are options of ``from_features`` (``name`` names the member in the
            sum's ``state_dict``); or a list of these, which is their sum.
        feats_s: An example of the student's features.
        feats_t: An example of the teacher's.

    Returns:
        The criterion; a :class:`CriterionSum` for a list or where a weight is given.

    Raises:
        ValueError: If a type is no criterion (the near names are listed), or a list is empty.
        TypeError: If an option is unknown, or the spec is of none of these kinds.

    Example:
        >>> import torch
        >>> feats = Features(logits=torch.eye(4), embedding=torch.randn(4, 8))
        >>> specs = [dict(type="CORALLoss"), dict(type="KDLoss", temperature=2.0, weight=0.5)]
        >>> build_criterion(specs, feats, feats).weights
        {'CORALLoss': 1.0, 'KDLoss': 0.5}
    """
    if isinstance(spec, list | tuple):
        if not spec:
            raise ValueError("criterion is an empty list: name at least one criterion")
        parts = [build_criterion(part, feats_s, feats_t) for part in spec]
        return CriterionSum.of(*parts)
    if isinstance(spec, Mapping):
        return _from_dict(spec, feats_s, feats_t)
    if isinstance(spec, str):
        return _from_dict({"type": spec}, feats_s, feats_t)
    if isinstance(spec, Criterion):
        return spec
    if isinstance(spec, type):
        return _checked_class(spec).from_features(feats_s, feats_t)
    if callable(spec):
        built: object = spec(feats_s, feats_t)
        if not isinstance(built, Criterion):
            raise TypeError(
                f"the criterion function must return a Criterion, got {describe(built)}"
            )
        return built
    raise TypeError(
        "criterion must be a Criterion, a class or function that makes one, a dict with its type, "
        f"or a list of these, got {describe(spec)}"
    )


def needs_example(spec: Spec) -> bool:
    """Tells whether building needs example features: all but finished criteria do."""
    if isinstance(spec, list | tuple):
        return any(needs_example(part) for part in spec)
    return not isinstance(spec, Criterion)


def _from_dict(spec: Mapping[str, Any], feats_s: Features, feats_t: Features) -> Criterion:
    options = dict(spec)
    kind = options.pop("type", None)
    if kind is None:
        raise ValueError(f"a criterion's dict needs its type, got the entries {sorted(options)}")
    weight, name = options.pop("weight", None), options.pop("name", None)
    if isinstance(kind, type):
        found = _checked_class(kind)
    else:
        known = criterion_classes()
        name_given = str(kind).removeprefix("structkd.")
        if name_given not in known:
            raise ValueError(
                f"type={kind!r} is no criterion of structkd; {near(name_given, known)}"
            )
        found = known[name_given]
    criterion = found.from_features(feats_s, feats_t, **options)
    if weight is None and name is None:
        return criterion
    name = name or found.__name__
    return CriterionSum({name: criterion}, {name: 1.0 if weight is None else weight})


def _checked_class(kind: type) -> type[Criterion]:
    if not issubclass(kind, Criterion):
        raise TypeError(f"criterion must be a class of structkd.Criterion, got {kind.__name__}")
    return kind
