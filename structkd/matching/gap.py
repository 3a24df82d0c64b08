"""How far images made poor are from really poor ones."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from structkd.matching.views import fits

FARTHEST, LARGEST_RATIO = 0.5, 2**0.5


class ModalityGapWarning(UserWarning):
    """Images made poor are far from the really poor ones."""


class ModalityGap(NamedTuple):
    """What :func:`modality_gap` says of each channel.

    Attributes:
        mean: Standardised difference of the means, pseudo minus real, ``(C,)`` float64.
        ratio: The pseudo images' standard deviation over the real ones', ``(C,)`` float64.
    """

    mean: Tensor
    ratio: Tensor

    @property
    def far(self) -> Tensor:
        """Which channels are far apart, ``(C,)`` bool; where a moment is not finite, too."""
        near = (self.mean.abs() <= FARTHEST) & (self.ratio <= LARGEST_RATIO)
        return ~(near & (self.ratio >= 1 / LARGEST_RATIO))

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
            f"{float(ratio):.2f} times the deviation"
            for place, (mean, ratio) in enumerate(zip(self.mean, self.ratio, strict=True))
        ]
        return "\n".join([said, *lines])


@torch.no_grad()
def modality_gap(pseudo: Tensor, real: Tensor, *, warn: bool = False) -> ModalityGap:
    r"""Compares the first two moments of made poor and of real poor images, channel by channel.

    A student that is distilled over free pairs learns what *made* poor images show; it rests on
    these being like its own. Over all pixels of all images,

    .. math::
        d_c = \frac{\mu_c^{made} - \mu_c^{real}}
            {\sqrt{\frac{1}{2} (v_c^{made} + v_c^{real})}}, \qquad
        r_c = \sqrt{v_c^{made} / v_c^{real}}

    A channel is far apart where :math:`|d_c| > 0.5` or the variances differ by more than a factor
    of 2, the rule of thumb for two samples that are to be compared at all. Near moments do not
    prove that the images are alike: blur, for example, shows in them little.

    Args:
        pseudo: Rich images made poor, ``(N, C, H, W)``, floating point, some hundred or more.
        real: The student's own images ``(M, C, H, W)``, likewise, and in the same units.
        warn: Whether to warn, too, where a channel is far apart.

    Returns:
        The result by channel, which tells itself: ``print(gap.describe())``. A channel that is
        constant in both has ratio 1, and 0 or infinity for d.

    Raises:
        TypeError, ValueError: If one is no images, or they differ in channels or in size.

    Warns:
        ModalityGapWarning: If asked, where a channel is far apart.

    References:
        Rubin, *Using Propensity Scores to Help Design Observational Studies*, 2001: half a standard
        deviation, and a ratio of variances in [1/2, 2].

    Example:
        >>> real = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> modality_gap(real.flip(0), real).far
        tensor([False])
        >>> print(modality_gap(1 - real / 4, real).describe().splitlines()[-1])
        channel 0: means +1.81 standard deviations apart, 0.25 times the deviation
    """
    fits(real, pseudo, "real", "pseudo")
    if not len(real) or not len(pseudo):
        raise ValueError(f"both sets need an image, got {len(pseudo)} made and {len(real)} real")
    (mean, variance), (mean_real, variance_real) = _moments(pseudo), _moments(real)
    apart, together = mean - mean_real, (0.5 * (variance + variance_real)).sqrt()
    ratio = (variance / variance_real).sqrt()
    gap = ModalityGap(
        torch.where(apart == 0, 0, apart / together),
        torch.where((variance == 0) & (variance_real == 0), 1, ratio),
    )
    if warn and bool(gap.far.any()):
        warnings.warn(gap.describe(), ModalityGapWarning, stacklevel=3)  # past no_grad's wrapper
    return gap


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and variance of every channel, each ``(C,)``."""
    variance, mean = torch.var_mean(images.double(), dim=(0, 2, 3), correction=0)
    return mean, variance
