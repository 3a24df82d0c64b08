"""The poor modality: salt-and-pepper noise, one draw a pixel across all channels."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def check_amount(amount: float) -> float:
    """Return ``amount``, or raise ValueError where it is no fraction of the pixels."""
    if not 0.0 <= amount <= 1.0:
        raise ValueError(
            f"amount is the fraction of pixels replaced and lies in [0, 1], got {amount!r}"
        )
    return float(amount)


def salt_and_pepper(images: Tensor, amount: float, *, seed: int, indices: Tensor) -> Tensor:
    """Replace each pixel with probability ``amount`` by 0 or 255, equally likely, in all channels.

    A sample's draw depends on ``(seed, its index)`` alone, so the noisy set is a fixed second set:
    neither a limit nor the order of the images changes it.

    Args:
        images: uint8 (N, C, H, W); left as it is.
        amount: fraction of the pixels replaced, in [0, 1].
        seed: which noisy set, >= 0.
        indices: int64 (N,), each sample's place in the whole data set, >= 0.

    Returns:
        uint8 (N, C, H, W), the noisy copy.

    Raises:
        TypeError: ``images`` is not uint8.
        ValueError: ``amount`` is outside [0, 1], or ``images`` and ``indices`` do not fit together.
    """
    amount = check_amount(amount)
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8 (values 0 to 255), got {images.dtype}")
    if images.ndim != 4 or indices.shape != images.shape[:1]:
        raise ValueError(
            "images must be (N, C, H, W) and indices (N,), "
            f"got {tuple(images.shape)} and {tuple(indices.shape)}"
        )
    noisy = images.numpy().copy()
    height, width = noisy.shape[-2:]
    for image, index in zip(noisy, indices.tolist(), strict=True):
        replaced, salt = _draw(amount, height, width, seed, index)
        image[:, replaced & salt] = 255
        image[:, replaced & ~salt] = 0
    return torch.from_numpy(noisy)


def fresh_salt_and_pepper(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """The same noise drawn anew at every call, on the device of ``images``, uint8 (N, H, W, C)."""
    draw = torch.rand(images.shape[:-1], generator=generator, device=images.device).unsqueeze(-1)
    noisy = torch.where(draw < amount / 2, torch.zeros_like(images), images)
    return torch.where((draw >= amount / 2) & (draw < amount), torch.full_like(images, 255), noisy)


def _draw(
    amount: float, height: int, width: int, seed: int, index: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which pixels of sample ``index`` are replaced, and which of them by white."""
    # A Philox stream is named by its key: no seed arithmetic, so no two samples share a stream.
    stream = np.random.Generator(np.random.Philox(key=[seed, index]))
    draw = stream.random((2, height, width), dtype=np.float32)
    return draw[0] < amount, draw[1] < 0.5
