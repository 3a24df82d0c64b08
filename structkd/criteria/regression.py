"""Criteria that regress one teacher map from a student map: FitNets and VID."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structkd._checks import choice, number, whole
from structkd.criteria._maps import (
    channels,
    check_several,
    checked_layer,
    common_positions,
    map_pair,
)
from structkd.criteria._moments import UNKNOWABLE, error_and_variance
from structkd.criteria.base import Criterion
from structkd.features import Features
from structkd.projectors import ConvAdapter

FORMS = ("squared", "log")
# Keeps VID's variance from reaching zero.
_FLOOR = 1e-5


class _MapRegression(Criterion):
    """Reads one pair of maps and checks their channels."""

    reads = ("intermediate",)

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        layer: int = -1,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        self.student_channels = whole("student_channels", student_channels)
        self.teacher_channels = whole("teacher_channels", teacher_channels)
        self.layer = checked_layer(layer)

    @classmethod
    def arguments(
        cls, feats_s: Features, feats_t: Features, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Returns the channels of two example passes."""
        map_s, map_t = map_pair(feats_s, feats_t, options.get("layer", -1))
        return {"student_channels": channels(map_s), "teacher_channels": channels(map_t)}

    def _maps(self, student: Features, teacher: Features) -> tuple[Tensor, Tensor]:
        """Returns both maps as ``(B, C, H, W)`` of one size."""
        map_s, map_t = map_pair(student, teacher, self.layer)
        for name, given, wanted in (
            ("student", channels(map_s), self.student_channels),
            ("teacher", channels(map_t), self.teacher_channels),
        ):
            if given != wanted:
                raise ValueError(
                    f"{name}.intermediate[{self.layer}] has {given} channels, expected "
                    f"{name}_channels={wanted}; build the criterion with "
                    f"{type(self).__name__}.from_features(feats_s, feats_t)"
                )
        return common_positions(map_s, map_t, "student and teacher intermediate")


class FitNetLoss(_MapRegression):
    r"""Regresses the teacher's map (the "hint") from the student's.

    .. math:: L = \mathrm{mean} \, (r(F_s) - F_t)^2

    with r a convolution to the teacher's channels, linear for tokens and rows, trained with the
    student. Maps of other sizes are average-pooled to a common size before r. Term: ``FitNets``.

    That is ``form="squared"``, the default, whose size goes with the square of the teacher's scale,
    and so does the weight that suits it. ``form="log"`` is the logarithm of the error's share of
    the teacher's variance,

    .. math::
        L = \log \Big( \frac{\mathrm{mean} \, (r(F_s) - F_t)^2}
            {\mathrm{mean}_c \, \mathrm{var}(F_{t,c})} + 0.01 \Big)

    with the variance of each of the teacher's channels over the positions of all samples, about its
    mean. The scale of the teacher cancels, so one weight means the same on every teacher, and the
    pull does not fade as the error falls until a hundredth of the variance is left. The share is 1
    for a regressor that knows the teacher's mean and no more. A channel that is constant, but for
    the rounding of its mean, has a variance of 0; where all channels are, there is nothing to
    learn, and the share counts as 1, without a gradient.

    Args:
        student_channels: Channels of the student's map.
        teacher_channels: Channels of the teacher's map.
        form: ``squared`` or ``log``.
        kernel_size: Odd size of the convolution.
        layer: Position in ``Features.intermediate`` of the map to read.
        gather: Take the sums inside the logarithm over the samples of all processes, whatever
            number each holds: two all-reduces forward and one backward. Without effect on
            ``squared``, where no sample meets another.

    Shape:
        maps ``(B, C, H, W)``, tokens ``(B, N, C)`` or rows ``(B, C)``, of any two kinds, any float
        dtype; output a scalar in float32 (float64 for float64 inputs), of ``log`` not below
        log 0.01.

    Raises:
        ValueError: If channels are not those it was built for, tokens that would need a grid have
            none, ``form`` is none of the two, or ``log`` meets one position only.

    References:
        Romero et al., *FitNets: Hints for Thin Deep Nets*, 2015, Eq. 3, as a mean over elements;
        the CRD benchmark's weight is 100. The logarithm is this library's own.

    Example:
        >>> criterion = FitNetLoss(8, 16)
        >>> criterion(torch.randn(2, 8, 4, 4), torch.randn(2, 16, 2, 2)).shape
        torch.Size([])
        >>> scaled = FitNetLoss(8, 16, form="log")
        >>> _ = torch.nn.init.zeros_(scaled.regressor.conv.weight)
        >>> _ = torch.nn.init.zeros_(scaled.regressor.conv.bias)
        >>> teacher = torch.randn(64, 16, 4, 4)
        >>> teacher = teacher - teacher.mean(dim=(0, 2, 3), keepdim=True)
        >>> value = scaled(torch.randn(64, 8, 4, 4), 1000 * teacher)
        >>> round(float(value), 3)  # log 1.01: the mean is predicted, and no more
        0.01
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        form: str = "squared",
        kernel_size: int = 1,
        layer: int = -1,
        gather: bool = False,
    ) -> None:
        super().__init__(student_channels, teacher_channels, layer=layer, gather=gather)
        self.form = choice("form", form, FORMS)
        # The mean of the squared form needs the rows of nobody else.
        self.couples = self.sums_over_ranks = form == "log"
        self.regressor = ConvAdapter(student_channels, teacher_channels, kernel_size=kernel_size)

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        map_s, map_t = self._maps(student, teacher)
        if self.form == "squared":
            return {"FitNets": F.mse_loss(self.regressor(map_s), map_t)}
        check_several(map_s, type(self).__name__, gather=self.gather)
        error, variance = error_and_variance(
            self.regressor(map_s) - map_t, map_t, gather=self.gather
        )
        variance = variance.mean()
        # Written so that NaN stays NaN: a comparison with it is false, and 0 times it is NaN.
        constant = variance <= 0
        error = torch.where(constant, 1 + 0 * error, error)
        variance = torch.where(constant, 1, variance)
        # No quotient, which would leave float32 where the variance nearly does.
        return {"FitNets": torch.log(error + UNKNOWABLE * variance) - torch.log(variance)}

    def extra_repr(self) -> str:
        return f"form={self.form!r}"


class VariationalInformationLoss(_MapRegression):
    r"""Maximises a variational bound on the mutual information of two maps (VID).

    The teacher's map is modelled as a Gaussian whose mean the student predicts and whose variance
    is learned per channel:

    .. math::
        L = \mathrm{mean} \; \frac{1}{2} \Big( \log v_c + \frac{(\mu(F_s) - F_t)^2}{v_c} \Big),
        \qquad v_c = \mathrm{softplus}(\rho_c) + 10^{-5}

    over samples, channels and positions; it may be negative. mu is the stack of the authors' code:
    three 1x1 convolutions without bias, as wide as the teacher's map, with ReLU between. Maps of
    other sizes are average-pooled to a common size before mu. Term: ``VID``.

    Args:
        student_channels: Channels of the student's map.
        teacher_channels: Channels of the teacher's map.
        init_variance: Value of every v_c at the start, > 1e-5.
        layer: Position in ``Features.intermediate`` of the map to read.
        gather: Accepted by every criterion; without effect here, where no sample meets another.

    Shape:
        maps ``(B, C, H, W)``, tokens ``(B, N, C)`` or rows ``(B, C)``, of any two kinds, any float
        dtype; output a scalar in float32 (float64 for float64 inputs).

    Raises:
        ValueError: If channels are not those it was built for, tokens that would need a grid have
            none, or ``init_variance`` is out of range.

    References:
        Ahn et al., *Variational Information Distillation for Knowledge Transfer*, 2019, section 2,
        with the authors' code for mu and the floor.

    Example:
        >>> criterion = VariationalInformationLoss(8, 16)
        >>> criterion.variance.shape
        torch.Size([16])
        >>> criterion(torch.randn(2, 8, 4, 4), torch.randn(2, 16, 2, 2)).shape
        torch.Size([])
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        init_variance: float = 5.0,
        layer: int = -1,
        gather: bool = False,
    ) -> None:
        super().__init__(student_channels, teacher_channels, layer=layer, gather=gather)
        start = number("init_variance", init_variance, above=_FLOOR) - _FLOOR
        width = self.teacher_channels
        self.mean = nn.Sequential(
            nn.Conv2d(self.student_channels, width, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=False),
        )
        # The inverse of softplus, in the form that does not overflow.
        self.rho = nn.Parameter(torch.full((width,), start + math.log(-math.expm1(-start))))

    @property
    def variance(self) -> Tensor:
        """The learned variances ``(C_t,)``."""
        return F.softplus(self.rho) + _FLOOR

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        map_s, map_t = self._maps(student, teacher)
        variance = self.variance[:, None, None]
        residual = (self.mean(map_s) - map_t).square()
        return {"VID": 0.5 * (variance.log() + residual / variance).mean()}
