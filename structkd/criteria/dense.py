"""Dimensional structure of aligned maps, where every position is a sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from structkd._checks import choice, number, terms_of
from structkd.criteria._maps import (
    Layers,
    check_several,
    checked_layers,
    common_positions,
    map_pairs,
)
from structkd.criteria.base import Criterion, Input
from structkd.criteria.correlation import off_diagonal_energy
from structkd.criteria.moments import UNKNOWABLE, Columns, Moments, by_channel, moments
from structkd.criteria.numerics import inverse, inverse_scale, parted
from structkd.distributed import Shards
from structkd.features import Features
from structkd.projectors import StackedLinear, linear_map

ADAPTERS = ("conv", "closed_form")
DIAGONALS = ("information", "squared")
TERMS = ("Dense-1", "Dense-2")
# Positions a student channel below which a regression measured on its own positions flatters.
_ENOUGH = 10


class DenseStructureLoss(Criterion):
    r"""Makes every channel of the student's maps match the teacher's, position by position.

    For pairs that are aligned to the pixel. The rows are the positions of all maps of the batch,
    N = B H W, with the student's map brought to the teacher's d channels by a 1x1 convolution. With
    centred columns x and y of both, their variances :math:`v` and a floor :math:`\epsilon`,

    .. math::
        C_{ij} = \frac{\mathrm{cov}(x_i, y_j)}{\sqrt{(v_{x,i} + \epsilon \bar{v_x})
            (v_{y,j} + \epsilon \bar{v_y})}}, \qquad
        L = \sum_{stages} \frac{1}{d} \Bigl( \sum_i L_{ii} + \lambda \sum_{i \neq j} C_{ij}^2 \Bigr)

    Terms: ``Dense-1`` (diagonal) and ``Dense-2``. The diagonal has two forms:

    * ``information``, the default, is :math:`L_{ii} = \log(1 - \max(C_{ii}, 0)^2 + 0.01)`: up to
      the constant, which stands for what cannot be known, twice the negative mutual information of
      two Gaussian variables. Its pull is strongest on channels that are nearly predicted and fades
      on those that the student's modality does not show. It lies in [log 0.01, log 1.01], so its
      weight does not depend on the scale of features or teacher. A channel whose C_ii is not
      positive has no pull of its own until the rest of the training moves it;
    * ``squared`` is :math:`(1 - C_{ii})^2`, Eq. 7 of the paper on positions. It pulls hardest on
      channels that cannot be predicted; take it to compare with the paper.

    ``adapter="closed_form"`` trains no convolution. It solves each batch's ridge regression of the
    teacher's channels on the student's, and with :math:`u_i` the share of channel i that this
    leaves unexplained,

    .. math::
        L = \sum_{stages} \frac{1}{d} \sum_i \log(u_i + 0.01), \qquad
        u_i = 1 - \frac{[S_{ts} (S_{ss} + \rho I)^{-1} S_{st}]_{ii}}{v_{y,i} + \epsilon \bar{v_y}}

    where :math:`\rho` is ``ridge`` times the mean variance of the student's channels, and the
    factorisation is Cholesky's in float64 (float32 on Apple's GPUs). It has no parameters, so
    nothing goes into an optimizer or a checkpoint; take it where that counts, and the convolution
    where accuracy does. Where positions are few against channels, a regression looks good by
    overfitting. So the positions, in the order of the batch, are cut into two halves: the
    regression and its intercept are fitted on one and :math:`u_i` is measured on the other against
    the mean of the first, both ways, and averaged. u_i may exceed 1 then.

    Everything comes from sums over positions, so memory is :math:`O(C^2 + BHWC)`. Where the student
    has no more channels than the teacher, the convolution is applied to the sums and never to a
    map. With ``gather`` the sums are all-reduced, and no position is gathered: two all-reduces
    forward and one backward, whatever the number of stages. The first one has the means, which are
    taken off before the second moments, so that these do not cancel in float32. The closed form
    exchanges the numbers of samples beside them.

    Args:
        adapter: ``conv``, a trained 1x1 convolution without bias a stage, or ``closed_form``.
        diagonal: ``information`` or ``squared``; the closed form has the first only.
        lambd: Weight of the off-diagonal part, >= 0.
        floor: :math:`\epsilon >= 0`. It bounds the gradient of a channel that is nearly dead, which
            grows as one over its deviation without. With it C_ii stays a little below 1.
        ridge: Of the closed form, > 0.
        split: Fit the closed form on halves or not; none means where a stage has fewer than 10
            positions a student channel.
        layer: Position, or several, in ``Features.intermediate`` of the maps to pair; else all.
        terms: Which of ``Dense-1`` and ``Dense-2`` to take; none means all that the adapter has.
            The closed form has ``Dense-1`` only.
        gather: Sum over the positions of all processes, whatever number each holds. On an
            accelerator the closed form needs the same number of samples on each.

    Shape:
        as many maps ``(B, C, H, W)``, tokens ``(B, N, C)`` or rows ``(B, C)`` of both, of any two
        kinds in a pair, any float dtype; maps of other sizes are average-pooled to a common size.
        B may be 1 where maps have positions. Output a scalar in float32 (float64 for float64
        inputs), which may be negative.

    Raises:
        ValueError: If the maps do not pair up, channels are not those of the first call, there is
            one position only, tokens that would need a grid have none, or an option is out of
            range or has no meaning with the others.

    References:
        Eq. 6-7 of Si et al., *A Dimensional Structure based Knowledge Distillation Method for
        Cross-Modal Learning*, on positions; the information form and the closed form are this
        library's own. Mutual information of Gaussians: Cover & Thomas, *Elements of Information
        Theory*, 2006, Sec. 8.5.

    Example:
        >>> small, large = torch.randn(4, 8, 8, 8), torch.randn(4, 16, 8, 8)
        >>> criterion = DenseStructureLoss()
        >>> sorted(criterion.terms(small, large))
        ['Dense-1', 'Dense-2']
        >>> free = DenseStructureLoss(adapter="closed_form")
        >>> free(small, large).shape, list(free.parameters())
        (torch.Size([]), [])
    """

    reads = ("intermediate",)
    over_ranks = "sums"

    def __init__(
        self,
        *,
        adapter: str = "conv",
        diagonal: str = "information",
        lambd: float = 0.05,
        floor: float = 1e-2,
        ridge: float = 1e-3,
        split: bool | None = None,
        layer: Layers = None,
        terms: Sequence[str] | None = None,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        self.adapter = choice("adapter", adapter, ADAPTERS)
        self.diagonal = choice("diagonal", diagonal, DIAGONALS)
        self.lambd = number("lambd", lambd, at_least=0)
        self.floor = number("floor", floor, at_least=0)
        self.ridge = number("ridge", ridge, above=0)
        if split not in (None, True, False):
            raise ValueError(f"split must be True, False or None, got {split!r}")
        self.split = split
        self.layer = checked_layers(layer)
        self.enabled = _enabled(terms, self.adapter, self.diagonal)
        # A 1x1 convolution a stage. Columns are centred, which makes a bias idle.
        self.convs = StackedLinear(bias=False) if self.adapter == "conv" else None

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None, shards: Shards
    ) -> dict[str, Tensor]:
        maps = self._maps(student, teacher, shards)
        if self.convs is None:
            shares = self._shares(maps, shards)
            costs = [torch.log(1 - share + UNKNOWABLE).mean() for share in shares]
            return {"Dense-1": torch.stack(costs).sum()}
        stages = self._correlations(maps, self.convs, shards)
        terms = {
            "Dense-1": [self._diagonal(diagonal).mean() for diagonal, _ in stages],
            "Dense-2": [self.lambd * off / len(diagonal) for diagonal, off in stages],
        }
        return {name: torch.stack(terms[name]).sum() for name in self.enabled}

    @torch.no_grad()
    def shares(self, student: Input, teacher: Input) -> list[Tensor]:
        """Returns of every stage the share ``(C_t,)`` of each teacher channel that is predicted.

        By the regression of the closed form, on this process's batch, without a gradient: 1 minus
        the shares :math:`u_i` that it leaves unexplained.

        Args:
            student: The student's features, or its maps.
            teacher: The teacher's, of the same batch in the same order.
        """
        student, teacher, device = self._prepared(student, teacher)
        shards = Shards.alone(len(student.intermediate[0]))
        with torch.autocast(device.type, enabled=False):
            return self._shares(self._maps(student, teacher, shards), shards)

    def _maps(
        self, student: Features, teacher: Features, shards: Shards
    ) -> list[tuple[Tensor, Tensor]]:
        """Returns the maps in pairs, as ``(B, C, H, W)`` of one height and width."""
        name = type(self).__name__
        maps = [
            common_positions(map_s, map_t, "student and teacher intermediate")
            for map_s, map_t in map_pairs(student, teacher, name, self.layer)
        ]
        for map_s, _ in maps:
            check_several(map_s, name, shards)
        return maps

    def _diagonal(self, correlation: Tensor) -> Tensor:
        if self.diagonal == "squared":
            return (1 - correlation).square()
        return torch.log(1 - correlation.clamp_min(0).square() + UNKNOWABLE)

    def _correlations(
        self, maps: list[tuple[Tensor, Tensor]], convs: StackedLinear, shards: Shards
    ) -> list[tuple[Tensor, Tensor]]:
        """Returns of every stage C's diagonal ``(d,)`` and the sum of its other squares."""
        widths = [(map_s.shape[1], map_t.shape[1]) for map_s, map_t in maps]
        weights = [weight for weight, _ in convs(widths, maps[0][0])]
        on_sums = [weight.shape[1] <= weight.shape[0] for weight in weights]
        pairs = [
            Columns(
                by_channel(map_s if sums else linear_map(map_s, weight)),
                by_channel(map_t),
                whole=sums,
            )
            for (map_s, map_t), weight, sums in zip(maps, weights, on_sums, strict=True)
        ]
        stages = []
        found = moments(pairs, shards)
        for (value,), weight, sums in zip(found, weights, on_sums, strict=True):
            var_s = _mapped_variance(value.spread_s, weight) if sums else value.spread_s
            scale_s = inverse_scale(var_s, self.floor)[:, None]
            cross = value.cross * inverse_scale(value.var_t, self.floor)
            if sums and 2 * len(cross) <= len(weight):  # C, (d, d), is never built
                left = scale_s * weight
                diagonal = (left * cross.T).sum(dim=1)
                stages.append((diagonal, off_diagonal_energy(left.T, cross, diagonal)))
                continue
            correlation = scale_s * weight @ cross if sums else scale_s * cross
            stages.append(parted(correlation))
        return stages

    def _shares(self, maps: list[tuple[Tensor, Tensor]], shards: Shards) -> list[Tensor]:
        """Returns of every stage the share of each teacher channel that is predicted."""
        pairs = []
        for map_s, map_t in maps:
            x, y = by_channel(map_s), by_channel(map_t)
            positions = map_s.shape[2] * map_s.shape[3]
            cut = _cut_at(shards.total * positions, len(x), self.split)
            if cut is not None:  # of the whole batch: this process may lie on either side
                cut = min(max(cut - shards.before * positions, 0), len(map_s) * positions)
            pairs.append(Columns(x, y, whole=True, cut=cut))
        return [
            predicted_share(halves, ridge=self.ridge, floor=self.floor)
            for halves in moments(pairs, shards)
        ]


def _mapped_variance(spread: Tensor, weight: Tensor) -> Tensor:
    """Returns the variances of ``weight x``."""
    # Rounding can leave what is 0 just below it; NaN passes through clamp.
    return (weight @ spread * weight).sum(dim=1).clamp_min(0)


def _enabled(terms: Sequence[str] | None, adapter: str, diagonal: str) -> tuple[str, ...]:
    if adapter == "conv":
        return TERMS if terms is None else terms_of(terms, TERMS)
    if diagonal != "information":
        raise ValueError(
            f"diagonal={diagonal!r} goes with adapter='conv': the closed form has 'information' "
            "only; leave one of them out"
        )
    return TERMS[:1] if terms is None else terms_of(terms, TERMS[:1])


def _cut_at(positions: int, channels: int, split: bool | None) -> int | None:
    """Returns how many positions the regression is fitted on, None for all, measured on all.

    Args:
        positions: Of the whole batch.
        channels: Of the student.
        split: Whether to cut them in halves; None where there are fewer than 10 a channel.
    """
    few = positions < _ENOUGH * channels if split is None else split
    return positions // 2 if few else None


def predicted_share(halves: tuple[Moments, ...], *, ridge: float, floor: float) -> Tensor:
    r"""Returns the share of each teacher channel that a linear map predicts, ``(C_t,)``.

    On all positions it is :math:`[S_{ts} (S_{ss} + \rho I)^{-1} S_{st}]_{ii} / v_i`, within [0, 1],
    with :math:`\rho` the ridge times the student's mean variance and :math:`v_i = S_{tt,ii} + floor
    \cdot mean_j S_{tt,jj}`. From halves, the map and its intercept are fitted on one and measured
    on the other, against the mean of the one, both ways; where they predict worse than that mean
    does, it is below 0.

    Args:
        halves: The moments of all positions, or of each half, with the student's covariance.
        ridge: > 0, so that dead and dependent channels are no obstacle.
        floor: >= 0, which fades teacher channels of little variance.
    """
    weights = [_ridge_regression(half, ridge) for half in halves]
    if len(halves) == 1:
        (whole,) = halves
        explained = (weights[0] * whole.cross).sum(dim=0)
        return explained * inverse(whole.var_t + floor * whole.var_t.mean())
    shares = []
    for weight, fitted, measured in zip(weights, halves, halves[::-1], strict=True):
        step_s, step_t = measured.mean_s - fitted.mean_s, measured.mean_t - fitted.mean_t
        # Second moments of the measured half about the means of the fitted one.
        spread_s = measured.spread_s + torch.outer(step_s, step_s)
        cross = measured.cross + torch.outer(step_s, step_t)
        total = measured.var_t + step_t.square()
        # What the mean leaves over, less what the regression does.
        explained = (weight * (2 * cross - spread_s @ weight)).sum(dim=0)
        shares.append(explained * inverse(total + floor * total.mean()))
    return torch.stack(shares).mean(dim=0)


def _ridge_regression(found: Moments, ridge: float) -> Tensor:
    """Returns the weights ``(C_s, C_t)``; in float64 where the device has it."""
    spread_s, cross = found.spread_s, found.cross
    dtype = torch.float32 if spread_s.device.type == "mps" else torch.float64
    size = spread_s.diagonal().mean()
    # A student that is constant throughout predicts nothing, whatever it is divided by.
    size = torch.where(size <= 0, 1, size)
    identity = torch.eye(len(spread_s), dtype=dtype, device=spread_s.device)
    # Not cholesky, whose check waits for the device. The ridge keeps the matrix positive; where
    # NaN stops the factorisation, what it leaves is no answer.
    factor, stopped = torch.linalg.cholesky_ex((spread_s / size).to(dtype) + ridge * identity)
    solved = torch.cholesky_solve((cross / size).to(dtype), factor)
    return torch.where(stopped == 0, solved, torch.nan).to(spread_s.dtype)
