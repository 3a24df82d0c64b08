"""What an error says, in one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of its message, or its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
