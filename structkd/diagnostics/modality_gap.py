"""How far images made poor are from really poor ones."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from structkd.views import fits

FARTHEST, LARGEST_RATIO = 0.25, 2**0.5
LARGEST_GRAIN = 1.05  # docs/unpaired.md has what free pairs do beyond it


class ModalityGapWarning(UserWarning):
    """Images made poor are far from the really poor ones."""


class ModalityGap(NamedTuple):
    """The result of :func:`modality_gap`, for each channel.

    Attributes:
        mean: Standardised difference of the means, pseudo minus real, ``(C,)`` float64.
        ratio: The pseudo images' standard deviation over the real ones', ``(C,)`` float64.
        grain: The root mean square of the pseudo images' differences between neighbouring pixels
            over the real ones', ``(C,)`` float64.
    """

    mean: Tensor
    ratio: Tensor
    grain: Tensor

    @property
    def far(self) -> Tensor:
        """Which channels are far apart, ``(C,)`` bool; where a moment is not finite, too."""
        near = self.mean.abs() <= FARTHEST
        for value, largest in ((self.ratio, LARGEST_RATIO), (self.grain, LARGEST_GRAIN)):
            near &= (value <= largest) & (value >= 1 / largest)
        return ~near

    def describe(self) -> str:
        """Returns a sentence, and a line for each channel."""
        far = self.far.nonzero()[:, 0].tolist()
        said = (
            f"the made poor images are far from the real ones in channel(s) {far}: the student "
            "learns from another modality than its own. Make them nearer (scale, noise, blur), or "
            "normalise each set by its own statistics"
            if far
            else "the made poor images are near the real ones in every channel"
        )
        lines = [
            f"channel {place}: means {float(mean):+.2f} standard deviations apart, "
            f"{float(ratio):.2f} times the deviation, {float(grain):.2f} times the grain"
            for place, (mean, ratio, grain) in enumerate(zip(*self, strict=True))
        ]
        return "\n".join([said, *lines])


@torch.no_grad()
def modality_gap(pseudo: Tensor, real: Tensor, *, warn: bool = False) -> ModalityGap:
    r"""Compares made poor with real poor images, channel by channel: moments, and their grain.

    A student that is distilled over free pairs learns from *made* poor images, so these must be
    like its own. Over all pixels of all images, and with g the mean squared difference of
    horizontal neighbours plus that of vertical ones,

    .. math::
        d_c = \frac{\mu_c^{made} - \mu_c^{real}}
            {\sqrt{\frac{1}{2} (v_c^{made} + v_c^{real})}}, \qquad
        r_c = \sqrt{v_c^{made} / v_c^{real}}, \qquad
        q_c = \sqrt{g_c^{made} / g_c^{real}}

    A channel is far apart where :math:`|d_c| > 0.25` or the variances differ by more than a factor
    of 2, the rule of thumb for two samples that are to be compared at all, or where the grain
    differs by more than 5 %. Grain is where noise, blur and resolution show, which moments hardly
    see. Images that are near by these numbers may still differ: compare with a run of the lone
    student.

    Args:
        pseudo: Rich images made poor, ``(N, C, H, W)``, floating point, some hundred or more.
        real: The student's own images ``(M, C, H, W)``, likewise, and in the same units.
        warn: Whether to warn where a channel is far apart.

    Returns:
        The result by channel, in words by ``print(gap.describe())``. A channel that is constant in
        both has ratio 1, and 0 or infinity for d.

    Raises:
        TypeError, ValueError: If an argument is not such a batch of images, or they differ in
            channels or in size.

    Warns:
        ModalityGapWarning: If asked, where a channel is far apart.

    References:
        Stuart, *Matching Methods for Causal Inference*, 2010: a quarter of a standard deviation,
        and a ratio of variances in [1/2, 2].

    Example:
        >>> real = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> modality_gap(real.flip(0), real).far
        tensor([False])
        >>> print(modality_gap(1 - real / 4, real).describe().splitlines()[-1].split(", ", 1)[1])
        0.25 times the deviation, 0.25 times the grain
    """
    fits(real, pseudo, "real", "pseudo")
    if not len(real) or not len(pseudo):
        raise ValueError(f"both sets need an image, got {len(pseudo)} made and {len(real)} real")
    mean, variance, grain = _moments(pseudo)
    mean_real, variance_real, grain_real = _moments(real)
    apart, together = mean - mean_real, (0.5 * (variance + variance_real)).sqrt()
    gap = ModalityGap(
        torch.where(apart == 0, 0, apart / together),
        _ratio(variance, variance_real),
        _ratio(grain, grain_real),
    )
    if warn and bool(gap.far.any()):
        warnings.warn(gap.describe(), ModalityGapWarning, stacklevel=3)  # past no_grad's wrapper
    return gap


def _moments(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns mean, variance and squared grain of every channel, each ``(C,)``."""
    wide = images.double()
    variance, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
    grain = torch.zeros_like(mean)
    for axis in (2, 3):
        if images.shape[axis] > 1:
            grain = grain + wide.diff(dim=axis).square().mean(dim=(0, 2, 3))
    return mean, variance, grain


def _ratio(square: Tensor, square_real: Tensor) -> Tensor:
    return torch.where((square == 0) & (square_real == 0), 1, (square / square_real).sqrt())
