"""Which terms of a criterion are switched on."""

from __future__ import annotations

from collections.abc import Sequence


def checked_terms(terms: Sequence[str], known: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the terms to take in the order of ``known``, after checking their names."""
    chosen = (terms,) if isinstance(terms, str) else tuple(terms)
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        got = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"terms must name one or more of {', '.join(known)}, got {got}")
    return tuple(name for name in known if name in chosen)
