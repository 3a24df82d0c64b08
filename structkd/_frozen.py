"""A frozen teacher with its capture, out of sight of its owner's parameters and state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from structkd.capture import FeatureCapture
from structkd.features import Features


def call(network: nn.Module, x: Any) -> Any:
    """Calls a network with a tensor, a tuple of arguments or a dict of keywords."""
    if isinstance(x, Mapping):
        return network(**x)
    return network(*x) if isinstance(x, tuple | list) else network(x)


class Frozen:
    """A teacher with its capture, held where ``nn.Module`` does not look for submodules.

    Deep copies (an EMA, a mean teacher) share the teacher and its hooks, unless they are moved
    elsewhere. Who detaches takes off the hooks that are its own, and leaves the others their use.
    """

    def __init__(self, module: nn.Module, layers: dict[str, Any], *, owned: bool = True) -> None:
        self.module = module
        self.layers = layers
        self.owned = owned
        self.attach()

    def features(self, x: Any) -> Features:
        """Runs the teacher and returns what it gives, without gradient.

        A batch of no samples gives features of no rows, by way of one sample of zeros: many a
        network cannot reshape nothing.
        """
        if self.capture.removed:  # by the one that this is a copy of
            self.attach()
        empty = isinstance(x, Tensor) and x.dim() > 0 and len(x) == 0
        with torch.no_grad():
            call(self.module, x.new_zeros(1, *x.shape[1:]) if empty else x)
            found = self.capture.read()
        return found.rows(torch.empty(0, dtype=torch.int64)) if empty else found

    def attach(self) -> None:
        self.capture, self.borrows_hooks = FeatureCapture(self.module, **self.layers), False

    def detach(self) -> None:
        if not self.borrows_hooks:
            self.capture.remove()

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Moves the teacher; a shared one stays, and a copy of it moves if that changes it."""
        if not self.owned:
            probe = next(self.module.parameters(), None)
            moved = None if probe is None else fn(probe.data)
            if probe is None or moved is None or _alike(probe, moved):
                return
            self.module, self.owned = copy.deepcopy(self.module), True
            self.attach()
        self.module._apply(fn)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        shared = Frozen.__new__(Frozen)
        shared.__dict__.update(self.__dict__, owned=False, borrows_hooks=True)
        return shared

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, borrows_hooks=False)  # a loaded capture has hooks of its own


def _alike(tensor: Tensor, other: Tensor) -> bool:
    return tensor.device == other.device and tensor.dtype == other.dtype
