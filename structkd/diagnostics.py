"""Dimensional structure in numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from structkd._checks import describe, number
from structkd.criteria._closed_form import cut_at, predicted_share
from structkd.criteria._maps import common_positions
from structkd.criteria._moments import Columns, moments
from structkd.matching.gap import ModalityGap, ModalityGapWarning, modality_gap

__all__ = [
    "FilterDirections",
    "ModalityGap",
    "ModalityGapWarning",
    "effective_rank",
    "filter_collapse",
    "modality_gap",
    "predictable_share",
    "self_similarity",
    "transport_cost",
    "uniformity",
]

# Far more than a few thousand rows need; POT's default of 1e5 stops there.
SIMPLEX_PIVOTS = 10_000_000


def self_similarity(embedding: Tensor) -> Tensor:
    """Cosine similarity of an embedding's channels over the samples.

    ``S_ij = <z_i, z_j> / (|z_i| |z_j|)`` with ``z_i`` a column, the paper's Fig. 2(a-b).
    Off-diagonal values near 0 mean independent channels. A channel that is zero everywhere gives
    zeros.

    Args:
        embedding: ``(N, D)``, floating point.

    Returns:
        ``(D, D)`` in [-1, 1], float32 at least.

    Raises:
        TypeError, ValueError: If ``embedding`` is no 2-D floating-point tensor.

    References:
        Si et al., Sec. 3.1.

    Example:
        >>> self_similarity(torch.eye(3))
        tensor([[1., 0., 0.],
                [0., 1., 0.],
                [0., 0., 1.]])
    """
    columns = F.normalize(_rows(embedding), dim=0)
    return (columns.T @ columns).clamp(-1, 1)


def effective_rank(embedding: Tensor) -> Tensor:
    """Number of dimensions that an embedding really uses.

    ``exp(H(p))`` with ``p`` the singular values of the matrix divided by their sum and ``H`` the
    entropy: D for equal singular values, 1 for a matrix of rank 1.

    Args:
        embedding: ``(N, D)``, floating point.

    Returns:
        A scalar in [1, min(N, D)] (1 for a matrix of zeros), float32 at least.

    Raises:
        TypeError, ValueError: If ``embedding`` is no 2-D floating-point tensor.

    References:
        Roy & Vetterli, *The Effective Rank: A Measure of Effective Dimensionality*, 2007.

    Example:
        >>> round(float(effective_rank(torch.eye(4))), 4)
        4.0
    """
    values = torch.linalg.svdvals(_rows(embedding))
    share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    rank: Tensor = torch.special.entr(share).sum().exp()
    return rank


def uniformity(features: Tensor, t: float = 2.0) -> Tensor:
    """How evenly features spread over the unit sphere.

    ``log mean_{i<j} exp(-t |x_i - x_j|^2)`` on rows scaled to unit length; 0 where all fall on one
    point, lower is more uniform.

    Args:
        features: ``(N, D)`` with N >= 2, floating point.
        t: Kernel sharpness > 0.

    Returns:
        A scalar in [-4 t, 0], float32 at least.

    Raises:
        TypeError, ValueError: If ``features`` is no 2-D floating-point tensor of at least two rows,
            or ``t`` is not positive.

    References:
        Wang & Isola, 2020, Sec. 4.1.2.

    Example:
        >>> uniformity(torch.ones(5, 3))
        tensor(0.)
    """
    rows = F.normalize(_rows(features), dim=1)
    if rows.shape[0] < 2:
        raise ValueError(f"features must have at least 2 rows, got {rows.shape[0]}")
    squared = torch.pdist(rows).square()
    spread = torch.logsumexp(-number("t", t, above=0) * squared, dim=0)
    return spread - torch.log(torch.tensor(float(squared.numel()), device=rows.device))


def transport_cost(features_s: Tensor, features_t: Tensor, *, p: float = 2.0) -> Tensor:
    """Exact Wasserstein distance between two sets of features.

    ``W_p = (min_P sum_ij P_ij |s_i - t_j|^p)^(1/p)`` over plans ``P`` whose rows sum to 1/N and
    columns to 1/M: every sample counts the same, the order and the pairing of the two sets do not.
    ``p=2`` gives W_2, not its square. It is solved exactly by POT's network simplex on the CPU in
    float64; time grows about as N^3, so take a sample of a few thousand rows.

    Args:
        features_s: ``(N, D)``, floating point.
        features_t: ``(M, D)``, floating point.
        p: Order >= 1, the power of the Euclidean distance.

    Returns:
        A scalar >= 0 in the unit of the features, float32 at least, without gradient; NaN where a
        feature is not finite.

    Raises:
        TypeError, ValueError: If a set is no 2-D floating-point tensor or empty, widths differ, or
            ``p`` is below 1.
        ImportError: If POT is not installed.
        RuntimeError: If the solver stops before the optimum.

    References:
        Wei et al., *Asymmetric Cross-Modal Knowledge Distillation*, AAAI 2026, Fig. 2; Peyré &
        Cuturi, *Computational Optimal Transport*, 2019, Sec. 2.4.

    Example:
        >>> points = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> transport_cost(points, points.flip(0) + torch.tensor([3.0, 4.0]))  # a shift by 5
        tensor(5.)
    """
    try:
        import ot  # seconds of work, for it pulls in SciPy and scikit-learn
    except ImportError as error:
        raise ImportError(
            "transport_cost needs POT: pip install POT, the package that has the module ot"
        ) from error
    rows_s, rows_t = _rows(features_s).detach(), _rows(features_t).detach()
    if rows_s.shape[1] != rows_t.shape[1]:
        raise ValueError(
            "features_s and features_t must have one width, got "
            f"{describe(features_s)} and {describe(features_t)}"
        )
    if not (len(rows_s) and len(rows_t)):
        raise ValueError(
            f"both sets need a sample, got {describe(features_s)} and {describe(features_t)}"
        )
    power = number("p", p, at_least=1)
    # By differences: the matrix-product form loses the digits of near points.
    distance = torch.cdist(
        rows_s.double().cpu(),
        rows_t.double().cpu(),
        compute_mode="donot_use_mm_for_euclid_dist",
    )
    # In units of the largest distance no power of it overflows.
    largest = distance.max()
    if not largest.isfinite():
        return rows_s.new_tensor(float("nan"))
    unit = distance / largest.where(largest > 0, 1)
    solved, log = ot.emd2([], [], unit.pow(power).numpy(), numItermax=SIMPLEX_PIVOTS, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"the exact transport solver stopped early: {log['warning']}")
    return rows_s.new_tensor(max(float(solved), 0.0) ** (1 / power) * float(largest))


def predictable_share(
    features_s: Tensor, features_t: Tensor, *, ridge: float = 1e-3, split: bool | None = None
) -> Tensor:
    """Share of every teacher channel's variance that a linear map of the student's predicts.

    Taken once between a student trained *without* a teacher and the teacher, on some hundreds of
    images, it says beforehand what :class:`structkd.DenseStructureLoss` can gain. What no map
    predicts, the student's modality may not show, and pulling on it costs; what is predicted
    already leaves little to learn. Positions of maps are samples. The map is the ridge regression
    of the closed form there, and so is the rule for few positions: below 10 a student channel it is
    fitted on one half of them and measured on the other, both ways.

    Args:
        features_s: Maps ``(B, C_s, H, W)``, tokens ``(B, N, C_s)`` or rows ``(B, C_s)``.
        features_t: The teacher's for the same samples, ``C_t`` channels, of any of these kinds;
            maps of other sizes are average-pooled to a common size.
        ridge: > 0, times the mean variance of the student's channels.
        split: Fit and measure on halves or not; none follows the rule.

    Returns:
        ``(C_t,)``, float32 at least, at most 1: 0 for a constant channel, and below 0 where halves
        predict each other worse than their means do. NaN where features are not finite.

    Raises:
        TypeError, ValueError: If features are no floating-point tensors of these kinds or of
            different samples, or there are fewer than 2 positions.

    Example:
        >>> maps = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> noise = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        >>> shown = predictable_share(maps, torch.cat([maps[:, :1] - maps[:, 1:2], noise], dim=1))
        >>> [round(float(share), 1) for share in shown]
        [1.0, 0.0]
    """
    for name, features in (("features_s", features_s), ("features_t", features_t)):
        if not isinstance(features, Tensor) or not features.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {describe(features)}")
        if features.dim() not in (2, 3, 4):
            raise ValueError(
                f"{name} must be (B, C, H, W), (B, N, C) or (B, C), got {describe(features)}"
            )
    if len(features_s) != len(features_t):
        raise ValueError(
            "features_s and features_t must hold the same samples, got "
            f"{describe(features_s)} and {describe(features_t)}"
        )
    dtype = torch.promote_types(
        torch.promote_types(features_s.dtype, features_t.dtype), torch.float32
    )
    wide = (features_s.detach().to(dtype), features_t.detach().to(dtype))
    x, y = (
        value.transpose(0, 1).flatten(1)
        for value in common_positions(*wide, "features_s and features_t")
    )
    if x.shape[1] < 2:
        raise ValueError(f"the features must have at least 2 positions, got {x.shape[1]}")
    pair = Columns(x, y, whole=True, cut=cut_at(x.shape[1], len(x), split))
    return predicted_share(*moments([pair]), ridge=number("ridge", ridge, above=0), floor=0.0)


class FilterDirections(NamedTuple):
    """What :func:`filter_collapse` says of one convolution.

    Attributes:
        norm: Mean Euclidean norm of the filters.
        rank: Effective rank of the filters' directions.
        most: The largest rank that they could have, the lesser of filters and weights a filter.
    """

    norm: float
    rank: float
    most: int


@torch.no_grad()
def filter_collapse(module: nn.Module) -> dict[str, FilterDirections]:
    """Norm and effective rank of the filters of every convolution that a batch norm follows.

    Such a convolution does not change with the scale of its filters, so its effective learning rate
    is ``lr / |w|^2``. A strong criterion on early maps can throw all filters of a layer far in one
    common direction within an epoch. Their norms are large then and their rank is small, no later
    gradient parts them, and the run is lost although no gradient is large and no channel is dead.
    Compare with the same network as it was initialised, or trained without the criterion: a norm
    several times as large *and* a clearly lower rank is a collapse. Clipping every unit's gradient
    by the norm of its weights prevents it (``timm.utils.agc.adaptive_clip_grad``).

    The rank is :func:`effective_rank` of the filters scaled to unit length, one a row. A
    convolution counts if the next module that its parent registers is a batch norm of as many
    channels, or if its parent has such a norm under its own name with ``bn`` or ``norm`` for
    ``conv``; so does the last one of an ``nn.Sequential`` in its place.

    Args:
        module: A network, or anything that holds one.

    Returns:
        One result by the layer's dotted name, in order of registration.

    References:
        van Laarhoven, *L2 Regularization versus Batch and Weight Normalization*, 2017; Brock et
        al., *High-Performance Large-Scale Image Recognition Without Normalization*, 2021, Eq. 3.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3))
        >>> nn.init.ones_(net[0].weight).shape
        torch.Size([4, 3, 3, 3])
        >>> {name: round(found.rank, 3) for name, found in filter_collapse(net).items()}
        {'0': 1.0}
    """
    found = {}
    for name, weight in _normalised_filters(module):
        filters = _rows(weight.flatten(1))
        norm, rank = float(filters.norm(dim=1).mean()), float("nan")
        if math.isfinite(norm):  # LAPACK refuses what is not
            rank = float(effective_rank(F.normalize(filters, dim=1)))
        found[name] = FilterDirections(norm, rank, min(filters.shape))
    return found


def _normalised_filters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, parent in module.named_modules():
        children = list(parent.named_children())
        for position, (name, child) in enumerate(children):
            norms = [getattr(parent, name.replace("conv", norm), None) for norm in ("bn", "norm")]
            norms += [after for _, after in children[position + 1 : position + 2]]
            while isinstance(child, nn.Sequential) and len(child):  # a deep stem
                last, child = list(child.named_children())[-1]
                name = f"{name}.{last}"
            if not isinstance(child, nn.Conv1d | nn.Conv2d | nn.Conv3d) or is_lazy(child.weight):
                continue
            if any(
                isinstance(norm, _BatchNorm) and norm.num_features == child.out_channels
                for norm in norms
            ):
                yield (f"{path}.{name}" if path else name), child.weight


def _rows(features: Tensor) -> Tensor:
    if not isinstance(features, Tensor) or not features.is_floating_point():
        raise TypeError(f"expected a floating-point tensor, got {describe(features)}")
    if features.dim() != 2:
        raise ValueError(
            f"expected 2-D (N, D), got {describe(features)}; pool or flatten maps first"
        )
    return features if features.dtype == torch.float64 else features.float()
