"""Which layers a capture reads, by their dotted names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from structkd import _backbone
from structkd._checks import describe, near

ALL = "all"  # every stage of a timm model


def layer_names(intermediate: str | Sequence[str] | None, inner: nn.Module) -> tuple[str, ...]:
    """Returns the names that a user asked for, or what timm says where none was given."""
    if intermediate is None:
        return _backbone.default_intermediate(inner)
    if intermediate == ALL and not hasattr(inner, ALL):
        names = tuple(stage.name for stage in _backbone.stages(inner))
        if not names:
            raise ValueError(
                "intermediate='all' needs a model with timm's feature_info; name the layers"
            )
        return names
    return (intermediate,) if isinstance(intermediate, str) else tuple(intermediate)


def layer_of(name: str) -> str:
    """Returns a name without the ending that asks for a layer's input."""
    return name.removesuffix(_backbone.INPUT)


def check_layer(argument: str, name: object, layers: dict[str, nn.Module]) -> None:
    """Raises where a name is no string, or no layer of the network."""
    if not isinstance(name, str):
        raise TypeError(f"{argument} must name layers by strings, got {describe(name)}")
    layer = layer_of(name)
    if layer not in layers or not layer:
        known = [known for known in layers if known]
        raise ValueError(f"{argument}={name!r} is no layer of the module; {near(layer, known)}")


def chosen_layers(
    names: tuple[str, ...], layers: dict[str, nn.Module]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Returns automatically chosen names if all are layers, or none of them and the reason."""
    missing = [name for name in names if name not in layers]
    if not missing:
        return names, {}
    reason = (
        f"the model's feature_info names {missing[0]!r}, which is no layer of it; name a layer "
        "yourself, intermediate=..."
    )
    return (), {"intermediate": reason}
