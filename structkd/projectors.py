"""The trainable heads that criteria own."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from structkd._checks import describe, whole


class Projector(nn.Module):
    """Maps embeddings to another width: linear, or an MLP with batch norm and ReLU between.

    Args:
        in_dim: Width of the embedding.
        out_dim: Width of the projection.
        hidden_dim: Width of the hidden layers, ``out_dim`` by default.
        layers: Number of linear layers, 1 for a linear projector.
        bias: Whether the last linear layer has a bias.

    Shape:
        ``(B, in_dim)`` to ``(B, out_dim)``, in the dtype of the parameters.

    Raises:
        TypeError, ValueError: If a width is no whole number of at least 1.

    Example:
        >>> import torch
        >>> Projector(64, 512, layers=2)(torch.zeros(8, 64)).shape
        torch.Size([8, 512])
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        hidden_dim: int | None = None,
        layers: int = 2,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.in_dim = whole("in_dim", in_dim)
        self.out_dim = whole("out_dim", out_dim)
        hidden = self.out_dim if hidden_dim is None else whole("hidden_dim", hidden_dim)
        blocks: list[nn.Module] = []
        width = self.in_dim
        for _ in range(whole("layers", layers) - 1):
            # The norm's shift makes a bias before it idle.
            blocks += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
            width = hidden
        self.net = nn.Sequential(*blocks, nn.Linear(width, self.out_dim, bias=bias))

    def forward(self, embedding: Tensor) -> Tensor:
        if embedding.dim() != 2 or embedding.shape[1] != self.in_dim:
            raise ValueError(
                f"the projector takes (B, {self.in_dim}), got {describe(embedding)}; build it for "
                "the width it meets"
            )
        projected: Tensor = self.net(embedding)
        return projected


class ConvAdapter(nn.Module):
    """Brings a student's map to the teacher's channels by a convolution, linear for rows.

    Args:
        in_channels: Channels of the student's map.
        out_channels: Channels of the teacher's map.
        kernel_size: Odd size of the convolution. Tokens are a map one pixel high, rows one pixel.

    Shape:
        ``(B, C, H, W)`` to ``(B, C', H, W)``, ``(B, N, C)`` to ``(B, N, C')``, or ``(B, C)`` to
        ``(B, C')``.

    Raises:
        TypeError, ValueError: If an argument is no whole number of at least 1, or ``kernel_size``
            is even.

    Example:
        >>> import torch
        >>> ConvAdapter(16, 32)(torch.zeros(2, 16, 8, 8)).shape
        torch.Size([2, 32, 8, 8])
    """

    def __init__(self, in_channels: int, out_channels: int, *, kernel_size: int = 1) -> None:
        super().__init__()
        self.in_channels = whole("in_channels", in_channels)
        self.out_channels = whole("out_channels", out_channels)
        if whole("kernel_size", kernel_size) % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.conv = nn.Conv2d(
            self.in_channels, self.out_channels, kernel_size, padding=kernel_size // 2
        )

    def forward(self, features: Tensor) -> Tensor:
        rank, width = features.dim(), self.in_channels
        if rank not in (2, 3, 4) or features.shape[2 if rank == 3 else 1] != width:
            raise ValueError(
                f"the adapter takes (B, {width}, H, W), (B, N, {width}) or (B, {width}), got "
                f"{describe(features)}; build it for the channels it meets"
            )
        adapted: Tensor
        if rank == 4:
            adapted = self.conv(features)
        elif rank == 3:
            adapted = self.conv(rearrange(features, "b n c -> b c 1 n"))
            adapted = rearrange(adapted, "b c 1 n -> b n c")
        else:
            adapted = self.conv(rearrange(features, "b c -> b c 1 1"))
            adapted = rearrange(adapted, "b c 1 1 -> b c")
        return adapted
