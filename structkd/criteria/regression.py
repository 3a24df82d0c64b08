"""Criteria that regress one teacher map from a student map: FitNets and VID."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from structkd._checks import choice, number
from structkd.criteria._maps import adapted, check_several, checked_layer, common_pair
from structkd.criteria.base import Criterion
from structkd.criteria.moments import log_error
from structkd.distributed import Shards
from structkd.features import Features
from structkd.projectors import ConvAdapter, LazyHead, project, shaped

FORMS = ("squared", "log")
# Keeps VID's variance from reaching zero.
_FLOOR = 1e-5


class FitNetLoss(Criterion):
    r"""Regresses the teacher's map (the "hint") from the student's.

    .. math:: L = \mathrm{mean} \, (r(F_s) - F_t)^2

    with r a convolution to the teacher's channels, linear for tokens and rows, trained with the
    student. Maps of other sizes are average-pooled to a common size before r. Term: ``FitNets``.

    That is ``form="squared"``, the default. Its size grows with the square of the teacher's scale,
    so the weight that suits it depends on the teacher. ``form="log"`` is the logarithm of the
    error's share of the teacher's variance,

    .. math::
        L = \log \Bigl( \frac{\mathrm{mean} \, (r(F_s) - F_t)^2}
            {\mathrm{mean}_c \, \mathrm{var}(F_{t,c})} + 0.01 \Bigr)

    with the variance of each of the teacher's channels over the positions of all samples, about its
    mean. The scale of the teacher cancels, so one weight means the same on every teacher, and the
    gradient does not fade until a hundredth of the variance is left. The share is 1 for a regressor
    that predicts the teacher's mean only. A channel that is constant, but for the rounding of its
    mean, has a variance of 0; where all channels are, there is nothing to learn, and the share
    counts as 1, without a gradient.

    Args:
        form: ``squared`` or ``log``.
        kernel_size: Odd size of the convolution.
        adapter: Module from the student's map ``(B, C, H, W)`` to the teacher's channels, in place
            of the convolution.
        layer: Position in ``Features.intermediate`` of the map to read.
        gather: Take the sums inside the logarithm over the samples of all processes, whatever
            number each holds: two all-reduces forward and one backward. Without effect on
            ``squared``, where no sample meets another.

    Shape:
        maps ``(B, C, H, W)``, tokens ``(B, N, C)`` or rows ``(B, C)``, of any two kinds, any float
        dtype; output a scalar in float32 (float64 for float64 inputs), of ``log`` not below
        log 0.01.

    Raises:
        ValueError: If channels are not those of the first call, tokens that would need a grid have
            none, ``form`` is none of the two, or ``log`` meets one position only.

    References:
        Romero et al., *FitNets: Hints for Thin Deep Nets*, 2015, Eq. 3, as a mean over elements;
        the CRD benchmark's weight is 100. The logarithm is this library's own.

    Example:
        >>> import torch
        >>> criterion = FitNetLoss()
        >>> criterion(torch.randn(2, 8, 4, 4), torch.randn(2, 16, 2, 2)).shape
        torch.Size([])
        >>> class Zero(nn.Module):
        ...     def forward(self, features):
        ...         return features.new_zeros(len(features), 16, 4, 4)
        >>> teacher = torch.randn(64, 16, 4, 4)
        >>> teacher = 1000 * (teacher - teacher.mean(dim=(0, 2, 3), keepdim=True))
        >>> value = FitNetLoss(form="log", adapter=Zero())(torch.randn(64, 8, 4, 4), teacher)
        >>> round(float(value), 3)  # log 1.01: the mean is predicted, and no more
        0.01
    """

    reads = ("intermediate",)

    def __init__(
        self,
        *,
        form: str = "squared",
        kernel_size: int = 1,
        adapter: nn.Module | None = None,
        layer: int = -1,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        self.form = choice("form", form, FORMS)
        # The mean of the squared form needs this process's rows only.
        self.over_ranks = "sums" if form == "log" else "rows"
        self.layer = checked_layer(layer)
        self.regressor = ConvAdapter(kernel_size=kernel_size) if adapter is None else adapter

    def compute(
        self,
        student: Features,
        teacher: Features,
        target: Tensor | None,
        shards: Shards | None = None,
    ) -> dict[str, Tensor]:
        map_s, map_t = common_pair(student, teacher, self.layer)
        predicted = adapted(self.regressor, map_s, map_t)
        if shards is None:
            return {"FitNets": F.mse_loss(predicted, map_t)}
        check_several(map_s, type(self).__name__, shards)
        return {"FitNets": log_error(predicted - map_t, map_t, shards)}


class VariationalInformationLoss(Criterion):
    r"""Maximises a variational bound on the mutual information of two maps (VID).

    The teacher's map is modelled as a Gaussian whose mean the student predicts and whose variance
    is learned per channel:

    .. math::
        L = \mathrm{mean} \; \frac{1}{2} \Bigl( \log v_c + \frac{(\mu(F_s) - F_t)^2}{v_c} \Bigr),
        \qquad v_c = \mathrm{softplus}(\rho_c) + 10^{-5}

    over samples, channels and positions; it may be negative. mu is the stack of the authors' code:
    three 1x1 convolutions without bias, as wide as the teacher's map, with ReLU between. Maps of
    other sizes are average-pooled to a common size before mu. Term: ``VID``.

    Args:
        init_variance: Value of every v_c at the start, > 1e-5.
        layer: Position in ``Features.intermediate`` of the map to read.
        gather: Accepted by every criterion; without effect here, as samples are not compared.

    Shape:
        maps ``(B, C, H, W)``, tokens ``(B, N, C)`` or rows ``(B, C)``, of any two kinds, any float
        dtype; output a scalar in float32 (float64 for float64 inputs).

    Raises:
        ValueError: If channels are not those of the first call, tokens that would need a grid have
            none, or ``init_variance`` is out of range.

    References:
        Ahn et al., *Variational Information Distillation for Knowledge Transfer*, 2019, section 2,
        with the authors' code for mu and the floor.

    Example:
        >>> import torch
        >>> criterion = VariationalInformationLoss()
        >>> criterion(torch.randn(2, 8, 4, 4), torch.randn(2, 16, 2, 2)).shape
        torch.Size([])
        >>> criterion.variance.shape
        torch.Size([16])
    """

    reads = ("intermediate",)

    def __init__(
        self, *, init_variance: float = 5.0, layer: int = -1, gather: bool = False
    ) -> None:
        super().__init__(gather=gather)
        self.init_variance = number("init_variance", init_variance, above=_FLOOR)
        self.layer = checked_layer(layer)
        self.gaussian = _Gaussian(self.init_variance)

    @property
    def variance(self) -> Tensor:
        """The learned variances ``(C_t,)``, which exist from the first call on."""
        if is_lazy(self.gaussian.rho):
            raise ValueError("variance has no shape before the first call: call the criterion once")
        return self.gaussian.variance()

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        map_s, map_t = common_pair(student, teacher, self.layer)
        mean = project(self.gaussian, map_s, map_t.shape[1])
        variance = self.gaussian.variance()[:, None, None]
        return {"VID": 0.5 * (variance.log() + (mean - map_t).square() / variance).mean()}


class _Gaussian(LazyHead):
    """The mean of the teacher's map, and the variance of each of its channels."""

    rho: nn.Parameter

    def __init__(self, init_variance: float) -> None:
        super().__init__()
        start = init_variance - _FLOOR
        # The inverse of softplus, in the form that does not overflow.
        self.start = start + math.log(-math.expm1(-start))
        self.mean = nn.Sequential(
            nn.LazyConv2d(0, 1, bias=False),
            nn.ReLU(),
            nn.LazyConv2d(0, 1, bias=False),
            nn.ReLU(),
            nn.LazyConv2d(0, 1, bias=False),
        )
        self.rho = UninitializedParameter()  # type: ignore[assignment]

    def initialize_parameters(self, features: Tensor, width: int) -> None:
        value = features
        for layer in self.mean:
            shaped(layer, value, width)
            value = features.new_empty(1, width, 1, 1)
        if isinstance(self.rho, UninitializedParameter):
            self.rho.materialize((width,), device=features.device, dtype=features.dtype)
            nn.init.constant_(self.rho, self.start)

    def variance(self) -> Tensor:
        return F.softplus(self.rho) + _FLOOR

    def forward(self, features: Tensor, width: int) -> Tensor:
        first = self.mean[0]
        assert isinstance(first, nn.Conv2d)
        if (features.shape[1], width) != (first.in_channels, len(self.rho)):
            raise ValueError(
                f"the maps have {features.shape[1]} (student) and {width} (teacher) channels, but "
                f"this criterion took its shape from {first.in_channels} and {len(self.rho)}: make "
                "a new one"
            )
        mean: Tensor = self.mean(features)
        return mean
