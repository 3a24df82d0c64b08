"""Near names, for errors about a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint; empty where no name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def looked_up(what: str, name: str, known: Mapping[str, Any], more: str = "") -> Any:
    """The entry of that name; ValueError with the near name and all known ones."""
    if name not in known:
        raise ValueError(
            f"unknown {what} {name!r}; {did_you_mean(name, known)}known: {', '.join(known)}{more}"
        )
    return known[name]
