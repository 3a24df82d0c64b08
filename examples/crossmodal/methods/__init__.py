"""Distillation methods by name: one entry of ``methods.toml``, or a sum of several."""

from __future__ import annotations

import hashlib
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import structkd
from crossmodal.near import did_you_mean, looked_up
from crossmodal.recipes import checked, tomllib
from structkd import ConvAdapter, Criterion, CrossCorrelationLoss, UniformityCalibrationLoss
from structkd.criteria.structure import VARIANTS as STRUCTURES

Options = Mapping[str, Mapping[str, Any]]
ALONE = "alone"
# Options of a method rather than of its criterion.
_WEIGHTS = ("weight", "supervision")
_HERE = Path(__file__).parent
# Options that no command line can say: modules, and the labels' part of DSLoss.
_OBJECTS = (
    "sem", "dcm", "srm", "adapter", "adapters", "planner", "student_projector", "teacher_projector"
)  # fmt: skip
_DS, _TERMS = "DSLoss", ("SEM-1", "SEM-2", "DCM-1", "DCM-2")


@dataclass(frozen=True)
class Setup:
    """What a criterion may need beyond features: training images, images a step, stages."""

    samples: int
    batch_size: int
    stages: int = 1  # of a network that are captured

    def fill(self, option: object) -> object:
        """An option of the registry with what the data have in place of its name."""
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

    @property
    def known(self) -> list[str]:
        """The options of its criterion; of ``DSLoss`` those of its parts as well."""
        if not self.criterion:
            return []
        kinds = [getattr(structkd, self.criterion)]
        kinds += [CrossCorrelationLoss, UniformityCalibrationLoss] if self.criterion == _DS else []
        names = dict.fromkeys(name for kind in kinds for name in inspect.signature(kind).parameters)
        return [
            name
            for name in names
            if name not in _OBJECTS or (name, self.criterion) == ("adapter", "DenseStructureLoss")
        ]

    def build(self, setup: Setup, options: Mapping[str, Any]) -> Criterion:
        """The criterion, unweighted."""
        ready = {k: setup.fill(v) for k, v in self.options.items()} | dict(options)
        ready.setdefault("gather", True)
        if self.stagewise:
            return reduce(
                add, (self._made(setup, ready | {"layer": k}) for k in range(setup.stages))
            )
        if self.layers == "one" and setup.stages > 1 and "layer" in self.known:
            ready.setdefault("layer", -2)
        return self._made(setup, ready)

    def _made(self, setup: Setup, options: dict[str, Any]) -> Criterion:
        if self.criterion == "FitNetLoss" and not self.stagewise:
            options["adapter"] = Normalised(kernel_size=options.pop("kernel_size", 1))
        if self.criterion == "FlowMatrixLoss":
            layers = options.get("layer") or range(setup.stages)
            options["adapters"] = [Normalised(skip_equal=True) for _ in layers]
        if self.criterion == _DS:
            return structure(**options)
        made: Criterion = getattr(structkd, self.criterion)(**options)
        return made


class Normalised(ConvAdapter):
    """The CRD benchmark's map to the teacher's channels: a convolution, batch norm, ReLU.

    The benchmark's weights need the norm: with a bare convolution, FitNets at weight 100 and FSP at
    50 diverge within a few steps of learning rate 0.1.
    """

    def __init__(self, *, kernel_size: int = 1, skip_equal: bool = False) -> None:
        super().__init__(kernel_size=kernel_size, skip_equal=skip_equal)
        self.norm: nn.Module | None = nn.LazyBatchNorm2d()

    def initialize_parameters(self, features: Tensor, out_channels: int | None = None) -> None:
        super().initialize_parameters(features, out_channels)
        if self.conv is None:
            self.norm = None

    def forward(self, features: Tensor, out_channels: int | None = None) -> Tensor:
        adapted = super().forward(features, out_channels)
        return adapted if self.norm is None else F.relu(self.norm(adapted))


def structure(
    *,
    variant: str = "measured",
    gamma: Any = None,
    terms: Sequence[str] = _TERMS,
    gather: bool,
    **options: Any,
) -> structkd.DSLoss:
    """``DSLoss`` with the options of its parts by name, beside those of its variant."""
    parts = {}
    for part, kind in (("sem", CrossCorrelationLoss), ("dcm", UniformityCalibrationLoss)):
        own = inspect.signature(kind).parameters
        given = {name: value for name, value in options.items() if name in own}
        wanted = [term for term in terms if term.startswith(part.upper())]
        if given and wanted:
            preset = STRUCTURES.get(variant, {}).get(part, {})
            parts[part] = kind(**preset | given, terms=wanted, gather=gather)
    return structkd.DSLoss(variant=variant, gamma=gamma, terms=terms, gather=gather, **parts)


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

    @property
    def taught(self) -> bool:
        """Whether it needs a teacher."""
        return bool(self.parts)

    def stages(self, names: list[str]) -> list[str]:
        """Which of a network's to capture: all if any part wants them, else the last but one."""
        if any(method.layers == "all" for _, method in self.parts):
            return names
        return [names[max(len(names) - 2, 0)]]

    def weight(self, part: str, method: Method) -> float:
        own = self.weights.get(part, method.weight)
        return float(self.options.get(part, {}).get("weight", own))

    def build(self, setup: Setup) -> Criterion:
        """The weighted sum of the parts' criteria."""
        criteria = []
        for name, method in self.parts:
            options = {k: v for k, v in self.options.get(name, {}).items() if k not in _WEIGHTS}
            criterion = method.build(setup, options)
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
        known = [*_WEIGHTS, *METHODS[method].known]
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
