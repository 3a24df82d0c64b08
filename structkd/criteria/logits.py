"""Criteria on class scores and predictions, of images or of pixels."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structkd._checks import choice, labels, number, whole
from structkd.criteria.base import Criterion, pair
from structkd.criteria.moments import log_error
from structkd.criteria.numerics import (
    is_rounding,
    labelled_mean,
    mean_of_rows,
    mean_of_sum,
    seen_empty,
)
from structkd.distributed import Shards
from structkd.features import Features

FORMS = ("softmax", "sigmoid")
ERRORS = ("squared", "absolute", "log")
# What is lower is a class that is masked out, whether with -inf or with the lowest number.
_CLOSED = -1e30
# Where the published code starts: sigmoid(1), which is a temperature of 15.6 in (1, 21).
_START = 1.0


class KDLoss(Criterion):
    r"""Soft-label distillation.

    .. math::
        L = \frac{\tau^2}{B} \sum_b KL\left(
            \mathrm{softmax}(t_b / \tau) \,\|\, \mathrm{softmax}(s_b / \tau) \right)

    Where a row has several labels, or one logit says yes or no, ``form="sigmoid"`` takes every
    class as a question of its own, with :math:`p = \mathrm{sigmoid}(\cdot / \tau)`:

    .. math::
        L = \frac{\tau^2}{B} \sum_{b,k} KL\left( (p^t_{bk}, 1 - p^t_{bk}) \,\|\,
            (p^s_{bk}, 1 - p^s_{bk}) \right)

    A class that the teacher masks out, by a logit of -inf, adds nothing under ``softmax``, and is a
    sure no under ``sigmoid``. Term: ``KD``.

    Args:
        temperature: tau > 0.
        form: ``softmax``, or ``sigmoid`` for binary and multi-label teachers.
        gather: Accepted by every criterion; without effect here, where no sample meets another.

    Shape:
        logits ``(B, K)`` or ``(B, K, H, W)`` of both, any float dtype, K >= 2 for ``softmax``;
        output a scalar in float32 (float64 for float64 inputs).

    Raises:
        ValueError: If the class counts differ, there is one class only for ``softmax``, or an
            argument is out of range.

    References:
        Hinton, Vinyals & Dean, *Distilling the Knowledge in a Neural Network*, 2015.

    Example:
        >>> import torch
        >>> KDLoss(temperature=4.0)(torch.eye(3), torch.eye(3))
        tensor(0.)
    """

    reads = ("logits",)
    pixels = "maps"

    def __init__(
        self, temperature: float = 4.0, *, form: str = "softmax", gather: bool = False
    ) -> None:
        super().__init__(gather=gather)
        self.temperature = number("temperature", temperature, above=0)
        self.form = choice("form", form, FORMS)

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        if self.form == "softmax":
            logits_s, logits_t = _scores(student, teacher, type(self).__name__)
            return {"KD": softened_divergence(logits_s, logits_t, self.temperature)}
        logits_s, logits_t = pair(student, teacher, "logits")
        divergence = _divergence(
            _yes_no(logits_s / self.temperature), _yes_no(logits_t / self.temperature)
        )
        return {"KD": self.temperature**2 * mean_of_rows(divergence)}


class LogitMSELoss(Criterion):
    r"""Regression of the teacher's logits, or of any continuous prediction of images or pixels.

    .. math::
        L = \frac{1}{B K} \sum_{b,k} (s_{bk} - t_{bk})^2

    the mean over samples and classes, ``form="squared"``. The paper's Eq. 1 is :math:`K / 2` times
    this: it sums over classes and halves. ``form="absolute"`` is the mean of
    :math:`|s_{bk} - t_{bk}|`, which a few wild pixels of a depth map do not rule.
    ``form="log"`` is the logarithm of the squared error's share of the teacher's variance,

    .. math::
        L = \log \Bigl( \frac{\mathrm{mean} \, (s - t)^2}{\mathrm{mean}_k \, \mathrm{var}(t_k)}
            + 0.01 \Bigr)

    with the variance of each channel over all rows, so that one weight means the same for metres
    and for degrees, as in :class:`FitNetLoss`. Classes that either masks out, by a logit of -inf,
    do not count. Term: ``Logits``.

    Args:
        form: ``squared``, ``absolute`` or ``log``.
        ignore: Value of the target whose rows or elements do not count: ``float("nan")`` for depth
            without a measurement, -100 for pixels without a class. By default the target is not
            read, and all count: the teacher answers where there are no labels.
        gather: Take the means over what counts on all processes, and the variances of ``log``.
            Without effect where neither ``ignore`` nor ``log`` is asked for.

    Shape:
        logits ``(B, K)`` or ``(B, K, H, W)`` of both, any float dtype; with ``ignore`` a target
        ``(B,)`` or ``(B, H, W)``, or one of the shape of the logits; output a scalar in float32
        (float64 for float64 inputs), of ``log`` not below log 0.01; 0 where nothing counts.

    Raises:
        ValueError: If the class counts differ, ``ignore`` is given and the target is missing or of
            another shape, ``log`` meets one row only, or ``form`` is unknown.
        TypeError: If ``ignore`` is no number.

    References:
        Ba & Caruana, *Do Deep Nets Really Need to be Deep?*, 2014, Eq. 1. The logarithm is this
        library's own.

    Example:
        >>> import torch
        >>> LogitMSELoss()(torch.zeros(4, 3), torch.full((4, 3), 2.0))
        tensor(4.)
        >>> depth = torch.tensor([[[1.5, float("nan")]]])  # (B, H, W): one pixel was measured
        >>> criterion = LogitMSELoss(form="absolute", ignore=float("nan"))
        >>> criterion(torch.zeros(1, 1, 1, 2), torch.tensor([[[[2.0, 9.0]]]]), depth)
        tensor(2.)
    """

    reads = ("logits",)
    takes_probabilities = True

    def __init__(
        self, *, form: str = "squared", ignore: float | None = None, gather: bool = False
    ) -> None:
        super().__init__(gather=gather)
        self.form = choice("form", form, ERRORS)
        self.ignore = ignore
        self.pixels = "maps" if ignore is None else "labelled maps"
        if ignore is not None:
            is_nan = isinstance(ignore, float) and math.isnan(ignore)
            self.ignore = ignore if is_nan else number("ignore", ignore)
        # The mean of all rows needs those of nobody else.
        self.over_ranks = "rows" if form != "log" and ignore is None else "sums"

    def compute(
        self,
        student: Features,
        teacher: Features,
        target: Tensor | None,
        shards: Shards | None = None,
    ) -> dict[str, Tensor]:
        logits_s, logits_t = pair(student, teacher, "logits")
        gone = _masked_out(logits_s, logits_t)
        if self.ignore is not None:
            ignored = self._ignored(target, logits_s).expand_as(logits_s)
            gone = ignored if gone is None else gone | ignored
        if gone is not None:  # a gap of 0, without a gradient
            logits_s, logits_t = (value.masked_fill(gone, 0) for value in (logits_s, logits_t))
        if self.form == "log":
            assert shards is not None
            if shards.total * math.prod(logits_s.shape[2:]) < 2:
                raise ValueError(
                    "LogitMSELoss(form='log') measures the teacher's variance over rows: it needs "
                    "at least 2, got 1; use drop_last=True in the DataLoader"
                )
            shape = (*logits_s.shape[:2], math.prod(logits_s.shape[2:]), 1)
            gaps, logits_t = (logits_s - logits_t).reshape(shape), logits_t.reshape(shape)
            counted = None if gone is None else ~gone.reshape(shape)
            return {"Logits": log_error(gaps, logits_t, shards, counted)}
        error = F.mse_loss if self.form == "squared" else F.l1_loss
        total = error(logits_s, logits_t, reduction="sum")
        count = total.new_full((), logits_s.numel()) if gone is None else (~gone).sum()
        alone = Shards.alone(len(logits_s))
        return {"Logits": mean_of_sum(total, count, shards or alone)}

    def _ignored(self, target: Tensor | None, logits: Tensor) -> Tensor:
        """Returns where the target holds ``ignore``, ``(B, 1, ...)`` or ``(B, K, ...)``."""
        if not isinstance(target, Tensor):
            raise ValueError(
                f"LogitMSELoss(ignore={self.ignore}) needs target, a tensor whose values say what "
                "does not count: pass target=labels"
            )
        rows = logits[:, 0].shape
        if target.shape not in (logits.shape, rows):
            raise ValueError(
                f"target must have a value for each row of logits, {tuple(rows)}, or for each "
                f"element, {tuple(logits.shape)}, got {tuple(target.shape)}"
            )
        assert self.ignore is not None
        gone = target.isnan() if math.isnan(self.ignore) else torch.eq(target, self.ignore)
        return gone if target.dim() == logits.dim() else gone[:, None]


class DKDLoss(Criterion):
    r"""Decoupled distillation: of the target's probability, and among the other classes.

    With :math:`p = \mathrm{softmax}(\cdot / \tau)`, the label y, the binary
    :math:`b = (p_y, 1 - p_y)` and :math:`\hat p` the softmax over the classes other than y,

    .. math::
        L = \frac{\tau^2}{B} \sum \left[ \alpha \, KL(b^t \| b^s)
            + \beta \, KL(\hat p^t \| \hat p^s) \right]

    Terms: ``DKD-target`` (the paper's TCKD) and ``DKD-nontarget`` (NCKD). Both need the label: B
    counts the rows that have one, and a row whose target is -100 adds nothing; a batch without any
    costs 0. Probabilities stay in
    logarithms, :math:`\log(1 - p_y)` is a logsumexp over the other classes, so the loss is finite
    at any gap between logits. The published code takes the logarithm of a sum of probabilities,
    which is -inf at wide gaps, and masks the label by subtracting 1000. It also ramps the loss up
    over the first epochs; that belongs to the training loop.

    Args:
        alpha: Weight of the target's part, >= 0.
        beta: Weight of the others' part, >= 0.
        temperature: tau > 0.
        gather: Take means over the labelled rows of all processes.

    Shape:
        logits ``(B, K)`` or ``(B, K, H, W)`` of both, any float dtype, K >= 2; target ``(B,)`` or
        ``(B, H, W)`` int64 in ``[0, K)`` or -100; output a scalar in float32 (float64 for float64
        inputs).

    Raises:
        ValueError: If the target is missing or out of range, the class counts differ, there is one
            class only, or an argument is out of range.
        TypeError: If the target holds no whole numbers.

    References:
        Zhao et al., *Decoupled Knowledge Distillation*, 2022, Eq. 7.

    Example:
        >>> import torch
        >>> logits = torch.eye(3)
        >>> terms = DKDLoss().terms(logits, logits, torch.tensor([0, 1, 2]))
        >>> list(terms)
        ['DKD-target', 'DKD-nontarget']
    """

    reads = ("logits",)
    over_ranks = "sums"
    pixels = "labelled maps"

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        *,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        self.alpha = number("alpha", alpha, at_least=0)
        self.beta = number("beta", beta, at_least=0)
        self.temperature = number("temperature", temperature, above=0)

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None, shards: Shards
    ) -> dict[str, Tensor]:
        logits_s, logits_t = _scores(student, teacher, "DKDLoss")
        tau = self.temperature
        index, labelled = labels(target, logits_s.shape, reader="DKDLoss")
        two_s, others_s, _ = _decoupled(logits_s, index[:, None], tau)
        two_t, others_t, alone = _decoupled(logits_t, index[:, None], tau)
        binary = _divergence(two_s, two_t)
        # Where all other classes are masked out there is nothing to compare among them.
        others = torch.where(alone[:, 0], 0, _divergence(others_s, others_t))
        means = [labelled_mean(part, labelled, shards) for part in (binary, others)]
        return {
            "DKD-target": self.alpha * tau**2 * means[0],
            "DKD-nontarget": self.beta * tau**2 * means[1],
        }


class LogitStandardizationLoss(Criterion):
    r"""Soft-label distillation of logits standardised row by row.

    .. math::
        L = \frac{\tau^2}{B} \sum_b KL\left(
            \mathrm{softmax}(Z(t_b) / \tau) \,\|\, \mathrm{softmax}(Z(s_b) / \tau) \right), \qquad
        Z(x) = \frac{x - \bar x}{\sigma(x)}

    with mean and standard deviation over a row's K classes, so that only the relations between a
    row's logits count, not their range. sigma divides by K as in the paper, whose bound
    :math:`|Z| \le \sqrt{K-1}` needs it; the published code divides by K-1 and adds 1e-7. A
    row whose logits are all equal has Z = 0. Term: ``LSKD``. The published loss is ``9 *
    LogitStandardizationLoss()`` beside a cross-entropy of weight 0.1.

    Args:
        temperature: Base temperature tau > 0.
        gather: Accepted by every criterion; without effect here, where no sample meets another.

    Shape:
        logits ``(B, K)`` or ``(B, K, H, W)`` of both, any float dtype; output a scalar in float32
        (float64 for float64 inputs).

    Raises:
        ValueError: If the class counts differ or an argument is out of range.

    References:
        Sun et al., *Logit Standardization in Knowledge Distillation*, 2024, Alg. 1 and 2.

    Example:
        >>> import torch
        >>> logits = torch.randn(4, 10)
        >>> float(LogitStandardizationLoss()(logits, 5 * logits + 2)) < 1e-4
        True
    """

    reads = ("logits",)
    pixels = "maps"

    def __init__(self, temperature: float = 2.0, *, gather: bool = False) -> None:
        super().__init__(gather=gather)
        self.temperature = number("temperature", temperature, above=0)

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        logits_s, logits_t = _scores(student, teacher, type(self).__name__)
        rows = [_standardized(side, 1 / self.temperature) for side in (logits_s, logits_t)]
        divergence = _divergence(*(F.log_softmax(side, dim=1) for side in rows))
        return {"LSKD": self.temperature**2 * mean_of_rows(divergence)}


class CurriculumTemperatureLoss(Criterion):
    r"""Soft-label distillation at a learned temperature that makes the task ever harder.

    .. math::
        L = \frac{T^2}{B} \sum_b KL\left(
            \mathrm{softmax}(t_b / T) \,\|\, \mathrm{softmax}(s_b / T) \right), \qquad
        T = low + (high - low) \, \mathrm{sigmoid}(\hat T)

    :math:`\hat T` is one learned number for all samples (the paper's global version). The student
    descends L; the gradient of T is multiplied by

    .. math::
        -\lambda(e) = -\tfrac{1}{2} \lambda \left( 1 - \cos \frac{\pi \min(e, E)}{E} \right)

    so that one optimizer step makes T ascend it. T^2 is part of what T ascends, as in the published
    code. The epoch e counts from 1 and is a buffer, so a resumed run goes on where it stopped: call
    :meth:`step_epoch` at the end of every epoch. Term: ``CTKD``.

    A weight decay of the optimizer pulls :math:`\hat T` towards 0 like any parameter, and in the
    published code it does.

    Args:
        low: Lower bound of T, > 0.
        high: Upper bound of T, > ``low``. The published code writes (1, 21) as t_start 1, t_end 20.
        ramp_epochs: E, the epochs until the reversal has its full strength.
        strength: lambda >= 0, the full strength.
        gather: Accepted by every criterion; without effect here, where no sample meets another.

    Shape:
        logits ``(B, K)`` or ``(B, K, H, W)`` of both, any float dtype; output a scalar in float32
        (float64 for float64 inputs).

    Raises:
        ValueError: If the class counts differ, the bounds are not in order, or an argument is out
            of range.

    References:
        Li et al., *Curriculum Temperature for Knowledge Distillation*, 2023.

    Example:
        >>> criterion = CurriculumTemperatureLoss(ramp_epochs=10)
        >>> loss = criterion(torch.randn(4, 10), torch.randn(4, 10))
        >>> criterion.step_epoch()
        >>> print(f"{criterion.temperature:.2f} {criterion.reversal:.3f}")
        15.62 0.095
    """

    reads = ("logits",)
    pixels = "maps"
    epoch: Tensor

    def __init__(
        self,
        *,
        low: float = 1.0,
        high: float = 21.0,
        ramp_epochs: int = 10,
        strength: float = 1.0,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        self.low = number("low", low, above=0)
        self.high = number("high", high, above=self.low)
        self.ramp_epochs = whole("ramp_epochs", ramp_epochs)
        self.strength = number("strength", strength, at_least=0)
        self.raw_temperature = nn.Parameter(torch.tensor(_START))
        self.register_buffer("epoch", torch.tensor(1))

    @property
    def temperature(self) -> Tensor:
        """The present temperature, a scalar in ``[low, high]`` outside the graph."""
        return self._bounded().detach()

    @property
    def reversal(self) -> Tensor:
        """The present strength of the reversal, a scalar in ``[0, strength]``."""
        raw = self.raw_temperature
        progress = self.epoch.to(raw.dtype).clamp(0, self.ramp_epochs) / self.ramp_epochs
        return 0.5 * self.strength * (1 - torch.cos(math.pi * progress))

    def epoch_ended(self) -> None:
        """Moves the ramp on by one epoch; :meth:`step_epoch` calls it, in sums too."""
        self.epoch += 1

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        logits_s, logits_t = _scores(student, teacher, type(self).__name__)
        bounded = self._bounded()
        constant = bounded.detach()
        # The bracket is exactly 0: the value is T's, the gradient is -reversal times T's.
        reversed_ = constant - self.reversal * (bounded - constant)
        return {"CTKD": softened_divergence(logits_s, logits_t, reversed_)}

    def _bounded(self) -> Tensor:
        return self.low + (self.high - self.low) * torch.sigmoid(self.raw_temperature)


def _scores(student: Features, teacher: Features, reader: str) -> tuple[Tensor, Tensor]:
    """Returns both networks' logits after checking that a softmax over them says something."""
    logits_s, logits_t = pair(student, teacher, "logits")
    if logits_s.shape[1] < 2:
        raise ValueError(
            f"{reader} needs logits of at least 2 classes, got {logits_s.shape[1]}: a softmax over "
            "one logit is always 1; for a binary or multi-label teacher take "
            "KDLoss(form='sigmoid')"
        )
    return logits_s, logits_t


def softened_divergence(logits_s: Tensor, logits_t: Tensor, temperature: float | Tensor) -> Tensor:
    """Returns tau^2 KL(softmax(t / tau) || softmax(s / tau)), averaged over the batch."""
    divergence = _divergence(
        _log_softmax(logits_s, temperature), _log_softmax(logits_t, temperature)
    )
    return temperature**2 * mean_of_rows(divergence)


def _log_softmax(logits: Tensor, temperature: float | Tensor) -> Tensor:
    if not isinstance(temperature, Tensor):
        return F.log_softmax(logits / temperature, dim=1)
    # A product, as the gradient of a divisor takes torch two passes more.
    inverse, closed = temperature.reciprocal(), _masked_out(logits)
    if closed is None:
        return F.log_softmax(logits * inverse, dim=1)
    # -inf times a number that is trained has a gradient of NaN in it.
    softened = logits.masked_fill(closed, 0) * inverse
    return F.log_softmax(softened.masked_fill(closed, -torch.inf), dim=1)


def _masked_out(*sides: Tensor) -> Tensor | None:
    """Returns which classes either side masks out, None where none is seen to be.

    Logits are looked at on the CPU only, where it spares passes that take masks into account: on an
    accelerator that would stall the stream.
    """
    sides = tuple(side.detach() for side in sides)
    # Both minima keep NaN, which counts.
    if sides[0].numel() and seen_empty(*(~(side.amin() > _CLOSED) for side in sides)):
        return None
    return functools.reduce(torch.minimum, sides) <= _CLOSED


def without_masked(logits_s: Tensor, logits_t: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both with 0 where either masks a class out, which then differs nowhere."""
    gone = _masked_out(logits_s, logits_t)
    if gone is None:
        return logits_s, logits_t
    return logits_s.masked_fill(gone, 0), logits_t.masked_fill(gone, 0)


def _yes_no(logits: Tensor) -> Tensor:
    """Returns the logarithms of ``(p, 1 - p)`` of every class, ``(B, 2 K)``."""
    return torch.cat([F.logsigmoid(logits), F.logsigmoid(-logits)], dim=1)


def _divergence(log_s: Tensor, log_t: Tensor) -> Tensor:
    """Returns KL(t || s) of every row ``(B, ...)`` from log-probabilities along dimension 1."""
    share = log_t.exp()
    gaps = (log_s - log_t).masked_fill_(share == 0, 0)  # 0 log 0 is 0
    return 0 - (share * gaps).sum(dim=1)  # which shows 0 at the optimum, not -0


def _decoupled(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the logarithms of ``(p_y, 1 - p_y)`` and those among the classes other than y.

    All along dimension 1, of the target ``(B, 1, ...)`` too; the second is -inf at y, and the third
    says where all others are masked out.
    """
    own = logits.gather(1, target) / temperature
    others = (logits / temperature).scatter_(1, target, -torch.inf)
    alone = others.detach().amax(dim=1, keepdim=True) <= _CLOSED / temperature
    others = others.masked_fill(alone, 0)
    rest = torch.logsumexp(others, dim=1, keepdim=True)
    two = torch.cat([own, rest.masked_fill(alone, -torch.inf)], dim=1)
    return F.log_softmax(two, dim=1), others - rest, alone


def _standardized(logits: Tensor, scale: float) -> Tensor:
    """Returns rows of mean 0 and standard deviation ``scale`` over the classes not masked out.

    Constant rows become 0, not noise.
    """
    closed = _masked_out(logits)
    count: float | Tensor = logits.shape[1]
    if closed is not None:
        count = (~closed).sum(dim=1, keepdim=True).clamp_min(1).to(logits.dtype)
        logits = logits.masked_fill(closed, 0)
    centred = logits - logits.sum(dim=1, keepdim=True) / count
    if closed is not None:
        centred = centred.masked_fill_(closed, 0)
    deviation = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / count**0.5
    # What is left of a constant row is the rounding of its mean, up to 6 eps at 20,000 classes.
    level = torch.linalg.vector_norm(logits.detach(), ord=torch.inf, dim=1, keepdim=True)
    inverse = scale / deviation.masked_fill(is_rounding(deviation, level), torch.inf)
    rows: Tensor = centred * inverse
    return rows if closed is None else rows.masked_fill_(closed, -torch.inf)
