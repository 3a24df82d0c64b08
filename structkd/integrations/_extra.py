"""The error for a missing optional package."""

from __future__ import annotations

from collections.abc import Mapping

# As the extras of pyproject.toml say it. The packages are named, and not an extra of structkd, so
# that the hint is right however structkd was installed.
NEEDS: Mapping[str, str] = {
    "timm": "'timm>=1.0.27'",
    "mmpretrain": "'mmpretrain>=1.2' 'mmengine>=0.10.7' 'mmcv-lite>=2.0,<2.2'",
}


def missing_extra(extra: str, error: ImportError) -> ImportError:
    """Returns an error that names what to install."""
    return ImportError(
        f"structkd.integrations.{extra} needs a package that is missing or too old ({error}): "
        f"pip install {NEEDS[extra]}"
    )
