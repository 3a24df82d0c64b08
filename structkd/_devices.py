"""Small tensors on their way to an accelerator."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor of the CPU on ``device``, without waiting for what is queued there.

    A plain ``.to(device)`` waits until a CUDA device has done all that was asked of it, the forward
    pass before a loss for example. CUDA takes a copy of memory that is not pinned before it
    returns; of other devices nobody knows.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")
