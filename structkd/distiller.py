"""Student, frozen teacher, captures and criterion as one module for a training loop."""

from __future__ import annotations

import copy
import math
import os
import re
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from structkd._checks import chosen_rows, describe, near, whole
from structkd._devices import sent
from structkd._modes import evaluating
from structkd.capture import FeatureCapture, backbone
from structkd.criteria import Spec, build_criterion
from structkd.criteria.base import Criterion, fields_read, leaves_of, same_buffers
from structkd.distributed import Shards, world_size
from structkd.features import Features
from structkd.projectors import is_unshaped

DistillerT = TypeVar("DistillerT", bound="Distiller")
_LAYER_OPTIONS = ("intermediate", "embedding", "logits", "layout")
# Which Distillers there are, so that none freezes a network that another one trains.
_living: weakref.WeakSet[Distiller] = weakref.WeakSet()


class Distiller(nn.Module):
    """Distils a frozen teacher into a student, as one module.

    It owns the captures of both networks, the criterion and the teacher. The student stays the
    module that was passed in: ``distiller.student`` has its own keys and attributes, and its
    ``state_dict()`` loads into the bare network at any time. The teacher is frozen and runs in eval
    mode whatever mode it is set to; it moves with ``.to()``, and it is in no ``parameters()``,
    ``state_dict()``, DDP bucket or EMA copy.

    Give ``distiller.parameters()`` to the optimizer: the parameters of the student and the
    criterion, which exist before the first batch gives them a shape. Under DDP wrap the Distiller,
    ``DistributedDataParallel(distiller)``, which is right for every criterion.
    ``torch.compile(distiller)``, autocast, ``copy.deepcopy`` and ``pickle`` take it as it is.

    Args:
        student: The network to train, bare. A network inside DDP belongs in a Distiller first.
        teacher: The trained network.
        criterion: A :class:`Criterion`; a class of criteria or its name; a dict such as
            ``dict(type="DSLoss", weight=0.5, gamma=2.0)``; or a list of these, which is their sum.
        example: Input of the student, or a pair (the student's, the teacher's), a few samples, with
            which the criterion takes its shape at once. DDP and copies (an average of weights) need
            it, or one call under ``torch.no_grad()``; a plain loop does not.
        layers: What to capture of both, any of :class:`FeatureCapture`'s ``intermediate``,
            ``embedding``, ``logits``, ``layout``. Optional on timm models.
        teacher_layers: The same for the teacher, where its layers have other names.

    Shape:
        ``distiller(x, target, x_teacher=...)`` takes what the networks take and returns the
        student's output as the student gives it, and the criterion's terms by name, scalars with
        their weights: ``loss = task_loss(output, target) + sum(terms.values())``.

    Raises:
        ValueError: If a layer or a criterion is unknown (the near names are listed), a network does
            not give what the criterion reads, or they score different classes.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import structkd
        >>> def net(width):
        ...     return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        ...                          nn.Flatten(), nn.Linear(width, 10))
        >>> distiller = Distiller(net(8), net(16), structkd.DSLoss(),
        ...                       layers=dict(intermediate="1", embedding="4:input"))
        >>> x_poor, x_rich = torch.randn(2, 4, 3, 8, 8)
        >>> output, terms = distiller(x_poor, x_teacher=x_rich)
        >>> output.shape, list(terms)
        (torch.Size([4, 10]), ['SEM-1', 'SEM-2', 'DCM-1', 'DCM-2'])

        Where only some rows of a batch have a pair, the teacher sees these alone:

        >>> output, terms = distiller(x_poor, x_teacher=x_rich[:2], paired=torch.tensor([0, 3]))
    """

    student: nn.Module
    criterion: Criterion

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        criterion: Spec,
        *,
        example: Any = None,
        layers: Mapping[str, Any] | None = None,
        teacher_layers: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check_networks(student, teacher)
        self.student = student
        self.criterion = build_criterion(criterion)
        _check_sharding(student, self.criterion)
        options_s = _layer_options("layers", layers)
        options_t = options_s
        if teacher_layers is not None:
            options_t = _layer_options("teacher_layers", teacher_layers)
        reads = fields_read(self.criterion)
        self._needs = _needs(self.criterion)
        self._reads_teacher = "teacher" in self._needs
        self._layers = _only(reads, options_s)
        self._capture: FeatureCapture | None = _captured("student", student, self._layers)
        self._versions: tuple[list[int], list[int]] | None = None
        self._frozen = _Frozen(teacher, _only(reads if self._reads_teacher else (), options_t))
        try:
            self._make_ready(reads, example)
        except BaseException:
            self.detach()
            raise

    def _make_ready(self, reads: tuple[str, ...], example: Any) -> None:
        student, teacher = self.student, self.teacher
        self._check_layers(reads)
        if any("logits" in leaf.reads and leaf.reads_teacher for leaf in leaves_of(self.criterion)):
            _check_classes(student, teacher)
        if not any(_share_parameters(other.student, teacher) for other in _living):
            for parameter in teacher.parameters():  # TorchScript refuses the module's own call
                parameter.requires_grad_(False)
            for part in teacher.modules():
                part.training = False
        if not any(parameter.requires_grad for parameter in student.parameters()):
            raise ValueError(
                "student has no parameter that trains, all are frozen: call "
                "student.requires_grad_(True), after the Distiller is made in which it teaches, if "
                "there is one"
            )
        _living.add(self)
        if example is not None:
            self._build(example)

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher, which is no submodule."""
        return self._frozen.module

    def __setattr__(self, name: str, value: Any) -> None:
        # A module passes every property by: the first teacher would go on teaching.
        replaced = name == "teacher"
        if name == "criterion" and "_frozen" in self.__dict__ and isinstance(value, Criterion):
            replaced = not _needs(value) <= self._needs
        if replaced:
            more = "" if name == "teacher" else " by one that reads more"
            raise AttributeError(
                f"{name} cannot be replaced{more}, the captures were made for the first one; fix: "
                "make a new Distiller(student, teacher, criterion)"
            )
        super().__setattr__(name, value)

    def forward(
        self,
        x: Any,
        target: Tensor | None = None,
        *,
        x_teacher: Any = None,
        paired: Tensor | None = None,
        index: Tensor | None = None,
    ) -> tuple[Any, dict[str, Tensor]]:
        """Runs both networks and compares them.

        Args:
            x: The student's input: a tensor, a tuple of arguments or a dict of keywords.
            target: Labels ``(B,)``, or ``(B, H, W)`` of pixels, for criteria that read them, -100
                where there is none.
            x_teacher: The teacher's input, the same samples in the same order: ``x_teacher=x``
                where both networks see the same. With ``paired``, pass only the teacher's images of
                the marked rows; the batch may be empty.
            paired: The rows of the batch that have a pair: a mask ``(B,)``, or int64 positions
                ``(n,)`` in the order of ``x_teacher``; all by default. The criterion gets these
                rows only, with their labels and their index. On an accelerator keep a mask on the
                CPU, or pass positions, so that the host does not wait.
            index: Positions of the samples in the data set ``(B,)``, for criteria with a memory.

        Returns:
            The student's output, and the criterion's terms by name. Where no row has a pair there
            is one term, 0 with a gradient of 0.

        Raises:
            RuntimeError: If the Distiller was detached, or as :meth:`FeatureCapture.read` raises.
            ValueError: As the criterion raises; or if nothing that is distilled reaches a parameter
                of the student that trains.
        """
        if self._capture is None:
            raise RuntimeError("this Distiller was detached: call attach() before you distil again")
        feats_t: Features | None = None if self._reads_teacher else Features()
        if x_teacher is None and self._reads_teacher and paired is None:
            raise TypeError(
                "x_teacher is missing, the teacher's input of the same samples: pass x_teacher=x "
                "where both networks see the same images"
            )
        if x_teacher is not None and self._reads_teacher:
            feats_t = self._frozen.features(x_teacher)
        output = _called("student", self.student, x)
        feats_s = self._capture.read()
        self._check_features(feats_s, feats_t)
        if index is not None:
            feats_s = feats_s.replace(index=index)
        if paired is not None:
            return output, self._paired_terms(feats_s, feats_t, target, paired)
        return output, self.criterion.terms(feats_s, feats_t or Features(), target)

    def step_epoch(self) -> None:
        """Tells the criterion that an epoch of training has ended.

        Warns:
            UserWarning: If the student's parameters changed since the last call and none of the
                criterion's did, which have a gradient: no optimizer has them.
        """
        self.criterion.step_epoch()
        if self._versions is not None:
            student, criterion = (
                before != now for before, now in zip(self._versions, self._marks(), strict=True)
            )
            # Where the loop left the terms out of its loss there is no gradient.
            given = any(p.grad is not None for p in self.criterion.parameters())
            if student and not criterion and given:
                warnings.warn(
                    f"no optimizer updates the parameters of {type(self.criterion).__name__}: make "
                    "it with distiller.parameters(), which has the criterion's too",
                    stacklevel=2,
                )
        self._versions = None

    def detach(self) -> nn.Module:
        """Takes all hooks off both networks and returns the student, as it came in."""
        if self._capture is not None:
            self._capture.remove()
            self._frozen.detach()
            self._capture = None
            _living.discard(self)
        return self.student

    def attach(self) -> None:
        """Puts the hooks back that :meth:`detach` took off."""
        if self._capture is None:
            self._capture = FeatureCapture(self.student, **self._layers)
            self._frozen.attach()
            _living.add(self)

    def no_weight_decay(self) -> set[str]:
        """Returns the parameters that the student asks timm's optimizers not to decay."""
        asked = getattr(backbone.unwrapped(self.student), "no_weight_decay", set)
        return {self._prefix() + name for name in asked()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], Any] | dict[str, Any]:
        """Returns the student's groups of layers for timm's optimizers; a criterion's go last.

        Args:
            coarse: As in timm, larger groups.
        """
        asked = getattr(backbone.unwrapped(self.student), "group_matcher", None)
        if asked is None:
            return {}
        matcher, prefix = asked(coarse=coarse), self._prefix()
        return lambda name: (
            _layer_group(matcher, name.removeprefix(prefix))
            if name.startswith(prefix)
            else (math.inf,)
        )

    def _prefix(self) -> str:
        """Returns what stands before the student's own names, ``torch.compile``'s part as well."""
        network = backbone.unwrapped(self.student)
        return next(f"{name}." for name, part in self.named_modules() if part is network)

    def extra_repr(self) -> str:
        return f"teacher={type(backbone.unwrapped(self.teacher)).__name__} (frozen)"

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DistributedDataParallel reads this name: it broadcasts all other buffers at every step.
        if is_unshaped(self):
            raise RuntimeError(
                "the criterion's parameters have no shape yet, which DistributedDataParallel needs:"
                " make the Distiller with example=x, or call it once under torch.no_grad() before "
                "wrapping it"
            )
        return same_buffers(self)

    def _apply(
        self: DistillerT, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> DistillerT:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._frozen.apply(fn)
        return self

    def to_empty(self: DistillerT, *, device: Any, recurse: bool = True) -> DistillerT:
        """Moves what trains to a device without its values, and the teacher with its own.

        A student made on the meta device gets memory so. The teacher's weights are in no state
        dict that would be loaded afterwards, so they are kept, unless they are meta themselves.
        """

        def emptied(tensor: Tensor) -> Tensor:
            return torch.empty_like(tensor, device=device)

        super()._apply(emptied, recurse)  # type: ignore[no-untyped-call]
        self._frozen.apply(lambda tensor: emptied(tensor) if tensor.is_meta else tensor.to(device))
        return self

    def _build(self, example: Any) -> None:
        """Runs everything once in eval mode, to shape the criterion without moving a statistic."""
        is_pair = isinstance(example, tuple | list) and len(example) == 2
        x_s, x_t = example if is_pair else (example, example)
        assert self._capture is not None
        with evaluating(self), torch.no_grad():
            _called("student", self.student, x_s, of_example=is_pair)
            feats_s, feats_t = self._capture.read(), Features()
            if self._reads_teacher:
                feats_t = self._frozen.features(x_t, of_example=is_pair)
            self._check_features(feats_s, feats_t)
            first = _tensors(feats_s)[0]
            wide = torch.float64 if first.dtype == torch.float64 else None
            self.criterion.to(device=first.device, dtype=wide)
            if not is_unshaped(self.criterion):
                return
            count = _batch_of(feats_s)
            leaves = leaves_of(self.criterion)
            enough = max(count, 2, *(leaf.min_batch for leaf in leaves))
            for leaf in leaves:  # one criterion depends on the batch size
                enough = getattr(leaf, "batch_size", None) or enough
            rows = torch.arange(enough) % count
            feats_s = feats_s.rows(rows).replace(index=torch.zeros_like(rows))
            feats_t = feats_t.rows(rows)
            place = next(iter(_tensors(feats_s)))
            feats_s = feats_s.replace(index=torch.zeros_like(rows, device=place.device))
            size = () if feats_s.logits is None else feats_s.logits.shape[2:]  # of pixels
            no_labels = torch.full((enough, *size), -100, device=place.device)
            alone = Shards.alone(enough)  # no process waits for another here
            self.criterion.terms(feats_s, feats_t, no_labels, shards=alone)

    def _paired_terms(
        self, student: Features, teacher: Features | None, target: Tensor | None, paired: Tensor
    ) -> dict[str, Tensor]:
        r"""Returns the terms of the rows that have a pair, on this process and on all.

        Of a criterion that looks at every sample by itself, a term is the mean over rows, and so
        that of all processes is :math:`\sum_r n_r L_r / \sum_r n_r` with :math:`n_r` rows on
        rank r. What is of all rows already, the same on each rank, this leaves as it is.
        """
        batch = _batch_of(student)
        rows = chosen_rows(paired, "paired", batch)
        size = len(rows)
        for name, value in (("target", target), ("index", student.index)):
            if value is not None and len(value) != batch:
                raise ValueError(
                    f"{name} must have an entry for each of the {batch} rows of x, also for those "
                    f"without a pair, got {len(value)}"
                )
        if teacher is None and size:
            raise ValueError(
                f"paired names {size} row(s) that have a pair, but x_teacher is None: pass the "
                "teacher's input of these rows"
            )
        if teacher is not None and self._reads_teacher:
            for value in _tensors(teacher):
                if len(value) != size:
                    raise ValueError(
                        f"x_teacher must hold one sample for each of the {size} rows that paired "
                        f"names, in their order, got {len(value)}"
                    )
        shards = self._shards(size, teacher is not None, next(iter(_tensors(student))).device)
        if not shards.total:
            return {"no pairs": self._nothing(student)}
        needy = max(leaves_of(self.criterion), key=lambda leaf: leaf.min_batch)
        if shards.total < needy.min_batch:
            raise ValueError(
                f"this batch has {shards.total} row(s) with a pair, but {type(needy).__name__} "
                f"compares samples with each other and needs at least {needy.min_batch} of them: "
                "draw them several at a time, from a loader of their own for example (views.mixed "
                "makes one batch of two), or leave so few out of paired"
            )
        if target is not None:
            target = target.index_select(0, sent(rows, target.device))
        given = student.rows(rows), teacher or Features(), target
        if len(shards.sizes) == 1:
            return self.criterion.terms(*given)
        found = self.criterion.terms(*given, shards=shards)
        own = torch.stack(list(found.values()))
        # A mean over no rows is NaN. It counts for nothing, yet stays in the graph: others wait for
        # its part in the collectives of the backward pass.
        own = size * own if size else torch.where(torch.zeros_like(own) > 0, own, 0)
        return dict(zip(found, (shards.sum(own) / shards.total).unbind(), strict=True))

    def _shards(self, size: int, has_teacher: bool, device: torch.device) -> Shards:
        """Returns how many rows have a pair, on all processes where the criterion exchanges."""
        leaves = leaves_of(self.criterion)
        if world_size() == 1 or not any(leaf.exchanges for leaf in leaves):
            return Shards.alone(size)
        for leaf in leaves:
            if leaf.over_ranks != "rows" and not leaf.exchanges:
                raise ValueError(
                    f"{type(leaf).__name__} compares samples and was made without gather=True, but "
                    "another criterion of the sum exchanges with all processes, some of which may "
                    "have no row: set gather=True for all of them"
                )
        told = Shards.read(size if has_teacher else -1, device)
        without = [place for place, count in enumerate(told.sizes) if count < 0]
        if without and max(told.sizes) > 0:
            raise ValueError(
                f"rank(s) {without} have no x_teacher while others have rows with a pair: a process"
                " without any passes zero samples, x_teacher=images[:0]"
            )
        return Shards(tuple(max(count, 0) for count in told.sizes), told.rank)

    def _nothing(self, student: Features) -> Tensor:
        """Returns 0 with a gradient of 0 for all that trains, which DDP waits for."""
        trained = [p for p in self.criterion.parameters() if p.requires_grad]
        parts = [next(iter(_tensors(student)))] + ([] if is_unshaped(self.criterion) else trained)
        zero = torch.stack([part.flatten()[:0].sum() for part in parts]).sum()
        return zero.to(torch.promote_types(zero.dtype, torch.float32))

    def _check_layers(self, reads: tuple[str, ...]) -> None:
        """Raises if a layer that the criterion reads was not named, and lists likely ones."""
        assert self._capture is not None
        asked = [("student", self._capture)]
        asked += [("teacher", self._frozen.capture)] if self._reads_teacher else []
        lacking: dict[str, list[str]] = {}
        for name, capture in asked:
            fields = [field for field in reads if field in capture.unnamed]
            if fields:
                lacking[name] = fields
        if not lacking:
            return
        said, fixes = [], {}
        for name, fields in lacking.items():
            likely = backbone.likely_layers(backbone.unwrapped(dict(asked)[name].module))
            said.append(f"{name} no {' and no '.join(fields)}")
            entries = [f"{field}={likely.get(field, 'NAME')!r}" for field in fields]
            fixes[name] = f"dict({', '.join(entries)})"
        call = f"layers={fixes.get('student') or fixes['teacher']}"
        if "teacher" in fixes and "student" in fixes and fixes["teacher"] != fixes["student"]:
            call += f", teacher_layers={fixes['teacher']}"
        elif "student" not in fixes:
            call = call.replace("layers=", "teacher_layers=", 1)
        raise ValueError(
            f"{type(self.criterion).__name__} reads fields without a named layer (of the "
            f"{', of the '.join(said)}); likely layers of yours: Distiller(..., {call})"
        )

    def _check_features(self, student: Features, teacher: Features | None) -> None:
        """Raises where a network gives no logits that are read, or nothing would train."""
        if torch.compiler.is_compiling():
            return
        leaves = leaves_of(self.criterion)
        for leaf in leaves:
            for name, features in (("student", student), ("teacher", teacher)):
                wanted = features is not None and (name == "student" or leaf.reads_teacher)
                if wanted and "logits" in leaf.reads and features.logits is None:  # type: ignore[union-attr]
                    said = features.absent.get("logits", "")  # type: ignore[union-attr]
                    raise ValueError(f"{type(leaf).__name__} needs the {name}'s logits: {said}")
        if not (self.training and torch.is_grad_enabled()):
            return
        for leaf in leaves:
            read = _tensors(student, leaf.reads)
            if read and not any(value.requires_grad for value in read):
                raise ValueError(
                    f"nothing of {type(leaf).__name__} reaches a parameter of the student that "
                    f"trains: what it reads ({', '.join(leaf.reads)}) comes out of frozen layers; "
                    "name a later layer, or unfreeze the layers before it"
                )
        if self._versions is None and not is_unshaped(self.criterion):
            self._versions = self._marks()

    def _marks(self) -> tuple[list[int], list[int]]:
        """Returns how often the parameters of student and criterion were written to."""
        student, criterion = (
            [p._version for p in module.parameters() if p.requires_grad]
            for module in (self.student, self.criterion)
        )
        return student, criterion


def falling(step: int, total: int) -> float:
    r"""Factor for a weight at a step, which falls from 1 to 0 along a cosine.

    :math:`\frac{1}{2} (1 + \cos(\pi \, step / total))`, and 0 from ``total`` on. Distillation with
    a falling weight shapes the student early in the training and leaves the end to the labels.
    Multiply the terms by it in the training loop.

    Args:
        step: Steps done, >= 0: batches or epochs.
        total: Steps of the whole training, >= 1.

    Returns:
        A number in [0, 1].

    Raises:
        TypeError, ValueError: If a number is not whole or out of range.

    Example:
        >>> [round(falling(step, 4), 3) for step in range(5)]
        [1.0, 0.854, 0.5, 0.146, 0.0]
        >>> terms = {"KD": torch.tensor(2.0)}
        >>> falling(2, 4) * sum(terms.values())
        tensor(1.)
    """
    done = whole("step", step, at_least=0) / whole("total", total)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class _Frozen:
    """A teacher with its capture, held where ``nn.Module`` does not look for submodules.

    Deep copies (an average of weights, a mean teacher) share the teacher and its hooks, unless they
    are moved to another device. Detaching one of them removes only its own hooks.
    """

    def __init__(self, module: nn.Module, layers: dict[str, Any]) -> None:
        self.module = module
        self.layers = layers
        self.owned = True
        if isinstance(module, torch.jit.ScriptModule) and (
            layers.get("intermediate") != () or layers.get("embedding") != ""
        ):
            raise ValueError(
                "teacher is a TorchScript network, whose layers cannot be captured, only its "
                "output: take a criterion on logits such as KDLoss, or build the network in Python "
                "and load its state dict"
            )
        self.attach()

    def features(self, x: Any, *, of_example: bool = False) -> Features:
        """Runs the teacher in eval mode and returns what it gives, without gradient.

        An empty batch gives features with no rows. It is run as one sample of zeros, because many
        networks cannot reshape an empty batch.
        """
        if self.capture.removed:  # by the one that this is a copy of
            self.attach()
        x, empty = _at_least_one(x)
        with torch.no_grad():
            if not torch.compiler.is_compiling():
                with evaluating(self.module):
                    _called("teacher", self.network, x, of_example=of_example)
            elif self.module.training:
                raise RuntimeError("the teacher is in training mode: call distiller.teacher.eval()")
            else:
                _called("teacher", self.network, x)
            found = self.capture.read()
        return found.rows(torch.empty(0, dtype=torch.int64)) if empty else found

    def attach(self) -> None:
        # TorchScript takes no hooks before its forward pass; a module around it does.
        scripted = isinstance(self.module, torch.jit.ScriptModule)
        self.network = _Around(self.module) if scripted else self.module
        self.capture = _captured("teacher", self.network, self.layers)
        self.borrows_hooks = False

    def detach(self) -> None:
        if not self.borrows_hooks:
            self.capture.remove()

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Moves the teacher; a shared one stays, and a copy of it moves if that changes it."""
        if not self.owned:
            probe = next(self.module.parameters(), None)
            moved = None if probe is None else fn(probe.data)
            if probe is None or moved is None or _alike(probe, moved):
                return
            self.module, self.owned = copy.deepcopy(self.module), True
            self.attach()
        self.module._apply(fn)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Frozen:
        shared = _Frozen.__new__(_Frozen)
        shared.__dict__.update(self.__dict__, owned=False, borrows_hooks=True)
        return shared

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, borrows_hooks=False)  # a loaded capture has hooks of its own


class _Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.inner(*arguments, **keywords)


def _at_least_one(x: Any) -> tuple[Any, bool]:
    """Returns one sample of zeros in the place of none, and whether there was none.

    There is none where the first tensor of the input has no rows: a later one may be empty beside
    a batch, such as boxes that nobody drew. Any other input comes back as it is.
    """
    first = _first_tensor(x)
    empty = first is not None and len(first) == 0
    return (_filled(x) if empty else x), empty


def _first_tensor(x: Any) -> Tensor | None:
    """Returns the first tensor of an input that has rows, None where there is none."""
    if isinstance(x, Tensor):
        return x if x.dim() else None
    parts = x.values() if isinstance(x, Mapping) else x if isinstance(x, tuple | list) else ()
    for part in parts:
        found = _first_tensor(part)
        if found is not None:
            return found
    return None


def _filled(x: Any) -> Any:
    """Returns an input whose empty tensors hold one sample of zeros."""
    if isinstance(x, Tensor):
        return x.new_zeros(1, *x.shape[1:]) if x.dim() and not len(x) else x
    if isinstance(x, Mapping):
        return {name: _filled(part) for name, part in x.items()}
    if isinstance(x, tuple | list):
        return tuple(_filled(part) for part in x)
    return x


def _alike(tensor: Tensor, other: Tensor) -> bool:
    return tensor.device == other.device and tensor.dtype == other.dtype


def _called(name: str, network: nn.Module, x: Any, *, of_example: bool = False) -> Any:
    """Calls a network with a tensor, a tuple of arguments or a dict of keywords.

    An error inside the network keeps its type and text; a note says which network it came from, and
    with which input.
    """
    arguments: tuple[Any, ...] = (x,)
    keywords: dict[str, Any] = {}
    if isinstance(x, Mapping):
        arguments, keywords = (), dict(x)
    elif isinstance(x, tuple | list):
        arguments = tuple(x)
    if torch.compiler.is_compiling():
        return network(*arguments, **keywords)
    try:
        return network(*arguments, **keywords)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        if len(error.args) == 1 and isinstance(error.args[0], str):
            said = _how_called(name, network, x, of_example=of_example)
            error.args = (f"{error.args[0]}\n{said}",)
        raise


def _how_called(name: str, network: nn.Module, x: Any, *, of_example: bool) -> str:
    said = f"structkd: this came from the {name}, a {type(network).__name__}, "
    if isinstance(x, Mapping):
        parts = ", ".join(f"{key}={describe(value)}" for key, value in x.items())
        said += f"called with the keywords of a dict ({parts}); a network whose one argument is a "
        said += "dict takes a tuple of arguments, ({...},)"
    elif isinstance(x, tuple | list):
        parts = ", ".join(describe(value) for value in x)
        said += f"called with {len(x)} arguments out of a {type(x).__name__} ({parts}); a network "
        said += "whose one argument is a list takes a tuple of arguments, ([a, b],)"
    else:
        said += f"called with {describe(x)}"
    if of_example:
        said += "; example=(a, b) is the student's input a and the teacher's b: for networks of two"
        said += " arguments pass example=((x, meta), (x, meta))"
    return said


def _needs(criterion: Criterion) -> set[str]:
    """Returns what is captured for a criterion; logits are there anyway, a network's output."""
    teacher = {"teacher"} if any(leaf.reads_teacher for leaf in leaves_of(criterion)) else set()
    return teacher | {field for field in fields_read(criterion) if field != "logits"}


def _tensors(features: Features, fields: tuple[str, ...] | None = None) -> list[Tensor]:
    """Returns the tensors of some fields, of all by default."""
    found: list[Tensor] = []
    for field in fields or ("logits", "embedding", "intermediate"):
        value = getattr(features, field)
        found += value if isinstance(value, tuple) else [] if value is None else [value]
    return found


def _batch_of(features: Features) -> int:
    return len(next(iter(_tensors(features))))


def _captured(name: str, network: nn.Module, options: Mapping[str, Any]) -> FeatureCapture:
    try:
        return FeatureCapture(network, **options)
    except ValueError as error:
        word = "layers" if name == "student" else "teacher_layers"
        raise ValueError(f"of the {name}, {word}: {error}") from error


def _check_networks(student: object, teacher: object) -> None:
    for name, module in (("student", student), ("teacher", teacher)):
        if isinstance(module, str | os.PathLike):
            raise TypeError(
                f"{name} must be an nn.Module, got the path {str(module)!r}: build the network and "
                "load the file into it, net.load_state_dict(torch.load(path, weights_only=True))"
            )
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name} must be an nn.Module, got {describe(module)}")
    assert isinstance(student, nn.Module)
    assert isinstance(teacher, nn.Module)
    wrapper = backbone.averaging_wrapper(student)
    if wrapper is not None:
        raise TypeError(
            f"student is a {type(wrapper).__name__}: give the bare network, and wrap the "
            "Distiller itself, so that the criterion's parameters are averaged too"
        )
    if _share_parameters(student, teacher):
        raise ValueError(
            "student and teacher share parameters, which freezing the teacher would freeze: give "
            "the teacher as a copy, copy.deepcopy(student)"
        )


def _check_classes(student: nn.Module, teacher: nn.Module) -> None:
    """Raises where both networks say how many classes they score, as timm's do, and differ."""
    counts = [getattr(backbone.unwrapped(net), "num_classes", None) for net in (student, teacher)]
    if all(isinstance(count, int) for count in counts) and counts[0] != counts[1]:
        raise ValueError(
            f"student and teacher must score the same classes, got num_classes={counts[0]} and "
            f"{counts[1]}"
        )


def _check_sharding(student: nn.Module, criterion: Criterion) -> None:
    """Raises where FSDP2 has sharded the student alone, and the criterion trains something."""
    if not any(parameter.requires_grad for parameter in criterion.parameters()):
        return
    if any(type(part).__name__.startswith("FSDP") for part in student.modules()):
        raise TypeError(
            f"student is sharded by fully_shard, which would leave the parameters of "
            f"{type(criterion).__name__} to every process by itself: make the Distiller of the bare"
            " network with example=x, then shard its parts and fully_shard(distiller)"
        )


def _share_parameters(first: nn.Module, second: nn.Module) -> bool:
    own = {id(parameter) for parameter in first.parameters()}
    return any(id(parameter) in own for parameter in second.parameters())


def _layer_options(argument: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{argument} must be a dict such as dict(intermediate='layer2', embedding='fc:input'), "
            f"got {describe(given)}"
        )
    for name in given:
        if name not in _LAYER_OPTIONS:
            raise ValueError(f"{argument} has no entry {name!r}; {near(name, _LAYER_OPTIONS)}")
    return dict(given)


def _only(reads: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what the criterion does not read: no hook without a reader."""
    kept = dict(options)
    if "intermediate" not in reads:
        kept |= {"intermediate": (), "layout": None}
    if "embedding" not in reads:
        kept["embedding"] = ""
    return kept


def _layer_group(matcher: Any, name: str) -> tuple[float, ...]:
    """Returns where a parameter comes in the order of the student's layers, by timm's rules."""
    if not isinstance(matcher, Mapping):
        place = matcher(name)
        return tuple(place) if isinstance(place, tuple | list) else (place,)
    for ordinal, specs in enumerate(matcher.values()):
        for pattern, suffix in [(specs, ())] if isinstance(specs, str) else specs or ():
            found = re.match(pattern, name)
            if found:
                parts = (ordinal, *(part for part in found.groups() if part is not None))
                return tuple(float(part) for part in (*parts, *(suffix or ())))
    return (math.inf,)
