"""Trainable heads of criteria, which take their shape at the first call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from structkd._checks import describe, whole


class LazyHead(LazyModuleMixin, nn.Module):
    """A head that takes its shape at the first call, as torch's lazy modules do.

    Its parameters exist from the start, uninitialized, so that an optimizer made before the first
    call trains them. They take the device of their first input, and float64 where that is float64.
    Loading a state dict shapes them as well; a head that the saved criterion did not need, or had
    not shaped yet, may be missing there.

    A subclass implements ``initialize_parameters``, which is given what ``forward`` is given, and
    calls :func:`shaped` on the lazy layers of torch inside it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._register_state_dict_hook(_without_unshaped)  # type: ignore[no-untyped-call]

    def _infer_parameters(self, module: Any, args: Any, kwargs: Any = None) -> None:
        # A first call may be a validation's: parameters made there could never train.
        with torch.inference_mode(False):
            super()._infer_parameters(module, args, kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **more: Any
    ) -> None:
        for name, value in _tensors(self):
            if is_lazy(value):
                state_dict.setdefault(prefix + name, value)
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)

    def initialize_parameters(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{type(self).__name__} must implement initialize_parameters")


def _without_unshaped(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    for name, value in _tensors(module):
        if is_lazy(value):
            state.pop(prefix + name, None)


def _tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


class _UnshapedBuffer(UninitializedBuffer):
    """A buffer without a shape that can be copied, as torch's own parameters without one can."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _UnshapedBuffer:
        made: Any = type(self)
        copied: _UnshapedBuffer = made(device=self.data.device, dtype=self.data.dtype)
        return copied


def lazy_norm(kind: type[nn.LazyBatchNorm1d] | type[nn.LazyBatchNorm2d]) -> nn.Module:
    """Returns one of torch's lazy batch norms, which can be copied before its first call."""
    norm = kind()
    norm.running_mean, norm.running_var = _UnshapedBuffer(), _UnshapedBuffer()
    return norm


def is_unshaped(module: nn.Module) -> bool:
    """Tells whether a module waits for its first call to take its shape."""
    return any(is_lazy(value) for _, value in _tensors(module))


def shaped(layer: nn.Module, value: Tensor, width: int | None = None) -> None:
    """Gives one of torch's lazy layers its shape, on the device and in the dtype of ``value``.

    Args:
        layer: A lazy linear or convolution layer, a lazy norm, or any other layer, which is left.
        value: What the layer will be called with.
        width: Outputs of a linear layer or a convolution.
    """
    if not isinstance(layer, LazyModuleMixin):
        return
    loaded = next(iter(layer.parameters()))
    if is_lazy(loaded):
        layer.to(device=value.device, dtype=value.dtype)
    elif width is not None:
        width = loaded.shape[0]
    for name in ("out_features", "out_channels"):
        if width is not None and hasattr(layer, name):
            setattr(layer, name, int(width))
    layer._infer_parameters(layer, (value,))
    # Where a state dict was loaded before, torch leaves these at 0.
    if isinstance(layer, nn.Conv2d):
        layer.in_channels = layer.weight.shape[1]
    elif isinstance(layer, nn.modules.batchnorm._NormBase):
        layer.num_features = len(layer.weight)


def project(head: nn.Module, value: Tensor, width: int) -> Tensor:
    """Calls a head of this library with the width, or a module of the user's without it."""
    projected: Tensor = head(value, width) if isinstance(head, LazyHead) else head(value)
    return projected


class Projector(LazyHead):
    """Maps embeddings to another width: linear, or an MLP with batch norm and ReLU between.

    It takes the width of what it is given at its first call.

    Args:
        out_dim: Width of the projection; by default that of the first call, which criteria give.
        hidden_dim: Width of the hidden layers, ``out_dim`` by default.
        layers: Number of linear layers, 1 for a linear projector.
        bias: Whether the last linear layer has a bias.
        skip_equal: Be the identity, without parameters, where both widths agree at the first call.

    Shape:
        ``(B, in_dim)`` to ``(B, out_dim)``, in the dtype of the parameters.

    Raises:
        TypeError, ValueError: If a width is no whole number of at least 1, ``out_dim`` is not
            known, or a later call brings another width than the first.

    Example:
        >>> import torch
        >>> Projector(512, layers=2)(torch.zeros(8, 64)).shape
        torch.Size([8, 512])
    """

    def __init__(
        self,
        out_dim: int | None = None,
        *,
        hidden_dim: int | None = None,
        layers: int = 2,
        bias: bool = True,
        skip_equal: bool = False,
    ) -> None:
        super().__init__()
        self.out_dim = None if out_dim is None else whole("out_dim", out_dim)
        self.hidden_dim = None if hidden_dim is None else whole("hidden_dim", hidden_dim)
        self.skip_equal = skip_equal
        blocks: list[nn.Module] = []
        for _ in range(whole("layers", layers) - 1):
            # The norm's shift makes a bias before it idle.
            blocks += [nn.LazyLinear(0, bias=False), lazy_norm(nn.LazyBatchNorm1d), nn.ReLU()]
        self.net: nn.Sequential | None = nn.Sequential(*blocks, nn.LazyLinear(0, bias=bias))

    def initialize_parameters(self, embedding: Tensor, out_dim: int | None = None) -> None:
        assert self.net is not None
        _check_rows(embedding)
        width = self.out_dim or out_dim or self.hidden_dim
        linear = [layer for layer in self.net if isinstance(layer, nn.Linear)]
        if is_lazy(linear[-1].weight):
            if self.skip_equal and width == embedding.shape[1]:
                self.net = None
                return
            if width is None:
                raise ValueError(
                    "out_dim is missing: the projection's width is not known; pass it, Projector(D)"
                )
        value = embedding
        for layer in self.net:
            hidden = width if layer is linear[-1] else self.hidden_dim or width
            shaped(layer, value, hidden)
            if isinstance(layer, nn.Linear):
                value = value.new_empty(2, len(layer.weight))
        self.out_dim = len(linear[-1].weight)

    def forward(self, embedding: Tensor, out_dim: int | None = None) -> Tensor:
        if self.net is None:
            return embedding
        _check_rows(embedding)
        first = self.net[0]
        assert isinstance(first, nn.Linear)
        if embedding.shape[1] != first.weight.shape[1]:
            raise ValueError(
                f"the projector took its shape from (B, {first.weight.shape[1]}), got "
                f"{describe(embedding)}: make a new one for embeddings of another width"
            )
        projected: Tensor = self.net(embedding)
        return projected

    def extra_repr(self) -> str:
        return f"out_dim={self.out_dim}"


class ConvAdapter(LazyHead):
    """Brings a student's map to the teacher's channels by a convolution, linear for rows.

    It takes the channels of what it is given at its first call.

    Args:
        out_channels: Channels of the result; by default those of the first call, which criteria
            give.
        kernel_size: Odd size of the convolution. Tokens are a map one pixel high, rows one pixel.
        skip_equal: Be the identity, without parameters, where channels agree at the first call.

    Shape:
        ``(B, C, H, W)`` to ``(B, C', H, W)``, ``(B, N, C)`` to ``(B, N, C')``, or ``(B, C)`` to
        ``(B, C')``.

    Raises:
        TypeError, ValueError: If an argument is no whole number of at least 1, ``kernel_size`` is
            even, ``out_channels`` is not known, or a later call brings other channels.

    Example:
        >>> import torch
        >>> ConvAdapter(32)(torch.zeros(2, 16, 8, 8)).shape
        torch.Size([2, 32, 8, 8])
    """

    def __init__(
        self,
        out_channels: int | None = None,
        *,
        kernel_size: int = 1,
        skip_equal: bool = False,
    ) -> None:
        super().__init__()
        self.out_channels = None if out_channels is None else whole("out_channels", out_channels)
        self.skip_equal = skip_equal
        if whole("kernel_size", kernel_size) % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.conv: nn.Conv2d | None = nn.LazyConv2d(0, kernel_size, padding=kernel_size // 2)

    def initialize_parameters(self, features: Tensor, out_channels: int | None = None) -> None:
        assert self.conv is not None
        width = self.out_channels or out_channels
        if is_lazy(self.conv.weight):
            if self.skip_equal and width == _as_map(features).shape[1]:
                self.conv = None
                return
            if width is None:
                raise ValueError(
                    "out_channels is missing: the channels to bring the map to are not known; pass "
                    "them, ConvAdapter(C)"
                )
        shaped(self.conv, _as_map(features), width)
        self.out_channels = len(self.conv.weight)

    def forward(self, features: Tensor, out_channels: int | None = None) -> Tensor:
        if self.conv is None:
            return features
        value = _as_map(features)
        if value.shape[1] != self.conv.weight.shape[1]:
            raise ValueError(
                f"the adapter took its shape from {self.conv.weight.shape[1]} channels, got "
                f"{describe(features)}: make a new one for maps of other channels"
            )
        adapted: Tensor = self.conv(value)
        if features.dim() == 3:
            return rearrange(adapted, "b c 1 n -> b n c")
        return rearrange(adapted, "b c 1 1 -> b c") if features.dim() == 2 else adapted

    def extra_repr(self) -> str:
        return f"out_channels={self.out_channels}"


class StackedLinear(LazyHead):
    """The weights of a linear map for every stage, in one parameter.

    The number of stages is known at the first call only, and an optimizer may be made before it. So
    one parameter holds all stages: the rows of stage k are its outputs, the columns its inputs, and
    columns that a narrower stage does not have stay 0, since no gradient reaches them. Every stage
    starts as ``nn.Linear`` or a 1x1 ``nn.Conv2d`` does.

    Args:
        bias: Whether every stage has a bias.

    Shape:
        ``stacked(widths)`` takes a sequence of (inputs, outputs), the same at every call, and an
        example tensor for device and dtype, and returns for every stage its weight
        ``(outputs, inputs)`` and its bias ``(outputs,)`` or None.

    Raises:
        ValueError: If the widths are not those of the first call.

    Example:
        >>> stacked = StackedLinear(bias=False)
        >>> [weight.shape for weight, _ in stacked([(8, 16), (4, 32)], torch.zeros(1))]
        [torch.Size([16, 8]), torch.Size([32, 4])]
    """

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = _unshaped()
        self.bias: nn.Parameter | None = _unshaped() if bias else None
        self.widths: list[tuple[int, int]] = []

    def initialize_parameters(self, widths: Sequence[tuple[int, int]], example: Tensor) -> None:
        self.widths = [(into, out) for into, out in widths]
        if not isinstance(self.weight, UninitializedParameter):
            return  # loaded
        if not widths:  # no stage needs one
            self.weight = self.bias = None
            return
        rows, columns = sum(out for _, out in widths), max(into for into, _ in widths)
        self.weight.materialize((rows, columns), device=example.device, dtype=example.dtype)
        with torch.no_grad():
            self.weight.zero_()
            if isinstance(self.bias, UninitializedParameter):
                self.bias.materialize((rows,), device=example.device, dtype=example.dtype)
            for (into, _), (weight, bias) in zip(widths, self._parts(widths), strict=True):
                bound = into**-0.5
                # Drawn as one piece, so that it starts with the numbers that a layer would have.
                weight.copy_(weight.new_empty(weight.shape).uniform_(-bound, bound))
                if bias is not None:
                    bias.uniform_(-bound, bound)

    def forward(
        self, widths: Sequence[tuple[int, int]], example: Tensor
    ) -> list[tuple[Tensor, Tensor | None]]:
        if self.weight is None:
            return []
        wanted = (sum(out for _, out in widths), max(into for into, _ in widths))
        # Stages in another order would have as many weights, and the wrong ones.
        if tuple(self.weight.shape) != wanted or [tuple(w) for w in widths] != self.widths:
            raise ValueError(
                f"the stages are {list(widths)} wide (student, teacher), but this criterion took "
                f"its shape {tuple(self.weight.shape)} from others at its first call: make a new "
                "one, or choose stages with layer=[...]"
            )
        return self._parts(widths)

    def _parts(self, widths: Sequence[tuple[int, int]]) -> list[tuple[Tensor, Tensor | None]]:
        assert self.weight is not None
        sizes = [out for _, out in widths]
        biases: Sequence[Tensor | None] = [None] * len(sizes)
        if self.bias is not None:
            biases = torch.split(self.bias, sizes)
        return [
            (weight[:, :into], bias)
            for weight, bias, (into, _) in zip(
                torch.split(self.weight, sizes), biases, widths, strict=True
            )
        ]


def _unshaped() -> nn.Parameter:
    return UninitializedParameter()  # type: ignore[return-value]


def linear_map(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Applies a weight ``(C', C)`` to the channels of a map, tokens or rows, in their own form."""
    if features.dim() == 4:
        return F.conv2d(features, weight[:, :, None, None], bias)
    return F.linear(features, weight, bias)


def _check_rows(embedding: Tensor) -> None:
    if embedding.dim() != 2:
        raise ValueError(f"the projector takes rows (B, D), got {describe(embedding)}")


def _as_map(features: Tensor) -> Tensor:
    if features.dim() == 3:
        return rearrange(features, "b n c -> b c 1 n")
    if features.dim() == 2:
        return rearrange(features, "b c -> b c 1 1")
    if features.dim() != 4:
        raise ValueError(
            "the adapter takes maps (B, C, H, W), tokens (B, N, C) or rows (B, C), got "
            f"{describe(features)}"
        )
    return features
