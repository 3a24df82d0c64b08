"""Captured tensors made channels first, whatever the backbone's layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor, nn

from structkd._checks import choice, describe
from structkd.capture import backbone

# N is the batch, L a sequence without height and width.
LAYOUTS = ("NCHW", "NHWC", "NCL", "NLC", "NC")
_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
)
_LAST = (nn.Linear, nn.LayerNorm, nn.MultiheadAttention, nn.Embedding)


@dataclass(frozen=True)
class MapReader:
    """Makes what one layer gives channels first.

    Attributes:
        name: The layer's dotted name, ``:input`` included.
        layer: The layer.
        network: The network around it, which may know more.
        stated: The layout that the user states, None where it is to be found out.
    """

    name: str
    layer: nn.Module
    network: nn.Module
    stated: str | None = None

    def read(self, value: Tensor, image: tuple[int, int] | None) -> Tensor:
        """Returns ``(B, C, H, W)``, ``(B, N, C)`` where tokens have no grid, or ``(B, C)``.

        Args:
            value: What the layer gave.
            image: Height and width of the image that went into the network, if one did.

        Raises:
            ValueError: If the shape fits no layout, or fits several and nothing else decides.
        """
        layout = self.stated or self._found(value)
        if len(layout) != value.dim():
            raise ValueError(
                f"layout={layout!r} was stated for layer {self.name!r}, which gives "
                f"{describe(value)}"
            )
        if layout == "NHWC":
            return rearrange(value, "b h w c -> b c h w")
        if layout == "NCL":
            return rearrange(value, "b c l -> b c 1 l")
        return self._patches(value, image) if layout == "NLC" else value

    def _found(self, value: Tensor) -> str:
        if value.dim() == 2:
            return "NC"
        if value.dim() not in (3, 4):
            raise ValueError(
                f"intermediate layer {self.name!r} must give (B, C, H, W), (B, N, C) or (B, C), "
                f"got {describe(value)}; name another layer, or fold the extra dimensions in one"
            )
        first, last = ("NCHW", "NHWC") if value.dim() == 4 else ("NCL", "NLC")
        stage = self._stage()
        width, kinds = _evidence(self.layer, at_input=self.name.endswith(backbone.INPUT))
        if stage is not None and stage.channels is not None:
            width = stage.channels
            if width not in (value.shape[1], value.shape[-1]):
                raise ValueError(
                    f"layer {self.name!r} gives {describe(value)}, but the model's feature_info "
                    f"says {width} channels: state layout="
                )
        # Under torch.compile with dynamic sizes a comparison is no bool yet; an `if` makes it one,
        # so this is a list of what passed an `if` and not a pair of comparisons.
        fits = [place for place in (1, -1) if value.shape[place] == width]
        fits_first, fits_last = 1 in fits, -1 in fits
        if fits_first != fits_last:
            return first if fits_first else last
        if fits_first:  # as many channels as positions: only the layers themselves can tell
            if value.dim() == 4 and backbone.says_channels_last(self.network):
                return last
            if kinds == {"first"}:
                return first
            if kinds == {"last"} or (value.dim() == 3 and stage is not None):
                return last
            if value.dim() == 4 and self.name in backbone.all_stages(self.network):
                return first
        elif value.dim() == 4 and kinds != {"last"}:
            return first  # torch's own layout
        raise ValueError(
            f"layer {self.name!r} gives {describe(value)}, and it is not known where its channels "
            f"are: state layout={first!r} if they come first, {last!r} if they come last"
        )

    def _stage(self) -> backbone.Stage | None:
        return next((s for s in backbone.stages(self.network) if s.name == self.name), None)

    def _patches(self, tokens: Tensor, image: tuple[int, int] | None) -> Tensor:
        """Drops prefix tokens and lays patches out on their grid, where there is one.

        Raises:
            ValueError: If the network keeps its tokens in an order of its own.
        """
        if hasattr(self.network, "reroll"):  # timm's Hiera
            raise ValueError(
                f"layer {self.name!r} gives tokens in an order that is not the image's; name a "
                "layer that gives a map, or distil this network's embedding or logits"
            )
        prefix = backbone.prefix_tokens(self.network)
        grids = list(backbone.patch_grids(self.network, image))
        for skipped in dict.fromkeys((prefix, 0)):  # some layers come before the class token
            for height, width in grids:
                if height * width == tokens.shape[1] - skipped:
                    patches = tokens[:, skipped:]
                    return rearrange(patches, "b (h w) c -> b c h w", h=height)
        return tokens[:, prefix:]


def stated_layouts(
    layout: str | Sequence[str] | None, intermediate: Sequence[str]
) -> tuple[str | None, ...]:
    """Returns one stated layout a layer after checking them."""
    if layout is None:
        return (None,) * len(intermediate)
    if isinstance(layout, str):
        return (choice("layout", layout, LAYOUTS),) * len(intermediate)
    if len(layout) != len(intermediate):
        raise ValueError(
            f"layout must be one of {', '.join(LAYOUTS)} or one for every intermediate layer, got "
            f"{len(layout)} for {len(intermediate)} layer(s)"
        )
    return tuple(choice("layout", each, LAYOUTS) for each in layout)


def _evidence(layer: nn.Module, *, at_input: bool) -> tuple[int | None, set[str]]:
    """Returns the width of the layer's first or last part with one, and which kinds it holds."""
    parts = [part for part in layer.modules() if isinstance(part, _FIRST + _LAST)]
    kinds = {"first" if isinstance(part, _FIRST) else "last" for part in parts}
    if not parts:
        return None, kinds
    return _width(parts[0 if at_input else -1], at_input), kinds


def _width(part: nn.Module, at_input: bool) -> int | None:
    side = "in" if at_input else "out"
    common = ("num_features", "num_channels", "embed_dim", "embedding_dim")
    for name in (*common, f"{side}_features", f"{side}_channels"):
        value = getattr(part, name, None)
        if isinstance(value, int):
            return value
    shape = getattr(part, "normalized_shape", None)
    return int(shape[-1]) if shape else None
