"""The hook of a capture, which reports to that capture only."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from structkd.capture.backbone import forward_of

# What a hook becomes in a copy or a file: a function of the standard library that takes anything
# and returns None, so that a saved network needs no structkd to be loaded.
_NOTHING = contextlib.nullcontext().__exit__
_BEFORE = ("start", "enter", "input")  # reported before the layer runs; the others after it


class Reporter(Protocol):
    """What a hook reports to."""

    def reported(self, kind: str, name: str, value: Any, depth: int) -> None:
        """Takes what a layer got (``input``) or gave (``output``), or that one begins or ends.

        The whole network reports ``start`` and ``finish``, a layer around a shared one ``enter``
        and ``leave``. ``depth`` is 0 for the named layer itself, more for a part at its end.
        """


class Hook:
    """Reports what a layer gets or gives, while both the layer and the capture are its own.

    It holds the capture and the layer weakly, so that neither keeps the other alive. In a deep
    copy, a replica, and an exported or traced network it is a function that does nothing. It never
    raises: errors are reported when the capture is read, so that the network stays usable.
    """

    def __init__(
        self, capture: Reporter, layer: nn.Module, kind: str, name: str = "", depth: int = 0
    ) -> None:
        self.capture = weakref.ref(capture)
        self.layer = weakref.ref(layer)
        self.kind = kind
        self.name = name
        self.depth = depth

    def __call__(self, module: nn.Module, args: Any, *rest: Any) -> None:
        # rest: (kwargs) before the forward pass, (kwargs, output) after it.
        capture = self.capture()
        if capture is None or self.layer() is not module:
            return
        if _is_exported():
            return
        value = rest[-1]
        if self.kind in _BEFORE:
            value = args[0] if args else next(iter(rest[0].values()), None)
        capture.reported(self.kind, self.name, value, self.depth)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")

    def attach(self) -> RemovableHandle:
        """Registers the hook with its layer."""
        layer = self.layer()
        if layer is None:
            raise RuntimeError("the layer is gone")
        if self.kind in _BEFORE:
            # First of all, so that a stale map never pairs with a new batch.
            return layer.register_forward_pre_hook(
                self, with_kwargs=True, prepend=self.kind == "start"
            )
        return layer.register_forward_hook(self, with_kwargs=True)


def _is_exported() -> bool:
    """Tells whether ``torch.export`` or ``torch.jit.trace`` runs the network by itself."""
    # Dynamo drops what hooks do where it exports, and up to torch 2.10 it calls all it does export.
    if torch.compiler.is_dynamo_compiling():
        return False
    return torch.compiler.is_exporting() or torch._C._is_tracing()


def drop_spent_hooks(module: nn.Module) -> None:
    """Removes what copying left of other captures' hooks."""
    for layer in module.modules():
        for hooks, flags in (
            (layer._forward_hooks, layer._forward_hooks_with_kwargs),
            (layer._forward_pre_hooks, layer._forward_pre_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if _is_spent(hook)]:
                del hooks[key]
                flags.pop(key, None)


def _is_spent(hook: object) -> bool:
    return getattr(hook, "__func__", None) is _NOTHING.__func__  # type: ignore[attr-defined]


def ends_of(layer: nn.Module, kind: str) -> Iterator[nn.Module]:
    """Yields a layer and, for a chain, the layer at its end that gives (or gets) the same tensor.

    Activation checkpointing of a chain (timm's ``checkpoint_seq``) calls its parts without it.
    """
    yield layer
    while forward_of(layer) is nn.Sequential.forward and len(layer):  # type: ignore[arg-type]
        # Not children(), which gives an object that comes twice only once.
        parts = list(layer._modules.values())
        part = parts[0 if kind == "input" else -1]
        assert part is not None
        layer = part
        yield layer
