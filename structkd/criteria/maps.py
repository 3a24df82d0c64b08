"""Criteria that summarise maps: attention, neuron selectivity, channels over positions."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from structkd._checks import choice, describe, number
from structkd.criteria._maps import (
    Layers,
    adapted,
    check_positions,
    checked_layer,
    checked_layers,
    common_pair,
    common_positions,
    map_pairs,
    on_one_grid,
    to_common_size,
)
from structkd.criteria.base import Criterion, pair
from structkd.criteria.logits import softened_divergence, without_masked
from structkd.criteria.numerics import unit
from structkd.features import Features
from structkd.projectors import ConvAdapter

SOURCES = ("logits", "intermediate")
_NAMES = "student and teacher intermediate"


class AttentionTransferLoss(Criterion):
    r"""Makes the student look where the teacher looks.

    Over all pairs of maps F, taken in order,

    .. math::
        Q(F) = \frac{a}{\|a\|_2}, \quad a = \mathrm{vec}\Bigl(\frac{1}{C} \sum_c |F_c|^p\Bigr),
        \qquad L = \sum_{pairs} \frac{1}{B H W} \sum_{b, h, w} (Q(F_s) - Q(F_t))^2

    Channels may differ. Where sizes differ the attention maps a, not the features, are
    average-pooled to the common size before they are normalised, as the paper has it; the CRD
    benchmark pools the features. A map that is zero has an attention of zero. Term: ``AT``.

    On one position Q is 1 whatever the map holds, so a pair that shares one only is an error.

    Args:
        p: Power >= 1 of the channel responses.
        layer: Position, or several, in ``Features.intermediate`` of the maps to pair; else all.
        gather: Accepted by every criterion; without effect here, as samples are not compared.

    Shape:
        as many maps ``(B, C, H, W)`` or tokens ``(B, N, C)`` of both, of any two kinds in a pair,
        any float dtype; output a scalar in float32 (float64 for float64 inputs).

    Raises:
        ValueError: If the maps do not pair up, a pair shares one position only, tokens that would
            need a grid have none, or ``p`` is below 1.

    References:
        Zagoruyko & Komodakis, *Paying More Attention to Attention*, 2017, Eq. 1-2. The mean over
        positions is the CRD benchmark's, whose weight is 1000.

    Example:
        >>> criterion = AttentionTransferLoss()
        >>> criterion(torch.ones(2, 8, 4, 4), torch.ones(2, 16, 8, 8))
        tensor(0.)
    """

    reads = ("intermediate",)

    def __init__(self, p: float = 2.0, *, layer: Layers = None, gather: bool = False) -> None:
        super().__init__(gather=gather)
        self.p = number("p", p, at_least=1)
        self.layer = checked_layers(layer)

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        gaps = []
        for map_s, map_t in map_pairs(student, teacher, type(self).__name__, self.layer):
            map_s, map_t = on_one_grid(map_s, map_t, _NAMES)
            attention_s, attention_t = to_common_size(
                self._attention(map_s), self._attention(map_t)
            )
            check_positions(attention_s, attention_t, type(self).__name__)
            unit_s, unit_t = unit(attention_s.flatten(1)), unit(attention_t.flatten(1))
            gaps.append((unit_s - unit_t).square().mean())
        return {"AT": torch.stack(gaps).sum()}

    def _attention(self, features: Tensor) -> Tensor:
        # Q does not change with the map's scale; near 1 no power over- or underflows.
        given, every = features.detach(), (1, 2, 3)
        # Without a copy, which the absolute values would be.
        peak = torch.maximum(given.amax(every, keepdim=True), -given.amin(every, keepdim=True))
        scale = 1 / peak.clamp_min(torch.finfo(peak.dtype).tiny)
        if self.p == 2:
            power: Tensor = _MeanSquare.apply(features, scale)
            return power
        return reduce((features * scale).abs().pow(self.p), "b c h w -> b 1 h w", "mean")


class _MeanSquare(torch.autograd.Function):
    """The mean over channels of ``(scale * features)^2``.

    Nothing of the map's size is kept for the backward pass but the map; the same by torch's own
    operations takes several times as long.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(features, scale)
        scaled = features * scale
        return scaled.mul_(scaled).mean(dim=1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        features, scale = ctx.saved_tensors
        # Scaled twice: the square of a scale overflows where a map is tiny.
        factor = gradient * (2 / features.shape[1]) * scale
        return (features * factor).mul_(scale), None


class NeuronSelectivityLoss(Criterion):
    r"""Matches the distributions of the channels' responses over positions (NST).

    With :math:`f_i` the response of channel i over all positions, scaled to unit length, and the
    kernel :math:`k(x, y) = (x^T y)^2`, the squared maximum mean discrepancy of a sample is

    .. math::
        L = \frac{1}{C_s^2} \sum_{ij} k(s_i, s_j) + \frac{1}{C_t^2} \sum_{ij} k(t_i, t_j)
            - \frac{2}{C_s C_t} \sum_{ij} k(s_i, t_j)

    averaged over the batch and summed over all pairs of maps. Channels may differ; maps of other
    sizes are average-pooled to a common size first. A channel that is zero counts as zero. Term:
    ``NST``.

    With a sample's responses as rows of S and T, L equals
    :math:`\|S^T S / C_s - T^T T / C_t\|_F^2`. Either these position Grams or the three channel
    Grams are built, by ``bmm``, whichever are smaller: at most ``B min(N^2, C_s^2 + C_t^2 + C_s
    C_t)`` numbers up to a small factor, N = H W, and never ``B C^2 N``. Channel Grams are summed in
    float64, because L is a difference of near-equal numbers there.

    On one position every channel's response has length 1 and all kernels are 1, so a pair that
    shares one only is an error.

    Args:
        layer: Position, or several, in ``Features.intermediate`` of the maps to pair; else all.
        gather: Accepted by every criterion; without effect here, as samples are not compared.

    Shape:
        as many maps ``(B, C, H, W)`` or tokens ``(B, N, C)`` of both, of any two kinds in a pair,
        any float dtype; output a scalar in float32 (float64 for float64 inputs).

    Raises:
        ValueError: If the maps do not pair up, a pair shares one position only, or tokens that
            would need a grid have none.

    References:
        Huang & Wang, *Like What You Like: Knowledge Distill via Neuron Selectivity Transfer*, 2017;
        polynomial kernel with d = 2, c = 0. Pooling to a common size is the CRD
        benchmark's, whose weight is 50.

    Example:
        >>> maps = torch.randn(2, 8, 4, 4)
        >>> float(NeuronSelectivityLoss()(maps, 3 * maps)) < 1e-6
        True
    """

    reads = ("intermediate",)

    def __init__(self, *, layer: Layers = None, gather: bool = False) -> None:
        super().__init__(gather=gather)
        self.layer = checked_layers(layer)

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        gaps = []
        for map_s, map_t in map_pairs(student, teacher, type(self).__name__, self.layer):
            map_s, map_t = common_positions(map_s, map_t, _NAMES)
            check_positions(map_s, map_t, type(self).__name__)
            unit_s, unit_t = (
                unit(rearrange(value, "b c h w -> b c (h w)"), dim=2) for value in (map_s, map_t)
            )
            if _channels_pay(unit_s, unit_t):
                gaps.append(_by_channels(unit_s, unit_t))
            else:
                gaps.append(_by_positions(unit_s, unit_t))
        return {"NST": torch.stack(gaps).sum()}


class ChannelWiseLoss(Criterion):
    r"""Matches where every channel looks: a softmax over positions, channel by channel (CWD).

    With :math:`\phi_c = \mathrm{softmax}_{positions}(z_c / \tau)` the share of a channel's mass
    that lies at each position,

    .. math::
        L = \frac{\tau^2}{C} \sum_c KL(\phi_c(t) \,\|\, \phi_c(s))

    the mean over the batch. It is for dense predictions: it compares how a channel ranks positions,
    whatever the channel's level. A class that either network masks out, by logits of -inf, adds
    nothing. Term: ``CWD``.

    Args:
        temperature: tau > 0.
        source: ``logits`` of pixels, of the same classes on both sides, or ``intermediate``, a map
            brought to the teacher's channels.
        layer: Position in ``Features.intermediate`` of the map to read.
        adapter: Module that brings the student's map ``(B, C, H, W)`` to the teacher's channels; by
            default a :class:`ConvAdapter` where the channels of the first call differ.
        gather: Accepted by every criterion; without effect here, as samples are not compared.

    Shape:
        logits ``(B, K, H, W)`` of both, the teacher's brought to the student's size by bilinear
        interpolation; or maps ``(B, C, H, W)`` or tokens ``(B, N, C)`` of any two kinds, which are
        average-pooled to a common size; any float dtype. Output a scalar in float32 (float64 for
        float64 inputs).

    Raises:
        ValueError: If the logits are those of images, the class counts differ, the maps share one
            position only, or an argument is out of range.

    References:
        Shu et al., *Channel-wise Knowledge Distillation for Dense Prediction*, 2021, Eq. 3-5; the
        authors' weight is 3 on logits and 50 on maps.

    Example:
        >>> logits = torch.randn(2, 19, 8, 8)
        >>> bool(ChannelWiseLoss()(logits, logits + 5) < 1e-5)  # the level does not count
        True
    """

    pixels = "maps"

    def __init__(
        self,
        temperature: float = 4.0,
        *,
        source: str = "logits",
        layer: int = -1,
        adapter: nn.Module | None = None,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        self.temperature = number("temperature", temperature, above=0)
        self.source = choice("source", source, SOURCES)
        self.reads = (self.source,)
        self.layer = checked_layer(layer)
        of_maps = self.source == "intermediate"
        self.adapter = ConvAdapter(skip_equal=True) if of_maps and adapter is None else adapter

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        if self.source == "logits":
            map_s, map_t = pair(student, teacher, "logits")
            if map_s.dim() == 2:
                raise ValueError(
                    "ChannelWiseLoss compares positions: it needs logits of pixels (B, K, H, W), "
                    f"got {describe(map_s)}; take KDLoss on logits of images, or "
                    "ChannelWiseLoss(source='intermediate') on maps"
                )
            map_s, map_t = without_masked(map_s, map_t)
        else:
            map_s, map_t = common_pair(student, teacher, self.layer)
            if self.adapter is not None:
                map_s = adapted(self.adapter, map_s, map_t)
        check_positions(map_s, map_t, type(self).__name__)
        # A channel of a sample is a row, and its positions are what the rows are softmaxes over.
        rows = [rearrange(value, "b c h w -> (b c) (h w)") for value in (map_s, map_t)]
        return {"CWD": softened_divergence(rows[0], rows[1], self.temperature)}


def _channels_pay(unit_s: Tensor, unit_t: Tensor) -> bool:
    """Tells whether the channel Grams, in float64, are smaller than the position Grams."""
    wide_s, wide_t, positions = unit_s.shape[1], unit_t.shape[1], unit_s.shape[2]
    channel_grams = wide_s**2 + wide_t**2 + wide_s * wide_t
    # A float64 number takes two float32 ones; Apple's GPUs have none.
    return positions**2 > 2 * channel_grams and unit_s.device.type != "mps"


def _by_positions(unit_s: Tensor, unit_t: Tensor) -> Tensor:
    gram_s = torch.bmm(unit_s.transpose(1, 2), unit_s) / unit_s.shape[1]
    gram_t = torch.bmm(unit_t.transpose(1, 2), unit_t) / unit_t.shape[1]
    return (gram_s - gram_t).square().sum(dim=(1, 2)).mean()


def _by_channels(unit_s: Tensor, unit_t: Tensor) -> Tensor:
    dtype = unit_s.dtype
    unit_s, unit_t = unit_s.double(), unit_t.double()

    def mean_kernel(left: Tensor, right: Tensor) -> Tensor:
        return torch.bmm(left, right.transpose(1, 2)).square().mean(dim=(1, 2))

    own = mean_kernel(unit_s, unit_s) + mean_kernel(unit_t, unit_t)
    discrepancy = own - 2 * mean_kernel(unit_s, unit_t)
    # Rounding can leave the difference just below zero; NaN passes through clamp.
    return discrepancy.mean().clamp_min(0).to(dtype)
