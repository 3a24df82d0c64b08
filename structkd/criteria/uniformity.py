"""Uniformity of intermediate features: the distribution calibration module (DCM)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from structkd._checks import choice, number, terms_of, whole
from structkd.criteria._maps import adapted, checked_layer, common_positions, map_pair, pooled
from structkd.criteria.base import Criterion
from structkd.criteria.numerics import unit
from structkd.features import Features
from structkd.projectors import ConvAdapter

POOLS = ("avg", "flatten")
CROSS_SIGNS = ("separate", "align")
TERMS = ("DCM-1", "DCM-2")
# Wang & Isola's exp(-2 d^2) on the unit sphere.
SPHERE_SIGMA = math.sqrt(0.5)


class UniformityCalibrationLoss(Criterion):
    r"""Spreads the student's intermediate features over their space.

    With rows :math:`s_i, t_j` of N samples,

    .. math::
        DM(u, v) = \log \frac{1}{N^2} \sum_{ij} \exp(-\|u_i - v_j\|^2 / \sigma^2), \qquad
        L = DM(s, s) + DM(s, t)

    with the self-pairs in, as printed. Terms: ``DCM-1`` and ``DCM-2``. It is computed as a
    logsumexp, which does not underflow where distances are large.

    The paper's prose and its Eq. 10 disagree on the second term. The prose says that it shortens
    the distance between student and teacher; minimising :math:`\log E[\exp(-d^2)]`, which is what
    Eq. 10 does, lengthens it. ``cross_sign="separate"`` is Eq. 10 as printed; ``"align"`` follows
    the prose and subtracts the term. docs/choices.md compares them.

    The paper gives neither sigma nor a normalisation. Unit rows with sigma^2 = 1/2 (Wang & Isola)
    are the default; the other documented choice is raw rows with the median distance between
    teacher rows as bandwidth: ``normalize=False, sigma="median"``.

    Args:
        adapter: Module that brings the student's map ``(B, C, H, W)`` to the teacher's channels; by
            default a :class:`ConvAdapter` where the channels of the first call differ, and nothing
            where they agree.
        sigma: Bandwidth > 0, or ``"median"``.
        normalize: Scale rows to unit length. A row of zeros stays one, and sends no gradient.
        pool: ``avg`` averages a map over its positions; ``flatten`` keeps them, and average-pools
            both maps to a common size first where sizes differ. Maps, tokens and rows may meet. A
            number k averages both maps to one grid of at most k x k cells, each a sample of its
            own: N grows up to k^2 times as large, and the work with its square.
        cross_sign: ``separate`` or ``align``.
        layer: Position in ``Features.intermediate`` of the map to read.
        terms: Which of ``DCM-1`` and ``DCM-2`` to take.
        gather: Spread over the batch of all processes.

    Shape:
        maps ``(B, C, H, W)``, tokens ``(B, N, C)`` or rows ``(B, n)``, any float dtype, B >= 2;
        output a scalar in float32 (float64 for float64 inputs).

    Raises:
        ValueError: If ``sigma`` is not positive, or an option is unknown.

    References:
        Si et al., Eq. 8-11; Wang & Isola, *Understanding Contrastive Representation Learning
        through Alignment and Uniformity on the Hypersphere*, 2020.

    Example:
        >>> criterion = UniformityCalibrationLoss()
        >>> terms = criterion.terms(torch.randn(8, 16, 4, 4), torch.randn(8, 16, 4, 4))
        >>> sorted(terms)
        ['DCM-1', 'DCM-2']
    """

    reads = ("intermediate",)
    over_ranks = "gathered"
    min_batch = 2

    def __init__(
        self,
        adapter: nn.Module | None = None,
        *,
        sigma: float | str = SPHERE_SIGMA,
        normalize: bool = True,
        pool: str | int = "avg",
        cross_sign: str = "separate",
        layer: int = -1,
        terms: Sequence[str] = TERMS,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        self.sigma: float | str = (
            choice("sigma", sigma, ("median",))
            if isinstance(sigma, str)
            else number("sigma", sigma, above=0)
        )
        self.adapter = ConvAdapter(skip_equal=True) if adapter is None else adapter
        self.normalize = normalize
        self.pool = choice("pool", pool, POOLS) if isinstance(pool, str) else whole("pool", pool)
        self.cross_sign = choice("cross_sign", cross_sign, CROSS_SIGNS)
        self.layer = checked_layer(layer)
        self.enabled = terms_of(terms, TERMS)

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        map_s, map_t = map_pair(student, teacher, self.layer)
        rows_s, rows_t = self._rows(adapted(self.adapter, map_s, map_t), map_t)
        variance = self._variance(rows_t)
        terms = {}
        if "DCM-1" in self.enabled:
            terms["DCM-1"] = _mean_kernel(_squared_distances(rows_s, None), variance)
        if "DCM-2" in self.enabled:
            cross = _mean_kernel(_squared_distances(rows_s, rows_t), variance)
            terms["DCM-2"] = cross if self.cross_sign == "separate" else -cross
        return terms

    def _rows(self, map_s: Tensor, map_t: Tensor) -> tuple[Tensor, Tensor]:
        if self.pool == "avg":
            rows_s, rows_t = pooled(map_s), pooled(map_t)
        else:
            maps = common_positions(map_s, map_t, "student and teacher intermediate")
            rows_s, rows_t = (_cells(features, self.pool) for features in maps)
        return (unit(rows_s), unit(rows_t)) if self.normalize else (rows_s, rows_t)

    def _variance(self, rows_t: Tensor) -> Tensor | float:
        if not isinstance(self.sigma, str):
            return self.sigma**2
        with torch.no_grad():
            count = rows_t.shape[0]
            pairs = torch.triu_indices(count, count, 1, device=rows_t.device)
            median = _squared_distances(rows_t, None)[pairs[0], pairs[1]].median()
            # Identical teacher rows leave no scale to measure by.
            return torch.where(median == 0, 1, median)


def _cells(features: Tensor, pool: str | int) -> Tensor:
    """Returns a row a sample of ``(B, C, H, W)``, or one a cell of its grid."""
    if isinstance(pool, str):
        return features.flatten(1)
    size = (min(features.shape[2], pool), min(features.shape[3], pool))
    return rearrange(F.adaptive_avg_pool2d(features, size), "b c h w -> (b h w) c")


def _squared_distances(left: Tensor, right: Tensor | None) -> Tensor:
    """Returns all squared distances ``(N, M)``; ``right=None`` means ``left`` against itself."""
    # Distances do not change with the origin; near the data's centre they keep more digits.
    origin = left.detach().mean(dim=0)
    left = left - origin
    other = left if right is None else right - origin
    squared = (
        left.square().sum(dim=1)[:, None] + other.square().sum(dim=1) - 2 * left @ other.T
    ).clamp_min(0)
    if right is None:
        # A row's distance to itself is exactly 0, which rounding would miss.
        return squared - torch.diag_embed(squared.diagonal())
    return squared


def _mean_kernel(squared: Tensor, variance: Tensor | float) -> Tensor:
    # The count as a tensor: a compiled graph would be bound to one batch size by its logarithm.
    count = squared.new_full((), squared.numel())
    return torch.logsumexp((-squared / variance).flatten(), dim=0) - count.log()
