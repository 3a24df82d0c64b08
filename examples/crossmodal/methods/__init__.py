"""Distillation methods by name: one entry of ``methods.toml``, or a sum of several."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from operator import add
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import structkd
from crossmodal.near import did_you_mean, looked_up
from crossmodal.recipes import checked, tomllib
from structkd import ConvAdapter, Criterion, Features

Options = Mapping[str, Mapping[str, Any]]
ALONE = "alone"
# Options of a method rather than of its criterion.
_WEIGHTS = ("weight", "supervision")
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Setup:
    """What a criterion may need beyond features: training images, images a step."""

    samples: int
    batch_size: int
    read: Callable[[], tuple[Tensor, Tensor]] | None = None  # see `taught`

    @cached_property
    def taught(self) -> dict[str, Tensor]:
        """The teacher's embedding of its own set and the labels there, read when first asked."""
        if self.read is None:
            raise ValueError("this criterion reads the teacher's own set, which is not at hand")
        embedding, labels = self.read()
        return {"$embedding": embedding, "$labels": labels}

    def fill(self, option: object) -> object:
        """An option of the registry with what the data have in place of its name."""
        if option in ("$embedding", "$labels"):
            return self.taught[str(option)]
        names = {
            "$samples": self.samples,
            "$batch_size": min(self.batch_size, self.samples),
            "$negatives": min(16384, self.samples),
        }
        return names.get(option, option) if isinstance(option, str) else option


@dataclass(frozen=True)
class Method:
    """An entry of ``methods.toml``, whose head says what each field is."""

    title: str
    family: str
    criterion: str = ""
    supervision: float = 1.0
    weight: float = 1.0
    layers: str = "one"
    stagewise: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(
        self, feats_s: Features, feats_t: Features, setup: Setup, options: Mapping[str, Any]
    ) -> Criterion:
        """The criterion, unweighted, for the widths of two example passes over its stages."""
        kind = getattr(structkd, self.criterion)
        known = kind.options()
        ready = {k: setup.fill(v) for k, v in self.options.items()} | dict(options)
        if "gather" in known:
            ready.setdefault("gather", True)
        stages = min(len(feats_s.intermediate), len(feats_t.intermediate))
        if self.stagewise:
            parts = (kind.from_features(feats_s, feats_t, layer=k, **ready) for k in range(stages))
            return reduce(add, parts)
        if self.layers == "one" and stages > 1 and "layer" in known:
            ready.setdefault("layer", -2)
        criterion = kind.from_features(feats_s, feats_t, **ready)
        if isinstance(criterion, structkd.FitNetLoss | structkd.FlowMatrixLoss):
            for parent in list(criterion.modules()):
                for name, child in list(parent.named_children()):
                    if isinstance(child, ConvAdapter):
                        setattr(parent, name, _normalised(child))
        return criterion


def _normalised(convolution: ConvAdapter) -> nn.Module:
    """The CRD benchmark's map to the teacher's channels: a convolution, batch norm, ReLU.

    The benchmark's weights need the norm: with a bare convolution, FitNets at weight 100 and FSP at
    50 diverge within a few steps of learning rate 0.1.
    """
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU())


METHODS: dict[str, Method] = {
    name: checked(Method, entry, f"methods.toml [{name}]")
    for name, entry in tomllib.loads(_HERE.joinpath("methods.toml").read_text()).items()
}

SWEEPS: dict[str, dict[str, str]] = tomllib.loads(_HERE.joinpath("sweeps.toml").read_text())


@dataclass(frozen=True)
class Plan:
    """A resolved method: what to build, and the weight of the cross-entropy."""

    name: str  # as resolved, parts joined by +
    parts: tuple[tuple[str, Method], ...]  # with their names; empty for the lone student
    supervision: float = 1.0  # weight of the cross-entropy
    options: Options = field(default_factory=dict)  # overrides by part
    weights: Mapping[str, float] = field(default_factory=dict)  # where not the methods' own
    bridged: bool = False  # the parts are for the free pairs of a mixed batch
    match: Plan | None = None  # there, what is minimised over matches of the other images

    @property
    def taught(self) -> bool:
        """Whether it needs a teacher."""
        return bool(self.parts) or self.match is not None

    def stages(self, names: list[str]) -> list[str]:
        """Which of a network's to capture: all if any part wants them, else the last but one."""
        parts = self.parts if self.match is None else self.parts + self.match.parts
        if any(method.layers == "all" for _, method in parts):
            return names
        return [names[max(len(names) - 2, 0)]]

    def weight(self, part: str, method: Method) -> float:
        own = self.weights.get(part, method.weight)
        return float(self.options.get(part, {}).get("weight", own))

    def build(self, feats_s: Features, feats_t: Features, setup: Setup) -> Criterion:
        """The weighted sum of the parts' criteria, from two example passes over the stages.

        Over a mixed batch it is a ``BridgeLoss``, the cross-entropy included.
        """
        if self.bridged:
            pair = replace(self, bridged=False, match=None) if self.parts else None
            pair_loss, match_loss = (
                None if plan is None else plan.build(feats_s, feats_t, setup)
                for plan in (pair, self.match)
            )
            return structkd.BridgeLoss(pair_loss, match_loss, task_weight=self.supervision)
        criteria = []
        for name, method in self.parts:
            options = {k: v for k, v in self.options.get(name, {}).items() if k not in _WEIGHTS}
            criterion = method.build(feats_s, feats_t, setup, options)
            criteria.append(self.weight(name, method) * criterion)
        return reduce(add, criteria)

    def described(self, criterion: Criterion | None) -> dict[str, Any]:
        """What is minimised, down to every option of the criterion and every changed default."""
        return {"supervision": self.supervision} | (described(criterion) if criterion else {})


def resolve(name: str, options: Options | None = None) -> Plan:
    """Look up a method or a sum: ``kd``, ``kd+ds``, ``ds:terms=[SEM-1,SEM-2],gamma=2+kd``.

    A sum takes every criterion at its own weight and the cross-entropy at weight 1. Options follow
    a part's name and are keywords of its criterion, ``weight``, or ``supervision``, the weight of
    the cross-entropy, where a method stands alone; they are part of the name, as are further
    ``options`` by part.
    """
    written: dict[str, dict[str, Any]] = {}
    for part in name.split("+"):
        method, _, listed = (text.strip() for text in part.partition(":"))
        method = method.lower()
        looked_up("method", method, METHODS, ", and sums of them such as kd+ds")
        if method in written:
            raise ValueError(f"method {name!r} names a part twice; name each once")
        written[method] = _options(method, listed)
    parts = tuple((part, METHODS[part]) for part in written)
    if len(parts) > 1 and ALONE in written:
        raise ValueError(f"method {name!r}: 'alone' has no criterion to add; leave it out")
    for part, more in (options or {}).items():
        if part not in written:
            raise ValueError(f"options for {part}, but method {name!r} has {', '.join(written)}")
        written[part] |= more
    supervision = _supervision(parts, written)
    title = "+".join(
        part + (":" + ",".join(f"{k}={as_text(v)}" for k, v in own.items()) if own else "")
        for part, own in written.items()
    )
    return Plan(title, tuple(p for p in parts if p[1].criterion), supervision, written)


def _supervision(parts: tuple[tuple[str, Method], ...], written: Options) -> float:
    """The weight of the cross-entropy: 1 in a sum, else the method's own or what is written."""
    given = [own["supervision"] for own in written.values() if "supervision" in own]
    if not given:
        return parts[0][1].supervision if len(parts) == 1 else 1.0
    if len(parts) > 1:
        raise ValueError(
            f"supervision is for a method that stands alone, got {'+'.join(written)}; leave it "
            "out: a sum has the cross-entropy at weight 1"
        )
    if isinstance(given[0], bool) or not isinstance(given[0], int | float) or given[0] < 0:
        raise ValueError(f"supervision must be a number of at least 0, got {given[0]!r}")
    return float(given[0])


def _options(method: str, listed: str) -> dict[str, Any]:
    """``temperature=2,terms=[SEM-1,SEM-2]`` as keywords."""
    found: dict[str, Any] = {}
    known = ["weight"]
    if METHODS[method].criterion:
        known = [*_WEIGHTS, *getattr(structkd, METHODS[method].criterion).options()]
    for item in _split(listed):
        key, equals, text = (part.strip() for part in item.partition("="))
        if not equals or key not in known:
            hint = did_you_mean(key, known) + f"write name=value with one of {', '.join(known)}"
            raise ValueError(f"method {method!r} has no option {item!r}; {hint}")
        found[key] = value(text)
        if key == "weight" and not _is_weight(found[key]):
            raise ValueError(
                f"method {method!r}: weight must be a number of at least 0, got {text!r}"
            )
    return found


def _is_weight(given: object) -> bool:
    return isinstance(given, int | float) and not isinstance(given, bool) and 0 <= given < math.inf


def _split(listed: str) -> list[str]:
    """The parts between commas; commas inside brackets belong to their part."""
    return [part for part in re.split(r",(?![^\[(]*[\])])", listed) if part.strip()]


def value(text: str) -> Any:
    """A value from the command line: true, false, none, a number, [a, b], or the text itself."""
    text = text.strip()
    if text[:1] in ("[", "("):
        return tuple(value(part) for part in _split(text[1:-1]))
    plain = {"none": None, "true": True, "false": False}
    if text.lower() in plain:
        return plain[text.lower()]
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def as_text(option: object) -> str:
    """The text that ``value`` reads back."""
    if isinstance(option, list | tuple):
        return f"[{','.join(as_text(part) for part in option)}]"
    return str(option).lower() if option is None or isinstance(option, bool) else str(option)


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
    return plain and not name.startswith("_") and name not in ("training", "gather")
