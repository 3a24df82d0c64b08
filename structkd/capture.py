"""Forward hooks that fill :class:`Features` without editing the model."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from structkd._checks import describe, near
from structkd.features import Features

_INPUT = ":input"
# Where a wrapper keeps the network; torch.compile's is OptimizedModule.
_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
}


class FeatureCapture:
    """Captures logits, embedding and intermediate maps of any module by forward hooks.

    Layers are dotted names as in ``named_modules()``; ``"fc:input"`` is what goes into a layer. On
    timm models names are optional: the embedding is then the classifier's input and the
    intermediate map the last stage but one of ``feature_info``. Wrapped models (DDP,
    ``torch.compile``) take the inner model's names. With ``torch.compile``, capture first and
    compile the captured module afterwards.

    Call the capture in place of the module, or let the training loop call the module and then
    :meth:`read`. Reading hands the tensors over: the capture keeps neither them nor their graph. A
    layer that runs several times in a forward pass gives its last output.

    Args:
        module: The network; it is neither copied nor changed beyond its hooks.
        intermediate: Layer name, or names shallow to deep, giving ``(B, C, H, W)`` or
            ``(B, N, C)``.
        embedding: Layer name giving ``(B, D)`` (or ``(B, D, 1, 1)``, which is flattened).
        logits: Layer name giving ``(B, K)``; by default the module's own output where that is a
            2-D tensor.

    Raises:
        ValueError: If a name is no layer of the module (the near names are listed).
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
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be an nn.Module, got {describe(module)}")
        self.module = module
        inner = _unwrap(module)
        if intermediate is None:
            intermediate = _timm_intermediate(inner)
        self.intermediate = (
            (intermediate,) if isinstance(intermediate, str) else tuple(intermediate)
        )
        self.embedding = embedding if embedding is not None else _timm_embedding(inner)
        self.logits = logits
        self._captured: dict[str, tuple[Tensor, int | None]] = {}
        self._output: Any = None
        self._ran = False
        self._handles: list[RemovableHandle] = []
        layers = dict(inner.named_modules())
        named: list[tuple[str, str | None]] = []
        named += [("intermediate", name) for name in self.intermediate]
        named += [("embedding", self.embedding), ("logits", self.logits)]
        for argument, name in named:
            if name is not None:
                _check_layer(argument, name, layers)
        # Clears before any layer fires: a stale map never pairs with a new batch.
        self._handles.append(inner.register_forward_pre_hook(self._start, prepend=True))
        for name in dict.fromkeys(name for _, name in named if name is not None):
            layer = layers[name.removesuffix(_INPUT)]
            if name.endswith(_INPUT):
                hook = layer.register_forward_pre_hook(self._input_hook(name), with_kwargs=True)
            else:
                hook = layer.register_forward_hook(self._output_hook(name))
            self._handles.append(hook)
        self._handles.append(inner.register_forward_hook(self._finish))

    def __call__(self, *args: Any, **kwargs: Any) -> Features:
        """Runs the module on the arguments and returns what it captured."""
        self.module(*args, **kwargs)
        return self.read()

    def read(self) -> Features:
        """Returns the last forward pass's features and lets go of them.

        Raises:
            RuntimeError: If no forward pass ran since the last read, a layer never fired, or a
                later layer overwrote a captured tensor in place.
            ValueError: If a captured tensor has a shape that its field cannot take.
            TypeError: If a layer gave no tensor.
        """
        captured, output, ran = self._captured, self._output, self._ran
        self._forget()
        if not self._handles:
            raise RuntimeError("this FeatureCapture was removed; make a new one")
        if not ran:
            raise RuntimeError(
                "nothing to read: no forward pass has run since the last read(); call the module "
                "first, and read() once per forward pass"
            )
        embedding = None
        if self.embedding is not None:
            embedding = _as_row(_fetch(captured, self.embedding), self.embedding)
        maps = tuple(_as_map(_fetch(captured, name), name) for name in self.intermediate)
        if self.logits is not None:
            output = _as_row(_fetch(captured, self.logits), self.logits)
        logits = output if isinstance(output, Tensor) and output.dim() == 2 else None
        return Features(logits=logits, embedding=embedding, intermediate=maps)

    def remove(self) -> None:
        """Removes every hook from the module and lets go of what was captured."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
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

    def _forget(self) -> None:
        self._captured = {}
        self._output = None
        self._ran = False

    def _start(self, module: nn.Module, args: Any) -> None:
        self._forget()

    def _finish(self, module: nn.Module, args: Any, output: Any) -> None:
        self._output = output
        self._ran = True

    def _keep(self, name: str, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(
                f"layer {name!r} gave {describe(value)}, only tensors can be captured; name a "
                "layer inside it"
            )
        # Inference tensors carry no version counter, so a later overwrite would go unseen.
        if not torch.compiler.is_compiling() and value.is_inference():
            value = value.clone()
            self._captured[name] = (value, None)
        else:
            self._captured[name] = (value, value._version)

    def _input_hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._keep(name, args[0] if args else next(iter(kwargs.values()), None))

        return hook

    def _output_hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._keep(name, output)

        return hook


def _unwrap(module: nn.Module) -> nn.Module:
    """Returns the network inside DDP and torch.compile wrappers."""
    while attribute := _WRAPPERS.get(type(module).__name__):
        module = getattr(module, attribute)
    return module


def _timm_embedding(module: nn.Module) -> str | None:
    """Returns the input of a timm model's classifier, None for other models."""
    get_classifier = getattr(module, "get_classifier", None)
    if not callable(get_classifier):
        return None
    classifier = get_classifier()
    names = [name for name, layer in module.named_modules() if layer is classifier]
    return names[0] + _INPUT if names else None


def _timm_intermediate(module: nn.Module) -> tuple[str, ...]:
    """Returns the last stage but one of a timm model's feature_info, nothing for others."""
    info = getattr(module, "feature_info", None)
    get_name = getattr(info, "module_name", None)
    names = list(get_name()) if callable(get_name) else [stage["module"] for stage in info or ()]
    return tuple(names[-2:-1])


def _check_layer(argument: str, name: object, layers: dict[str, nn.Module]) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{argument} must name layers by strings, got {describe(name)}")
    layer = name.removesuffix(_INPUT)
    if layer not in layers or not layer:
        known = [known for known in layers if known]
        raise ValueError(f"{argument}={name!r} is no layer of the module; {near(layer, known)}")


def _fetch(captured: dict[str, tuple[Tensor, int | None]], name: str) -> Tensor:
    if name not in captured:
        raise RuntimeError(
            f"layer {name!r} never fired in the last forward pass; name a layer that "
            "forward() calls"
        )
    value, version = captured[name]
    if version is not None and value._version != version:
        raise RuntimeError(
            f"the tensor captured at {name!r} was overwritten in place by a later layer; name that "
            "layer instead, or build it with inplace=False"
        )
    return value


def _as_row(value: Tensor, name: str) -> Tensor:
    if value.dim() == 4 and value.shape[2:] == (1, 1):
        value = value.flatten(1)
    if value.dim() != 2:
        raise ValueError(
            f"layer {name!r} must give 2-D (B, D), got {describe(value)}; name a pooled layer, the "
            "classifier's input for example ('fc:input')"
        )
    return value


def _as_map(value: Tensor, name: str) -> Tensor:
    if value.dim() not in (3, 4):
        raise ValueError(
            f"intermediate layer {name!r} must give (B, C, H, W) or (B, N, C), "
            f"got {describe(value)}"
        )
    return value
