"""Forward hooks that fill :class:`Features` without editing the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from structkd._checks import describe
from structkd.capture import backbone
from structkd.capture.backbone import INPUT
from structkd.capture.hook import Hook, drop_spent_hooks, ends_of
from structkd.capture.layout import MapReader, stated_layouts
from structkd.distributed import world_size
from structkd.features import Features

ALL = "all"  # every stage that is known of the network


class FeatureCapture:
    """Captures logits, embedding and intermediate maps of any module by forward hooks.

    Layers are dotted names as in ``named_modules()``; ``"fc:input"`` is what goes into a layer. On
    timm models names are optional: the embedding is then the classifier's input and the
    intermediate map the last stage but one of ``feature_info``. If these defaults do not fit the
    network, the field stays empty, and a criterion that reads it reports why. Wrapped models (DDP,
    ``torch.compile``) take the inner model's names.

    What comes out is always channels first. timm's ``(B, H, W, C)`` maps are permuted; the patches
    of a transformer become a map ``(B, C, H, W)``, without class, distillation and register tokens;
    rows ``(B, C)`` are maps without positions. Where the layout cannot be determined, pass
    ``layout``.

    Call the capture in place of the module, or let the training loop call the module and then
    :meth:`read`. Reading hands the tensors over: the capture keeps neither them nor their graph. A
    layer that runs several times in a forward pass gives its last output. A layer object that has
    several names is captured where it runs inside the layer that was named; if that is ambiguous,
    reading raises an error.

    The network stays the user's. The capture works whether ``torch.compile``, DDP, an EMA copy or
    activation checkpointing come before it or after it. A copy of the network carries no capture,
    an exported or saved network no trace of one, and the hooks go when the capture does. A network
    that was compiled before is compiled anew.

    Args:
        module: The network; it is neither copied nor changed beyond its hooks.
        intermediate: Layer name, or names shallow to deep; ``"all"`` takes every stage of a network
            whose stages are known: timm's (with ``features_only`` too), and the encoder stages and
            decoder blocks of segmentation networks of segmentation_models_pytorch, torchvision and
            transformers. An empty list takes none.
        embedding: Layer name giving ``(B, D)`` (or ``(B, D, 1, 1)``, which is flattened); an empty
            string for none.
        logits: Layer name giving ``(B, K)``, or ``(B, K, H, W)`` of pixels; by default the module's
            own output where that is such a tensor, or the ``logits`` (of pixels, torchvision's
            ``out``) in it.
        layout: The layout of the intermediate layers where it cannot be determined, one for all or
            one for each: ``NCHW``, ``NHWC``, ``NCL`` (audio), ``NLC`` (tokens) or ``NC``.

    Raises:
        ValueError: If a name is no layer of the module (the near names are listed, or the likely
            ones), or a layout is unknown.
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
        inner = backbone.unwrapped(module)
        self._network = inner
        # Under every name: an object that the network holds twice can be named either way.
        layers = dict(inner.named_modules(remove_duplicate=False))
        likely = backbone.likely_layers(inner)
        self.intermediate, self._absent = _layer_names(intermediate, inner, layers, likely)
        self.embedding = backbone.default_embedding(inner) if embedding is None else embedding
        self.logits = logits
        self._chosen = {
            "intermediate": intermediate is None,
            "embedding": embedding is None,
            "logits": False,
        }
        self._fields = [*(("intermediate", name) for name in self.intermediate)]
        self._fields += [("embedding", self.embedding)] if self.embedding else []
        self._fields += [("logits", logits)] if logits else []
        wrong = [_wrong_name(field, name, layers, likely) for field, name in self._fields]
        if any(wrong):
            raise ValueError("; ".join(filter(None, wrong)))
        unnamed = ["embedding"] if self.embedding is None else []
        if intermediate is None and not self.intermediate and not self._absent:
            unnamed.append("intermediate")
        self.unnamed = tuple(unnamed)  # fields without a layer, from the user or the network
        for field in unnamed:
            self._absent[field] = (
                "no layer was named, and this network does not list its layers as timm's models "
                f"do; name one: {_suggestion(likely, unnamed)}"
            )
        self._logits_cure = f"name the layer that gives them: {_suggestion(likely, ['logits'])}"
        self._embedding_cure = (
            "a segmentation network has none, take criteria that read logits or intermediate; in "
            "others name a layer after the pooling"
        )
        if likely.get("embedding", self.embedding) != self.embedding:
            self._embedding_cure += f": {_suggestion(likely, ['embedding'])}"
        self._readers = [
            MapReader(name, layers[_layer_of(name)], inner, stated)
            for name, stated in zip(
                self.intermediate, stated_layouts(layout, self.intermediate), strict=True
            )
        ]
        self._forget()
        self._removed = False
        self._handles: list[RemovableHandle] = []
        self._finalizer = weakref.finalize(self, _remove_all, self._handles)
        drop_spent_hooks(module)
        self._handles.append(Hook(self, inner, "start").attach())
        self._places = {name: _Place.of(name, layers) for _, name in self._fields}
        for name, place in self._places.items():
            for depth, layer in enumerate(place.ends):
                self._handles.append(Hook(self, layer, place.kind, name, depth).attach())
            if place.around:
                for kind in ("enter", "leave"):
                    hook = Hook(self, layers[place.around], kind, name)
                    self._handles.append(hook.attach())
        self._handles.append(Hook(self, inner, "finish").attach())
        if backbone.is_compiled(module):
            torch.compiler.reset()  # code compiled earlier runs without the hooks

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
            RuntimeError: If no forward pass ran since the last read, a named layer never fired or
                was replaced since the capture was made, it is ambiguous which run of a shared layer
                object was meant, a later layer overwrote a captured tensor in place, or a captured
                tensor has lost the gradient that the forward pass has.
            ValueError: If a captured tensor has a shape that its field cannot take.
            TypeError: If a named layer gave no tensor.
        """
        captured, problems, output = self._captured, self._problems, self._output
        ran, image = self._ran, self._image
        self._forget()
        if self._removed:
            raise RuntimeError("this FeatureCapture was removed; make a new one")
        if not ran:
            raise RuntimeError(
                "nothing to read: no forward pass has run since the last read(); call the module "
                "first (not a copy of it), and read() once per forward pass"
            )
        absent = dict(self._absent)

        def fetched(field: str, name: str, shaped: Callable[[Tensor], Tensor]) -> Tensor | None:
            place = self._places[name]
            problem = place.replaced(self._network, captured) or problems.get(name)
            if problem is not None:
                if name in problems or not self._chosen[field]:
                    raise RuntimeError(problem)
                absent[field] = problem
                return None
            try:
                if name not in captured:
                    raise RuntimeError(place.silence())
                return shaped(_tensor(captured, name))
            except (RuntimeError, TypeError, ValueError) as error:
                if not self._chosen[field]:
                    raise
                absent[field] = (
                    f"{error}; or name a layer yourself, {field}=... (in a Distiller, "
                    f"layers=dict({field}=...))"
                )
                return None

        embedding = logits = None
        if self.embedding:
            name = self.embedding
            embedding = fetched("embedding", name, lambda value: self._as_embedding(value, name))
        maps = [
            fetched("intermediate", reader.name, lambda value, r=reader: r.read(value, image))  # type: ignore[misc]
            for reader in self._readers
        ]
        if self.logits:
            named = self.logits
            logits = fetched("logits", named, lambda value: self._as_logits(value, named))
        else:
            logits = _flat(_logits_in(output))
            if not isinstance(logits, Tensor) or logits.dim() not in (2, 4):
                absent["logits"] = _without_logits(output, self._logits_cure)
                logits = None
        return Features(
            logits=logits,
            embedding=embedding,
            intermediate=tuple(value for value in maps if value is not None),
            absent=absent,
        )

    def _as_embedding(self, value: Tensor, name: str) -> Tensor:
        value = _flat(value)
        if value.dim() != 2:
            raise ValueError(
                f"layer {name!r} must give 2-D (B, D), got {describe(value)}; "
                f"{self._embedding_cure}"
            )
        return value

    def _as_logits(self, value: Tensor, name: str) -> Tensor:
        value = _flat(value)
        if value.dim() not in (2, 4):
            raise ValueError(
                f"layer {name!r} must give logits, (B, K) or (B, K, H, W), got {describe(value)}; "
                f"{self._logits_cure}"
            )
        return value

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
        self._captured: dict[str, tuple[Any, int | None, int]] = {}  # value, version, depth
        self._problems: dict[str, str] = {}
        self._inside: dict[str, bool] = {}
        self._output: Any = None
        self._image: tuple[int, int] | None = None
        self._ran = self._runs = self._with_grad = False

    def reported(self, kind: str, name: str, value: Any, depth: int) -> None:
        """Stores what one of the capture's own hooks reports."""
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
        elif kind in ("enter", "leave"):
            self._inside[name] = kind == "enter"
        else:
            self._keep(name, value, depth)

    def _keep(self, name: str, value: Any, depth: int) -> None:
        place = self._places[name]
        if place.around and not self._inside.get(name, False):
            if name not in self._captured:
                self._problems[name] = place.elsewhere()
            return
        before = self._captured.get(name)
        if before is not None and before[2] < depth:
            return  # the chain has reported; a part of it ran again alone
        # A later report takes the place of an earlier one, and of what was wrong with that.
        self._problems.pop(name, None)
        if before is not None and before[2] == depth and place.is_unsure(depth):
            self._problems[name] = place.several(depth)
        elif self._with_grad and not torch.is_grad_enabled():
            self._problems[name] = (
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
        self._captured[name] = (value, version, depth)

    def _check_versions(self) -> None:
        for name, (value, version, _) in self._captured.items():
            if version is not None and value._version != version:
                self._problems[name] = (
                    f"the tensor captured at {name!r} was overwritten in place by a later layer; "
                    "name that layer instead, or build it with inplace=False"
                )

    def _check_wrapped(self) -> None:
        if world_size() == 1 or not torch.is_grad_enabled():
            return
        if backbone.averages_gradients(self.module):
            return
        if any(parameter.requires_grad for parameter in self.module.parameters()):
            raise RuntimeError(
                "several processes train, but this capture calls the bare network, whose gradients "
                "are not averaged: make the capture of the wrapped one, FeatureCapture(ddp), or "
                "call the network yourself and then capture.read(), with "
                "structkd.distributed.average_gradients where there is no wrapper"
            )


def _made(module: nn.Module, asked: dict[str, Any]) -> FeatureCapture:
    return FeatureCapture(module, **asked)


def _remove_all(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a named layer stands in the network, so that nothing else is taken for it.

    Attributes:
        name: The layer's dotted name, ``:input`` included.
        ends: The layer, then the parts of a chain that may stand for it where the chain is not
            called itself. A part that has another name as well could run elsewhere, and is left
            out.
        others: The other names of the same object.
        around: The nearest layer around it that the other names are not in; empty where there is
            none, or where the object has one name.
        shared_end: The part at the chain's end that was left out, if one was.
    """

    name: str
    ends: tuple[nn.Module, ...]
    others: tuple[str, ...] = ()
    around: str = ""
    shared_end: str = ""

    @classmethod
    def of(cls, name: str, layers: Mapping[str, nn.Module]) -> _Place:
        """Finds the place of a layer by the network's layers under all their names."""
        dotted = _layer_of(name)
        layer = layers[dotted]
        others = tuple(n for n, other in layers.items() if other is layer and n != dotted)
        ends: list[nn.Module] = []
        shared_end = ""
        for part in ends_of(layer, _kind_of(name)):
            names = [n for n, other in layers.items() if other is part]
            if ends and len(names) > 1:
                shared_end = " and ".join(map(repr, names))
                break
            ends.append(part)
        around = ""
        if others:
            outer = [_parents(other) for other in others]
            for parent in _parents(dotted):
                layer = layers[parent]
                inside = any(layers[p] is layer for each in outer for p in each)
                if backbone.runs(layer) and not inside:
                    around = parent
                    break
        return cls(name, tuple(ends), others, around, shared_end)

    @property
    def kind(self) -> str:
        return _kind_of(self.name)

    def replaced(self, network: nn.Module, captured: Mapping[str, Any]) -> str | None:
        """Describes a layer that was replaced since; None if it was not."""
        dotted, found = _layer_of(self.name), captured.get(self.name)
        now = backbone.layers_at(network, dotted)
        same = any(layer is self.ends[0] for layer in now)
        if same and (found is None or found[2] > 0):  # the chain was not called itself
            ends = tuple(ends_of(now[-1], self.kind))
            same = all(any(part is end for end in ends) for part in self.ends[1:])
        if same:
            return None
        return (
            f"layer {dotted!r} was replaced after this capture was made: the layer of this name is "
            f"{'another object' if now else 'gone'} now, and the hooks are on the old one; make "
            "the capture (or the Distiller) after the swap"
        )

    def silence(self) -> str:
        """Describes a layer that gave nothing."""
        if self.shared_end:
            return (
                f"layer {self.name!r} was not called itself in the last forward pass, and the part "
                f"at its end is one object under the names {self.shared_end}, so its runs cannot "
                "be told apart; name another layer, or give every place a module of its own"
            )
        return (
            f"layer {self.name!r} never fired in the last forward pass; name a layer that "
            "forward() calls (code compiled before the capture runs without its hooks: call "
            "torch.compiler.reset())"
        )

    def is_unsure(self, depth: int) -> bool:
        """Tells whether a second run in one forward pass may be that of another layer."""
        return depth > 0 or bool(self.others and not self.around)

    def several(self, depth: int) -> str:
        """Describes a layer that ran several times, where the run that was meant is ambiguous."""
        if depth > 0:
            why = "was not called itself, and the part at its end ran several times"
        else:
            others = " and ".join(map(repr, self.others))
            why = f"is the same object as {others} and ran several times"
        return (
            f"layer {self.name!r} {why} in the last forward pass, so which run is meant cannot be "
            "told; name another layer, or give every place a module of its own"
        )

    def elsewhere(self) -> str:
        """Describes a shared layer that ran, but never in the place that was named."""
        others = " and ".join(map(repr, self.others))
        return (
            f"layer {self.name!r} is the same object as {others}, and it did not run inside "
            f"{self.around!r} in the last forward pass; name another layer, or give every place a "
            "module of its own"
        )


def _parents(name: str) -> list[str]:
    """Returns the names of the layers around a layer, the nearest first, the network left out."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _kind_of(name: str) -> str:
    return "input" if name.endswith(INPUT) else "output"


def _layer_of(name: str) -> str:
    """Returns a name without the ending that asks for a layer's input."""
    return name.removesuffix(INPUT)


def _layer_names(
    intermediate: str | Sequence[str] | None,
    inner: nn.Module,
    layers: Mapping[str, nn.Module],
    likely: Mapping[str, str | list[str]],
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Returns the intermediate layers that are asked for, or timm's, and why there are none."""
    if intermediate is None:
        names = backbone.default_intermediate(inner)
        missing = [name for name in names if name not in layers]
        if not missing:
            return names, {}
        reason = (
            f"the model's feature_info names {missing[0]!r}, which is no layer of it; name a layer "
            f"yourself: {_suggestion(likely, ['intermediate'])}"
        )
        return (), {"intermediate": reason}
    if intermediate == ALL and ALL not in layers:
        names = backbone.all_stages(inner)
        if not names:
            raise ValueError(
                "intermediate='all' needs a network whose stages are known, by timm's feature_info "
                "or as segmentation networks of smp, torchvision and transformers do; name the "
                f"layers: {_suggestion(likely, ['intermediate'])}"
            )
        return names, {}
    return ((intermediate,) if isinstance(intermediate, str) else tuple(intermediate)), {}


def _wrong_name(
    argument: str,
    name: object,
    layers: Mapping[str, nn.Module],
    likely: Mapping[str, str | list[str]],
) -> str | None:
    """Returns an error that lists the network's layers if a name is none of them, else None."""
    if not isinstance(name, str):
        raise TypeError(f"{argument} must name layers by strings, got {describe(name)}")
    layer = _layer_of(name)
    if layer and layer in layers:
        return None
    names = _near(layer, [known for known in layers if known])
    hint = f"near names: {', '.join(names)}" if names else f"name {_suggestion(likely, [argument])}"
    return f"{argument}={name!r} is no layer of the module; {hint}"


def _near(name: str, known: Iterable[str]) -> list[str]:
    """Returns the names that differ by a wrapper's prefix or by a few letters, at most five."""
    names = list(known)
    ends = [n for n in names if n.endswith("." + name) or name.endswith("." + n)]
    close = get_close_matches(name, names, n=5)
    return list(dict.fromkeys([*ends, *close]))[:5]


def _suggestion(likely: Mapping[str, str | list[str]], fields: Sequence[str]) -> str:
    """Returns likely names as keyword arguments, for a capture and for a Distiller."""
    said = []
    for field in fields:
        names = likely.get(field, "...")
        names = names[-4:] if isinstance(names, list) else names
        said.append(f"{field}={'...' if names == '...' else repr(names)}")
    given = ", ".join(said)
    return (
        f"{given} (in a Distiller, layers=dict({given}), or teacher_layers where the teacher's "
        "names are others)"
    )


def _tensor(captured: Mapping[str, tuple[Any, int | None, int]], name: str) -> Tensor:
    value = captured[name][0]
    if not isinstance(value, Tensor):
        raise TypeError(
            f"layer {name!r} gave {describe(value)}, only tensors can be captured; name a "
            "layer inside it"
        )
    return value


def _flat(value: Any) -> Any:
    """Returns ``(B, D)`` of ``(B, D, 1, 1)``, anything else as it is."""
    if isinstance(value, Tensor) and value.dim() == 4 and value.shape[2:] == (1, 1):
        return value.flatten(1)
    return value


def _logits_in(output: Any) -> Any:
    """Returns a network's output, or the ``logits`` in it, or torchvision's ``out`` of pixels."""
    if isinstance(output, dict):
        out = output.get("out")
        pixels = out if isinstance(out, Tensor) and out.dim() == 4 else None
        return output.get("logits", pixels)
    return output if isinstance(output, Tensor) else getattr(output, "logits", None)


def _without_logits(output: Any, cure: str) -> str:
    """Describes an output without logits, and what to do about it."""
    return (
        f"the network gave {_came(output)}, in which no logits (B, K) or (B, K, H, W) are marked "
        f"as such; {cure}"
    )


def _parts(output: Any) -> dict[str, Any]:
    """Returns what an output that is no tensor holds, by name or position."""
    if isinstance(output, dict):
        return {repr(name): value for name, value in output.items()}
    if hasattr(output, "_fields"):
        return {name: getattr(output, name) for name in output._fields}
    if isinstance(output, tuple | list):
        return {str(position): value for position, value in enumerate(output)}
    return dict(getattr(output, "__dict__", {}))


def _came(value: Any) -> str:
    if isinstance(value, Tensor):
        # In a graph with dynamic sizes, to print a size would make it static.
        return f"a {value.dim()}-D tensor" if torch.compiler.is_compiling() else describe(value)
    held = ", ".join(
        f"{name}: {_came(part) if isinstance(part, Tensor) else type(part).__name__}"
        for name, part in list(_parts(value).items())[:6]
    )
    return f"{type(value).__name__} ({held})" if held else type(value).__name__
