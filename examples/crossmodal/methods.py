"""Distillation methods by name; a further one is one entry in ``METHODS``, and sums come free."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any, Literal

from torch import Tensor

import structkd
from structkd import Features
from structkd.criteria.base import Criterion, Input

Layers = Literal["one", "all"]
Options = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Setup:
    """What a criterion may need beyond features: how many classes, training images, steps."""

    classes: int
    samples: int
    steps: int


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        build: ``build(feats_s, feats_t, setup, **options) -> Criterion`` from two example forward
            passes; None trains without a teacher.
        supervision: weight of the labels' cross-entropy when the method stands alone.
        weight: weight of the criterion, alone and in a sum.
        layers: ``one`` hands it the last stage but one, ``all`` every stage.
    """

    build: Callable[..., Criterion] | None
    supervision: float = 1.0
    weight: float = 1.0
    layers: Layers = "one"


def _kd(feats_s: Features, feats_t: Features, setup: Setup, **options: Any) -> Criterion:
    return structkd.KDLoss(**{"temperature": 4.0, **options})


def _ds(feats_s: Features, feats_t: Features, setup: Setup, **options: Any) -> Criterion:
    # The engine adds the cross-entropy for every method, so DSLoss leaves its own out.
    return structkd.DSLoss.from_features(feats_s, feats_t, **{"srm": False, **options})


METHODS: dict[str, Method] = {
    "alone": Method(None),
    "kd": Method(_kd, supervision=0.1, weight=0.9),  # as in the CRD benchmark
    "ds": Method(_ds),
}


@dataclass(frozen=True)
class Plan:
    """A resolved method: what to build, and the weight of the cross-entropy.

    Attributes:
        name: as resolved, parts joined by ``+``.
        parts: each part's name and method; empty for the lone student.
        supervision: weight of the cross-entropy.
        options: overrides by part name.
    """

    name: str
    parts: tuple[tuple[str, Method], ...]
    supervision: float
    options: Options = field(default_factory=dict)

    @property
    def layers(self) -> Layers:
        """The stages to capture: all of them if any part wants them."""
        return "all" if any(method.layers == "all" for _, method in self.parts) else "one"

    def build(self, feats_s: Features, feats_t: Features, setup: Setup) -> Criterion | None:
        """The criterion from two example passes over ``layers``; None for the lone student."""
        if not self.parts:
            return None
        criteria: list[Criterion] = []
        for name, method in self.parts:
            if method.build is None:
                continue
            options = dict(self.options.get(name, {}))
            weight = options.pop("weight", method.weight)
            narrow = method.layers == "one" and self.layers == "all"
            pair = (_one(feats_s), _one(feats_t)) if narrow else (feats_s, feats_t)
            criterion = method.build(*pair, setup, **options)
            criteria.append(weight * (OneStage(criterion) if narrow else criterion))
        return reduce(add, criteria)


class OneStage(Criterion):
    """Hands a criterion the last stage but one where every stage was captured."""

    def __init__(self, criterion: Criterion) -> None:
        super().__init__()
        self.criterion = criterion

    def terms(
        self, student: Input, teacher: Input, target: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The wrapped criterion's terms."""
        if not isinstance(student, Features) or not isinstance(teacher, Features):
            raise TypeError("student and teacher must be Features")
        return self.criterion.terms(_one(student), _one(teacher), target)


def resolve(name: str, options: Options | None = None) -> Plan:
    """Look up a method or a sum of methods, ``kd`` or ``kd+ds``.

    A sum takes every criterion at its own weight and the cross-entropy at weight 1.

    Args:
        name: a key of ``METHODS``, or several joined by ``+``.
        options: by part name, keywords of its criterion; ``weight`` overrides the part's weight.

    Raises:
        ValueError: an unknown or repeated part, ``alone`` in a sum, or options for no part.
    """
    names = [part.strip().lower() for part in name.split("+")]
    for part in names:
        if part not in METHODS:
            near = difflib.get_close_matches(part, METHODS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"unknown method {part!r}; {hint}known: {', '.join(METHODS)}, "
                "and sums of them such as kd+ds"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"method {name!r} names a part twice; name each once")
    parts = tuple((part, METHODS[part]) for part in names)
    if len(parts) > 1 and any(method.build is None for _, method in parts):
        raise ValueError(
            f"method {name!r}: 'alone' has no criterion to add; leave it out of the sum"
        )
    options = options or {}
    if strangers := sorted(set(options) - set(names)):
        raise ValueError(
            f"options for {', '.join(strangers)}, but method {name!r} has {', '.join(names)}"
        )
    supervision = parts[0][1].supervision if len(parts) == 1 else 1.0
    parts = tuple(part for part in parts if part[1].build is not None)
    return Plan("+".join(names), parts, supervision, options)


def stages(names: list[str], layers: Layers) -> list[str]:
    """Which of a model's stages to capture: all, or the last but one (the only one of one)."""
    return names if layers == "all" else [names[max(len(names) - 2, 0)]]


def _one(feats: Features) -> Features:
    maps = feats.intermediate
    return feats.replace(intermediate=(maps[max(len(maps) - 2, 0)],))
