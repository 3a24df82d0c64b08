"""The contract every criterion keeps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from structkd._checks import describe, near, number
from structkd.criteria._fields import (
    Input,
    as_features,
    constant,
    gathered_rows,
    mapped,
    missing,
    named_tensors,
)
from structkd.distributed import gather_batch, shard_sizes, whole_batch
from structkd.features import Features

if TYPE_CHECKING:
    from structkd.criteria.sums import CriterionSum

CriterionT = TypeVar("CriterionT", bound="Criterion")

_RANKS: Mapping[str, tuple[tuple[int, ...], str]] = {
    "logits": ((2,), "2-D (B, K)"),
    "embedding": ((2,), "2-D (B, D)"),
    "intermediate": ((2, 3, 4), "4-D (B, C, H, W), 3-D (B, N, C) or 2-D (B, C)"),
}
_HALVES = (torch.float16, torch.bfloat16)


class Criterion(nn.Module):
    """Base class of all distillation criteria.

    A criterion compares a student's features with a teacher's and returns a scalar to minimise. It
    takes :class:`Features` and reads its own fields, or takes that field's tensors directly. The
    teacher is a constant: it is detached inside. Internals run in float32 at least with autocast
    off, and gradients return in the caller's dtype. Trainable parts are parameters and memories are
    buffers, so ``.to()``, ``state_dict()`` and ``parameters()`` cover all of it. They stay in
    float32 where ``.half()`` or ``.bfloat16()`` is called on a module that holds the criterion.

    No criterion adds the labels' cross-entropy unless it is asked to. Labels may be missing: a
    target of -100 marks a row without one.

    To write one, name the fields it ``reads`` and implement :meth:`compute`. Say ``couples = True``
    if it compares the samples of a batch with each other: under ``gather`` it is then given the
    rows of all processes, unless ``sums_over_ranks`` says that it needs their sums alone. Override
    :meth:`arguments` if the constructor needs widths.

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

    reads: ClassVar[tuple[str, ...]] = ()  # a bare tensor stands for the first
    reads_teacher: ClassVar[bool] = True  # whether it looks at the teacher at all
    # Whether the samples of a batch are compared with each other, and whether compute adds sums up
    # over the ranks by itself and wants its own rows under gather. Where an option decides it, the
    # constructor sets it on the instance.
    couples: bool = False
    sums_over_ranks: bool = False
    # Whether a training call exchanges with all ranks without gather too, so that none may miss it.
    collective: ClassVar[bool] = False
    # Options of from_features that are no keywords of the constructor; arguments() reads them.
    build_options: ClassVar[tuple[str, ...]] = ()
    min_batch: ClassVar[int] = 1
    ranks: ClassVar[Mapping[str, tuple[tuple[int, ...], str]]] = _RANKS
    # Buffers that are equal on all ranks by construction, which DDP need not broadcast.
    same_on_all_ranks: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *, gather: bool = False) -> None:
        super().__init__()
        self.gather = gather

    @classmethod
    def from_features(
        cls: type[CriterionT], feats_s: Input, feats_t: Input, **options: Any
    ) -> CriterionT:
        """Builds the criterion for the widths of two example forward passes.

        Args:
            feats_s: Any batch of the student's features.
            feats_t: Any batch of the teacher's.
            **options: Any keyword of the constructor; it goes before what the features say.

        Returns:
            The criterion on the device of the features, in float64 where they are.

        Raises:
            ValueError: If a feature is missing that the criterion reads.
            TypeError: If there is no such option (the near names are listed).
        """
        known = cls.options()
        for name in options:
            if name not in known:
                raise TypeError(f"{cls.__name__} has no option {name!r}; {near(name, known)}")
        feats_s, feats_t = (
            as_features(feats_s, "feats_s", cls),
            as_features(feats_t, "feats_t", cls),
        )
        given = {name: value for name, value in options.items() if name not in cls.build_options}
        criterion = cls(**{**cls.arguments(feats_s, feats_t, options), **given})
        for _, tensor in [*named_tensors(feats_s, "feats_s"), *named_tensors(feats_t, "feats_t")]:
            dtype = torch.float64 if tensor.dtype == torch.float64 else None
            return criterion.to(device=tensor.device, dtype=dtype)
        return criterion

    @classmethod
    def arguments(
        cls, feats_s: Features, feats_t: Features, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Returns the constructor's keywords that two example passes determine.

        Args:
            feats_s: The student's features.
            feats_t: The teacher's.
            options: What the caller of :meth:`from_features` gave, which goes first.
        """
        return {}

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Returns the names of all options that :meth:`from_features` takes."""
        return (*inspect.signature(cls).parameters, *cls.build_options)

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
            target: Labels ``(B,)`` where the criterion uses them, -100 where a row has none.

        Returns:
            Scalars by name, weights included.

        Raises:
            ValueError: If a field is missing, of the wrong rank or of another batch size.
            TypeError: If a tensor is not of floating point.
        """
        student = self._read(student, "student")
        teacher = self._read(teacher, "teacher") if self.reads_teacher else Features()
        tensors = [*named_tensors(student, "student"), *named_tensors(teacher, "teacher")]
        device, batch = self._check_together(tensors)
        dtype = self._compute_dtype(tensors, device)
        if self.gather and self.couples and not self.sums_over_ranks:
            sizes = shard_sizes(batch, device)
            batch = sum(sizes)
            student, teacher = gathered_rows(student, sizes), gathered_rows(teacher, sizes)
            target = None if target is None else gather_batch(target, sizes)
        if not self.sums_over_ranks:
            self._check_batch(whole_batch(batch))
        student = mapped(student, lambda tensor: tensor.to(dtype))
        teacher = mapped(teacher, lambda tensor: constant(tensor).to(dtype))
        with torch.autocast(device.type, enabled=False):
            return self.compute(student, teacher, target)

    def step_epoch(self) -> None:
        """Tells the criterion, and every one inside it, that an epoch of training is over."""
        for module in self.modules():
            if isinstance(module, Criterion):
                module.epoch_ended()

    def epoch_ended(self) -> None:
        """Moves a schedule on by one epoch, where this criterion has one; override it there."""

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DistributedDataParallel reads this name, and broadcasts all other buffers at every step.
        return same_buffers(self)

    def _apply(
        self: CriterionT, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> CriterionT:
        def kept_wide(tensor: Tensor) -> Tensor:
            try:
                moved = fn(tensor)
            except TypeError:  # Apple's GPUs know no float64
                moved = fn(tensor.float())
            if moved.dtype in _HALVES and tensor.dtype not in _HALVES:
                return tensor.to(moved.device)
            return moved

        super()._apply(kept_wide, recurse)  # type: ignore[no-untyped-call]
        return self

    def _read(self, given: Input, name: str) -> Features:
        """Returns only the fields that this criterion reads, each checked for type and rank."""
        features = as_features(given, name, self)
        found: dict[str, Tensor | tuple[Tensor, ...]] = {}
        for field in self.reads:
            value = getattr(features, field)
            if value is None or (field == "intermediate" and not value):
                raise ValueError(missing(type(self).__name__, f"{name}.{field}", features, field))
            for tensor in value if isinstance(value, tuple) else (value,):
                self._check_tensor(tensor, f"{name}.{field}", field)
            found[field] = value
        return Features(**found, index=features.index)  # type: ignore[arg-type]

    def _check_tensor(self, tensor: Tensor, name: str, field: str) -> None:
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {describe(tensor)}")
        ranks, wanted = self.ranks[field]
        if tensor.dim() not in ranks:
            raise ValueError(f"{name} must be {wanted}, got {describe(tensor)}")

    def _check_together(self, tensors: Sequence[tuple[str, Tensor]]) -> tuple[torch.device, int]:
        """Checks that all tensors share a batch size and a device; returns both."""
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
        return first.device, first.shape[0]

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
        for parameter in self.parameters():
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
        for name, buffer in self.named_buffers():
            if buffer.dim() and buffer.device != device:
                raise ValueError(
                    f"{type(self).__name__}'s {name} is on {buffer.device}, its inputs on "
                    f"{device}: call criterion.to('{device}')"
                )
        return torch.float64 if torch.float64 in dtypes else torch.float32

    def __add__(self, other: object) -> CriterionSum:
        from structkd.criteria.sums import CriterionSum

        return CriterionSum.of(self, other) if isinstance(other, Criterion) else NotImplemented

    def __radd__(self, other: object) -> Criterion:
        # sum() starts from 0.
        return self if isinstance(other, Real) and other == 0 else NotImplemented

    def __mul__(self, weight: object) -> CriterionSum:
        from structkd.criteria.sums import CriterionSum

        if not isinstance(weight, Real):
            return NotImplemented
        return CriterionSum.of(self).scaled(number("weight", weight))

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> CriterionSum:
        if not isinstance(divisor, Real):
            return NotImplemented
        if divisor == 0:
            raise ZeroDivisionError("a criterion cannot be divided by 0")
        return self * (1 / number("divisor", divisor))


def same_buffers(module: nn.Module) -> list[str]:
    """Returns the dotted names of a module's buffers that all ranks hold alike by construction."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        if isinstance(part, Criterion)
        for name in part.same_on_all_ranks
    ]
