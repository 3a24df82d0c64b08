"""Dimensional structure of aligned maps, where every position is a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from structkd._checks import choice, number, whole
from structkd.criteria._closed_form import cut_at, predicted_share
from structkd.criteria._gram import cross_product_energy, off_diagonal
from structkd.criteria._maps import (
    Layers,
    channels,
    check_several,
    checked_layers,
    common_positions,
    map_pairs,
)
from structkd.criteria._moments import UNKNOWABLE, Columns, by_channel, inverse_scale, moments
from structkd.criteria._terms import checked_terms
from structkd.criteria.base import Criterion
from structkd.distributed import rank, shard_sizes
from structkd.features import Features

ADAPTERS = ("conv", "closed_form")
DIAGONALS = ("information", "squared")
TERMS = ("Dense-1", "Dense-2")


class DenseStructureLoss(Criterion):
    r"""Makes every channel of the student's maps match the teacher's, position by position.

    For pairs that are aligned to the pixel. The rows are the positions of all maps of the batch,
    N = B H W, with the student's map brought to the teacher's d channels by a 1x1 convolution. With
    centred columns x and y of both, their variances :math:`v` and a floor :math:`\epsilon`,

    .. math::
        C_{ij} = \frac{\mathrm{cov}(x_i, y_j)}{\sqrt{(v_{x,i} + \epsilon \bar v_x)
            (v_{y,j} + \epsilon \bar v_y)}}, \qquad
        L = \sum_{stages} \frac{1}{d} \Big( \sum_i L_{ii} + \lambda \sum_{i \neq j} C_{ij}^2 \Big)

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
        u_i = 1 - \frac{[S_{ts} (S_{ss} + \rho I)^{-1} S_{st}]_{ii}}{v_{y,i} + \epsilon \bar v_y}

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
        student_channels: Channels of the student's maps, one number a stage, or one number. The
            closed form needs none.
        teacher_channels: Channels of the teacher's.
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
        ValueError: If the maps do not pair up, channels are not those it was built for, there is
            one position only, tokens that would need a grid have none, or an option is out of
            range or has no meaning with the others.

    References:
        Eq. 6-7 of Si et al., *A Dimensional Structure based Knowledge Distillation Method for
        Cross-Modal Learning*, on positions; the information form and the closed form are this
        library's own. Mutual information of Gaussians: Cover & Thomas, *Elements of Information
        Theory*, 2006, Sec. 8.5.

    Example:
        >>> small, large = torch.randn(4, 8, 8, 8), torch.randn(4, 16, 8, 8)
        >>> criterion = DenseStructureLoss(8, 16)
        >>> sorted(criterion.terms(small, large))
        ['Dense-1', 'Dense-2']
        >>> free = DenseStructureLoss(adapter="closed_form")
        >>> free(small, large).shape, list(free.parameters())
        (torch.Size([]), [])
    """

    reads = ("intermediate",)
    couples = True
    sums_over_ranks = True

    def __init__(
        self,
        student_channels: int | Sequence[int] | None = None,
        teacher_channels: int | Sequence[int] | None = None,
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
        self.convs = nn.ModuleList()
        if self.adapter == "conv":
            widths = _paired_widths(student_channels, teacher_channels)
            # Columns are centred, which makes a bias idle.
            self.convs.extend(nn.Conv2d(width_s, d, 1, bias=False) for width_s, d in widths)

    @classmethod
    def arguments(
        cls, feats_s: Features, feats_t: Features, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Returns the channels of every stage of two example passes."""
        if options.get("adapter") == "closed_form":
            return {}
        pairs = map_pairs(feats_s, feats_t, cls.__name__, options.get("layer"))
        return {
            "student_channels": [channels(map_s) for map_s, _ in pairs],
            "teacher_channels": [channels(map_t) for _, map_t in pairs],
        }

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        name = type(self).__name__
        maps = [
            common_positions(map_s, map_t, "student and teacher intermediate")
            for map_s, map_t in map_pairs(student, teacher, name, self.layer)
        ]
        for map_s, _ in maps:
            check_several(map_s, name, gather=self.gather)
        if self.adapter == "closed_form":
            return {"Dense-1": torch.stack(self._closed_form(maps)).sum()}
        stages = self._correlations(maps)
        terms = {
            "Dense-1": [self._diagonal(diagonal).mean() for diagonal, _ in stages],
            "Dense-2": [self.lambd * off / len(diagonal) for diagonal, off in stages],
        }
        return {name: torch.stack(terms[name]).sum() for name in self.enabled}

    def extra_repr(self) -> str:
        own = (
            f"ridge={self.ridge}, split={self.split}"
            if self.adapter == "closed_form"
            else f"diagonal={self.diagonal!r}, lambd={self.lambd}"
        )
        return (
            f"adapter={self.adapter!r}, {own}, floor={self.floor}, layer={self.layer}, "
            f"terms={self.enabled}"
        )

    def _diagonal(self, correlation: Tensor) -> Tensor:
        if self.diagonal == "squared":
            return (1 - correlation).square()
        return torch.log(1 - correlation.clamp_min(0).square() + UNKNOWABLE)

    def _correlations(self, maps: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Returns of every stage C's diagonal ``(d,)`` and the sum of its other squares."""
        self._check_channels(maps)
        weights = [weight[:, :, 0, 0] for weight in self.convs.parameters()]
        on_sums = [weight.shape[1] <= weight.shape[0] for weight in weights]
        pairs = [
            Columns(by_channel(map_s if sums else conv(map_s)), by_channel(map_t), whole=sums)
            for (map_s, map_t), conv, sums in zip(maps, self.convs, on_sums, strict=True)
        ]
        stages = []
        found = moments(pairs, gather=self.gather)
        for (value,), weight, sums in zip(found, weights, on_sums, strict=True):
            var_s = _mapped_variance(value.spread_s, weight) if sums else value.spread_s
            scale_s = inverse_scale(var_s, self.floor)[:, None]
            cross = value.cross * inverse_scale(value.var_t, self.floor)
            if sums and 2 * len(cross) <= len(weight):
                stages.append(_through_few(scale_s * weight, cross))
                continue
            correlation = scale_s * weight @ cross if sums else scale_s * cross
            others = off_diagonal(correlation).square().sum()
            stages.append((correlation.diagonal(), others))
        return stages

    def _closed_form(self, maps: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        sizes = [len(maps[0][0])]
        if self.gather:
            sizes = shard_sizes(sizes[0], maps[0][0].device)
        before = sum(sizes[: rank()]) if self.gather else 0
        pairs = []
        for map_s, map_t in maps:
            x, y = by_channel(map_s), by_channel(map_t)
            positions = map_s.shape[2] * map_s.shape[3]
            cut = cut_at(sum(sizes) * positions, len(x), self.split)
            if cut is not None:  # of the whole batch: this process may lie on either side
                cut = min(max(cut - before * positions, 0), len(map_s) * positions)
            pairs.append(Columns(x, y, whole=True, cut=cut))
        shares = [
            predicted_share(halves, ridge=self.ridge, floor=self.floor)
            for halves in moments(pairs, gather=self.gather)
        ]
        return [torch.log(1 - share + UNKNOWABLE).mean() for share in shares]

    def _check_channels(self, maps: list[tuple[Tensor, Tensor]]) -> None:
        name = type(self).__name__
        if len(maps) != len(self.convs):
            raise ValueError(
                f"{name} was built for {len(self.convs)} stage(s), got {len(maps)}; build it with "
                f"{name}.from_features(feats_s, feats_t), or choose stages with layer=[...]"
            )
        for stage, (pair, conv) in enumerate(zip(maps, self.convs, strict=True)):
            wanted = (conv.in_channels, conv.out_channels)
            for side, features, width in zip(("student", "teacher"), pair, wanted, strict=True):
                if features.shape[1] != width:
                    raise ValueError(
                        f"{side}'s map of stage {stage} has {features.shape[1]} channels, expected "
                        f"{width}; build the criterion with {name}.from_features(feats_s, feats_t)"
                    )


def _mapped_variance(spread: Tensor, weight: Tensor) -> Tensor:
    """Returns the variances of ``weight x``."""
    # Rounding can leave what is 0 just below it; NaN passes through clamp.
    return (weight @ spread * weight).sum(dim=1).clamp_min(0)


def _through_few(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the diagonal of ``left @ right`` and the sum of its other squares.

    The ``(d, d)`` product is never built: ``left`` is ``(d, C_s)`` with C_s well below d.
    """
    diagonal = (left * right.T).sum(dim=1)
    others = cross_product_energy(left.T, right) - diagonal.square().sum()
    # Rounding can leave the difference just below zero; NaN passes through clamp.
    return diagonal, others.clamp_min(0)


def _enabled(terms: Sequence[str] | None, adapter: str, diagonal: str) -> tuple[str, ...]:
    if adapter == "conv":
        return TERMS if terms is None else checked_terms(terms, TERMS)
    if diagonal != "information":
        raise ValueError(
            f"diagonal={diagonal!r} goes with adapter='conv': the closed form has 'information' "
            "only; leave one of them out"
        )
    return TERMS[:1] if terms is None else checked_terms(terms, TERMS[:1])


def _paired_widths(
    student: int | Sequence[int] | None, teacher: int | Sequence[int] | None
) -> list[tuple[int, int]]:
    if student is None or teacher is None:
        raise ValueError(
            "student_channels and teacher_channels are needed for adapter='conv'; build the "
            "criterion with DenseStructureLoss.from_features(feats_s, feats_t)"
        )
    widths_s = student if isinstance(student, list | tuple) else [student]
    widths_t = teacher if isinstance(teacher, list | tuple) else [teacher]
    if len(widths_s) != len(widths_t) or not widths_s:
        raise ValueError(
            "student_channels and teacher_channels must name as many stages, at least one, got "
            f"{len(widths_s)} and {len(widths_t)}"
        )
    return [
        (whole("student_channels", width_s), whole("teacher_channels", width_t))
        for width_s, width_t in zip(widths_s, widths_t, strict=True)
    ]
