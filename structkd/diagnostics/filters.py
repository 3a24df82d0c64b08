"""Whether a layer's filters have fallen together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from structkd.diagnostics._rows import rows_of
from structkd.diagnostics.embeddings import effective_rank


class FilterDirections(NamedTuple):
    """The result of :func:`filter_collapse` for one convolution.

    Attributes:
        norm: Mean Euclidean norm of the filters.
        rank: Effective rank of the filters' directions.
        most: The largest rank that they could have, the lesser of filters and weights a filter.
    """

    norm: float
    rank: float
    most: int


@torch.no_grad()
def filter_collapse(module: nn.Module) -> dict[str, FilterDirections]:
    """Norm and effective rank of the filters of every convolution that a batch norm follows.

    Such a convolution does not change with the scale of its filters, so its effective learning rate
    is ``lr / |w|^2``. A strong criterion on early maps can throw all filters of a layer far in one
    common direction within an epoch. Their norms are large then and their rank is small, no later
    gradient separates them, and the run is lost although no gradient is large and no channel is
    dead. Compare with the same network as it was initialised, or trained without the criterion: a
    norm several times as large *and* a clearly lower rank is a collapse. Clipping every unit's
    gradient by the norm of its weights prevents it (``timm.utils.agc.adaptive_clip_grad``).

    The rank is :func:`effective_rank` of the filters scaled to unit length, one a row. A
    convolution counts if the next module that its parent registers is a batch norm of as many
    channels, or if its parent has such a norm under its own name with ``bn`` or ``norm`` for
    ``conv``; so does the last one of an ``nn.Sequential`` in its place.

    Args:
        module: A network, or anything that holds one.

    Returns:
        One result by the layer's dotted name, in order of registration.

    References:
        van Laarhoven, *L2 Regularization versus Batch and Weight Normalization*, 2017; Brock et
        al., *High-Performance Large-Scale Image Recognition Without Normalization*, 2021, Eq. 3.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3))
        >>> nn.init.ones_(net[0].weight).shape
        torch.Size([4, 3, 3, 3])
        >>> {name: round(found.rank, 3) for name, found in filter_collapse(net).items()}
        {'0': 1.0}
    """
    found = {}
    for name, weight in _normalised_filters(module):
        filters = rows_of(weight.flatten(1), "weight")
        norm = float(filters.norm(dim=1).mean())
        rank = float(effective_rank(F.normalize(filters, dim=1)))
        found[name] = FilterDirections(norm, rank, min(filters.shape))
    return found


def _normalised_filters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, parent in module.named_modules():
        children = list(parent.named_children())
        for position, (name, child) in enumerate(children):
            norms = [getattr(parent, name.replace("conv", norm), None) for norm in ("bn", "norm")]
            norms += [after for _, after in children[position + 1 : position + 2]]
            while isinstance(child, nn.Sequential) and len(child):  # a deep stem
                last, child = list(child.named_children())[-1]
                name = f"{name}.{last}"
            if not isinstance(child, nn.Conv1d | nn.Conv2d | nn.Conv3d) or is_lazy(child.weight):
                continue
            if any(
                isinstance(norm, _BatchNorm) and norm.num_features == child.out_channels
                for norm in norms
            ):
                yield (f"{path}.{name}" if path else name), child.weight
