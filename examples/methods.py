"""Rows of a table as specs of the library; ``methods.yaml`` has names for some."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import models
import structkd
from recipe import near
from store import code_digest
from structkd.criteria import CRITERIA, build_criterion
from structkd.criteria.base import CriterionSum

ALONE = "alone"  # the student that has no teacher
MEAN_TEACHER = "mean teacher"  # taught by its own average where labels are missing
_OF_LABELS = {"type", "weight"}  # what a spec may say of the labels' cross-entropy
METHODS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())


@dataclass(frozen=True)
class Method:
    """A row of the table: a sum of criteria, and the weight of the labels' cross-entropy."""

    label: str
    parts: tuple[dict[str, Any], ...] = ()  # specs with a type each; none for the lone student
    labels: float = 1.0

    @classmethod
    def of(cls, text: str) -> Method:
        """Reads YAML; ``SupervisionLoss`` in a list is the cross-entropy, with its weight."""
        if text == MEAN_TEACHER:
            return cls(text)
        try:
            spec = yaml.safe_load(text)
        except yaml.YAMLError as error:
            told = str(error).splitlines()[0]
            raise ValueError(f"--criterion {text!r} is no YAML: {told}") from error
        parts = _parts(spec, alone=not isinstance(spec, list))
        labels = [part for part in parts if part["type"] == "SupervisionLoss"]
        kept = tuple(part for part in parts if part["type"] != "SupervisionLoss")
        given = labels[0] if labels else {"type": "SupervisionLoss"}
        weight = given.get("weight", 1.0)
        fits = isinstance(weight, int | float) and weight >= 0 and not given.keys() - _OF_LABELS
        if len(labels) > 1 or not fits:
            raise ValueError(
                f"--criterion {text!r}: SupervisionLoss stands once, with a weight of at least 0 "
                "and nothing else"
            )
        return cls(text, kept, float(weight))

    def build(self, stages: int, data: Mapping[str, int]) -> structkd.Criterion:
        """The criterion, for networks of so many stages and for so much data."""
        found = []
        for part in self.parts:
            kind, options = loaded(part["type"]), dict(part)
            known = inspect.signature(kind).parameters
            options["type"] = kind
            if "dataset_size" in known:
                options = {"dataset_size": "$samples"} | options
            if "gather" in known:
                options.setdefault("gather", True)
            own = "layer" in options
            for name, value in options.items():
                if isinstance(value, str) and value[:1] == "$" and value[1:] in data:
                    options[name] = data[value[1:]]
                elif value == "$normalised":  # the CRD benchmark's map to the teacher's channels
                    one = name == "adapter"
                    made = [models.Normalised(skip_equal=not one) for _ in range(stages)]
                    options[name] = made[0] if one else made
            each = range(stages) if options.get("layer") == "$each" else [options.get("layer")]
            for layer in each:
                criterion = build_criterion(options | ({"layer": layer} if own else {}))
                # A criterion that reads one map reads the last stage but one.
                for leaf in () if own else criterion.modules():
                    if stages > 1 and getattr(leaf, "layer", None) == -1:
                        leaf.layer = -2
                found.append(criterion)
        return found[0] if len(found) == 1 else CriterionSum.of(*found)

    def stages(self, names: list[str]) -> list[str]:
        """Which of a network's stages are captured: all if any part wants them, else one."""
        for part in self.parts:
            layer = inspect.signature(loaded(part["type"])).parameters.get("layer")
            given = part.get("layer", None if layer is None else layer.default)
            if "layer" in part or (layer is not None and given is None):
                return names
        return [names[max(len(names) - 2, 0)]]

    @property
    def reads_maps(self) -> bool:
        """Whether any part of it reads a network's stages."""
        return any(
            "layer" in inspect.signature(loaded(part["type"])).parameters for part in self.parts
        )

    @property
    def described(self) -> dict[str, Any]:
        """What is minimised, as plain values, with a digest of the user's own code."""
        found = {"labels": self.labels, "criterion": [dict(part) for part in self.parts]}
        files = {part["type"].rpartition(":")[0] for part in self.parts if ":" in part["type"]}
        if files:
            paths = {file: Path(file).expanduser().resolve() for file in sorted(files)}
            found["own code"] = {file: code_digest(path) for file, path in paths.items()}
        return found


def _parts(spec: Any, *, alone: bool) -> list[dict[str, Any]]:
    if isinstance(spec, list):
        if not spec or ALONE in spec:
            what = f"{ALONE!r} among others, which has none" if spec else "no criterion"
            raise ValueError(f"--criterion: a list names {what}; fix: leave it out")
        return [part for one in spec for part in _parts(one, alone=False)]
    if isinstance(spec, Mapping) and isinstance(spec.get("type"), str):
        loaded(spec["type"])
        return [dict(spec)]
    if not isinstance(spec, str):
        raise ValueError(f"--criterion must be a name, a dict with a type or a list, got {spec!r}")
    name = spec.lower()
    if name not in METHODS:
        loaded(spec)
        return [{"type": spec}]
    inner = METHODS[name].get("criterion")
    parts = [] if inner is None else _parts(inner, alone=True)
    # In a sum the labels weigh 1, whatever a method has beside itself.
    return [part for part in parts if alone or part["type"] != "SupervisionLoss"]


def loaded(kind: str) -> type[structkd.Criterion]:
    """The class of a criterion: of structkd, or ``FILE.py:CLASS``.

    Raises:
        ValueError: There is no criterion of that name.
    """
    place, colon, name = kind.rpartition(":")
    if not colon:
        if kind not in CRITERIA:
            known = [*METHODS, MEAN_TEACHER, *CRITERIA]
            raise ValueError(
                f"--criterion: unknown {kind!r}; {near(kind, known)}known: {', '.join(known)}, and "
                "my_losses.py:MyLoss for a class of your own"
            )
        return CRITERIA[kind]
    file = Path(place).expanduser().resolve()
    if not file.is_file():
        raise ValueError(f"--criterion {kind}: there is no file {file}")
    try:
        named = f"own_{file.stem}_{code_digest(file)}"
    except SyntaxError as error:
        raise ValueError(f"--criterion: {file.name}, line {error.lineno}: {error.msg}") from error
    if named not in sys.modules:
        made = importlib.util.spec_from_file_location(named, file)
        module = importlib.util.module_from_spec(made)
        sys.modules[named] = module
        try:
            made.loader.exec_module(module)
        except BaseException:
            del sys.modules[named]
            raise
    own = getattr(sys.modules[named], name, None)
    if not (isinstance(own, type) and issubclass(own, structkd.Criterion)):
        raise ValueError(f"--criterion {kind}: {file.name} has no structkd.Criterion named {name}")
    return own
