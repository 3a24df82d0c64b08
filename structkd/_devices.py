"""Small tensors on their way to an accelerator."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor of the CPU on ``device``, without waiting for what is queued there.

    A plain ``.to(device)`` waits until a CUDA device has finished everything queued on it, for
    example the forward pass before a loss. CUDA copies memory that is not pinned before the call
    returns. Other devices may not, so they get the plain call.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")
