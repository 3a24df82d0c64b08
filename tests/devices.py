"""The devices that suites run on: the CPU, and an accelerator where there is one.

Tests of the second one have the mark ``gpu`` and are collected only where it is. With
``STRUCTKD_DEVICE=cpu`` it is the CPU once more, which tries those tests without a card.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

ACCELERATOR = os.environ.get("STRUCTKD_DEVICE", "cuda" if torch.cuda.is_available() else "")
DEVICES = [
    pytest.param("cpu", id="cpu"),
    *([pytest.param(ACCELERATOR, id="accelerator", marks=pytest.mark.gpu)] if ACCELERATOR else []),
]


def drawn(*shape: int) -> Tensor:
    """Returns normal numbers on the default device, the same ones on any."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(0), device="cpu")
    return numbers.to(torch.get_default_device())


@contextlib.contextmanager
def no_wait(device: str) -> Iterator[None]:
    """Makes whatever waits for a CUDA device an error; other devices cannot say."""
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
