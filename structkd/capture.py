"""Forward hooks that fill :class:`Features` without editing the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from structkd import _backbone
from structkd._checks import describe
from structkd._hook import Hook, drop_spent_hooks, ends_of
from structkd._layer_names import check_layer, chosen_layers, layer_names, layer_of
from structkd._layout import MapReader, stated_layouts
from structkd.distributed import world_size
from structkd.features import Features


class FeatureCapture:
    """Captures logits, embedding and intermediate maps of any module by forward hooks.

    Layers are dotted names as in ``named_modules()``; ``"fc:input"`` is what goes into a layer. On
    timm models names are optional: the embedding is then the classifier's input and the
    intermediate map the last stage but one of ``feature_info``. Where such a choice does not work
    out, the field stays empty, and a criterion that reads it says why. Wrapped models (DDP,
    ``torch.compile``) take the inner model's names.

    What comes out is always channels first. timm's ``(B, H, W, C)`` maps are permuted; the patches
    of a transformer become a map ``(B, C, H, W)``, without class, distillation and register tokens;
    rows ``(B, C)`` are maps without positions. Where nothing tells the layout, ``layout`` states
    it.

    Call the capture in place of the module, or let the training loop call the module and then
    :meth:`read`. Reading hands the tensors over: the capture keeps neither them nor their graph. A
    layer that runs several times in a forward pass gives its last output.

    The network stays the user's. The capture works whether ``torch.compile``, DDP, an EMA copy or
    activation checkpointing come before it or after it. A copy of the network carries no capture,
    an exported or saved network no trace of one, and the hooks go when the capture does. A network
    that was compiled before is compiled anew.

    Args:
        module: The network; it is neither copied nor changed beyond its hooks.
        intermediate: Layer name, or names shallow to deep; ``"all"`` takes every stage of a timm
            model, an empty list none.
        embedding: Layer name giving ``(B, D)`` (or ``(B, D, 1, 1)``, which is flattened); an empty
            string for none.
        logits: Layer name giving ``(B, K)``; by default the module's own output where that is a
            2-D tensor, or its ``logits``.
        layout: The layout of the intermediate layers where it cannot be found out, one for all or
            one each: ``NCHW``, ``NHWC``, ``NCL`` (audio), ``NLC`` (tokens) or ``NC``.

    Raises:
        ValueError: If a name is no layer of the module (the near names are listed), or a layout is
            unknown.
        TypeError: If ``module`` is no ``nn.Module`` or a name no string.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        ...                     nn.Flatten(), nn.Linear(8, 10))
        >>> with FeatureCapture(net, intermediate="0", embedding="4:input") as capture:
        ...     feats = capture(torch.zeros(2, 3, 8, 8))
        >>> feats
        Features(logits=(2, 10), embedding=(2, 8), intermediate=[(2, 8, 6, 6)])
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        intermediate: str | Sequence[str] | None = None,
        embedding: str | None = None,
        logits: str | None = None,
        layout: str | Sequence[str] | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be an nn.Module, got {describe(module)}")
        if isinstance(module, nn.DataParallel):
            raise TypeError(
                "module is a DataParallel, whose replicas cannot be told apart by hooks: use "
                "DistributedDataParallel, or capture the network inside it"
            )
        self.module = module
        self._asked = {
            "intermediate": intermediate,
            "embedding": embedding,
            "logits": logits,
            "layout": layout,
        }
        inner = _backbone.unwrapped(module)
        layers = dict(inner.named_modules())
        self._absent: dict[str, str] = {}
        names = layer_names(intermediate, inner)
        if intermediate is None:
            names, self._absent = chosen_layers(names, layers)
        self.intermediate = names
        self.embedding = _backbone.default_embedding(inner) if embedding is None else embedding
        self.logits = logits
        self._chosen = {
            "intermediate": intermediate is None,
            "embedding": embedding is None,
            "logits": False,
        }
        self._fields = [*(("intermediate", name) for name in self.intermediate)]
        self._fields += [("embedding", self.embedding)] if self.embedding else []
        self._fields += [("logits", logits)] if logits else []
        for field, name in self._fields:
            check_layer(field, name, layers)
        self._readers = [
            MapReader(name, layers[layer_of(name)], inner, stated)
            for name, stated in zip(names, stated_layouts(layout, names), strict=True)
        ]
        self._forget()
        self._removed = False
        self._handles: list[RemovableHandle] = []
        self._finalizer = weakref.finalize(self, _remove_all, self._handles)
        drop_spent_hooks(module)
        self._handles.append(Hook(self, inner, "start").attach())
        for name in dict.fromkeys(name for _, name in self._fields):
            kind = "input" if name.endswith(_backbone.INPUT) else "output"
            for layer in ends_of(layers[layer_of(name)], kind):
                self._handles.append(Hook(self, layer, kind, name).attach())
        self._handles.append(Hook(self, inner, "finish").attach())
        if _backbone.is_compiled(module):
            torch.compiler.reset()  # what was compiled before knows no hooks

    def __call__(self, *args: Any, **kwargs: Any) -> Features:
        """Runs the module on the arguments and returns what it captured.

        Raises:
            RuntimeError: If several processes train and the module is not the wrapped one, so that
                its gradients would not be averaged; or as :meth:`read` raises.
        """
        self._check_wrapped()
        self.module(*args, **kwargs)
        return self.read()

    def read(self) -> Features:
        """Returns the last forward pass's features and lets go of them.

        Raises:
            RuntimeError: If no forward pass ran since the last read, a named layer never fired, a
                later layer overwrote a captured tensor in place, or a captured tensor has lost the
                gradient that the forward pass has.
            ValueError: If a captured tensor has a shape that its field cannot take.
            TypeError: If a named layer gave no tensor.
        """
        captured, lost, output = self._captured, self._lost, self._output
        ran, image = self._ran, self._image
        self._forget()
        if self._removed:
            raise RuntimeError("this FeatureCapture was removed; make a new one")
        if not ran:
            raise RuntimeError(
                "nothing to read: no forward pass has run since the last read(); call the module "
                "first (not a copy of it), and read() once per forward pass"
            )
        for problem in lost.values():
            raise RuntimeError(problem)
        absent = dict(self._absent)

        def fetched(field: str, name: str, shaped: Callable[[Tensor], Tensor]) -> Tensor | None:
            try:
                return shaped(_fetch(captured, name))
            except (RuntimeError, TypeError, ValueError) as error:
                if not self._chosen[field]:
                    raise
                absent[field] = f"{error}; name a layer yourself, {field}=..."
                return None

        embedding = logits = None
        if self.embedding:
            name = self.embedding
            embedding = fetched("embedding", name, lambda value: _as_row(value, name))
        maps = [
            fetched("intermediate", reader.name, lambda value, r=reader: r.read(value, image))  # type: ignore[misc]
            for reader in self._readers
        ]
        if self.logits:
            output = _as_row(_fetch(captured, self.logits), self.logits)
        else:
            output = _output_logits(output)
        logits = output if isinstance(output, Tensor) and output.dim() == 2 else None
        return Features(
            logits=logits,
            embedding=embedding,
            intermediate=tuple(value for value in maps if value is not None),
            absent=absent,
        )

    @property
    def removed(self) -> bool:
        """Whether its hooks were taken off, so that it captures nothing any more."""
        return self._removed

    def remove(self) -> None:
        """Removes every hook from the module and lets go of what was captured."""
        self._finalizer()
        self._removed = True
        self._forget()

    def __enter__(self) -> FeatureCapture:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy captures the copied module; what was captured here stays here.
        return _made, (self.module, self._asked)

    def _forget(self) -> None:
        self._captured: dict[str, tuple[Any, int | None]] = {}
        self._lost: dict[str, str] = {}
        self._output: Any = None
        self._image: tuple[int, int] | None = None
        self._ran = self._runs = self._with_grad = False

    def reported(self, kind: str, name: str, value: Any) -> None:
        """Takes what a hook reports; for the capture's own hooks."""
        if kind == "start":
            self._forget()
            self._runs = True
            self._with_grad = torch.is_grad_enabled()
            if isinstance(value, Tensor) and value.dim() == 4:
                self._image = (value.shape[2], value.shape[3])
        elif not self._runs:  # a layer by itself, or recomputed for the backward pass
            return
        elif kind == "finish":
            self._runs, self._ran, self._output = False, True, value
            self._check_versions()
        else:
            self._keep(name, value)

    def _keep(self, name: str, value: Any) -> None:
        if self._with_grad and not torch.is_grad_enabled():
            self._lost[name] = (
                f"layer {name!r} ran without gradient inside a forward pass that has one, so "
                "nothing that is distilled from it would reach the layers before: checkpoint with "
                "use_reentrant=False, take the layer out of torch.no_grad(), or name a layer after "
                "that part"
            )
        version = None
        if isinstance(value, Tensor):
            if torch.compiler.is_compiling():
                value = value.clone()  # compiled code may overwrite it without a trace
            elif value.is_inference():
                value = value.clone()  # no version counter would tell
            else:
                version = value._version
        self._captured[name] = (value, version)

    def _check_versions(self) -> None:
        for name, (value, version) in self._captured.items():
            if version is not None and value._version != version:
                self._lost[name] = (
                    f"the tensor captured at {name!r} was overwritten in place by a later layer; "
                    "name that layer instead, or build it with inplace=False"
                )

    def _check_wrapped(self) -> None:
        if world_size() == 1 or not torch.is_grad_enabled():
            return
        if _backbone.averages_gradients(self.module):
            return
        if any(parameter.requires_grad for parameter in self.module.parameters()):
            raise RuntimeError(
                "several processes train, but this capture calls the bare network, whose gradients "
                "nobody averages: make the capture of the wrapped one, FeatureCapture(ddp), or "
                "call the network yourself and then capture.read(), with "
                "structkd.distributed.average_gradients where there is no wrapper"
            )


def _made(module: nn.Module, asked: dict[str, Any]) -> FeatureCapture:
    return FeatureCapture(module, **asked)


def _remove_all(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _fetch(captured: dict[str, tuple[Any, int | None]], name: str) -> Tensor:
    if name not in captured:
        raise RuntimeError(
            f"layer {name!r} never fired in the last forward pass; name a layer that "
            "forward() calls (code compiled before the capture was made knows no hooks: call "
            "torch.compiler.reset())"
        )
    value = captured[name][0]
    if not isinstance(value, Tensor):
        raise TypeError(
            f"layer {name!r} gave {describe(value)}, only tensors can be captured; name a "
            "layer inside it"
        )
    return value


def _output_logits(output: Any) -> Any:
    """Returns a network's output, or the ``logits`` in it."""
    if isinstance(output, dict):
        return output.get("logits")
    return output if isinstance(output, Tensor) else getattr(output, "logits", None)


def _as_row(value: Tensor, name: str) -> Tensor:
    if value.dim() == 4 and value.shape[2:] == (1, 1):
        value = value.flatten(1)
    if value.dim() != 2:
        raise ValueError(
            f"layer {name!r} must give 2-D (B, D), got {describe(value)}; name a pooled layer, the "
            "classifier's input for example ('fc:input')"
        )
    return value
