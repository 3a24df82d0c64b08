"""Student, frozen teacher, captures and criterion as one module that a training loop can own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from structkd._checks import describe, near
from structkd._frozen import Frozen, call
from structkd._modes import evaluating
from structkd.capture import FeatureCapture
from structkd.capture import backbone as _backbone
from structkd.criteria._weights import Share
from structkd.criteria.base import Criterion, same_buffers
from structkd.criteria.sums import fields_read, reads_teacher
from structkd.features import Features
from structkd.matching.bridge import BridgeLoss
from structkd.specs import Spec, build_criterion, needs_example

DistillerT = TypeVar("DistillerT", bound="Distiller")
_LAYER_OPTIONS = ("intermediate", "embedding", "logits", "layout")


class Distiller(nn.Module):
    """Distils a frozen teacher into a student, as one module.

    It owns the captures of both networks, the criterion and the teacher. The student is the very
    module that went in: ``distiller.student`` has its own keys and attributes, and its
    ``state_dict()`` loads into the bare network at any step. The teacher is frozen and in eval
    mode; it moves with ``.to()``, and it is in no ``parameters()``, ``state_dict()``, DDP bucket or
    EMA copy.

    The optimizer takes ``distiller.parameters()``: the student's and the criterion's. Under DDP
    wrap the Distiller, ``DistributedDataParallel(distiller)``, which is right for every criterion.
    ``torch.compile(distiller)``, autocast, ``copy.deepcopy`` and ``pickle`` take it as it is.

    Args:
        student: The network to train, bare. A network inside DDP belongs in a Distiller first.
        teacher: The trained network.
        criterion: A :class:`Criterion`; a class or function that makes one from two example
            ``Features``; a dict such as ``dict(type="DSLoss", weight=0.5, gamma=2.0)``; or a list
            of these, which is their sum.
        example: Input of the student, or a pair (the student's, the teacher's), from which a
            criterion reads widths. Needed unless ``criterion`` is finished. A few samples do.
        layers: What to capture of both, any of :class:`FeatureCapture`'s ``intermediate``,
            ``embedding``, ``logits``, ``layout``. Optional on timm models.
        teacher_layers: The same for the teacher, where its layers have other names.

    Shape:
        ``distiller(x, target, x_teacher)`` takes what the networks take and returns the student's
        output as the student gives it, and the criterion's terms by name, scalars with their
        weights: ``loss = task_loss(output, target) + sum(terms.values())``.

    Raises:
        ValueError: If a layer or a criterion is unknown (the near names are listed), an example is
            missing, or a network does not give what the criterion reads.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import structkd
        >>> def net(width):
        ...     return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        ...                          nn.Flatten(), nn.Linear(width, 10))
        >>> x_poor, x_good = torch.randn(2, 4, 3, 8, 8)
        >>> distiller = Distiller(net(8), net(16), structkd.DSLoss, example=(x_poor, x_good),
        ...                       layers=dict(intermediate="1", embedding="4:input"))
        >>> output, terms = distiller(x_poor, x_teacher=x_good)
        >>> output.shape, list(terms)
        (torch.Size([4, 10]), ['SEM-1', 'SEM-2', 'DCM-1', 'DCM-2'])
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
        options_s = _layer_options("layers", layers)
        options_t = options_s
        if teacher_layers is not None:
            options_t = _layer_options("teacher_layers", teacher_layers)
        self.student = student
        teacher.requires_grad_(False).eval()
        feats_s = feats_t = Features()
        if needs_example(criterion):
            with (
                FeatureCapture(student, **options_s) as capture_s,
                FeatureCapture(teacher, **options_t) as capture_t,
            ):
                feats_s, feats_t = _example_features(capture_s, capture_t, example)
        self.criterion = build_criterion(criterion, feats_s, feats_t)
        self._share = Share()
        reads = fields_read(self.criterion)
        self._layers = _only(reads, options_s)
        self._capture: FeatureCapture | None = FeatureCapture(student, **self._layers)
        self._frozen = Frozen(teacher, _only(reads, options_t))

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher, which is no submodule."""
        return self._frozen.module

    def forward(
        self,
        x: Any,
        target: Tensor | None = None,
        x_teacher: Any = None,
        *,
        index: Tensor | None = None,
        x_matched: Any = None,
        **rows: Any,
    ) -> tuple[Any, dict[str, Tensor]]:
        """Runs both networks and compares them.

        Args:
            x: The student's input: a tensor, a tuple of arguments or a dict of keywords.
            target: Labels ``(B,)`` for criteria that read them, -100 where a row has none.
            x_teacher: The teacher's input, the same samples in the same order; ``x`` by default.
                With ``paired`` the samples that it names alone, which may be none. Where nothing
                reads the teacher's features of them, as in a :class:`BridgeLoss` without ``pair``,
                it is not run.
            index: Positions of the samples in the data set ``(B,)``, for criteria with a memory.
            x_matched: The teacher's input for a :class:`BridgeLoss`'s rows with a match, in place
                of ``matches``.
            **rows: For a :class:`BridgeLoss`, ``labelled``, ``paired``, ``matches`` and
                ``matched``, as :meth:`BridgeLoss.terms` takes them.

        Returns:
            The student's output, and the criterion's terms by name. A :class:`BridgeLoss`'s are the
            whole loss, the task's included.

        Raises:
            RuntimeError: If the Distiller was detached, or as :meth:`FeatureCapture.read` raises.
            ValueError: As the criterion raises.
        """
        if self._capture is None:
            raise RuntimeError("this Distiller was detached: call attach() to distil on")
        mixed = bool(rows) or x_matched is not None
        bridge = _as_bridge(self.criterion, rows) if mixed else None
        apart = "paired" in rows  # the teacher sees these samples alone, if any
        feats_t: Features | None = None
        if _reads_teacher(self.criterion) and not (apart and x_teacher is None):
            feats_t = self._frozen.features(x if x_teacher is None else x_teacher)
        if x_matched is not None:
            rows["matches"] = self._frozen.features(x_matched)
        output = call(self.student, x)
        feats_s = self._capture.read()
        if index is not None:
            feats_s = feats_s.replace(index=index)
            feats_t = feats_t if apart or feats_t is None else feats_t.replace(index=index)
        if bridge is not None:
            terms = bridge.terms(feats_s, feats_t, target, **rows)
        else:
            terms = self.criterion.terms(feats_s, feats_t or Features(), target)
        return output, self._share.of(terms)

    def set_weight(self, weight: float) -> None:
        """Sets a weight of all that is distilled, beside the criterion's own; 1 at first.

        The labels' terms, a :class:`BridgeLoss`'s ``task`` and ``SRM``, keep theirs. Nothing is
        compiled again, and the weight is no part of ``state_dict``. With :func:`falling` the labels
        have the last word: ``distiller.set_weight(structkd.falling(step, steps))``.

        Raises:
            TypeError, ValueError: If the weight is no finite number.
        """
        self._share.set_weight("distilled", weight)

    def step_epoch(self) -> None:
        """Tells the criterion that an epoch of training is over."""
        self.criterion.step_epoch()

    def detach(self) -> nn.Module:
        """Takes all hooks off both networks and returns the student, as it came in."""
        if self._capture is not None:
            self._capture.remove()
            self._frozen.detach()
            self._capture = None
        return self.student

    def attach(self) -> None:
        """Puts the hooks back that :meth:`detach` took off."""
        if self._capture is None:
            self._capture = FeatureCapture(self.student, **self._layers)
            self._frozen.attach()

    def train(self: DistillerT, mode: bool = True) -> DistillerT:
        """Sets the student's and the criterion's mode; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def extra_repr(self) -> str:
        return f"teacher={type(_backbone.unwrapped(self.teacher)).__name__} (frozen)"

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DistributedDataParallel reads this name: it broadcasts all other buffers at every step.
        return same_buffers(self)

    def _apply(
        self: DistillerT, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> DistillerT:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._frozen.apply(fn)
        return self


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
    wrapper = _backbone.averaging_wrapper(student)
    if wrapper is not None:
        raise TypeError(
            f"student is a {type(wrapper).__name__}: give the bare network, and wrap the "
            "Distiller itself, so that the criterion's parameters are averaged too"
        )
    trained = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in trained for parameter in teacher.parameters()):
        raise ValueError(
            "student and teacher share parameters, which freezing the teacher would freeze: give "
            "the teacher as a copy, copy.deepcopy(student)"
        )


def _as_bridge(criterion: Criterion, rows: Mapping[str, Any]) -> BridgeLoss:
    if not isinstance(criterion, BridgeLoss):
        given = ", ".join(rows) or "x_matched"
        raise TypeError(
            f"{given}: only a BridgeLoss, by itself and in no list or sum, tells rows of a batch "
            f"apart, but criterion is a {type(criterion).__name__}; put it inside, as "
            "dict(type='BridgeLoss', pair=...)"
        )
    return criterion


def _reads_teacher(criterion: Criterion) -> bool:
    """Tells whether anything looks at the teacher's features of the samples, matches aside."""
    if isinstance(criterion, BridgeLoss):
        return criterion.pair is not None and reads_teacher(criterion.pair)
    return reads_teacher(criterion)


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


def _example_features(
    capture_s: FeatureCapture, capture_t: FeatureCapture, example: Any
) -> tuple[Features, Features]:
    """Runs both networks once, in eval mode, so that no batch statistic moves."""
    if example is None:
        raise ValueError(
            "example is missing: pass the student's input, or a pair (the student's, the "
            "teacher's), from which the criterion reads its widths"
        )
    is_pair = isinstance(example, tuple | list) and len(example) == 2
    x_s, x_t = example if is_pair else (example, example)
    with evaluating(capture_s.module, capture_t.module), torch.no_grad():
        call(capture_s.module, x_s)
        call(capture_t.module, x_t)
    return capture_s.read(), capture_t.read()
