"""What a criterion reads out of features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from structkd._checks import describe
from structkd.distributed import gather_batch
from structkd.features import Features

if TYPE_CHECKING:
    from structkd.criteria.base import Criterion

Input: TypeAlias = Features | Tensor | Sequence[Tensor]

_HINTS: Mapping[str, str] = {
    "logits": "pass Features with logits, as FeatureCapture gives them",
    "embedding": "name the layer, for example FeatureCapture(net, embedding='fc:input')",
    "intermediate": "name a layer, for example FeatureCapture(net, intermediate='layer2')",
}


def pair(student: Features, teacher: Features, field: str) -> tuple[Tensor, Tensor]:
    """Returns ``logits`` or ``embedding`` of both, after checking that their widths agree."""
    value_s, value_t = either(student, teacher, field)
    if value_s.shape[1] != value_t.shape[1]:
        width_s, width_t = value_s.shape[1], value_t.shape[1]
        fix = (
            "both networks must score the same classes"
            if field == "logits"
            else f"project the student's with structkd.Projector({width_s}, {width_t}) first"
        )
        raise ValueError(
            f"student and teacher {field} must have one width, got {width_s} and {width_t}; {fix}"
        )
    return value_s, value_t


def either(student: Features, teacher: Features, field: str) -> tuple[Tensor, Tensor]:
    """Returns ``logits`` or ``embedding`` of both, of any width."""
    value_s, value_t = getattr(student, field), getattr(teacher, field)
    for name, features in (("student", student), ("teacher", teacher)):
        if getattr(features, field) is None:
            raise ValueError(missing("the criterion", f"{name}.{field}", features, field))
    return value_s, value_t


def missing(reader: str, name: str, features: Features, field: str) -> str:
    """Returns what to say where a field is missing, with the capture's reason if it gave one."""
    return f"{reader} needs {name}: {features.absent.get(field) or _HINTS[field]}"


def as_features(given: Input, name: str, reader: Criterion | type[Criterion]) -> Features:
    """Returns features; bare tensors become the first field that the criterion reads."""
    if isinstance(given, Features):
        return given
    if not reader.reads:
        raise TypeError(f"{name} must be Features here, got {describe(given)}")
    field = reader.reads[0]
    is_maps = field == "intermediate" and isinstance(given, list | tuple)
    if not isinstance(given, Tensor) and not is_maps:
        raise TypeError(f"{name} must be Features or a tensor, got {describe(given)}")
    return Features(**{field: given})  # type: ignore[arg-type]


def named_tensors(features: Features, name: str) -> list[tuple[str, Tensor]]:
    """Returns the features' floating-point tensors with their names."""
    fields = (("logits", features.logits), ("embedding", features.embedding))
    named = [(f"{name}.{field}", value) for field, value in fields if value is not None]
    for position, value in enumerate(features.intermediate):
        named.append((f"{name}.intermediate[{position}]", value))
    return named


def mapped(features: Features, function: Callable[[Tensor], Tensor]) -> Features:
    """Applies ``function`` to every floating-point field."""
    return features.replace(
        logits=None if features.logits is None else function(features.logits),
        embedding=None if features.embedding is None else function(features.embedding),
        intermediate=tuple(function(value) for value in features.intermediate),
    )


def gathered_rows(features: Features, sizes: list[int]) -> Features:
    """Gathers every field over the processes, the index included."""
    gathered = mapped(features, lambda tensor: gather_batch(tensor, sizes))
    if features.index is None:
        return gathered
    return gathered.replace(index=gather_batch(features.index, sizes))


def constant(tensor: Tensor) -> Tensor:
    """Detaches; a tensor made under ``inference_mode`` is copied, autograd cannot save it."""
    # A compiled graph copies such inputs itself, and cannot trace the question.
    if not torch.compiler.is_compiling() and tensor.is_inference():
        return tensor.clone()
    return tensor.detach()
