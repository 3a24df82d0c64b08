"""The contract every criterion keeps, and the sum of criteria."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from structkd._checks import describe, number
from structkd.distributed import gather_batch, world_size
from structkd.features import Features

Input: TypeAlias = Features | Tensor | Sequence[Tensor]

_RANKS: Mapping[str, tuple[tuple[int, ...], str]] = {
    "logits": ((2,), "2-D (B, K)"),
    "embedding": ((2,), "2-D (B, D)"),
    "intermediate": ((3, 4), "4-D (B, C, H, W) or 3-D (B, N, C)"),
}
_HINTS: Mapping[str, str] = {
    "logits": "pass Features with logits, as FeatureCapture gives them",
    "embedding": "name the layer, for example FeatureCapture(net, embedding='fc:input')",
    "intermediate": "name a layer, for example FeatureCapture(net, intermediate='layer2')",
}


class Criterion(nn.Module):
    """Base class of all distillation criteria.

    A criterion compares a student's features with a teacher's and returns a scalar to minimise. It
    takes :class:`Features` and reads its own fields, or takes that field's tensors directly. The
    teacher is a constant: it is detached inside. Internals run in float32 at least with autocast
    off, and gradients return in the caller's dtype. Trainable parts are parameters and memories are
    buffers, so ``.to()``, ``state_dict()`` and ``parameters()`` cover all of it.

    To write one, name the fields it ``reads`` and implement :meth:`compute`.

    Args:
        gather: Compute on the whole batch of all processes, so that value and gradient equal the
            single-process run. Only batch-coupled criteria offer it.

    Example:
        >>> class LogitGap(Criterion):
        ...     reads = ("logits",)
        ...     def compute(self, student, teacher, target):
        ...         return {"gap": (student.logits - teacher.logits).abs().mean()}
        >>> criterion = LogitGap() + 0.5 * LogitGap()
        >>> criterion(torch.zeros(4, 3), torch.ones(4, 3))
        tensor(1.5000)
    """

    reads: ClassVar[tuple[str, ...]] = ()  # a bare tensor stands for the first
    min_batch: ClassVar[int] = 1
    ranks: ClassVar[Mapping[str, tuple[tuple[int, ...], str]]] = _RANKS

    def __init__(self, *, gather: bool = False) -> None:
        super().__init__()
        self.gather = gather

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        """Returns the named scalar terms from checked float features with a detached teacher."""
        raise NotImplementedError(f"{type(self).__name__} must implement compute")

    def forward(self, student: Input, teacher: Input, target: Tensor | None = None) -> Tensor:
        """Returns the scalar sum of :meth:`terms`."""
        return torch.stack(list(self.terms(student, teacher, target).values())).sum()

    def terms(
        self, student: Input, teacher: Input, target: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns the named parts whose sum :meth:`forward` returns.

        Args:
            student: The student's features, or the tensor that this criterion reads.
            teacher: The teacher's, of the same batch in the same order.
            target: Labels ``(B,)`` where the criterion uses them.

        Returns:
            Scalars by name, weights included.

        Raises:
            ValueError: If a field is missing, of the wrong rank or of another batch size.
            TypeError: If a tensor is not of floating point.
        """
        student = self._read(student, "student")
        teacher = self._read(teacher, "teacher")
        tensors = [*_named(student, "student"), *_named(teacher, "teacher")]
        device = self._check_together(tensors)
        dtype = self._compute_dtype(tensors, device)
        if self.gather:
            student, teacher = _map(student, gather_batch), _map(teacher, gather_batch)
            target = None if target is None else gather_batch(target)
        student = _map(student, lambda tensor: tensor.to(dtype))
        teacher = _map(teacher, lambda tensor: _constant(tensor).to(dtype))
        with torch.autocast(device.type, enabled=False):
            return self.compute(student, teacher, target)

    def _read(self, given: Input, name: str) -> Features:
        """Returns only the fields that this criterion reads, each checked for type and rank."""
        if not isinstance(given, Features):
            if not self.reads:
                raise TypeError(f"{name} must be Features here, got {describe(given)}")
            field = self.reads[0]
            is_maps = field == "intermediate" and isinstance(given, list | tuple)
            if not isinstance(given, Tensor) and not is_maps:
                raise TypeError(f"{name} must be Features or a tensor, got {describe(given)}")
            given = Features(**{field: given})  # type: ignore[arg-type]
        found: dict[str, Tensor | tuple[Tensor, ...]] = {}
        for field in self.reads:
            value = getattr(given, field)
            if value is None or (field == "intermediate" and not value):
                raise ValueError(f"{type(self).__name__} needs {name}.{field}: {_HINTS[field]}")
            for tensor in value if isinstance(value, tuple) else (value,):
                self._check_tensor(tensor, f"{name}.{field}", field)
            found[field] = value
        return Features(**found, index=given.index)  # type: ignore[arg-type]

    def _check_tensor(self, tensor: Tensor, name: str, field: str) -> None:
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {describe(tensor)}")
        ranks, wanted = self.ranks[field]
        if tensor.dim() not in ranks:
            raise ValueError(f"{name} must be {wanted}, got {describe(tensor)}")

    def _check_together(self, tensors: Sequence[tuple[str, Tensor]]) -> torch.device:
        """Checks that all tensors share a batch size and a device; returns the device."""
        _, first = tensors[0]
        for name, tensor in tensors:
            if tensor.shape[0] != first.shape[0]:
                raise ValueError(
                    "student and teacher must hold the same samples: "
                    f"{name} has batch size {tensor.shape[0]}, expected {first.shape[0]}"
                )
            if tensor.device != first.device:
                raise ValueError(
                    f"{name} is on {tensor.device}, expected {first.device}: "
                    "move both models to one device"
                )
        batch = first.shape[0] * (world_size() if self.gather else 1)
        if batch < self.min_batch:
            raise ValueError(
                f"{type(self).__name__} compares the samples of a batch: it needs a batch of at "
                f"least {self.min_batch}, got {batch}; use drop_last=True in the DataLoader"
            )
        return first.device

    def _compute_dtype(
        self, tensors: Sequence[tuple[str, Tensor]], device: torch.device
    ) -> torch.dtype:
        """Returns float64 where an input or a parameter is, float32 otherwise."""
        dtypes = {tensor.dtype for _, tensor in tensors}
        wide = torch.float64 in dtypes
        for parameter in self.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                raise TypeError(
                    f"{type(self).__name__} has parameters in {parameter.dtype}; keep the "
                    "criterion in float32, it takes half-precision inputs as they are"
                )
            if parameter.device != device:
                raise ValueError(
                    f"{type(self).__name__} is on {parameter.device}, its inputs on {device}: "
                    f"call criterion.to('{device}')"
                )
            if wide and parameter.dtype != torch.float64:
                raise TypeError(
                    f"{type(self).__name__} has parameters in {parameter.dtype}, but its inputs "
                    "are float64: call criterion.double()"
                )
            dtypes.add(parameter.dtype)
        return torch.float64 if torch.float64 in dtypes else torch.float32

    def __add__(self, other: object) -> CriterionSum:
        if not isinstance(other, Criterion):
            return NotImplemented
        return CriterionSum([*_parts(self), *_parts(other)])

    def __radd__(self, other: object) -> Criterion:
        # sum() starts from 0.
        return self if isinstance(other, Real) and other == 0 else NotImplemented

    def __mul__(self, weight: object) -> CriterionSum:
        if not isinstance(weight, Real):
            return NotImplemented
        factor = number("weight", weight)
        return CriterionSum([(factor * own, criterion) for own, criterion in _parts(self)])

    __rmul__ = __mul__


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
    if value_s is None or value_t is None:
        raise ValueError(f"{field} is missing: {_HINTS[field]}")
    return value_s, value_t


def map_pair(student: Features, teacher: Features, layer: int) -> tuple[Tensor, Tensor]:
    """Returns the maps at position ``layer`` of both ``intermediate`` tuples."""
    picked = []
    for name, features in (("student", student), ("teacher", teacher)):
        count = len(features.intermediate)
        if not -count <= layer < count:
            raise ValueError(f"layer={layer}, but {name}.intermediate holds {count} map(s)")
        picked.append(features.intermediate[layer])
    return picked[0], picked[1]


def channels(features: Tensor) -> int:
    """Returns the channels of ``(B, C, H, W)`` maps, ``(B, N, C)`` tokens or ``(B, C)`` rows."""
    return features.shape[1] if features.dim() == 4 else features.shape[-1]


class CriterionSum(Criterion):
    """A weighted sum of criteria, written ``a + 0.5 * b``.

    Every member reads its own fields, so pass :class:`Features`. Term names are the members', with
    `` (2)`` added to a name that comes twice.

    Args:
        parts: Pairs of weight and criterion.

    Example:
        >>> import structkd
        >>> criterion = structkd.KDLoss() + 0.5 * structkd.CORALLoss()
        >>> feats = structkd.Features(logits=torch.eye(4), embedding=torch.eye(4))
        >>> list(criterion.terms(feats, feats))
        ['KD', 'CORAL']
    """

    def __init__(self, parts: Sequence[tuple[float, Criterion]]) -> None:
        super().__init__()
        self.weights = tuple(number("weight", weight) for weight, _ in parts)
        self.criteria = nn.ModuleList(criterion for _, criterion in parts)

    def terms(
        self, student: Input, teacher: Input, target: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns every member's weighted terms under distinct names."""
        fields = {criterion.reads for _, criterion in _parts(self)}
        if len(fields) > 1 and not (
            isinstance(student, Features) and isinstance(teacher, Features)
        ):
            raise TypeError(
                "student and teacher must be Features for a sum whose members read different "
                f"fields, got {describe(student)} and {describe(teacher)}"
            )
        merged: dict[str, Tensor] = {}
        for weight, criterion in _parts(self):
            for name, value in criterion.terms(student, teacher, target).items():
                unique, count = name, 1
                while unique in merged:
                    count += 1
                    unique = f"{name} ({count})"
                merged[unique] = weight * value
        return merged

    def extra_repr(self) -> str:
        return f"weights={self.weights}"


def _parts(criterion: Criterion) -> list[tuple[float, Criterion]]:
    if isinstance(criterion, CriterionSum):
        members = [member for member in criterion.criteria if isinstance(member, Criterion)]
        return list(zip(criterion.weights, members, strict=True))
    return [(1.0, criterion)]


def _named(features: Features, name: str) -> list[tuple[str, Tensor]]:
    """Returns the features' floating-point tensors with their names."""
    fields = (("logits", features.logits), ("embedding", features.embedding))
    named = [(f"{name}.{field}", value) for field, value in fields if value is not None]
    for position, value in enumerate(features.intermediate):
        named.append((f"{name}.intermediate[{position}]", value))
    return named


def _map(features: Features, function: Callable[[Tensor], Tensor]) -> Features:
    """Applies ``function`` to every floating-point field, and gathers alike the index."""
    index = features.index
    return Features(
        logits=None if features.logits is None else function(features.logits),
        embedding=None if features.embedding is None else function(features.embedding),
        intermediate=tuple(function(value) for value in features.intermediate),
        index=function(index) if index is not None and function is gather_batch else index,
    )


def _constant(tensor: Tensor) -> Tensor:
    """Detaches; a tensor made under ``inference_mode`` is copied, autograd cannot save it."""
    # A compiled graph copies such inputs itself, and cannot trace the question.
    if not torch.compiler.is_compiling() and tensor.is_inference():
        return tensor.clone()
    return tensor.detach()
