"""Method names resolved: one entry of the registry, or a sum of several."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any

from crossmodal.options import did_you_mean
from crossmodal.registry import METHODS, Method, Setup
from crossmodal.stages import Layers, OneStage, one_stage
from structkd import Features
from structkd.criteria.base import Criterion

Options = Mapping[str, Mapping[str, Any]]


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
            pair = (one_stage(feats_s), one_stage(feats_t)) if narrow else (feats_s, feats_t)
            criterion = method.build(*pair, setup, **options)
            criteria.append(weight * (OneStage(criterion) if narrow else criterion))
        return reduce(add, criteria)


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
            raise ValueError(
                f"unknown method {part!r}; {did_you_mean(part, METHODS)}known: "
                f"{', '.join(METHODS)}, "
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


def described(criterion: Criterion) -> dict[str, Any]:
    """A criterion in plain JSON values: equal where class, options, weights and layers are.

    ``repr`` alone would miss the options that a class does not print.
    """
    lines = []
    for module in criterion.modules():
        if isinstance(module, Criterion):
            options = {k: v for k, v in sorted(vars(module).items()) if _is_option(k, v)}
            shown = ", ".join(f"{name}={value!r}" for name, value in options.items())
            lines.append(f"{type(module).__name__}({shown})")
    layers = hashlib.sha256(repr(criterion).encode()).hexdigest()[:8]
    return {"criterion": lines, "layers": layers}


def _is_option(name: str, value: object) -> bool:
    plain = value is None or isinstance(value, bool | int | float | str | tuple)
    return plain and not name.startswith("_") and name != "training"
