"""What goes to an accelerator does not wait for it."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

from structkd._devices import sent


class _Moves(TorchFunctionMode):
    """Says how a tensor was to be moved, and leaves it where it is."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to:
            self.asked = args[1], kwargs
            return args[0]
        return func(*args, **(kwargs or {}))


def test_only_cuda_is_known_to_have_read_a_tensor_when_the_call_returns() -> None:
    for name, waits in (("cuda", False), ("cuda:1", False), ("cpu", True), ("mps", True)):
        with _Moves() as moves:
            sent(torch.arange(3), torch.device(name))
        assert moves.asked == (torch.device(name), {"non_blocking": not waits})
