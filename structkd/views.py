"""Rich images made poor: pairs for a setting in which nothing is paired.

Each function takes float images ``(B, C, H, W)`` and returns new ones of the same device and dtype;
they are chained by calling one on the other's result. Apply them before normalisation, and
normalise the result as the student's own images are. :func:`structkd.diagnostics.modality_gap` says
how far the result is from these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from structkd._checks import describe, number, whole
from structkd._devices import sent

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def bands(images: Tensor, places: Sequence[int]) -> Tensor:
    r"""Chooses channels: of a multispectral image its red, green and blue, for example.

    .. math:: y_c = x_{p_c}

    Args:
        images: ``(B, C, H, W)``, floating point.
        places: Positions in ``[0, C)`` in the order that is wanted.

    Returns:
        ``(B, len(places), H, W)``.

    Raises:
        TypeError, ValueError: If ``images`` are not of this kind, or a place is not one of their
            channels.

    Example:
        >>> bands(torch.arange(4.0).view(1, 4, 1, 1), [3, 2, 1]).flatten()
        tensor([3., 2., 1.])
    """
    count = _checked(images).shape[1]
    if not isinstance(places, Iterable):
        raise TypeError(f"places must be a list of channels, [2] for one, got {describe(places)}")
    chosen = [whole("places", place, at_least=0) for place in places]
    if not chosen or max(chosen) >= count:
        raise ValueError(
            f"places must name channels 0..{count - 1} of the images, at least one, got {chosen}"
        )
    return images[:, chosen]


def spectral_response(images: Tensor, response: Tensor) -> Tensor:
    r"""Mixes bands linearly, as a sensor of fewer and broader channels sees the same scene.

    .. math:: y_c = \sum_b R_{cb} \, x_b

    Rows of R that hold shares, at least 0 and summing to 1, keep the range of the images. For a
    multispectral image and a camera, R is the camera's sensitivity over each band's wavelengths,
    ``(3, bands)``; :func:`bands` is the case of one 1 a row.

    Args:
        images: ``(B, C, H, W)``, floating point.
        response: R, ``(channels, C)``, floating point.

    Returns:
        ``(B, channels, H, W)``.

    Raises:
        TypeError, ValueError: If ``images`` are not of this kind, or R does not have a column for
            each channel.

    Example:
        >>> response = torch.tensor([[0.5, 0.5, 0.0]])  # one grey channel of the first two bands
        >>> spectral_response(torch.tensor([2.0, 4.0, 9.0]).view(1, 3, 1, 1), response).flatten()
        tensor([3.])
    """
    count = _checked(images).shape[1]
    if not isinstance(response, Tensor) or not response.is_floating_point():
        raise TypeError(f"response must be a floating-point tensor, got {describe(response)}")
    if response.dim() != 2 or response.shape[1] != count:
        raise ValueError(
            f"response must be (channels, {count}), a column for each of the images' {count} "
            f"channels, got {describe(response)}"
        )
    response = sent(response.to(images.dtype), images.device)
    # Summed band by band: a matrix product would run in TF32 or half precision where those are on.
    mixed = images[:, :1] * response[:, 0].view(-1, 1, 1)
    for band in range(1, count):
        mixed = mixed + images[:, band : band + 1] * response[:, band].view(-1, 1, 1)
    return mixed


def luma(images: Tensor) -> Tensor:
    r"""Makes colours grey.

    .. math:: y = 0.299 \, R + 0.587 \, G + 0.114 \, B

    Args:
        images: ``(B, 3, H, W)``, floating point: red, green, blue.

    Returns:
        ``(B, 1, H, W)``.

    Raises:
        TypeError, ValueError: If ``images`` are not of this kind, or do not have three channels.

    References:
        ITU-R BT.601.

    Example:
        >>> round(float(luma(torch.ones(1, 3, 2, 2))[0, 0, 0, 0]), 4)
        1.0
    """
    if _checked(images).shape[1] != 3:
        raise ValueError(
            f"luma needs images of three colours, got {describe(images)}: choose them with bands()"
        )
    return spectral_response(images, torch.tensor([LUMA], dtype=torch.float64))


def salt_and_pepper(
    images: Tensor,
    amount: float | tuple[float, float],
    *,
    values: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Replaces pixels by black or white, in all channels at once.

    With u uniform in [0, 1) for each pixel, low and high of ``values``,

    .. math::
        y = \mathrm{low} \text{ where } u < a / 2, \quad
        \mathrm{high} \text{ where } a / 2 \le u < a, \quad x \text{ elsewhere}

    Args:
        images: ``(B, C, H, W)``, floating point, within ``values``.
        amount: a, the expected share of pixels that are replaced, in [0, 1]. Given a pair (least,
            most), each image's a is drawn uniformly between them: for a student whose noise is not
            known exactly.
        values: Black and white; the range of the images before they are normalised.
        generator: What draws u, and a before it, on its own device; torch's own by default.

    Returns:
        ``(B, C, H, W)``.

    Raises:
        TypeError, ValueError: If ``images`` are not of this kind, ``amount`` is out of range, or
            (checked on the CPU only) images leave ``values``.

    Example:
        >>> grey = torch.full((1, 1, 100, 100), 0.5)
        >>> noisy = salt_and_pepper(grey, 0.4, generator=torch.Generator().manual_seed(0))
        >>> round(float((noisy != 0.5).float().mean()), 1)
        0.4
        >>> salt_and_pepper(grey, (0.3, 0.9)).shape  # another share for each image
        torch.Size([1, 1, 100, 100])
    """
    fewest, most_pixels = _shares(amount)
    if not isinstance(values, tuple | list) or len(values) != 2:
        raise TypeError(f"values must be a pair, black and white, got {values!r}")
    low, high = (number("values", value) for value in values)
    batch, _, height, width = _checked(images).shape
    if images.device.type == "cpu" and images.numel():
        least, most = float(images.min()), float(images.max())
        # What another view made of black or white may miss them by rounding.
        slack = 8 * torch.finfo(images.dtype).eps * max(abs(low), abs(high))
        if not (low - slack <= least and most <= high + slack):
            raise ValueError(
                f"images must lie in values={low:g}..{high:g}, black to white, got {least:g}.."
                f"{most:g}: replace pixels before the images are normalised, or pass their range"
            )
    device = images.device if generator is None else generator.device
    share: Tensor | float = fewest
    if fewest < most_pixels:
        spread = torch.rand(batch, 1, 1, 1, generator=generator, device=device)
        share = sent(fewest + spread * (most_pixels - fewest), images.device)
    draw = torch.rand(batch, 1, height, width, generator=generator, device=device)
    draw = sent(draw, images.device)
    poor = images.masked_fill(draw < share / 2, low)
    return poor.masked_fill((draw >= share / 2) & (draw < share), high)


def resolution(images: Tensor, factor: float) -> Tensor:
    r"""Makes a coarser sensor: means over ``factor`` x ``factor`` pixels, brought back to size.

    .. math:: y = \mathrm{bilinear}_{H \times W}\bigl(\mathrm{mean}_{h \times w}(x)\bigr), \qquad
        h = \max(1, \mathrm{round}(H / \mathrm{factor}))

    and w likewise. A side that is no multiple of the factor is cut into as many near-equal parts.

    Args:
        images: ``(B, C, H, W)``, floating point.
        factor: >= 1; 8 makes one pixel of 8 x 8.

    Returns:
        ``(B, C, H, W)``.

    Raises:
        TypeError, ValueError: If ``images`` are not of this kind, or ``factor`` is below 1.

    Example:
        >>> resolution(torch.tensor([1.0, 3.0, 5.0, 7.0]).view(1, 1, 1, 4), 4).flatten()
        tensor([4., 4., 4., 4.])
    """
    size = list(_checked(images).shape[-2:])
    by = number("factor", factor, at_least=1)
    coarse = [max(1, round(side / by)) for side in size]
    means = F.interpolate(images, coarse, mode="area")
    return F.interpolate(means, size, mode="bilinear", align_corners=False)


def blur(images: Tensor, sigma: float) -> Tensor:
    r"""Makes a sensor out of focus: a Gaussian over pixels, edges continued.

    .. math:: y_{ij} = \sum_{|k|, |l| \le r} g_k \, g_l \, x_{i+k, j+l}, \qquad
        g_k \propto e^{-k^2 / 2 \sigma^2}, \quad r = \lceil 3 \sigma \rceil

    Args:
        images: ``(B, C, H, W)``, floating point.
        sigma: Standard deviation in pixels, > 0.

    Returns:
        ``(B, C, H, W)``.

    Raises:
        TypeError, ValueError: If ``images`` are not of this kind, or ``sigma`` is not above 0.

    Example:
        >>> blurred = blur(torch.eye(9)[None, None], 1.0)
        >>> bool(blurred.max() < 1), round(float(blurred.mean() / torch.eye(9).mean()), 1)
        (True, 1.0)
    """
    wide = number("sigma", sigma, above=0)
    blurred = _checked(images)
    reach = math.ceil(3 * wide)
    taps = [math.exp(-((step / wide) ** 2) / 2) for step in range(-reach, reach + 1)]
    for axis in (2, 3):
        places = torch.arange(images.shape[axis], device=images.device)
        total = torch.zeros_like(blurred)
        for step, tap in zip(range(-reach, reach + 1), taps, strict=True):
            beside = (places + step).clamp(0, len(places) - 1)
            total = total + blurred.index_select(axis, beside) * (tap / sum(taps))
        blurred = total
    return blurred


def mixed(own: Tensor, pseudo: Tensor) -> tuple[Tensor, Tensor]:
    """Puts the student's own images and rich ones made poor into one batch.

    Args:
        own: The student's images ``(B, C, H, W)``, floating point.
        pseudo: Rich images made poor, ``(N, C, H, W)``, of their size, channels, dtype and device.

    Returns:
        The batch ``(B + N, C, H, W)``, own images first, and the positions ``(N,)`` int64 of the
        others, which are ``paired`` in the call of a :class:`structkd.Distiller`.

    Raises:
        TypeError, ValueError: If an argument is not such a batch of images, or the two do not fit
            together.

    Example:
        >>> x, paired = mixed(torch.zeros(3, 1, 4, 4), luma(torch.ones(2, 3, 4, 4)))
        >>> x.shape, paired
        (torch.Size([5, 1, 4, 4]), tensor([3, 4]))
    """
    fits(own, pseudo, "own", "pseudo")
    if own.dtype != pseudo.dtype or own.device != pseudo.device:
        raise ValueError(
            f"own and pseudo must share dtype and device, got {describe(own)} on {own.device} and "
            f"{describe(pseudo)} on {pseudo.device}: pseudo.to(own)"
        )
    positions = torch.arange(len(own), len(own) + len(pseudo), device=own.device)
    return torch.cat([own, pseudo]), positions


def fits(own: Tensor, pseudo: Tensor, name: str, name_pseudo: str) -> None:
    """Raises where made images could not be the student's: other channels, or another size."""
    _checked(own, name), _checked(pseudo, name_pseudo)
    if own.shape[1] != pseudo.shape[1]:
        raise ValueError(
            f"{name_pseudo} must have the {own.shape[1]} channel(s) of {name}, got "
            f"{pseudo.shape[1]}: make them with views.bands, views.luma or views.spectral_response"
        )
    if own.shape[2:] != pseudo.shape[2:]:
        size, other = tuple(own.shape[2:]), tuple(pseudo.shape[2:])
        raise ValueError(
            f"{name_pseudo} must have the size {size} of {name}, got {other}: bring them to it, "
            f"torch.nn.functional.interpolate(images, {size}, mode='area'), or crop them"
        )


def _shares(amount: float | tuple[float, float]) -> tuple[float, float]:
    if not isinstance(amount, tuple | list):
        amount = (amount, amount)
    if len(amount) != 2:
        raise ValueError(f"amount must be a number, or a pair from least to most, got {amount!r}")
    least, most = (number("amount", share, at_least=0, at_most=1) for share in amount)
    if least > most:
        raise ValueError(f"amount must go from least to most, got {amount!r}")
    return least, most


def _checked(images: Tensor, name: str = "images") -> Tensor:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(
            f"{name} must be a floating-point tensor (B, C, H, W), got {describe(images)}; where "
            "that is of 8 bits, images.float() / 255"
        )
    if images.dim() != 4:
        raise ValueError(f"{name} must be (B, C, H, W), got {describe(images)}")
    return images
