"""Rules that keep distillation's gradient from harming the labels': ``papers surgery RECIPE``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

import train
from data import Batch
from methods import Method
from papers.grid import split
from papers.reports import finish, teacher_of, title_of
from recipe import near, parsed
from table import result_table

_DECAY = 0.9  # of the labels' averaged gradient, as in Bloop (arXiv 2402.02998)
Gradients = list[Tensor | None]


@dataclass(frozen=True)
class Surgery:
    """Each criterion's gradient added plainly, and by rules that put the labels' gradient first."""

    # plain: the sum. first: what opposes the labels' averaged gradient is taken off, tensor by
    # tensor. bound:2: in no tensor longer than twice the labels' gradient. upgrad, mgda: TorchJD's.
    rules: tuple[str, ...] = ("plain", "first", "bound:2")


@dataclass(frozen=True)
class Ruled(Method):
    """A row whose gradients are put together by a rule."""

    rule: str = "plain"

    @property
    def described(self) -> dict[str, Any]:
        return super().described | {"rule": self.rule}


class Session(train.Session):
    """The rows of ``train.py``, each by every rule."""

    def __init__(self, options: Any, command: str, rules: Sequence[str]) -> None:
        for text in rules:
            rule(text)
        if PartialState(cpu=options.device == "cpu").num_processes > 1:
            raise ValueError(
                "papers surgery trains in one process; fix: start it without a launcher"
            )
        self.rules = rules
        super().__init__(options, command)

    def rows(self) -> list[Any]:
        found: list[Any] = []
        for method in super().rows():
            for text in self.rules if method.parts else ("plain",):
                label = method.label if text == "plain" else f"{method.label}, {text}"
                found.append(Ruled(label, method.parts, method.labels, text))
        return found

    def student_training(self, method: Any, seed: int) -> train.Training:
        training = super().student_training(method, seed)
        if method.rule == "plain":
            return training
        return replace(training, loss=ruled(training.loss, rule(method.rule)))

    def fit(self, training: train.Training, keeper: Any) -> nn.Module:
        """Without kept epochs: a rule's average is not among what they hold."""
        return super().fit(training, None)


def surgery(arguments: Sequence[str], command: str) -> int:
    own, others = split(Surgery, arguments, "papers surgery RECIPE")
    options = parsed(others, train.Options, program="papers surgery")
    out = options.out or Path("runs") / f"surgery-{options.recipe}"
    session = Session(replace(options, out=out), command, own.rules)
    return finish(
        session, "surgery",
        lambda found: result_table(found, title=title_of(session), more=teacher_of(session)),
    )  # fmt: skip


def ruled(loss: Callable[..., Any], combine: Callable[[Gradients, Gradients], Gradients]) -> Any:
    """A loss of the same terms, whose gradient is what the rule makes of the two losses'."""

    def put_together(
        model: nn.Module, batch: Batch, share: float
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        logits, terms = loss(model, batch, share)
        named = [parameter for parameter in model.parameters() if parameter.requires_grad]
        distilled = sum(term for name, term in terms.items() if name != "CE")
        task = torch.autograd.grad(terms["CE"], named, retain_graph=True, allow_unused=True)
        other = torch.autograd.grad(distilled, named, allow_unused=True)
        gradients = combine(list(task), list(other))
        kept = {name: term.detach() for name, term in terms.items()}
        return logits, kept | {"CE": _Given.apply(kept["CE"], gradients, *named)}

    return put_together


def rule(text: str) -> Callable[[Gradients, Gradients], Gradients]:
    """A new rule of that name, with an average of its own.

    Raises:
        ValueError: There is no rule of that name, or its bound is not positive.
    """
    name, _, factor = text.partition(":")
    if text == "plain":
        return lambda task, other: [_sum(g, d) for g, d in zip(task, other, strict=True)]
    if text == "first":
        return _First()
    if name == "bound":
        bound = float(factor) if factor.replace(".", "", 1).isdigit() else 0.0
        if bound > 0:
            return lambda task, other: [
                _bounded(g, d, bound) for g, d in zip(task, other, strict=True)
            ]
        raise ValueError(f"--rules: bound takes a positive factor, as bound:2, got {text!r}")
    if text in ("upgrad", "mgda"):
        return _whole(text)
    known = ("plain", "first", "bound:2", "upgrad", "mgda")
    raise ValueError(f"--rules: unknown {text!r}; {near(text, known)}known: {', '.join(known)}")


class _First:
    """One-sided PCGrad (arXiv 2001.06782) against the labels' average, a tensor at a time."""

    def __init__(self) -> None:
        self.average: Gradients | None = None

    def __call__(self, task: Gradients, other: Gradients) -> Gradients:
        if self.average is None:
            self.average = [None if g is None else torch.zeros_like(g) for g in task]
        found: Gradients = []
        for g, d, e in zip(task, other, self.average, strict=True):
            if g is not None and e is not None:
                e.lerp_(g, 1 - _DECAY)
                if d is not None:
                    opposed = (e * d).sum().clamp_max(0.0)
                    d = d - opposed / (e * e).sum().clamp_min(torch.finfo(e.dtype).tiny) * e
            found.append(_sum(g, d))
        return found


def _bounded(g: Tensor | None, d: Tensor | None, bound: float) -> Tensor | None:
    if g is None or d is None:
        return _sum(g, d)
    longest = bound * g.norm() / d.norm().clamp_min(torch.finfo(d.dtype).tiny)
    return g + longest.clamp_max(1.0) * d


def _whole(text: str) -> Callable[[Gradients, Gradients], Gradients]:
    """TorchJD's aggregators over the network at once; they give a mean, and we a sum."""
    try:
        from torchjd import aggregation
    except ImportError as error:
        raise ValueError(f"--rules {text} needs TorchJD; fix: pip install torchjd") from error
    aggregator = {"upgrad": aggregation.UPGrad, "mgda": aggregation.MGDA}[text]()

    def combine(task: Gradients, other: Gradients) -> Gradients:
        pairs = list(zip(task, other, strict=True))
        both = [(g, d) for g, d in pairs if g is not None and d is not None]
        rows = [torch.cat([pair[side].flatten() for pair in both]) for side in (0, 1)]
        parts = iter((2 * aggregator(torch.stack(rows))).split([g.numel() for g, _ in both]))
        return [_sum(g, d) if g is None or d is None else next(parts).view_as(g) for g, d in pairs]

    return combine


def _sum(g: Tensor | None, d: Tensor | None) -> Tensor | None:
    return d if g is None else g if d is None else g + d


class _Given(torch.autograd.Function):
    """A value whose gradient for each parameter is given."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Gradients, *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        given = (None if g is None else g * outer[0] for g in ctx.gradients)
        return None, None, *given
