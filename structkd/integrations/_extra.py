"""What to say where an optional package is missing."""

from __future__ import annotations


def missing_extra(extra: str, error: ImportError) -> ImportError:
    """Returns an error that names the extra to install."""
    return ImportError(
        f"structkd.integrations.{extra} needs a package that is missing or too old ({error}): "
        f"pip install 'structkd[{extra}]'"
    )
