"""Random numbers by name: the same bits for any order of samples, batch, worker and process."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def stream(*key: int) -> int:
    """A 63-bit seed for a key of whole numbers; another key, another seed."""
    state = 0
    for part in key:
        state = _mixed((state + _GOLDEN + part) & _MASK)
    return state >> 1


def uniform(key: tuple[int, ...], index: Tensor, count: int) -> Tensor:
    """``count`` numbers in [0, 1) for every sample, (n, count) float32 on the device of ``index``.

    A sample's numbers depend on the key and its index alone. This is SplitMix64 (Steele et al.,
    2014), its state set by key and index, in int64 arithmetic that wraps as uint64 does.
    """
    start = _mixed_tensor(_mixed_tensor(index) ^ stream(*key))
    steps = torch.arange(1, count + 1, device=index.device) * _signed(_GOLDEN)
    bits = _mixed_tensor(start[:, None] + steps)
    return _shifted(bits, 40).float() / (1 << 24)


def permutation(key: tuple[int, ...], count: int) -> Tensor:
    """An order of ``count`` rows."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(stream(*key)))


def _mixed(state: int) -> int:
    return int(_mixed_tensor(torch.tensor(_signed(state)))) & _MASK


def _mixed_tensor(state: Tensor) -> Tensor:
    state = (state ^ _shifted(state, 30)) * _signed(_FIRST)
    state = (state ^ _shifted(state, 27)) * _signed(_SECOND)
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, places: int) -> Tensor:
    # torch's shift keeps the sign; the mask clears what it draws in.
    return (state >> places) & ((1 << (64 - places)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
