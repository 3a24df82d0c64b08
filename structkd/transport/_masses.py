"""Masses, limits and masks of transport problems: their defaults and their checks."""

from __future__ import annotations

import torch
from torch import Tensor

from structkd._checks import describe

# Two totals of mass count as equal up to the rounding of a long float32 sum.
MASS_RTOL = 1e-5


def _even(open_places: Tensor, cost: Tensor) -> Tensor:
    """Spreads a mass of 1 evenly over the open places, of which there may be none."""
    places = open_places.to(cost.dtype)
    return places / places.sum(dim=-1, keepdim=True).clamp_min(1)


def check_cost(cost: Tensor) -> None:
    if not isinstance(cost, Tensor) or not cost.is_floating_point():
        raise TypeError(f"cost must be a floating-point tensor, got {describe(cost)}")
    if cost.dim() < 2 or 0 in cost.shape[-2:]:
        raise ValueError(f"cost must be (..., N, M) with N, M >= 1, got {describe(cost)}")


def open_pairs(mask: Tensor | None, cost: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, True where open, got {describe(mask)}")
    return _expanded("mask", mask, cost.shape, cost)


def _expanded(name: str, value: Tensor, shape: torch.Size, cost: Tensor) -> Tensor:
    if value.device != cost.device:
        raise ValueError(f"{name} is on {value.device}, the cost on {cost.device}")
    try:
        return value.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name} must fit {tuple(shape)} for a cost of {tuple(cost.shape)}, "
            f"got {describe(value)}"
        ) from None


def _checked(name: str, value: Tensor, shape: torch.Size, cost: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name} must be a tensor of numbers, got {describe(value)}")
    mass = _expanded(name, value.detach().to(cost.dtype), shape, cost)
    finite = name != "capacity"
    if not torch.compiler.is_compiling():
        allowed = (mass >= 0) & ~(mass.isinf() & finite)
        if not bool(allowed.all()):
            wrong = float(mass[~allowed][0])
            raise ValueError(f"{name} must be {'finite ' if finite else ''}>= 0, got {wrong:g}")
    return mass


def _balanced(column_mass: Tensor, total: Tensor) -> Tensor:
    """Checks that both sides hold the same total; takes the rounding between them away."""
    given = column_mass.sum(dim=-1, keepdim=True)
    if not torch.compiler.is_compiling():
        apart = (given - total).abs() > MASS_RTOL * total
        if bool(apart.any()):
            raise ValueError(
                "row_mass and column_mass must hold the same total, got "
                f"{float(total[apart][0]):g} and {float(given[apart][0]):g}; "
                "scale one, or use constraint='capacity'"
            )
    return column_mass * (total / given.where(given > 0, 1))


def _enough(
    capacity: Tensor | float,
    columns: torch.Size,
    total: Tensor,
    reach: Tensor | None,
    cost: Tensor,
) -> Tensor:
    """Checks that the open columns can take the rows' mass."""
    if not isinstance(capacity, Tensor):
        if isinstance(capacity, bool) or not isinstance(capacity, int | float):
            raise TypeError(f"capacity must be a number or a tensor, got {describe(capacity)}")
        capacity = cost.new_tensor(capacity)
    limit = _checked("capacity", capacity, columns, cost)
    room = (limit if reach is None else limit.where(reach, 0)).sum(dim=-1, keepdim=True)
    if not torch.compiler.is_compiling():
        short = room < total * (1 - MASS_RTOL)
        if bool(short.any()):
            raise ValueError(
                f"capacity is short: the open columns take {float(room[short][0]):g} in all, "
                f"row_mass holds {float(total[short][0]):g}; raise capacity or lower row_mass"
            )
    # Room that equals the mass but for rounding is made equal.
    full = (room <= total * (1 + MASS_RTOL)) & (room > 0)
    return limit * torch.where(full, total / room, 1)


def masses_of_rows(row_mass: Tensor | None, mask: Tensor | None, cost: Tensor) -> Tensor:
    """Returns what every row gives, ``(..., N)``: by default the open rows share 1 evenly."""
    rows = cost.shape[:-1]
    if row_mass is None:
        return _even(cost.new_ones(rows) if mask is None else mask.any(dim=-1), cost)
    return _checked("row_mass", row_mass, rows, cost)


def column_limit(
    constraint: str,
    column_mass: Tensor | None,
    capacity: Tensor | float | None,
    row_mass: Tensor,
    reach: Tensor | None,
    cost: Tensor,
) -> Tensor | None:
    """Returns what the columns must (``both``) or may (``capacity``) receive, ``(..., M)``."""
    for name, value, reader in (
        ("column_mass", column_mass, "both"),
        ("capacity", capacity, "capacity"),
    ):
        if value is not None and constraint != reader:
            raise ValueError(f"{name} is read under constraint={reader!r}, not {constraint!r}")
    columns = cost.shape[:-2] + cost.shape[-1:]
    total = row_mass.sum(dim=-1, keepdim=True)
    if constraint == "both":
        if column_mass is None:
            return total * _even(cost.new_ones(columns) if reach is None else reach, cost)
        return _balanced(_checked("column_mass", column_mass, columns, cost), total)
    if constraint == "capacity":
        if capacity is None:
            raise ValueError(
                "constraint='capacity' needs capacity, the most that a column may receive: "
                "a number or a tensor (..., M)"
            )
        return _enough(capacity, columns, total, reach, cost)
    return None


def check_ways(
    constraint: str, mask: Tensor, row_mass: Tensor, limit: Tensor | None, reach: Tensor
) -> Tensor | None:
    """Raises where the mask leaves mass nowhere to go; returns the limit of columns in reach."""
    ways, stuck = mask, torch.zeros_like(reach)
    if limit is not None:
        stuck = (limit > 0) & ~reach & (constraint == "both")
        limit = limit.where(reach, 0)
        ways = mask & (limit > 0)[..., None, :]
    if not torch.compiler.is_compiling():
        if bool(((row_mass > 0) & ~ways.any(dim=-1)).any()):
            raise ValueError("row_mass is positive in a row whose columns the mask or limit closes")
        if bool(stuck.any()):
            raise ValueError("column_mass is positive in a column whose rows the mask closes")
    return limit
