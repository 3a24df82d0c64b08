"""The contract that every criterion keeps, and the weighted sum of criteria."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from numbers import Real
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from structkd._checks import describe, near, number
from structkd.distributed import Shards
from structkd.features import Features, named_features
from structkd.projectors import is_unshaped

CriterionT = TypeVar("CriterionT", bound="Criterion")
Input: TypeAlias = Features | Mapping[str, Any] | Tensor | Sequence[Tensor]

_RANKS: Mapping[str, tuple[tuple[int, ...], str]] = {
    "logits": ((2, 4), "2-D (B, K), or 4-D (B, K, H, W) of pixels"),
    "embedding": ((2,), "2-D (B, D)"),
    "intermediate": ((2, 3, 4), "4-D (B, C, H, W), 3-D (B, N, C) or 2-D (B, C)"),
}
_HINTS: Mapping[str, str] = {
    "logits": "pass Features with logits, as FeatureCapture and Distiller give them",
    "embedding": "name the layer, embedding='fc:input' for FeatureCapture, "
    "layers=dict(embedding='fc:input') for a Distiller",
    "intermediate": "name a layer, intermediate='layer2' for FeatureCapture, "
    "layers=dict(intermediate='layer2') for a Distiller",
}
_HALVES = (torch.float16, torch.bfloat16)


class Criterion(nn.Module):
    """Base class of all distillation criteria.

    A criterion compares a student's features with a teacher's and returns a scalar to minimise. It
    takes :class:`Features`, or a dict of the same names, and reads its own fields; or it takes that
    field's tensors directly. The teacher is a constant: it is detached inside. Internals run in
    float32 at least with autocast off, and gradients return in the caller's dtype.

    A criterion is constructed from its options alone. Parts that depend on the networks, such as a
    projector, take their shape at the first call, in place: an optimizer made before that trains
    them. Trainable parts are parameters and memories are buffers, so ``.to()``, ``state_dict()``
    and ``parameters()`` cover all of it. They stay in float32 where ``.half()`` or ``.bfloat16()``
    is called on a module that holds the criterion.

    No criterion adds the labels' cross-entropy unless it is asked to. Labels may be missing: a
    target of -100 marks a row without one.

    A pixel is a row: logits ``(B, K, H, W)`` reach :meth:`compute` as ``(B H W, K)``, a target
    ``(B, H, W)`` as ``(B H W,)``, unless ``pixels`` says that they stay maps. Logits of another
    size are brought to the student's by bilinear interpolation (``align_corners=False``) of the
    logits, before any softmax; a criterion that reads labels brings both networks' logits to the
    target's size where that is larger. Labels themselves are never resized.

    To write one, name the fields it ``reads`` and implement :meth:`compute`. If it compares the
    samples of a batch with each other, set ``over_ranks = "gathered"``: under ``gather`` it is then
    given the rows of all processes. Parts that depend on the networks are torch's lazy modules.

    Args:
        gather: Compute on the whole batch of all processes, so that value and gradient equal the
            single-process run. It has no effect on criteria that look at every sample by itself.

    Example:
        >>> class LogitGap(Criterion):
        ...     reads = ("logits",)
        ...     def compute(self, student, teacher, target):
        ...         return {"gap": (student.logits - teacher.logits).abs().mean()}
        >>> criterion = LogitGap() + 0.5 * LogitGap()
        >>> criterion(torch.zeros(4, 3), torch.ones(4, 3))
        tensor(1.5000)
    """

    # Fields of Features; a bare tensor stands for the first. An option may decide it: then the
    # constructor sets it on the instance.
    reads: tuple[str, ...] = ()
    reads_teacher: ClassVar[bool] = True  # whether it looks at the teacher at all
    # How it works on several processes. "rows": every sample by itself. "gathered": under gather,
    # compute is given the rows of all processes. "sums": compute is given Shards as a fourth
    # argument, and adds up what it needs. "always": as "sums", and a training call exchanges
    # without gather too, so that no rank may miss it; its buffers are then equal on all ranks.
    over_ranks: Literal["rows", "gathered", "sums", "always"] = "rows"
    # What logits of pixels become. "rows": a row each, at the student's size. "labelled": likewise,
    # at the target's size. "maps" and "labelled maps": they stay (B, K, H, W), at these sizes,
    # which spares a copy where everything happens along dimension 1.
    pixels: Literal["rows", "labelled", "maps", "labelled maps"] = "rows"
    # Whether logits may be probabilities, or whatever a network predicts; else they are refused.
    takes_probabilities: ClassVar[bool] = False
    min_batch: ClassVar[int] = 1
    _version = 2  # of the state dict; 1 is structkd 0.1.0
    _has_met = False  # whether a batch was looked at closely
    _has_shape = False  # whether all parameters were seen to have one

    def __init__(self, *, gather: bool = False) -> None:
        super().__init__()
        self.gather = gather

    def compute(self, *given: Any) -> dict[str, Tensor]:
        """Returns the named scalar terms of ``(student, teacher, target)``.

        Both are :class:`Features` that hold what the criterion reads, checked, in one dtype of
        float32 at least, the teacher's detached. ``target`` is what the caller gave. Where
        ``over_ranks`` is ``sums`` or ``always``, a fourth argument is the batch's ``Shards``.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement compute")

    def forward(self, student: Input, teacher: Input, target: Tensor | None = None) -> Tensor:
        """Returns the scalar sum of :meth:`terms`."""
        value, *others = self.terms(student, teacher, target).values()
        for other in others:
            value = value + other
        return value

    def terms(
        self,
        student: Input,
        teacher: Input,
        target: Tensor | None = None,
        *,
        shards: Shards | None = None,
    ) -> dict[str, Tensor]:
        """Returns the named parts whose sum :meth:`forward` returns.

        Args:
            student: The student's features, or the tensor that this criterion reads.
            teacher: The teacher's, of the same batch in the same order.
            target: Labels ``(B,)``, or ``(B, H, W)`` of pixels, where the criterion uses them, -100
                where there is none.
            shards: The rows that every process holds, where the caller knows them; a process may
                hold none then. Otherwise a criterion that needs them asks.

        Returns:
            Scalars by name, weights included.

        Raises:
            ValueError: If a field is missing, of the wrong rank or of another batch size.
            TypeError: If a tensor is not of floating point.
        """
        features_s, features_t, device = self._prepared(student, teacher)
        batch = len(_named(features_s, "student")[0][1])
        counted = shards
        if not self.exchanges:
            shards = Shards.alone(batch)
        elif shards is None:
            shards = Shards.ask(batch, device)
        self._check_batch((counted or shards).total)
        if self.over_ranks == "gathered":
            features_s, features_t = _gathered(features_s, shards), _gathered(features_t, shards)
            target = None if target is None else shards.gather(target)
        more = (shards,) if self.over_ranks in ("sums", "always") else ()
        # To enter it takes as long as two small operations.
        amp = torch.is_autocast_enabled(device.type)
        with torch.autocast(device.type, enabled=False) if amp else nullcontext():
            if "logits" in self.reads:
                features_s, features_t, target = _of_pixels(features_s, features_t, target, self)
            return self.compute(features_s, features_t, target, *more)

    @property
    def exchanges(self) -> bool:
        """Whether a call now waits for the other processes, if there are any."""
        if self.over_ranks == "always" and self.training and torch.is_grad_enabled():
            return True
        return self.gather and self.over_ranks != "rows"

    def step_epoch(self) -> None:
        """Tells the criterion, and every one inside it, that an epoch of training is over."""
        for part in criteria_in(self):
            part.epoch_ended()

    def epoch_ended(self) -> None:
        """Moves a schedule on by one epoch; override it in a criterion that has one."""

    def extra_repr(self) -> str:
        """Returns the options, written as in the constructor and in a criterion's dict."""
        shown = []
        for name in inspect.signature(type(self)).parameters:
            value = self.__dict__.get("enabled" if name == "terms" else name)
            if value is not None and not isinstance(value, nn.Module):
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DistributedDataParallel reads this name, and broadcasts all other buffers at every step.
        if is_unshaped(self):
            raise RuntimeError(
                f"the parameters of {type(self).__name__} have no shape yet, which "
                "DistributedDataParallel needs: call it once on features under torch.no_grad() "
                "before wrapping it"
            )
        return same_buffers(self)

    def _apply(
        self: CriterionT, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> CriterionT:
        def kept_wide(tensor: Tensor) -> Tensor:
            waits = is_lazy(tensor)  # then it has no dimensions, which channels_last asks for
            given = torch.empty(0, dtype=tensor.dtype, device=tensor.device) if waits else tensor
            try:
                moved = fn(given)
            except TypeError:  # Apple's GPUs know no float64
                moved = fn(given.float())
            if moved.dtype in _HALVES and tensor.dtype not in _HALVES:
                return tensor.to(moved.device)
            return tensor.to(moved) if waits else moved

        super()._apply(kept_wide, recurse)  # type: ignore[no-untyped-call]
        return self

    def _prepared(self, student: Input, teacher: Input) -> tuple[Features, Features, torch.device]:
        """Returns what is read of both, checked and in one dtype, and the device they are on."""
        features_s = self._read(student, "student")
        features_t = self._read(teacher, "teacher") if self.reads_teacher else Features()
        if not self._has_met and not torch.compiler.is_compiling() and is_unshaped(self):
            self._join(_named(features_s, "student")[0][1])
        if not self._has_met:  # to set an attribute of a module takes as long as a small operation
            self._has_met = True
        tensors = [*_named(features_s, "student"), *_named(features_t, "teacher")]
        device = self._check_together(tensors)
        dtype = self._compute_dtype(tensors, device)
        if any(tensor.dtype != dtype for _, tensor in tensors):
            features_s = _mapped(features_s, lambda tensor: tensor.to(dtype))
        features_t = _mapped(features_t, lambda tensor: _constant(tensor).to(dtype))
        return features_s, features_t, device

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        version = local_metadata.get("version")  # None where tensors alone were saved
        if version == self._version:
            return
        inner = tuple(
            f"{prefix}{name}."
            for name, part in self.named_modules()
            if part is not self and isinstance(part, Criterion)
        )
        # Those without a shape too, which state_dict() leaves out.
        own = (*self.named_parameters(), *self.named_buffers())
        known = {prefix + name for name, _ in own}
        if any(
            key.startswith(prefix) and not key.startswith(inner) and key not in known
            for key in state_dict
        ):
            perhaps = "may be" if version is None else "is"
            rest[-1].append(  # added to the errors, which list the keys
                f"this state dict {perhaps} of structkd 0.1.0, whose {type(self).__name__} kept "
                "its state under other names: go on with that release, or train a new criterion"
            )

    def _join(self, first: Tensor) -> None:
        """Moves to the device of the first features, and to float64 if they are float64."""
        wide = torch.float64 if first.dtype == torch.float64 else None
        with torch.inference_mode(False):  # what is moved there could never train
            self.to(device=first.device, dtype=wide)

    def _read(self, given: Input, name: str) -> Features:
        """Returns only the fields that this criterion reads, each checked for type and rank."""
        if not self.reads:
            raise TypeError(
                f"{type(self).__name__} must name the fields that it reads, "
                "reads = ('logits',) in the class for example"
            )
        features = as_features(given, name, self)
        found: dict[str, Tensor | tuple[Tensor, ...]] = {}
        for field in self.reads:
            value = getattr(features, field)
            if value is None or (field == "intermediate" and not value):
                raise ValueError(missing(type(self).__name__, f"{name}.{field}", features, field))
            for tensor in value if isinstance(value, tuple) else (value,):
                _check_tensor(tensor, f"{name}.{field}", field)
            looks = not (self.takes_probabilities or self._has_met)
            if field == "logits" and looks and not torch.compiler.is_compiling():
                _check_scores(value, f"{name}.logits")
            found[field] = value
        return Features(**found, index=features.index)  # type: ignore[arg-type]

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
        return first.device

    def _check_batch(self, batch: int) -> None:
        if batch < self.min_batch:
            raise ValueError(
                f"{type(self).__name__} compares the samples of a batch: it needs a batch of at "
                f"least {self.min_batch}, got {batch}; use drop_last=True in the DataLoader"
            )

    def _compute_dtype(
        self, tensors: Sequence[tuple[str, Tensor]], device: torch.device
    ) -> torch.dtype:
        """Returns float64 where an input or a parameter is, float32 otherwise."""
        dtypes = {tensor.dtype for _, tensor in tensors}
        wide = torch.float64 in dtypes
        # A graph that has met a parameter without a shape cannot give it one.
        looks = self._has_shape or not torch.compiler.is_compiling()
        if looks != self._has_shape:
            self._has_shape = looks
        for parameter in self.parameters() if looks else ():
            if isinstance(parameter, UninitializedParameter):  # it goes where its first input is
                self._has_shape = False
                continue
            if parameter.dtype in _HALVES:
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
        for name, buffer in self.named_buffers() if looks else ():
            if isinstance(buffer, UninitializedBuffer):
                continue
            if buffer.dim() and buffer.device != device:
                raise ValueError(
                    f"{type(self).__name__}'s {name} is on {buffer.device}, its inputs on "
                    f"{device}: call criterion.to('{device}')"
                )
        return torch.float64 if torch.float64 in dtypes else torch.float32

    def __add__(self, other: object) -> CriterionSum:
        return CriterionSum.of(self, other) if isinstance(other, Criterion) else NotImplemented

    def __radd__(self, other: object) -> Criterion:
        # sum() starts from 0.
        return self if isinstance(other, Real) and other == 0 else NotImplemented

    def __mul__(self, weight: object) -> CriterionSum:
        if not isinstance(weight, Real):
            return NotImplemented
        return CriterionSum.of(self).scaled(number("weight", weight, at_least=0))

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> CriterionSum:
        if not isinstance(divisor, Real):
            return NotImplemented
        if divisor == 0:
            raise ZeroDivisionError("a criterion cannot be divided by 0")
        return self * (1 / number("divisor", divisor))


class CriterionSum(Criterion):
    """A weighted sum of criteria, written ``a + 0.5 * b``.

    Every member reads its own fields, so pass :class:`Features`. Members have names, those of their
    classes unless others are given, with ``_2`` added to a name that comes twice; ``state_dict``
    goes by them, so it loads whatever the order. Term names are the members', with `` (2)`` added
    to a name that comes twice. A weight that changes from step to step is a factor in the loop,
    beside which the sum's weights stay: ``falling(step, steps) * sum(terms.values())``.

    Args:
        members: Criteria by name.
        weights: Weights >= 0 by name, 1 where none is given.

    Raises:
        ValueError: If there is no member, a weight names none, or one is negative.
        TypeError: If a member is no criterion.

    Example:
        >>> import torch, structkd
        >>> criterion = structkd.KDLoss() + 0.5 * structkd.CORALLoss()
        >>> feats = structkd.Features(logits=torch.eye(4), embedding=torch.eye(4))
        >>> list(criterion.terms(feats, feats))
        ['KD', 'CORAL']
        >>> criterion.weights
        {'KDLoss': 1.0, 'CORALLoss': 0.5}
    """

    def __init__(
        self, members: Mapping[str, Criterion], weights: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        if not members:
            raise ValueError("a sum needs at least one criterion, got none")
        self.criteria = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        for name, weight, member in _flattened(members, weights or {}):
            unused = _unused(name, self.criteria)
            self.criteria[unused], self.weights[unused] = member, weight

    @classmethod
    def of(cls, *criteria: Criterion) -> CriterionSum:
        """Returns the sum of criteria, named by their classes; members of sums come apart."""
        names: dict[str, Criterion] = {}
        for criterion in criteria:
            names[_unused(type(criterion).__name__, names)] = criterion
        return cls(names)

    def scaled(self, factor: float) -> CriterionSum:
        """Returns a sum of the same members, every weight times ``factor``."""
        weights = {name: factor * weight for name, weight in self.weights.items()}
        return CriterionSum(dict(self._members()), weights)

    def terms(
        self,
        student: Input,
        teacher: Input,
        target: Tensor | None = None,
        *,
        shards: Shards | None = None,
    ) -> dict[str, Tensor]:
        """Returns every member's weighted terms under distinct names."""
        fields = {member.reads for _, member in self._members()}
        by_name = (Features, Mapping)
        if len(fields) > 1 and not (isinstance(student, by_name) and isinstance(teacher, by_name)):
            raise TypeError(
                "student and teacher must be Features, or dicts of their names, for a sum whose "
                f"members read different fields, got {describe(student)} and {describe(teacher)}"
            )
        merged: dict[str, Tensor] = {}
        for part, member in self._members():
            found = member.terms(student, teacher, target, shards=shards)
            for name, value in found.items():
                unique, count = name, 1
                while unique in merged:
                    count += 1
                    unique = f"{name} ({count})"
                merged[unique] = self.weights[part] * value
        return merged

    def extra_repr(self) -> str:
        return f"weights={self.weights}"

    def _members(self) -> list[tuple[str, Criterion]]:
        return [
            (name, member)
            for name, member in self.criteria.items()
            if isinstance(member, Criterion)
        ]


def criteria_in(module: nn.Module) -> list[Criterion]:
    """Returns a criterion and all inside it, or those inside any module."""
    return [part for part in module.modules() if isinstance(part, Criterion)]


def leaves_of(criterion: Criterion) -> list[Criterion]:
    """Returns the criteria inside one that hold no other, which are the ones that read."""
    return [part for part in criteria_in(criterion) if len(criteria_in(part)) == 1]


def fields_read(criterion: Criterion) -> tuple[str, ...]:
    """Returns the fields of ``Features`` that a criterion reads, its members' included."""
    fields = [field for part in criteria_in(criterion) for field in part.reads]
    return tuple(dict.fromkeys(fields))


def same_buffers(module: nn.Module) -> list[str]:
    """Returns the dotted names of a module's buffers that all ranks hold alike by construction."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        if isinstance(part, Criterion) and part.over_ranks == "always"
        for name, _ in part.named_buffers()
    ]


def pair(student: Features, teacher: Features, field: str) -> tuple[Tensor, Tensor]:
    """Returns ``logits`` or ``embedding`` of both, after checking that their widths agree."""
    value_s, value_t = either(student, teacher, field)
    if value_s.shape[1] != value_t.shape[1]:
        width_s, width_t = value_s.shape[1], value_t.shape[1]
        fix = (
            "both networks must score the same classes"
            if field == "logits"
            else f"project the student's with structkd.Projector({width_t}) first"
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
    """Returns the message for a missing field, with the capture's reason if it gave one."""
    return f"{reader} needs {name}: {features.absent.get(field) or _HINTS[field]}"


def as_features(given: Input, name: str, reader: Criterion) -> Features:
    """Returns features; bare tensors become the first field that the criterion reads."""
    if isinstance(given, Features | Mapping):
        return named_features(given, name)
    field = reader.reads[0] if reader.reads else ""
    is_maps = field == "intermediate" and isinstance(given, list | tuple)
    if not field or (not isinstance(given, Tensor) and not is_maps):
        raise TypeError(
            f"{name} must be Features, a dict of their names or a tensor, got {describe(given)}"
        )
    return Features(**{field: given})  # type: ignore[arg-type]


def _of_pixels(
    student: Features, teacher: Features, target: Tensor | None, reader: Criterion
) -> tuple[Features, Features, Tensor | None]:
    """Returns logits of pixels and their target in the form that ``reader.pixels`` names."""
    found = [side.logits for side in (student, teacher) if side.logits is not None]
    if all(logits.dim() == 2 for logits in found):
        return student, teacher, target
    if any(logits.dim() == 2 for logits in found):
        raise ValueError(
            "student and teacher logits must both be of images (B, K) or both of pixels "
            f"(B, K, H, W), got {describe(found[0])} and {describe(found[1])}: distil what both "
            "networks give alike, or intermediate maps"
        )
    size = found[0].shape[2:]
    if target is not None and reader.pixels.startswith("labelled"):
        size = _labelled_size(found[0], target)
    found = [_resized(logits, size) for logits in found]
    if not reader.pixels.endswith("maps"):
        found = [_rows(logits) for logits in found]
        # A criterion that reads no labels is not asked for their size.
        if target is not None and target.dim() in (3, 4) and target.shape[-2:] == size:
            target = target.flatten() if target.dim() == 3 else _rows(target)
    student = student.replace(logits=found[0])
    return student, teacher.replace(logits=found[1]) if len(found) > 1 else teacher, target


def _rows(pixels: Tensor) -> Tensor:
    """Returns ``(B H W, K)`` of ``(B, K, H, W)``."""
    return pixels.movedim(1, -1).flatten(0, 2)


def _labelled_size(logits: Tensor, target: Tensor) -> torch.Size:
    """Returns the size of a target of pixels, which logits at a fraction of it are brought to."""
    given = f"beside logits of pixels {tuple(logits.shape)}"
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor (B, H, W) {given}, got {describe(target)}")
    whole = not target.is_floating_point()
    if target.dim() != 3 and (whole or target.dim() != 4):
        raise ValueError(
            f"target must be (B, H, W) {given}, got {describe(target)}; of masks (B, 1, H, W) take "
            "target[:, 0], of one-hot masks target.argmax(1)"
        )
    size = target.shape[-2:]
    if len(target) != len(logits):
        raise ValueError(f"target must hold {len(logits)} samples {given}, got {len(target)}")
    # Strides divide rounding up or down: SegFormer's quarter of 130 pixels is 33. The longer side
    # tells the stride more exactly.
    stride = max(1, round(max(size) / max(logits.shape[2:])))
    for all_, some in zip(size, logits.shape[2:], strict=True):
        if some not in (all_ // stride, -(-all_ // stride)):
            raise ValueError(
                f"target must be of the size of the logits or a whole multiple of it {given}, got "
                f"{tuple(target.shape)}: labels are not resized, so crop or resize image and mask "
                "alike (masks by the nearest neighbour)"
            )
    return size


def _resized(logits: Tensor, size: torch.Size) -> Tensor:
    if logits.shape[2:] == size:
        return logits
    # A class that is masked out by -inf would be NaN at a weight of 0.
    finite = logits.clamp_min(torch.finfo(logits.dtype).min)
    return F.interpolate(finite, size=size, mode="bilinear", align_corners=False)


def _check_tensor(tensor: Tensor, name: str, field: str) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {describe(tensor)}")
    ranks, wanted = _RANKS[field]
    if tensor.dim() not in ranks:
        raise ValueError(f"{name} must be {wanted}, got {describe(tensor)}")


def _check_scores(logits: Tensor, name: str) -> None:
    """Raises where logits are probabilities; done for the first batch only, as it reads values."""
    values = logits.detach()
    if values.numel() == 0 or values.shape[1] < 2:
        return
    inside = (values >= 0) & (values <= 1)
    whole = (values == 0) | (values == 1)
    adds_up = (values.sum(dim=1) - 1).abs() < 1e-2
    if bool(inside.all() & adds_up.all() & ~whole.all()):
        raise ValueError(
            f"{name} look like probabilities, rows in 0..1 that add up to 1: give the scores "
            "before the softmax"
        )


def _named(features: Features, name: str) -> list[tuple[str, Tensor]]:
    """Returns the features' floating-point tensors with their names."""
    fields = (("logits", features.logits), ("embedding", features.embedding))
    named = [(f"{name}.{field}", value) for field, value in fields if value is not None]
    for position, value in enumerate(features.intermediate):
        named.append((f"{name}.intermediate[{position}]", value))
    return named


def _mapped(features: Features, function: Callable[[Tensor], Tensor]) -> Features:
    """Applies ``function`` to every floating-point field."""
    return features.replace(
        logits=None if features.logits is None else function(features.logits),
        embedding=None if features.embedding is None else function(features.embedding),
        intermediate=tuple(function(value) for value in features.intermediate),
    )


def _gathered(features: Features, shards: Shards) -> Features:
    """Gathers every field over the processes, the index included."""
    gathered = _mapped(features, shards.gather)
    if features.index is None:
        return gathered
    return gathered.replace(index=shards.gather(features.index))


def _constant(tensor: Tensor) -> Tensor:
    """Detaches; a tensor made under ``inference_mode`` is copied, autograd cannot save it."""
    # A compiled graph copies such inputs itself, and cannot trace the question.
    if not torch.compiler.is_compiling() and tensor.is_inference():
        return tensor.clone()
    return tensor.detach()


def _flattened(
    members: Mapping[str, Criterion], weights: Mapping[str, float]
) -> Iterator[tuple[str, float, Criterion]]:
    """Yields name, weight and member; members of a sum come apart and keep their own names."""
    for name in weights:
        if name not in members:
            raise ValueError(f"weights names no member {name!r}; {near(name, members)}")
    for name, member in members.items():
        if not isinstance(member, Criterion):
            raise TypeError(f"member {name!r} must be a Criterion, got {describe(member)}")
        weight = number("weight", weights.get(name, 1.0), at_least=0)
        if isinstance(member, CriterionSum):
            for (inner, part), own in zip(member._members(), member.weights.values(), strict=True):
                yield _base_name(inner, member.criteria), weight * own, part
        else:
            yield name, weight, member


def _base_name(name: str, members: Iterable[str]) -> str:
    """Returns a member's name without the number that made it unique among the members."""
    stem, _, count = name.rpartition("_")
    return stem if stem in members and count.isdigit() else name


def _unused(name: str, taken: Iterable[str]) -> str:
    unique, count = name, 1
    while unique in taken:
        count += 1
        unique = f"{name}_{count}"
    return unique
