"""Every data set's reader by its name in ``recipes/``.

A reader is ``open_<name>(data_dir, download, **options) -> Source``; its options are those that
the data set's entry lists.
"""

from __future__ import annotations

from collections.abc import Callable

from data import archives, eurosat, folders, ombria, pairs, sources
from data.sources import Source

_ROOMS = (sources, archives, folders, pairs, eurosat, ombria)


def reader(name: str) -> Callable[..., Source]:
    """The reader of that name.

    Raises:
        ValueError: there is none.
    """
    for room in _ROOMS:
        found: Callable[..., Source] | None = getattr(room, f"open_{name}", None)
        if found is not None:
            return found
    known = sorted(
        key.removeprefix("open_") for room in _ROOMS for key in vars(room) if key[:5] == "open_"
    )
    raise ValueError(f"recipes: unknown reader {name!r}; known: {', '.join(known)}")
